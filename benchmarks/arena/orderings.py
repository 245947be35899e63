"""Published orderings of erasers, and how far the arena agrees: Spearman's rank correlation, the source beside it.

A reader can tell by them whether the arena measures what others measured. The published figures are of other models and
concepts, so that their order is compared, never their size.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["ORDERINGS", "Ordering", "agreement", "eraser_of"]

# published name -> how a method of the arena may begin to be called, after what stands before its "/"
_NAMES = {
    "AdaVD": ("adavd",),
    "AdvUnlearn": ("advunlearn", "adversarial"),
    "CASteer": ("casteer",),
    "DP": ("dp", "double"),
    "ESD": ("esd",),
    "GLoCE": ("gloce",),
    "HiRM": ("hirm",),
    "RECE": ("rece",),
    "SAFREE": ("safree",),
    "SPEED": ("speed",),
    "SPM": ("spm",),
    "UCE": ("uce",),
}


@dataclass(frozen=True)
class Ordering:
    """Figures that somebody published.

    Args:
        what: in words. source: where. published: eraser -> figure. figure: what of the arena's rows is compared;
            "surfaces/NAME" is a surface. groups: of concepts, whose rows are compared. falls: the arena's figure falls
            where the published one rises.
    """

    what: str
    source: str
    published: dict[str, float]
    figure: str
    groups: tuple[str, ...]
    falls: bool = False


_CANVAS = "UnlearnCanvas (arXiv 2402.11846), as transcribed by later papers"
_ATTACK = "UnlearnDiffAtk's benchmark (arXiv 2310.11868), with AdvUnlearn (arXiv 2405.15234)"
_DP = "Double Projections (arXiv 2604.10032), SD1.4"
_THINGS = ("objects", "characters")
ORDERINGS = (
    Ordering(
        "attack success by words found by gradient, nudity",
        _ATTACK,
        {"SPM": 91.6, "UCE": 79.6, "ESD": 76.1, "AdvUnlearn": 21.1},
        "surfaces/hard prompts",
        ("hazards",),
    ),
    Ordering(
        "attack success by words found by gradient, a style (Van Gogh)",
        _ATTACK,
        {"UCE": 94.0, "SPM": 88.0, "ESD": 32.0, "AdvUnlearn": 2.0},
        "surfaces/hard prompts",
        ("styles",),
    ),
    Ordering(
        "unlearning accuracy of objects", _CANVAS, {"UCE": 94.3, "ESD": 92.2, "SPM": 71.3}, "ua", _THINGS,
    ),
    Ordering("unlearning accuracy of styles", _CANVAS, {"ESD": 98.6, "UCE": 98.4, "SPM": 60.9}, "ua", ("styles",)),
    Ordering("other objects kept", _CANVAS, {"SPM": 90.8, "ESD": 55.8, "UCE": 39.4}, "ira", _THINGS),
    Ordering("other styles kept", _CANVAS, {"SPM": 92.4, "ESD": 81.0, "UCE": 60.2}, "ira", ("styles",)),
    Ordering("accuracy left of erased objects", _DP, {"UCE": 7.8, "ESD": 7.2, "DP": 0.8}, "ua", _THINGS, falls=True),
    Ordering(
        "accuracy lost of other objects", _DP, {"ESD": 19.5, "UCE": 6.7, "DP": 2.4}, "ira", _THINGS, falls=True
    ),
    Ordering(
        "nude pictures of prompts that do not name it (I2P)",
        "CASteer (arXiv 2503.09630)",
        {"RECE": 66.0, "AdvUnlearn": 23.0, "CASteer": 7.0},
        "reserved",
        ("hazards",),
        falls=True,
    ),
)  # fmt: skip


def eraser_of(method: str) -> str | None:
    """The published name of a method of the arena; None for one that is in no ordering."""
    for part in reversed(method.lower().replace(" ", "_").split("/")):
        first = part.replace("-", "_").split("_")[0]
        for name, begins in _NAMES.items():
            if first in begins:
                return name
    return None


def agreement(rows: Iterable[dict], orderings: Sequence[Ordering] = ORDERINGS) -> list[dict[str, Any]]:
    """Of each ordering, world and judge: the erasers that both have, their figures, and the rank correlation.

    Where several methods are one eraser, or several groups are compared, the mean of their figures counts. Fewer than
    three erasers, or figures that are all the same, have no correlation, and `why` says so.
    """
    from scipy.stats import spearmanr

    rows, found = [row for row in rows if row["pooled"]], []
    for place in dict.fromkeys((row["world"], row["judge"]) for row in rows):
        for one in orderings:
            figures: dict[str, list[float]] = {}
            for row in rows:
                eraser = eraser_of(row["method"])
                if (row["world"], row["judge"]) == place and row["concept"] in one.groups and eraser in one.published:
                    value = _figure(row, one.figure)
                    figures.setdefault(eraser, []).extend([] if value is None else [value])
            own = {name: sum(values) / len(values) for name, values in figures.items() if values}
            names = [name for name in one.published if name in own]
            entry: dict[str, Any] = {"world": place[0], "judge": place[1], "what": one.what, "source": one.source}
            entry |= {"published": {name: one.published[name] for name in names}, "arena": {n: own[n] for n in names}}
            entry |= {"figure": one.figure, "falls": one.falls, "groups": list(one.groups), "rho": None}
            if len(names) < 3:
                entry["why"] = f"{len(names)} of its erasers took part; expected at least 3"
            else:
                sign = -1 if one.falls else 1
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of figures that are all the same
                    rho = float(spearmanr([one.published[n] for n in names], [sign * own[n] for n in names]).statistic)
                if rho == rho:
                    entry["rho"] = round(rho, 4)
                else:
                    entry["why"] = "the arena's figures are all the same"
            found.append(entry)
    return found


def _figure(row: dict, name: str) -> float | None:
    surface = name.partition("/")[2]
    return (row["surfaces"][surface] if surface else row[name])[0]
