"""The sections of docs/results.md on the embedded models of the second edition: a table a world that has a file.

Each section is a function of {model: content of its file}, in the order of the models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import watermark as mark
from .guidance import attacks_of, command_of
from .tables import number, paragraphs, percent, ratio, source, table

METHODS = {
    "untouched": "untouched",
    "closed_form/auto": "membranes, gate auto (the default)",
    "closed_form/always": "membranes, gate always",
    "closed_form/paper": "membranes, gate paper (SPM's)",
    "uce/textbook": "UCE as published, last token of the name",
    "negative_prompt": "negative prompt",
}
_COLUMNS = ("UA", "IRA", "CRA", "kept", "attributes", "negative")
GROUPS = {"objects": "Objects", "characters": "Characters", "styles": "Styles", "hazards": "Hazards"}
ASKED = {
    "given": "told all public words, asked by them",
    "public": "told the name, asked in public words",
    "reserved": "told the name, asked in reserved words",
}
# score -> heading; those that a group's pictures cannot show are left out
_SCORES = {
    "ua": "UA", "ira": "IRA", "cra": "CRA", "kept": "kept", "twin": "look-alike kept", "scene": "UA in scenes",
    "other": "other object kept", "implied": "UA, implied", "negative": "negative",
}  # fmt: skip


def erasure(found: dict[str, dict]) -> str:
    """Every group of every world, asked in words that no method was told."""
    parts = [
        "## Erasure, on scenes",
        "Models that draw one or two things, look-alikes and four hazards ([their words](../canvas/language.py)). Every"
        " method is told the name of one concept, and the membranes keep the package's general captions, as on any"
        " checkpoint; UCE is told the names of the other concepts besides. **UA** is the share of pictures without the"
        " concept among those that ask for it (UnlearnCanvas, arXiv 2402.11846). On as many other prompts: **IRA** and"
        " **CRA**, the accuracy in its own and in the other domain, and **kept**, the share of pictures in which the"
        " judge sees the same objects and style as in the untouched model's. **negative**: asked for the concept with a"
        " negative prompt that names it, the share of pictures that show it. **look-alike kept**, the share of pictures"
        " that show a look-alike of the concept when it is asked for; **UA in scenes**, where the concept is asked for"
        " beside another object; **other object kept** in those; **UA, implied**, where harmless words together mean a"
        " hazard; **outside**, the mean change of those scenes' pixels outside the concept's box, in 255ths. Two judges"
        " of different architectures look at the same pictures: the first one's figures, and the second one's UA.",
    ]
    for world, figures in found.items():
        rows, asked = figures["rows"], figures["asked"]
        options = [f"--{name}" for name in ("withhold", "negative") if asked[name]]
        options += [f"--steps {figures['num_inference_steps']}", f"--repeats {asked['repeats']}"]
        options += [f"--each {asked['each']}"] if asked["each"] else []
        options += [f"--concept {name}" for name in asked["concepts"]]
        file = f"erasure_{world}.json"
        command = f"semiperm evaluate {world} --suite {' '.join(options)} --json benchmarks/results/{file}"
        parts += [f"### Erasure, {world}", source(file, command, figures), _sampling(figures)]
        for words in dict.fromkeys(row["words"] for row in rows):
            for group, title in GROUPS.items():
                some = [row for row in rows if row["words"] == words and row["concept"] == group and "concepts" in row]
                if some:
                    parts += [f"{title} ({', '.join(some[0]['concepts'])}), {ASKED[words]}:", _scores(some)]
    return paragraphs(
        *parts,
        "Limits: small models, one seed a prompt; reserved words are ones that the models learnt, so that they lie near"
        " the names. In the second edition's pictures the judges were right on held-out renders, not on every picture"
        " that a model draws.",
    )


def at_once(count: int, trained: bool = False) -> Callable[[dict], str]:
    """The section of `count` concepts erased together, by closed form or `trained` ones, under both gates."""

    gates, stem, weights, made_by, how = ("auto", "always"), f"erasure_{count}", f"{count}", "semiperm erase", ""
    if trained:
        stem, weights, made_by, how = f"trained_{count}", f"trained_{count}", "semiperm train", ", trained"
    labels = {"untouched": METHODS["untouched"]}
    labels |= {f"membrane/{gate}": f"{count} membranes, gate {gate}" for gate in gates}

    def section(found: dict[str, dict]) -> str:
        parts = [
            f"## {count} concepts at once{how}",
            "Columns as above; **attributes**: colour and background as without membranes, in all pictures.",
        ]
        for world, figures in found.items():
            asked, file = figures["asked"], f"{stem}_{world}.json"
            names = asked["concepts"]
            command = (
                f"semiperm evaluate {world} --membrane {weights}.safetensors --withhold"
                f" {' '.join(f'--gate {gate}' for gate in gates)} --steps {figures['num_inference_steps']}"
                f" --each {asked['each']} --repeats {asked['repeats']} {' '.join(f'--concept {one}' for one in names)}"
                f" --json benchmarks/results/{file}"
            )
            more = [name for name in asked["stack"] if name not in names]
            said = ", ".join(asked["stack"][: len(names)])
            if more:
                few = ", ".join([*more[:6], *["..."] * (len(more) > 6)])
                said += f", and {len(more)} words that this world does not draw ({few})"
            parts += [
                f"### {count} at once{how}, {world}",
                source(file, command, figures),
                f"{count} membranes of one `{made_by}`, by name alone: {said}.",
            ]
            for words, judge in dict.fromkeys((row["words"], row["judge"]) for row in figures["rows"]):
                rows = [row for row in figures["rows"] if (row["words"], row["judge"]) == (words, judge)]
                title = f"Asked in {words} words, by the {judge} judge:"
                parts += [title, _at_once({row["method"]: row for row in rows}, labels)]
        return paragraphs(*parts)

    return section


def _at_once(rows: dict[str, dict], methods: dict[str, str]) -> str:
    """A line for each method that has a row; columns that were measured."""
    scores = [name.lower() for name in _COLUMNS]
    used = [key for key in scores if any(row[key][0] is not None for row in rows.values())]
    cells = [(methods[name], *(percent(rows[name][key]) for key in used)) for name in methods if name in rows]
    return table(("method", *(name for name in _COLUMNS if name.lower() in used)), cells)


def _scores(rows: Sequence[dict]) -> str:
    first, *others = dict.fromkeys(row["judge"] for row in rows)
    found = {(row["method"], row["judge"]): row for row in rows}
    used = [key for key in _SCORES if any(row[key][0] is not None for row in rows)]
    outside = any(row["outside"] for row in rows)
    cells = []
    for method in dict.fromkeys(row["method"] for row in rows):
        row = found[method, first]
        more = [number(found[method, judge]["ua"][0]) for judge in others]
        changed = [] if not outside else ["-" if row["outside"] is None else f"{row['outside']:.1f}"]
        cells.append((METHODS.get(method, method), *(percent(row[key]) for key in used), *changed, *more))
    headings = [_SCORES[key] for key in used] + ["outside"] * outside
    return table(("method", *headings, *(f"UA, {judge} judge" for judge in others)), cells)


def _sampling(figures: dict) -> str:
    return f"{figures['num_inference_steps']} steps, guidance {figures['guidance_scale']:g}."


_PLAIN = ("named", "other words", "implied")


def guidance(found: dict[str, dict]) -> str:
    """Of every world: each method away from all hazards at once, and from one at a time."""
    parts = [
        "## Safe guidance",
        "Methods are told the plain name of each of four hazards. Pictures with the hazard that was asked for, in %: by"
        " its name, by words that no method was told, and by harmless words that only imply it; benign prompts:"
        " pictures with any hazard, and accuracy of objects, style and background. Fire and ice are drawn in opposite"
        " colours: what leads away from one leads to the other; **others** are pictures of all kinds with a hazard that"
        " was not asked for. The first judge's figures, and at the end of a line the hazards that the second one sees:",
    ]
    for world, figures in found.items():
        file = f"guidance_{world}.json"
        parts += [f"### Safe guidance, {world}", source(file, command_of(figures, file), figures), _sampling(figures)]
        cells: list[tuple[str, ...]] = []
        first, *more = (guided := _guided(figures)).values()
        for (method, scope), own in first.items():
            benign, others = own["benign"], [own[kind] for kind in ("benign", *_PLAIN)]
            share = sum(row["others"][0] * row["n"] for row in others) / sum(row["n"] for row in others)
            cells.append(
                (
                    method,
                    "-" if method == "untouched" else scope,
                    *(percent(own[kind]["hazard"]) for kind in _PLAIN),
                    *(percent(benign[name]) for name in ("hazard", "accuracy")),
                    number(share),
                    *(number(rows[method, scope][kind]["hazard"][0]) for rows in more for kind in _PLAIN),
                )
            )
        seen = (f"{kind}, {judge} judge" for judge in [*guided][1:] for kind in _PLAIN)
        heading = ("method", "hazards at once", *_PLAIN, "benign", "accuracy, benign", "others", *seen)
        parts.append(table(heading, cells))
    return paragraphs(
        *parts,
        "Limits: few prompts a hazard; hazards are marks and frames that cover little of a picture, and one that is"
        " only faded, as value decomposition can leave a pale frame of fire, is none to either judge. A pair of"
        " detectors that refuses leaves a grey picture, which counts as none of what was asked for. A model without"
        " guidance cannot be given the methods that need it.",
    )


def attacked(found: dict[str, dict]) -> str:
    """Of every world: what an adversary's prompts bring back against each method."""
    parts = ["## Safe guidance under attack"]
    for world, figures in found.items():
        file = f"attacked_{world}.json"
        first, *more = (guided := _guided(figures)).values()
        rows = {method: own for (method, scope), own in first.items() if scope == "all"}
        kinds = [kind for kind in dict.fromkeys(kind for own in rows.values() for kind in own) if kind != "benign"]
        kinds = [kind for kind in kinds if kind not in _PLAIN]
        others = [f"{kind}, {judge} judge" for judge in [*guided][1:] for kind in kinds]
        parts += [
            f"### Under attack, {world}",
            source(file, command_of(figures, file), figures),
            f"{_sampling(figures)} {attacks_of(figures).capitalize()}. Pictures with the hazard, in %:",
            table(
                ("method", *kinds, "accuracy, benign", *others),
                [
                    (
                        method,
                        *(percent(own[kind]["hazard"]) if kind in own else "-" for kind in kinds),
                        percent(own["benign"]["accuracy"]),
                        *(
                            number(seen[method, "all"][kind]["hazard"][0]) if kind in own else "-"
                            for seen in more
                            for kind in kinds
                        ),
                    )
                    for method, own in rows.items()
                ],
            ),
        ]
    return paragraphs(
        *parts,
        "Limits: pictures of one search are not independent: true intervals are wider; an attack that brings nothing"
        " back from the untouched model tells nothing about methods. An adversary that learns embeddings needs the text"
        " encoder's inputs, which whoever runs the model has.",
    )


def guidance_cost(found: dict[str, list[dict]]) -> str:
    """What safe guidance costs a run and a step, and two counts that no busy machine spoils."""
    parts = [
        "## What safe guidance costs",
        "Runs on benign prompts, in times the bare one's: the whole run; the steps after the first, in which text is"
        " read; rows of the denoiser's batches; and floating point operations of all products. NAG without"
        " classifier-free guidance, and guidance itself, against runs without guidance:",
    ]
    for world, rows in found.items():
        file = f"guidance_cost_{world}.json"
        command = f"semiperm bench guidance-cost --model {world} --json benchmarks/results/{file}"
        cells = [
            (row["name"], ratio(row), *(f"{row[name]:.3f}" for name in ("step", "rows", "operations"))) for row in rows
        ]
        parts += [f"### Its cost, {world}", source(file, command, rows)]
        parts.append(table(("", "run", "step", "rows", "operations"), cells))
    return paragraphs(*parts, "Limits: a small model on a CPU, where products of few rows are not cheaper by much.")


def _guided(figures: dict) -> dict[str, dict[tuple[str, str], dict[str, dict]]]:
    """judge -> (method, how many hazards at once) -> kind -> the row of all hazards."""
    found: dict[str, dict[tuple[str, str], dict[str, dict]]] = {}
    for row in figures["rows"]:
        if not row["category"]:
            own = found.setdefault(row["judge"], {})
            own.setdefault((row["method"], row["categories"]), {})[row["kind"]] = row
    return found


def held_out(found: dict[str, list[dict]]) -> str:
    """Negative token merging on references that its setting was not chosen on."""
    parts = [
        "## Negative token merging, references held out",
        "The setting is chosen on one reference picture by a rule that wants no truth (the first of a ladder that"
        " halves the similarity of the pictures to the reference), and used unchanged on four others, whatever comes"
        " out. The first judge's figures:",
    ]
    for world, rows in found.items():
        file = f"held_out_{world}.json"
        command = (
            f"semiperm bench token-merging --held-out --world {world} --prompts {rows[0]['images']} --steps"
            f" {rows[0]['steps']} --json benchmarks/results/{file}"
        )
        some = [row for row in rows if row["role"] == "held out" and row["judge"] == rows[0]["judge"]]
        config = next(row["config"] for row in some if row["name"] == "negative_token_merging")
        setting = ", ".join(f"{name} {value:g}" for name, value in config.items())
        cells = [
            (row["reference"], row["name"].replace("_", " "), percent(row["shown"]), f"{row['similarity']:.3f}",
             percent(row["style_kept"]), percent(row["background_kept"]))
            for row in some
        ]  # fmt: skip
        parts += [
            f"### References held out, {world}",
            source(file, command, rows),
            f"{rows[0]['images']} prompts a reference, {rows[0]['steps']} steps, guidance"
            f" {rows[0]['guidance_scale']:g}; the setting: {setting}.",
            table(("reference", "method", "shown", "similarity", "style kept", "background kept"), cells),
        ]
    return paragraphs(*parts, "Limits: prompts name the thing, which the push has to work against; plain references.")


def watermark(found: dict[str, list[dict]]) -> str:
    """The marks on pictures of every world."""
    parts = [
        "## The mark, on flow models and scenes",
        "The same marks, attacks and detection on other models; flow models are inverted by Euler's steps. Pictures"
        " found at p < 1e-6 as drawn, and at p < 1e-3 over the attacks of the table above, on average:",
    ]
    sections = {"canvas": _marks, "linked": mark.linked, "repaint": mark.repaint, "everyday": mark.everyday}
    for world, rows in found.items():
        parts.append(f"### The mark, {world}")
        parts += [mark.part(rows, name, world, section) for name, section in sections.items()]
    return paragraphs(*parts, "Limits: detected with the very weights that drew.")


def _marks(own: dict[str, list[dict]]) -> str:
    clean, mean = ({row["mark"]: row for row in own["attack"] if row["attack"] == name} for name in ("none", "mean"))
    quality = {row["mark"]: row for row in own["quality"]}
    cells = [
        (name, clean[name]["n"], percent(clean[name]["detected"]), percent(clean[name]["exact"]),
         percent(mean[name]["tpr"]) if name in mean else "-",
         percent(quality[name]["object"]) if name in quality else "-")
        for name in clean
    ]  # fmt: skip
    headings = ("mark", "n", "found as drawn", "payload exact", "found after attacks", "object as asked")
    signs = [
        f"guidance {row['guidance']:g}: "
        + ", ".join(f"{steps} steps {number(share)}" for steps, share in row["agreement"].items())
        for row in own["guidance"]
    ]
    return paragraphs(
        "#### As drawn, and after attacks",
        table(headings, cells),
        "Right signs after inversion: " + "; ".join(signs) + ".",
    )
