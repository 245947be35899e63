"""The section of docs/results.md on the second edition's worlds: what `canvas check` wrote to canvas_<model>.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ...canvas.language import HAZARDS, IMPLIED
from .tables import number, paragraphs, source, table

JUDGES = ("first", "second")
_WORDINGS = ("public", "reserved")
# what a row says, its group of `canvas check` and the figure of it
_ROWS = (
    ("one thing: it and no other, asked in {} words", "{} pairs", "objects"),
    ("one thing: its style, asked in {} words", "{} pairs", "style"),
    ("one thing: its colour, {}", "{} pairs", "colors"),
    ("one thing: look-alikes not mixed up, {}", "{} pairs", "look-alikes kept"),
    ("two things: both, {}", "{} two", "objects"),
    ("two things: their relation, {}", "{} two", "relation"),
    ("two or three of a kind, {}", "{} counted", "objects"),
    ("no hazard asked for: one drawn, {}", "{} pairs", "any hazard drawn"),
)


def checks(figures: Mapping[str, dict]) -> str:
    """A table of samples, one of the noise, one of the judges.

    Args:
        figures: model -> what `semiperm canvas check MODEL` wrote.
    """
    models = list(figures)
    lines = [
        ("one thing among ordinary words", "public pairs among ordinary words", "objects"),
        *((label.format(w), group.format(w), key) for label, group, key in _ROWS for w in _WORDINGS),
        *((f"{name} when asked, {w}", f"{w} hazard {name}", "hazard drawn") for name in HAZARDS for w in _WORDINGS),
        *((f"{name} when implied", f"implied {name}", "hazard drawn") for name in IMPLIED),
        ("memorised picture from its caption", "memorised", "found"),
    ]
    counts = {group: part["n"] for figure in figures.values() for group, part in _first(figure).items()}
    rows = [
        (label, counts.get(group, "-"), *(_by_judges(figures[model]["samples"], group, key) for model in models))
        for label, group, key in lines
    ]
    noise: list[tuple[str, Callable[[dict], str]]] = [
        ("pictures", lambda n: str(n["n"])),
        ("signs of the initial noise found again, mean", lambda n: number(n["mean_sign_agreement"])),
        ("of these pictures, p < 1e-6", lambda n: number(n["share_p_below_1e-6"])),
        ("round trip through the autoencoder, relative error", lambda n: number(n["autoencoder_roundtrip"])),
    ]
    commands = " ".join(source(f"canvas_{m}.json", _command(m, figures[m]), figures[m]) for m in models)
    return paragraphs(
        "## The second edition's worlds",
        commands,
        "Scenes of one to three things with relations, four hazards, five memorised pictures; what is asked in"
        " **reserved** words is asked in phrasings that no eraser, guide or gate may see. Each cell: what the first"
        " judge says, and what the second one says, where it was asked. A judge that counts wrongly counts against the"
        " model: see below how often it is right.",
        table(("%", "n", *models), [row for row in rows if any(cell != "-" for cell in row[2:])]),
        "### Does the noise survive",
        table(("%", *models), [(label, *(say(figures[m]["noise"]) for m in models)) for label, say in noise]),
        _judges(figures[models[-1]].get("judges", {})),
    )


def _command(model: str, figures: dict) -> str:
    """What made the file, with its numbers of pictures."""
    pictures = _first(figures)["public two"]["n"]
    return (
        f"semiperm canvas check {model} --pictures {pictures} --marks {figures['noise']['n']} --json"
        f" benchmarks/results/canvas_{model}.json"
    )


def _first(figures: dict) -> dict:
    """What the first of the judges said, by group."""
    return next(iter(figures["samples"].values()))


def _by_judges(samples: dict, group: str, key: str) -> str:
    said = [samples[judge][group].get(key) for judge in JUDGES if group in samples.get(judge, {})]
    return " / ".join(number(value) for value in said if value is not None) or "-"


def _judges(trust: dict) -> str:
    judges = [judge for judge in JUDGES if judge in trust]
    if not judges:
        return ""
    names = ("objects", "color", "style", "background", "hazards", "memorised", "front")
    rows = [(name, *(number(trust[judge][name]) for judge in judges)) for name in names]
    rows.append(("place, mean distance in pixels", *(f"{trust[judge]['place']:.1f}" for judge in judges)))
    for kind in ("removed", "smudge", "blurred", "smeared"):
        label = f"still found where it was painted out: {kind}"
        rows.append((label, *(number(trust[judge]["painted_out"][kind]) for judge in judges)))
    said = ", ".join(f"{name} {number(value)}" for name, value in trust.get("agreement", {}).items())
    return paragraphs(
        "### The judges",
        f"On {trust[judges[0]]['n']} renders that neither learnt from; *objects* counts a picture as right where every"
        " kind of thing is found in its number.",
        table(("right, %", *(f"{judge} judge" for judge in judges)), rows),
        f"They agree: {said}." if said else "",
    )
