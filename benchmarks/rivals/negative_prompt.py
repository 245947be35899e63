"""The negative prompt: all phrasings of the concepts, after commas. It needs guidance, and a pipeline that takes one.

    e = e(x, negative) + w (e(x, prompt) - e(x, negative))

Source: what pipelines and users do; the same as in benchmarks/erasure/methods.py.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from ..erasure.methods import METHODS, Told


def erase(pipe, told: Told) -> AbstractContextManager[dict]:
    return METHODS["negative_prompt"](pipe, told)
