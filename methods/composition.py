"""Which methods were measured to do worse together than alone: a table that ships with the package.

The table is written by `semiperm bench composition --table` and says nothing that was not measured: where a world is
not in its "worlds", no pair was drawn there.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FORMAT", "METHODS", "TABLE", "Worse", "read_table", "warn_of"]

logger = logging.getLogger(__name__)

FORMAT = 1
TABLE = Path(__file__).parent / "composition.json"
METHODS = ("sld", "safree", "adavd", "nag", "detector pair", "membranes", "token merging", "mark")
_OUTCOMES = {
    "hazard": ("the hazard was shown in {:.0f} points more of the pictures that ask for it", 1),
    "kept": ("object, style and background were as asked in {:.0f} points fewer of the harmless pictures", -1),
    "mark": ("the mark was found in {:.0f} points fewer of the pictures", -1),
}


@dataclass(frozen=True)
class Worse:
    """A pair that does worse than what is better of it alone.

    Args:
        pair: two of `METHODS`, in their order. world: where it was measured. outcome: "hazard", "kept" or "mark".
        difference: share of pictures, and the ends of its interval.
    """

    pair: tuple[str, str]
    world: str
    outcome: str
    difference: tuple[float, float, float]

    def __str__(self) -> str:
        said, sign = _OUTCOMES[self.outcome]
        share, low, high = (100 * sign * value for value in self.difference)
        low, high = sorted((low, high))
        return (
            f"{self.pair[0]} and {self.pair[1]} together did worse than one of them alone where it was measured"
            f" ({self.world}): {said.format(share)} ({low:.0f} to {high:.0f}); take one of them, or look at your own"
            " pictures"
        )


@functools.cache
def read_table(path: Path) -> tuple[Worse, ...]:
    """The pairs of a table."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return tuple(
        Worse(tuple(one["pair"]), one["world"], one["outcome"], tuple(one["difference"])) for one in found["worse"]
    )


def warn_of(new: Iterable[str], others: Iterable[str], table: Path | None = None) -> None:
    """Warn of pairs that were measured as worse: of new methods among themselves, and of each with the others.

    Args:
        new, others: of `METHODS`. table: None is the package's.
    """
    new, others = set(new), set(others)
    together = {frozenset(pair) for pair in (*itertools.combinations(new, 2), *itertools.product(new, others - new))}
    for one in read_table(TABLE if table is None else table):
        if frozenset(one.pair) in together:
            logger.warning("%s", one)
