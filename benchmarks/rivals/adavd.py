"""AdaVD: values that text gives to attention lose their part along the concepts' (methods/guidance/adavd.py).

Source: arXiv 2412.06143. We differ from the released code as that file says; it acts in the rows of prompts.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from ...methods.guidance.adavd import AdaVD
from ..erasure.methods import Told
from .guided import guided


def erase(pipe, told: Told, strength: float = 1.0) -> AbstractContextManager[dict]:
    return guided(pipe, told, AdaVD(), strength)
