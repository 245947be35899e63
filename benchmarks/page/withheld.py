"""The sections on erasure with words that no method was given, one concept at a time and many at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .tables import paragraphs, percent, source, table

METHODS = {
    "untouched": "untouched",
    "closed_form/auto": "membranes, gate auto (the default)",
    "closed_form/always": "membranes, gate always",
    "closed_form/paper": "membranes, gate paper (SPM's)",
    "uce/textbook": "UCE as published, last token of the name",
    "negative_prompt": "negative prompt",
}
_COLUMNS = ("UA", "IRA", "CRA", "kept", "attributes", "negative")
_ABOUT = (
    "**UA** is the share of pictures without the concept among those that ask for it. On as many other prompts:"
    " **IRA** and **CRA**, the accuracy in its own and in the other domain, and **kept**, the share of pictures in"
    " which the judge sees the same object and style as in the untouched model's. **attributes**: the same of colour"
    " and background, in all pictures. **negative**: asked for the concept with a negative prompt that names it, the"
    " share of pictures that show it."
)


def withheld(figures: dict) -> str:
    """One concept at a time, by name alone, asked for by other words."""
    rows = figures["rows"]
    each = max(row["n"] for row in rows if "concepts" not in row)
    command = (
        f"semiperm evaluate canvas --suite --withhold --negative --steps {figures['num_inference_steps']} --each {each}"
        f" --repeats 2 {_named(rows)} --json benchmarks/results/erasure_withheld.json"
    )
    parts = [
        "## Erasure, asked in withheld words",
        source("erasure_withheld.json", command, figures),
        "Every method is given the bare name of one concept, and the package's general captions; the prompts ask in"
        f" full captions of the canvas by the other phrasings alone, {each} of each concept"
        f" ({figures['num_inference_steps']} steps, guidance {figures['guidance_scale']:g}). {_ABOUT}",
    ]
    for label in ("objects", "styles"):
        pooled = {row["method"]: row for row in rows if row["concept"] == label}
        concepts, n = pooled["untouched"]["concepts"], pooled["untouched"]["n"]
        parts += [
            f"### Withheld, {label}: {', '.join(concepts)}",
            f"{n} pictures ask for one of them.",
            scores_table(pooled),
        ]
    parts += [
        "Limits: phrasings that this world's text encoder learnt as synonyms, so that a withheld word lies close to the"
        " name; words that only imply a concept are not among them. On this encoder, which never saw English captions,"
        " no detector could tell (`separation` below 0), so that `auto` was `always` in every run: the two rows are the"
        " same membranes, and the choice between the gates is not decided here. Few steps, one seed a prompt.",
    ]
    return paragraphs(*parts)


def at_once(count: int) -> Callable[[dict], str]:
    """The section of `count` concepts erased together, six of them the canvas's."""

    def section(figures: dict) -> str:
        rows = {row["method"]: row for row in figures["rows"]}
        names, name = figures["rows"][0]["concept"].split("+"), f"erasure_{count}.json"
        command = (
            f"semiperm evaluate canvas --membrane {count}.safetensors --withhold"
            f" --steps {figures['num_inference_steps']} --each {max(row['n'] for row in rows.values())}"
            f" --repeats 1 {' '.join(f'--concept {one}' for one in names)} --json benchmarks/results/{name}"
        )
        return paragraphs(
            f"## {count} concepts at once",
            source(name, command, figures),
            f"{count} membranes of one `semiperm erase`, by name alone: {', '.join(names)}, and {count - len(names)}"
            " common nouns that the canvas does not draw. Asked in withheld words; columns as above.",
            scores_table(rows, {"untouched": "untouched", "membrane": f"{count} membranes, gate auto"}),
            "Limits: this world's text encoder never learnt most of these nouns, so that its detectors cannot tell and"
            " the gates stay open: whatever is asked for passes every membrane. It is the worst case for a stack, and"
            " no figure for encoders that know the words.",
        )

    return section


def scores_table(rows: dict[str, dict], methods: dict[str, str] = METHODS) -> str:
    """A line for each method that has a row; columns that were measured."""
    scores = [name.lower() for name in _COLUMNS]
    used = [key for key in scores if any(row[key][0] is not None for row in rows.values())]
    cells = [(methods[name], *(percent(rows[name][key]) for key in used)) for name in methods if name in rows]
    return table(("method", *(name for name in _COLUMNS if name.lower() in used)), cells)


def _named(rows: Sequence[dict]) -> str:
    names = [row["concept"] for row in rows if row["method"] == "untouched" and "concepts" not in row]
    return " ".join(f"--concept {name}" for name in names)
