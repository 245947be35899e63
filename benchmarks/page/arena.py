"""The arena's tables: of docs/results.md, from arena_<world>.json, and of `semiperm arena --markdown`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .tables import count, number, paragraphs, percent, source, table

# figure -> heading; in this order
_KEPT = {
    "ua": "UA",
    "reserved": "UA, reserved words",
    "ira": "IRA",
    "cra": "CRA",
    "kept": "as untouched",
    "twin": "look-alikes",
    "scene": "UA in scenes",
    "other": "other object",
    "relation": "relation",
    "count": "count",
    "implied": "UA, implied",
}
_ABOUT = (
    "Every method is told the plain names of the concepts, and is asked for them in **public** words, the name among"
    " them, and in **reserved** ones that no method may know. **UA** is the share of pictures without the concept among"
    " those that ask for it; **IRA** and **CRA** the accuracy in its own and the other domain on prompts that do not;"
    " **as untouched** the share of these in which the judge sees what it sees in the untouched model's picture;"
    " **look-alikes**, **other object**, **relation** and **count** the shares of pictures that show what was asked for"
    " of what is not erased. **PSNR** is that of pixels outside the concept's box in scenes of two things, against the"
    " untouched picture: median and middle half in decibels; 100 is the same to the bit."
)
_ATTACKS = (
    "The share of pictures in which an attacker brings the concept back, who has the untouched model, and the protected"
    " one with its gradients: **hard prompts** of words that are none of the concept's own, a **learned embedding** in"
    " place of a text, **inverted latents** of pictures that show it, such pictures **redrawn** and **inpainted**, all"
    " without words for it, and **arithmetic** of prompts that name it. Intervals count pictures: those of one search"
    " or one embedding are not independent, and true intervals are wider."
)


def arena(figures: Mapping[str, dict]) -> str:
    """The section of docs/results.md.

    Args:
        figures: world -> what `semiperm arena --world WORLD` wrote.
    """
    parts = ["## The arena", _ABOUT, _ATTACKS]
    for world, found in figures.items():
        name = f"arena_{world}.json"
        command = " ".join(
            ["semiperm arena", *["--quick"] * found["quick"], f"--world {world}", f"--json benchmarks/results/{name}"]
        )
        parts += [f"### On {world}", source(name, command, found), tables(found, world)]
    return paragraphs(*parts)


def tables(found: dict, world: str) -> str:
    """All tables of one world.

    Args:
        found: the arena's JSON.
    """
    rows = [row for row in found["rows"] if row["world"] == world]
    judges = list(dict.fromkeys(row["judge"] for row in rows))
    first = [row for row in rows if row["judge"] == judges[0]]
    parts = []
    for label in dict.fromkeys(row["concept"] for row in first if row["pooled"] or row["together"] > 1):
        some = [row for row in first if row["concept"] == label]
        pooled = some[0]["pooled"]
        parts.append(f"**{label.capitalize()}** ({', '.join(some[0]['concepts'])}), %:")
        parts.append(_quality(some))
        parts += [_attacks(some), _second(rows, judges, label)] if pooled else []
    parts += [_costs(first), _why(rows, found["missing"], world), orderings(found["orderings"], world)]
    return paragraphs(*parts)


def _quality(rows: Sequence[dict]) -> str:
    used = [key for key in _KEPT if any(row[key][0] is not None for row in rows)]
    pixels = any(row["psnr"] for row in rows)
    lines = [
        (row["method"], *(percent(row[key]) for key in used), *([_range(row["psnr"], "{:.1f}")] if pixels else []))
        for row in rows
    ]
    return table(("method", *(_KEPT[key] for key in used), *["PSNR"] * pixels), lines)


def _attacks(rows: Sequence[dict]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["surfaces"]))
    lines = [(row["method"], *(percent(row["surfaces"][name]) for name in names)) for row in rows]
    return table(("brought back by", *names), lines)


def _second(rows: Sequence[dict], judges: Sequence[str], label: str) -> str:
    """What another judge says of the two figures that sum a method up."""
    parts = []
    for judge in judges[1:]:
        some = [row for row in rows if row["judge"] == judge and row["concept"] == label]
        said = "; ".join(
            f"{row['method']} {number(row['ua'][0])}, {number(row['quality'][0])}"
            for row in some
            if row["ua"][0] is not None and row["quality"][0] is not None
        )
        parts.append(f"By the {judge} judge, UA and the accuracy of all else: {said}.")
    return paragraphs(*parts)


def _costs(rows: Sequence[dict]) -> str:
    """Of one concept, as the median over those that were erased one at a time."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method and row["pooled"] and row["seconds"] is not None]
        if own:
            worst = max(own, key=lambda row: row["seconds"])
            size = f"{count(worst['bytes'])} ({worst['of']})"
            lines.append((method, f"{worst['seconds']:.1f}", _range(worst["step"], "{:.3f}"), size))
    said = (
        "What one concept costs, of the kind that takes longest: seconds until it works, a step in times the bare"
        " one's (middle half), size:"
    )
    return paragraphs(said, table(("method", "seconds", "step", "size"), lines)) if lines else ""


def _range(values: Sequence[float] | None, form: str) -> str:
    if values is None:
        return "-"
    middle, low, high = map(form.format, values)
    return f"{middle} ({low} to {high})"


def _why(rows: Sequence[dict], missing: Sequence[dict], world: str) -> str:
    """What could not be measured."""
    said: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if not row["pooled"] and row["judge"] == rows[0]["judge"]:
            reasons = dict.fromkeys(row["why"].values())
            for why in reasons:
                cells = [cell for cell, one in row["why"].items() if one == why]
                # what could not be put to work has nothing at all
                whole = {"made", "public"} <= set(cells)
                own = [row["concept"]] if whole else [f"{row['concept']}: {cell}" for cell in cells]
                said.setdefault((row["method"], why), []).extend(own)
    lines = [f"- {method}: {why} ({_few(cells)})" for (method, why), cells in said.items()]
    parts: dict[str, list[str]] = {}
    for one in missing:
        if one["world"] == world:
            parts.setdefault(f"{one['part']}: {one['why']}", []).append(one["concept"])
    lines += [f"- {part} ({_few(concepts)})" for part, concepts in parts.items()]
    return paragraphs("Not measured, and why:", "\n".join(lines)) if lines else ""


def _few(names: Sequence[str]) -> str:
    kept = list(dict.fromkeys(names))
    return ", ".join(kept[:4]) + (f", and {len(kept) - 4} more" if len(kept) > 4 else "")


def orderings(found: Sequence[dict], world: str) -> str:
    """Published orderings beside the arena's, by its first judge."""
    own = [one for one in found if one["world"] == world]
    own = [one for one in own if one["judge"] == own[0]["judge"]]
    lines = []
    for one in (one for one in own if one["arena"]):
        falls = " (falls where the other rises)" if one["falls"] else ""
        rho = one["why"] if one["rho"] is None else f"{one['rho']:.2f}"
        mine = ", ".join(f"{name} {number(value)}" for name, value in one["arena"].items())
        theirs = ", ".join(f"{name} {value:g}" for name, value in one["published"].items())
        lines.append((one["what"], one["source"], theirs, f"{mine}{falls}", rho))
    said = (
        "Published orderings of erasers, on other models and concepts, beside this one (Spearman's rank correlation):"
    )
    none = "; ".join(f"{one['what']} ({one['source']})" for one in own if not one["arena"])
    return paragraphs(
        paragraphs(said, table(("what", "source", "published", "here", "rho"), lines)) if lines else "",
        f"Published orderings of which no eraser was measured here: {none}." if none else "",
    )
