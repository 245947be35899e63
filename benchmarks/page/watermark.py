"""The section of docs/results.md on the mark, from the rows of watermark.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .tables import number, paragraphs, percent, source, table

Own = dict[str, list[dict]]  # rows of a part, by table

MARKS = {
    "semiperm": "ours",
    "semiperm, search": "ours, search",
    "semiperm, 10 steps": "ours, always 10 steps",
    "gaussian shading": "Gaussian Shading",
    "gaussian shading, soft": "the same, soft votes",
    "gaussian shading, one message": "Gaussian Shading, one message",
    "gaussian shading, new messages": "Gaussian Shading, new messages",
    "prc": "PRC",
    "tree-ring": "Tree-Ring",
    "tree-ring, all channels": "the same, 4 channels",
    "tree-ring, released p-value": "Tree-Ring, released p-value",
    "ring-id": "RingID",
}
FORGERIES = {
    "as drawn": "none: genuine",
    "jpeg:50": "none: genuine, JPEG 50",
    "reprompt": "another prompt on the same noise",
    "transplant:0.5": "transplant, strength .5",
    "transplant:0.7": "transplant, strength .7",
    "imprint": "imprint, 20 steps",
}


# What a row of each table has in the current form; older files are made again, part by part.
FIELDS = {
    "null": ("mark", "latents", "shape", "n", "rates"),
    "classifier": ("mark", "classifier", "shape", "n", "accuracy", "interval"),
    "channel": ("mark", "shape", "bits", "rho", "n", "exact"),
    "linked": ("shape", "format", "nonce_bits", "n", "largest", "pairs", "decades", "ms"),
    "attack": ("mark", "attack", "n", "tpr", "detected", "exact", "evaluations"),
    "guidance": ("guidance", "n", "agreement", "detected", "exact", "evaluations"),
    "quality": ("mark", "n", "object", "style", "background", "distance", "interval", "p_value"),
    "decoder": ("latents", "n", "agreement", "detected", "exact"),
    "forgery": ("attack", "n", "forged", "caught", "valid", "draws"),
    "repaint": ("attack", "way", "n", "tpr", "detected"),
    "everyday": ("conversion", "n", "detected", "exact", "seconds"),
    "speed": ("what", "shape", "keys", "threads", "ms", "peak_mb"),
}
# part of `bench watermark` -> its tables, in the order of the page
PARTS = {
    "latents": ("null", "classifier", "channel"),
    "linked": ("linked",),
    "canvas": ("guidance", "decoder", "quality", "attack", "forgery"),
    "repaint": ("repaint",),
    "everyday": ("everyday",),
    "speed": ("speed",),
}

TITLES = {
    "latents": "Without a mark",
    "linked": "Pictures of one key",
    "canvas": "On pictures of the canvas",
    "repaint": "Repainted, and grey",
    "everyday": "Everyday conversions",
    "speed": "Time and memory",
}


def watermark(rows: list[dict]) -> str:
    """Statistics on latents, then pictures of the canvas, attacks, forgeries, speed; each part by a command."""
    sections = {
        "latents": (_false_positives, _secrecy, _channel),
        "linked": (linked,),
        "canvas": (_pictures, _attacks, _forgeries),
        "repaint": (repaint,),
        "everyday": (everyday,),
        "speed": (_speed,),
    }
    return paragraphs(
        "## The mark",
        "The other marks are written again ([methods/watermark/peers](../methods/watermark/peers)) with exact p-values;"
        " all go through the same model, attacks and inversion. Each part is made by one command, which can be stopped"
        " and given again, and leaves the others in the file; without `--part` all are made.",
        *(part(rows, name, "canvas", *made) for name, made in sections.items()),
    )


def part(rows: Sequence[dict], name: str, world: str, *sections: Callable[..., str]) -> str:
    """A part's sections and the command that makes it; that command alone where rows are missing or of an older form.

    Args:
        rows: of the whole file. sections: f(rows by table) -> text.
    """
    own = {kind: [row for row in rows if row["table"] == kind] for kind in PARTS[name]}
    file = "watermark.json" if world == "canvas" else f"watermark_{world}.json"
    option = "" if world == "canvas" else f" --world {world}"
    command = f"semiperm bench watermark{option} --part {name} --resume watermark.jsonl"
    command += f" --json benchmarks/results/{file}"
    if not all(own[kind] and all(set(FIELDS[kind]) <= row.keys() for row in own[kind]) for kind in own):
        return paragraphs(f"### {TITLES[name]}", f"No figures of today's form yet; `{command}` makes them.")
    heading, *text = paragraphs(*(section(own) for section in sections)).split("\n\n")
    return paragraphs(heading, source(file, command, [row for some in own.values() for row in some]), *text)


def _mark(row: dict) -> str:
    return MARKS.get(row["mark"], row["mark"])


def _shape(row: dict) -> str:
    return "x".join(map(str, row["shape"]))


def _false_positives(own: Own) -> str:
    rows = own["null"]
    cells, outside, asked = [], [], 0
    for row in rows:
        line = [_mark(row), row["latents"], _shape(row), f"{row['n']:,}"]
        for rate in row["rates"]:
            low, high = rate["interval"]
            line.append(f"{rate['count']:,} ({low:,} to {high:,})")
            if row["mark"] == "semiperm" and rate["alpha"] < 0.1:
                asked += 1
                if rate["count"] > high:
                    outside.append(f"{rate['count']} of {row['n']:,} {row['latents']} at {rate['alpha']:g}")
        cells.append(line)
    above = f"{len(outside)} of our {asked} counts below .1 lies above its interval ({'; '.join(outside)})"
    return paragraphs(
        f"### {TITLES['latents']}",
        "How many of n readings without the mark have p below a level, and in brackets the interval that a uniform p"
        " keeps 99 times in 100:",
        table(("mark", "readings", "shape", "n", *(f"p < {rate['alpha']:g}" for rate in rows[0]["rates"])), cells),
        f"Limits: {above if outside else 'none of our counts lies above its interval'}. At .1 our p-value is on the"
        " safe side: fewer fall below it than would of a uniform one.",
    )


def _secrecy(own: Own) -> str:
    rows = own["classifier"]
    low, high = map(number, rows[0]["interval"])
    names = list(dict.fromkeys(row["classifier"] for row in rows))
    cells = [
        (MARKS.get(mark, mark), shape,
         *(number(row["accuracy"]) for name in names for row in rows
           if (row["mark"], _shape(row), row["classifier"]) == (mark, shape, name)))
        for mark, shape in dict.fromkeys((row["mark"], _shape(row)) for row in rows)
    ]  # fmt: skip
    return paragraphs(
        "### Marked or plain noise",
        f"Learned from 5,000 latents of one key; right answers on {rows[0]['n']:,} others. A coin has {low} to {high}:",
        table(("mark", "shape", *names), cells),
        "Limits: networks are small; larger ones and more latents were not tried. What a nearest neighbour finds stands"
        " below.",
    )


def linked(own: Own) -> str:
    rows = own["linked"]
    cells = [
        (_shape(row), row["format"], f"{row['nonce_bits']}", f"{row['largest']:.1f}", row["pairs"],
         f"{100 * row['nearest']:.1f}" if "nearest" in row else "", f"{row['decades']:.1f}", f"{row['ms']:.0f}")
        for row in rows
    ]  # fmt: skip
    known = next((f"{row['known']:,}" for row in rows if "known" in row), "")
    return paragraphs(
        f"### {TITLES['linked']}",
        f"Of all pairs of {rows[0]['n']:,} latents of one key, the largest agreement of signs, either way round, in"
        " standard deviations (chance reaches 5.2), and how many pairs lie above 6. A nearest neighbour knows"
        f" {known} latents of the key and says of others, and of plain noise, whose they are (a coin: 50 %). What it"
        " costs: decades of the first field's p-value that its nonces take, and the time of reading one latent under"
        " one key. Format 2 is what we signed before:",
        table(("shape", "format", "bits", "largest", "pairs above 6", "nearest right", "decades", "ms"), cells),
    )


WAYS = {
    "one look": "5 steps of inversion",
    "one look, lists of codewords": "the same, lists of sealed codewords",
    "reader, lists of codewords": "the reader, lists of sealed codewords",
    "ladder": "detection as it is, without the reader",
    "ladder with the reader": "detection as it is",
    "informed": "5 steps, 1,000 issued marks known",
    "informed, reader": "the reader, 1,000 issued marks known",
    "gaussian shading, soft, message known": "Gaussian Shading, soft votes, the one message known",
}


def repaint(own: Own) -> str:
    rows = own["repaint"]
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    cells = []
    for way in dict.fromkeys(row["way"] for row in rows):
        found = {row["attack"]: row for row in rows if row["way"] == way}
        cells.append((WAYS[way], *(f"{percent(found[a]['tpr'])} / {percent(found[a]['detected'])}" for a in attacks)))
    return paragraphs(
        f"### {TITLES['repaint']}",
        f"What each way to read brings on {rows[0]['n']} pictures: found at p < 1e-3 / at p < 1e-6. Single looks have"
        " the whole error to themselves, detection shares it among its rungs, a list of issued marks counts them all:",
        table(("way", *attacks), cells),
    )


def everyday(own: Own) -> str:
    rows = own["everyday"]
    cells = [
        (row["conversion"], row["n"], percent(row["detected"]), percent(row["exact"]), f"{row['seconds']:.2f}")
        for row in rows
    ]
    return paragraphs(
        f"### {TITLES['everyday']}",
        "Files written and opened again by Pillow, looked at as `semiperm detect` does without options:",
        table(("conversion", "n", "found at p < 1e-6", "valid, payload right", "seconds, median"), cells),
    )


def _channel(own: Own) -> str:
    parts, rows = [], own["channel"]
    for shape, bits in dict.fromkeys((_shape(row), row["bits"]) for row in rows):
        some = [row for row in rows if (_shape(row), row["bits"]) == (shape, bits)]
        rhos = sorted({row["rho"] for row in some})
        cells = []
        for mark in dict.fromkeys(row["mark"] for row in some):
            found = {row["rho"]: row for row in some if row["mark"] == mark}
            shares = (f"{100 * found[rho]['exact'][0]:.0f}" if rho in found else "" for rho in rhos)
            cells.append((MARKS.get(mark, mark), max(row["n"] for row in found.values()), *shares))
        parts.append(table((f"{shape}, {bits} bits", "trials", *(f"rho {rho:g}" for rho in rhos)), cells))
    return paragraphs(
        "### Messages through noise",
        "The whole message exact, through z' = rho z + sqrt(1 - rho²) n, latents alone:",
        *parts,
        "Limits: of our bits 24 (4x16x16) or 48 are the seal. Gaussian noise is kinder than what pictures go through.",
    )


def _pictures(own: Own) -> str:
    guidance, decoder, quality = (own[kind] for kind in ("guidance", "decoder", "quality"))
    steps = list(guidance[0]["agreement"])
    signs = [
        (f"{row['guidance']:g}", row["n"], *(number(row["agreement"][n]) for n in steps), percent(row["detected"]),
         percent(row["exact"]), f"{row['evaluations']:.1f}")
        for row in sorted(guidance, key=lambda row: row["guidance"])
    ]  # fmt: skip
    latents = [
        (row["latents"], row["n"], number(row["agreement"]), percent(row["detected"]), percent(row["exact"]))
        for row in decoder
    ]
    seen = []
    for row in quality:
        far = "-" if row["distance"] is None else "{:.1f} ({:.1f} to {:.1f})".format(row["distance"], *row["interval"])
        p = "-" if row["p_value"] is None else f"{row['p_value']:.3f}"
        seen.append((_mark(row), row["n"], *map(percent, (row["object"], row["style"], row["background"])), far, p))
    return paragraphs(
        f"### {TITLES['canvas']}",
        "1,024 signs a picture. Right signs after so many inversion steps, pictures found at p < 1e-6, payload exact,"
        " denoiser evaluations that a picture took, by guidance scale:",
        table(
            ("guidance", "n", *(f"{n} step{'s' * (n != '1')}" for n in steps), "found", "exact", "evaluations"), signs
        ),
        "Latents by the encoder, and by inverting the decoder (60 steps):",
        table(("latents", "n", "right signs", "found", "exact"), latents),
        "Pictures as asked, by the judge, and the Fréchet distance of its features to plain noise's pictures, with the"
        " interval of no change and its p-value:",
        table(("noise", "n", "object", "style", "background", "distance", "p"), seen),
        "Limits: one model, 25 steps of DDIM, detected with the very weights that drew. Not measured on a real"
        " checkpoint.",
    )


def _attacks(own: Own) -> str:
    rows = own["attack"]
    marks = list(dict.fromkeys(row["mark"] for row in rows))
    found = {(row["attack"], row["mark"]): row for row in rows}
    names = [name for name in dict.fromkeys(row["attack"] for row in rows) if name != "mean"]
    edits = [name for name in names if not name.startswith("average")]
    label = {"average removal, 32": "mean of 32 marked pictures taken out",
             "average forgery, 32": "the same put into others (a forgery)"}  # fmt: skip

    def line(name: str, said: str, bold: str = "") -> list[str]:
        cells = [f"{100 * found[name, mark]['tpr'][0]:.0f}" if (name, mark) in found else "-" for mark in marks]
        return [f"{bold}{text}{bold}" for text in (said, *cells)]

    cells = [line(name, name) for name in edits]
    cells += [line("mean", "mean of the attacks", "**")]
    cells += [line(name, label.get(name, name)) for name in names if name not in edits]
    numbers = {
        mark: sorted({row["n"] for row in rows if row["mark"] == mark and row["attack"] in edits}) for mark in marks
    }
    asked = "; ".join(f"{MARKS.get(mark, mark)} {' and '.join(map(str, n))}" for mark, n in numbers.items())
    mean = {mark: percent(found["mean", mark]["tpr"]) for mark in marks}
    return paragraphs(
        "### After attacks",
        "Found at p < 1e-3:",
        table(("attack", *(MARKS.get(mark, mark) for mark in marks)), cells),
        f"Pictures: {asked} (the larger number: without attack). The means with their intervals: "
        + "; ".join(f"{MARKS.get(mark, mark)} {said}" for mark, said in mean.items())
        + ".",
        "Limits: Gaussian Shading is told its key stream and message, ours has to find nonce and payload, so that it is"
        " ahead where little is left of the noise, and ahead of ours without the search on average. The search has far"
        " fewer pictures than the others and takes"
        f" {found['mean', 'semiperm, search']['evaluations']:.0f} evaluations a picture; the others have no search. The"
        " attacks are single edits by people who do not aim at the mark.",
    )


def _forgeries(own: Own) -> str:
    cells, rows = [], own["forgery"]
    for row in rows:
        both = f"{row['forged'][0] * row['n']:.0f} of {row['n']}"
        cells.append((FORGERIES.get(row["attack"], row["attack"]), both, percent(row["caught"]), percent(row["valid"])))
    return paragraphs(
        "### Forged pictures, content bound",
        f"{rows[0]['draws']:.1f} draws a picture. How many carry an authentic mark and show what the forger wanted; of"
        ' those, the verdict "content differs"; of all, the verdict "valid":',
        table(("forgery", "mark and motif", "caught", "valid of all"), cells),
        "Limits: the forger has the model and one marked picture. What shows nearly the same as the original passes."
        ' What is "caught" in the first two rows are false alarms.',
    )


def _speed(own: Own) -> str:
    rows = own["speed"]
    what = {"sign": "sign one latent", "bank": "search keys for one latent"}
    cells = [
        (what[row["what"]], _shape(row), f"{row['keys']:,}", row["threads"], f"{row['ms']:.2f}", row["peak_mb"])
        for row in rows
    ]
    return paragraphs(
        f"### {TITLES['speed']}",
        table(("", "shape", "keys", "threads", "ms", "peak of the process, MB"), cells),
        "Limits: latents alone; encoding and inverting a picture comes on top, and costs more.",
    )
