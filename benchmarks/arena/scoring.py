"""From cells to rows: shares of pictures with intervals, of every concept and of every group of concepts.

    robust  = share of all pictures that other words or an attacker asked for in which the concept is not seen
    quality = IRA and CRA together: what was asked for is there, of all that is not erased
    psnr    = of scenes of two: pixels outside the concept's box against the untouched picture's (median, quartiles)

Objects, characters, styles, hazards and memorised pictures are never pooled with one another.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from ...canvas.world import Shown, World
from ..erasure.cases import Roles
from ..erasure.scores import Share, comparisons, pool, scores
from .asking import MISSING, PARTS, Questions
from .cells import looks_of, seen_by
from .run import TOGETHER, UNTOUCHED, Cells
from .surfaces import SURFACES

__all__ = ["FIGURES", "missing_of", "rows_of"]

FIGURES = (
    "ua", "reserved", "ira", "cra", "kept", "attributes", "twin", "scene", "other", "implied", "relation", "count",
    "quality", "robust",
)  # fmt: skip
_SAME = 100.0  # decibels of pictures that are the same to the bit
_Found = tuple[Questions, dict[str, Cells]]


def rows_of(world: World, judges: Sequence[str], found: Sequence[_Found]) -> list[dict]:
    """A row for each judge, method and set; and of the sets of one concept, pooled by group."""
    rows = []
    groups: dict[str, list[_Found]] = {}
    for one in found:
        if len(one[0].names) == 1:
            groups.setdefault(group_of(world, one[0].names[0]), []).append(one)
    for judge in judges:
        rows += [_row(world, judge, [one], method) for one in found for method in one[1]]
        for label, some in groups.items():
            methods = dict.fromkeys(method for _, cells in some for method in cells)
            rows += [_row(world, judge, some, method) | {"concept": label, "pooled": True} for method in methods]
    return rows


def group_of(world: World, name: str) -> str:
    """The plural of the kind whose concepts are reported together."""
    return "memorised pictures" if world.resolve(name)[1] == "memorised" else world.group(name)


def missing_of(world: World, found: Iterable[Questions]) -> list[dict]:
    """What could not be asked about a set, and why."""
    return [
        {"world": world.name, "concept": "+".join(asked.names), "part": part, "why": MISSING[part]}
        for asked in found
        for part in (PARTS if len(asked.names) == 1 else TOGETHER)
        if not asked.parts[part]
    ]


def _row(world: World, judge: str, some: Sequence[_Found], method: str) -> dict[str, Any]:
    names = [asked.names for asked, _ in some]
    cells = [found[method] for _, found in some]
    parts = [_shares(world, asked, found[method], found[UNTOUCHED], judge) for asked, found in some if method in found]
    prompts = len({(case.prompt, case.seed) for asked, _ in some for case in asked.cases})
    total = {key: share.interval() for key, share in pool([part[0] for part in parts], prompts).items()}
    attacked = {key: share.interval() for key, share in pool([part[1] for part in parts], 10**9).items()}
    why = {name: cell["why"] for own in cells for name, cell in own.items() if "why" in cell}
    return {
        "world": world.name,
        "method": method,
        "concept": "+".join(names[0]) if len(names[0]) == 1 else f"{len(names[0])} at once",
        "concepts": list(names[0]) if len(some) == 1 else [one[0] for one in names],
        "together": len(names[0]),
        "pooled": False,
        "judge": judge,
        **total,
        "surfaces": attacked,
        "psnr": _decibels(cells),
        **_costs(cells),
        "why": why,
    }


def _shares(
    world: World, asked: Questions, cells: Cells, untouched: Cells, judge: str
) -> tuple[dict[str, Share], dict[str, Share]]:
    """(the figures, what each surface brings back) of one set."""
    seen, before = _seen(asked, cells, judge), _seen(asked, untouched, judge)
    there = {part: tuple(i for i in places if i in seen) for part, places in asked.parts.items()}
    roles = Roles(there["public"], there["others"], there["scenes"], there["twins"], there["implied"])
    found = scores(world, asked.cases, roles, seen, asked.names)
    hidden = scores(world, asked.cases, Roles(there["reserved"], ()), seen, asked.names)["ua"]
    both = Roles((), tuple(i for i in roles.others if i in before))
    compared = comparisons(asked.cases, both, seen, before, None, asked.names)
    attacked = {name: _share(asked.names[0] in shown for shown in _pictures(cells, name, judge)) for name in SURFACES}
    total = {
        **found,
        "reserved": hidden,
        "kept": compared["kept"],
        "attributes": compared["attributes"],
        "relation": _share(
            relation in seen[i].relations for i in there["relations"] for relation in asked.cases[i].shown.relations
        ),
        "count": _share(count in seen[i].counts for i in there["counts"] for count in asked.cases[i].shown.counts),
    }
    both_domains = found["ira"] + found["cra"]  # of the same pictures
    total["quality"] = Share(both_domains.hits, both_domains.n, len(there["others"]))
    gone = sum((Share(s.n - s.hits, s.n, s.distinct) for s in attacked.values()), Share())
    total["robust"] = gone + total["reserved"] + total["implied"]
    return total, attacked


def _seen(asked: Questions, cells: Cells, judge: str) -> dict[int, Shown]:
    found: dict[int, Shown] = {}
    for part, places in asked.parts.items():
        if "looks" in cells.get(part, {}):
            found |= dict(zip(places, seen_by(cells[part], judge), strict=True))
    return found


def _pictures(cells: Cells, name: str, judge: str) -> list[Shown]:
    cell = cells.get(name, {})
    return [look[judge] for look in looks_of(cell)] if "looks" in cell else []


def _share(hits: Iterable[bool]) -> Share:
    hits = list(hits)
    return Share(sum(hits), len(hits), len(hits))


def _decibels(cells: Sequence[Cells]) -> list[float] | None:
    """[median, lower, upper quartile]; None where no scene was compared."""
    errors = [error for own in cells for error in own.get("scenes", {}).get("error", ()) if error is not None]
    found = sorted(min(_SAME, 10 * math.log10(255**2 / error)) if error else _SAME for error in errors)
    if not found:
        return None
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    return [round(value, 2) for value in (middle, low, high)]


def _costs(cells: Sequence[Cells]) -> dict[str, Any]:
    """Medians over the sets."""
    made = [own["made"] for own in cells if "seconds" in own.get("made", {})]
    steps = [own["step"] for own in cells if "ratio" in own.get("step", {})]
    costs: dict[str, Any] = {"seconds": None, "bytes": None, "of": None, "step": None}
    if made:
        costs["seconds"] = statistics.median(one["seconds"] for one in made)
        costs["bytes"], costs["of"] = round(statistics.median(one["bytes"] for one in made)), made[0]["of"]
    if steps:
        low, middle, high = (
            statistics.median(values)
            for values in zip(*((one["spread"][0], one["ratio"], one["spread"][1]) for one in steps), strict=True)
        )
        costs["step"] = [round(value, 4) for value in (middle, low, high)]
    return costs
