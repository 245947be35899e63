"""Algorithms of safe guidance as erasers: each concept is a category, its phrasings the category's phrases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...methods.errors import GuidanceError
from ...methods.guidance.algorithm import Algorithm
from ...methods.guidance.category import Category
from ...methods.guidance.config import SafeGuidanceConfig
from ...pipelines.guidance.apply import apply_safe_guidance
from ..erasure.methods import Told


@contextmanager
def guided(pipe, told: Told, algorithm: Algorithm, strength: float) -> Iterator[dict]:
    """Safe guidance away from the concepts while the block runs."""
    if not told.phrases:
        raise GuidanceError(f"{algorithm.NAME} was told of no concept; expected Told({{name: (name, synonym, ...)}})")
    categories = [Category(name, tuple(phrases)) for name, phrases in told.words.items()]
    with apply_safe_guidance(pipe, SafeGuidanceConfig(categories, algorithm, strength)):
        yield {}
