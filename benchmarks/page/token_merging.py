"""The sections of docs/results.md on negative token merging, from the rows of negative_token_merging*.json."""

from __future__ import annotations

from collections.abc import Sequence

from .tables import paragraphs, percent, source, table

NAMES = {
    "negative prompt": 'negative prompt "a quibble"',
    "negative_token_merging": "negative token merging",
    "negative_token_merging, reference named": "negative token merging, reference named",
    "released": "released algorithm, same strength and window",
}
COMMAND = "semiperm bench token-merging{} --json benchmarks/results/{}.json"


def token_merging(rows: list[dict]) -> str:
    """Does it avoid a picture, does it spread a batch: on the first edition."""
    away, apart = _modes(rows)
    return paragraphs(
        "## Negative token merging",
        source("negative_token_merging.json", COMMAND.format("", "negative_token_merging"), rows),
        f"Away from a picture: {away[0]['images']} pictures whose prompts mean the mascot (every style on every"
        " background, by a synonym), with one plain picture of it as reference. Pictures that the judge calls the"
        " mascot; similarity to the reference (cosine of the judge's features less their mean); pictures that keep what"
        " was asked:",
        _away(away),
        f"A batch apart: mean pairwise distances within {_batches(apart)} batches of four of one prompt each, and"
        " pictures that show the asked object:",
        _apart(apart),
        f"Limits: settings ({_settings(away)} away from a picture, {_settings(apart)} apart) were chosen on these very"
        " prompts, for one reference picture of one concept; colours get harsher. The negative prompt does about as"
        " much as the push without words, and keeps everything else. The more plainly a prompt names the thing, the"
        " less is changed. The released algorithm is re-implemented from its formula; it pushes harder and loses the"
        " background.",
    )


def worlds(found: dict[str, list[dict]]) -> str:
    """The same on other worlds, with the settings that were chosen on the first edition."""
    parts = [
        "## Negative token merging, on scenes",
        "The same prompts and figures on other embedded models, by the settings that were chosen on `canvas`, unchanged"
        " whatever comes out. The first judge's figures:",
    ]
    for world, rows in found.items():
        away, apart = _modes(rows)
        file, options = f"negative_token_merging_{world}", f" --world {world} --steps {rows[0]['steps']}"
        parts += [
            f"### Negative token merging, {world}",
            source(f"{file}.json", COMMAND.format(options, file), rows),
            f"Away from the mascot, {away[0]['images']} pictures:",
            _away(away),
            f"{_batches(apart)} batches apart:",
            _apart(apart),
        ]
    return paragraphs(*parts)


def _modes(rows: Sequence[dict]) -> list[list[dict]]:
    own = [row for row in rows if row["judge"] == rows[0]["judge"]]
    return [[row for row in own if row["mode"] == mode] for mode in ("reference", "diversity")]


def _name(row: dict) -> str:
    return NAMES.get(row["name"], row["name"])


def _away(rows: Sequence[dict]) -> str:
    kept = "shown", "similarity", "style_kept", "background_kept"
    cells = [
        (_name(row), *(f"{row[key]:.3f}" if key == "similarity" else percent(row[key]) for key in kept)) for row in rows
    ]
    return table(("away from the mascot", "mascot", "similarity", "style kept", "background kept"), cells)


def _apart(rows: Sequence[dict]) -> str:
    cells = [
        (row["domain"], _name(row), f"{row['feature_distance']:.3f}", f"{row['pixel_distance']:.3f}",
         percent(row["object_kept"]))
        for row in rows
    ]  # fmt: skip
    return table(("batches of four", "method", "feature distance", "pixel distance", "object kept"), cells)


def _batches(rows: Sequence[dict]) -> int:
    return sum(row["images"] for row in rows if row["name"] == rows[0]["name"]) // 4


def _settings(rows: Sequence[dict]) -> str:
    config = next(row["config"] for row in rows if row["name"] == "negative_token_merging")
    return ", ".join(f"{name} {value:g}" for name, value in config.items())
