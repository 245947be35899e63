"""SAFREE: words that point at the concepts are projected away from them (methods/guidance/safree.py).

Source: arXiv 2410.12761. We differ from the paper and its code as that file says.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from ...methods.guidance.safree import SAFREE
from ..erasure.methods import Told
from .guided import guided


def erase(pipe, told: Told, strength: float = 1.0, alpha: float = 0.01) -> AbstractContextManager[dict]:
    """Erase by SAFREE; `alpha` is how far above the others' mean a word must lie to be projected."""
    return guided(pipe, told, SAFREE(alpha=alpha), strength)
