"""`semiperm bench watermark`: what the watermark's statistics are worth, what it survives, and what it costs."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from . import common

EXAMPLE = "Example: semiperm bench watermark --resume watermark.jsonl --json watermark.json"


def run(
    quick: Annotated[
        bool, typer.Option("--quick", help="Few latents, pictures and rounds: minutes instead of hours.")
    ] = False,
    parts: Annotated[
        list[str] | None,
        typer.Option(
            "--part",
            metavar="PART",
            help="latents, linked, canvas, repaint, everyday, speed, samplers; repeatable. Default: all but the last.",
        ),
    ] = None,
    world: Annotated[
        str,
        typer.Option(metavar="MODEL", help="The embedded model that draws; parts that depend on none are left out."),
    ] = "canvas",
    comfyui: Annotated[
        Path | None, typer.Option("--comfyui", metavar="FOLDER", help="With samplers: also those of this ComfyUI.")
    ] = None,
    comfyui_python: Annotated[
        Path | None,
        typer.Option("--comfyui-python", metavar="FILE", help="Its Python. Default: that of a venv beside it."),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one for each core.")] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="FILE", help="Keep finished work here, and go on from it.")
    ] = None,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the figures here; with --part, those of other parts stay."),
    ] = None,
):
    """Test the watermark on latents and on pictures: false positives, secrecy, noise, attacks, forgery, quality, speed.

    Other marks stand beside it in the same tables.
    """
    from ..benchmarks.watermark.run import OF_A_WORLD, ON_REQUEST, PARTS, TimingError
    from ..benchmarks.watermark.run import run as measure

    known = (*PARTS, *ON_REQUEST) if common.world_of(world).name == "canvas" else OF_A_WORLD
    parts = parts or [part for part in known if part not in ON_REQUEST]
    if unknown := set(parts) - set(known):
        raise common.CliError(f"there is no part {', '.join(sorted(unknown))}; choose among {', '.join(known)}")
    if comfyui is not None and "samplers" not in parts:
        raise common.CliError("--comfyui measures ComfyUI's samplers; give --part samplers with it")
    with ExitStack() as bars:

        def starting(label: str, total: int):
            bars.close()  # one bar at a time
            return bars.enter_context(common.progress(label, total))

        try:
            rows = measure(quick, parts, workers, resume, starting, world)
        except TimingError as error:
            raise common.CliError(f"a process failed: {str(error).splitlines()[-1]}") from error
    if comfyui is not None:
        with common.console().status("ComfyUI's samplers"):
            script, size = Path("watermark", "comfyui_samplers.py"), "quick" if quick else "full"
            finished = f"{resume.resolve()}.comfyui" if resume else ""
            rows = [*rows, *in_comfyui(comfyui, comfyui_python, script, finished, size)]
    if json_path is not None:
        common.write_json(json_path, [*kept(json_path, parts, rows), *rows])
    console = common.console()
    for table in tables(rows):
        console.print(table)


def kept(path: Path, parts: list[str], rows: list[dict]) -> list[dict]:
    """The rows of a file of figures that belong to parts which did not run.

    Raises:
        CliError: another kind of file.
    """
    import json

    from ..benchmarks.watermark.run import PARTS, TABLES

    if set(parts) == set(PARTS) or not path.exists():
        return []
    try:
        before = [(*_about(row), row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, KeyError) as error:
        raise common.CliError(f"--json {path} is there, and no file of this command's figures") from error
    fresh = {_about(row) for row in rows}
    mine = {name for part in parts for name in TABLES[part]} - {"null", "sampler"}
    return [row for table, about, row in before if table not in mine and (table, about) not in fresh]


def _about(row: dict) -> tuple[str, str | None]:
    """The table of a row, and what else tells apart the runs that it is of: readings without a mark are of several
    parts, samplers of two faces."""
    return row["table"], row["face"] if row["table"] == "sampler" else row.get("latents")


def tables(rows: list[dict]):
    """One rich table for each kind of row that there is, the channel's one for each shape and number of bits."""
    makers = {
        "null": null_table,
        "classifier": classifier_table,
        "channel": channel_tables,
        "attack": attack_tables,
        "guidance": guidance_table,
        "decoder": decoder_table,
        "quality": quality_table,
        "forgery": forgery_table,
        "sampler": sampler_tables,
        "linked": linked_table,
        "repaint": repaint_table,
        "everyday": everyday_table,
        "speed": speed_table,
    }
    for name, maker in makers.items():
        if some := [row for row in rows if row["table"] == name]:
            made = maker(some)
            yield from made if isinstance(made, list) else [made]


def in_comfyui(path: Path, python: Path | None, script: Path, *arguments) -> list[dict]:
    """The rows that a script of benchmarks/ prints in ComfyUI's Python."""
    from ..benchmarks.launch import ROOT, run_in_comfyui

    path = path.expanduser()
    common.existing_file(path / "main.py", "ComfyUI at")
    python = (python or path.parent / "venv" / "bin" / "python").expanduser()
    common.existing_file(python, "Python of ComfyUI at")
    try:
        return run_in_comfyui(path, python, ROOT / "benchmarks" / script, *arguments)
    except RuntimeError as error:
        raise common.CliError(f"ComfyUI's Python failed: {str(error).splitlines()[-1]}") from error


def sampler_tables(rows: list[dict]) -> list:
    """Of each face: pictures found of those drawn, sampler by sampler, for each number of steps and guidance."""
    made = []
    for face in dict.fromkeys(row["face"] for row in rows):
        some = [row for row in rows if row["face"] == face]
        settings = sorted({(row["steps"], row["guidance"]) for row in some})
        heads = (f"{steps}, {guidance:g}" for steps, guidance in settings)
        table = _table(f"{face}: pictures found at 1e-6 (median log10 p), by steps, guidance", "sampler", *heads)
        for name in dict.fromkeys(sampler_name(row) for row in some):
            found = {(row["steps"], row["guidance"]): row for row in some if sampler_name(row) == name}
            cells = (found.get(setting) for setting in settings)
            table.add_row(name, *(f"{c['found']}/{c['n']} ({c['log10_p']:.0f})" if c else "" for c in cells))
        made.append(table)
    return made


def sampler_name(row: dict) -> str:
    """A sampler with its options."""
    return " ".join([row["sampler"], *(f"{name}={value}" for name, value in row["options"].items())])


def null_table(rows: list[dict]):
    """False positives, each beside the interval that a uniform p-value keeps 99 times in 100."""
    table = _table(
        "latents without the mark: how many have p < alpha (99 % interval of a uniform p);\n"
        "tests of uniformity (p): one nonce alone, p below .01, and of p too small anywhere",
        *("mark", "latents", "shape", "n", *(f"{rate['alpha']:g}" for rate in rows[0]["rates"])),
        *("one nonce", "tail", "too small"),
    )
    for row in rows:
        cells = [f"{rate['count']} ({rate['interval'][0]}..{rate['interval'][1]})" for rate in row["rates"]]
        tests = ["" if row[name] is None else f"{row[name][1]:.3f}" for name in ("ks_single", "ks_tail", "ks_small")]
        table.add_row(row["mark"], row["latents"], shape(row), str(row["n"]), *cells, *tests)
    return table


def classifier_table(rows: list[dict]):
    """Accuracy of every classifier on every mark."""
    low, high = rows[0]["interval"]
    names = list(dict.fromkeys(row["classifier"] for row in rows))
    caption = f"marked or plain, of one key, {rows[0]['n']} latents asked: right answers"
    table = _table(f"{caption}\n(a coin: {low:.3f} to {high:.3f} with 99 %)", "mark", "shape", *names)
    for mark, size in dict.fromkeys((row["mark"], shape(row)) for row in rows):
        found = {row["classifier"]: row["accuracy"] for row in rows if (row["mark"], shape(row)) == (mark, size)}
        table.add_row(mark, size, *(f"{found[name]:.3f}" for name in names))
    return table


def channel_tables(rows: list[dict]) -> list:
    """Of each shape and number of bits: exact payloads and detections, rho by rho."""
    made = []
    for size in dict.fromkeys((shape(row), row["bits"]) for row in rows):
        some = [row for row in rows if (shape(row), row["bits"]) == size]
        rhos = sorted({row["rho"] for row in some})
        caption = (
            f"{size[0]}, {size[1]} bits, z' = rho z + sqrt(1 - rho^2) n: share of exact messages / detected at 1e-6"
        )
        table = _table(caption, "mark", "n", *(f"{rho:g}" for rho in rhos))
        for mark in dict.fromkeys(row["mark"] for row in some):
            found = {row["rho"]: row for row in some if row["mark"] == mark}
            cells = (
                f"{found[rho]['exact'][0]:.2f}/{found[rho]['detected'][0]:.2f}" if rho in found else "" for rho in rhos
            )
            table.add_row(mark, str(max(row["n"] for row in found.values())), *cells)
        made.append(table)
    return made


def attack_tables(rows: list[dict]) -> list:
    """Attack by attack: the marks' detections at 1e-3; and what else is known of clean pictures and of the mean."""
    marks = list(dict.fromkeys(row["mark"] for row in rows))
    found = _table(
        "share of pictures found at p < 1e-3; the mean is that of all attacks but averaging", "attack", *marks
    )
    for text in dict.fromkeys(row["attack"] for row in rows):
        cells = {row["mark"]: percent(row["tpr"]) for row in rows if row["attack"] == text}
        found.add_row(text, *(cells.get(mark, "") for mark in marks))
    whole = _table("pictures found, exact messages, denoiser evaluations a picture", "mark", "attack", "n")
    for heading in ("found at 1e-3", "at 1e-6", "exact", "evaluations"):
        whole.add_column(heading, justify="right")
    for row in rows:
        if row["attack"] in ("none", "mean"):
            cells = (percent(row[name]) for name in ("tpr", "detected", "exact"))
            whole.add_row(row["mark"], row["attack"], str(row["n"]), *cells, f"{row['evaluations']:.1f}")
    return [found, whole]


def guidance_table(rows: list[dict]):
    """Agreement of signs by guidance scale."""
    steps = list(rows[0]["agreement"])
    table = _table("the mark by guidance scale: share of right signs after so many inversion steps", "guidance", "n")
    for heading in (*(f"{n} steps" for n in steps), "found at 1e-6", "exact", "evaluations"):
        table.add_column(heading, justify="right")
    for row in sorted(rows, key=lambda row: row["guidance"]):
        shares = (f"{row['agreement'][n]:.3f}" for n in steps)
        rest = percent(row["detected"]), percent(row["exact"]), f"{row['evaluations']:.1f}"
        table.add_row(f"{row['guidance']:g}", str(row["n"]), *shares, *rest)
    return table


def decoder_table(rows: list[dict]):
    """Decoder inversion beside the encoder's latent."""
    table = _table("latents of pictures by the encoder, and after decoder inversion", "latents", "n")
    for heading in ("right signs", "found at 1e-6", "exact"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = f"{row['agreement']:.3f}", percent(row["detected"]), percent(row["exact"])
        table.add_row(row["latents"], str(row["n"]), *cells)
    return table


def quality_table(rows: list[dict]):
    """What the judge sees, and how far its features move."""
    table = _table(
        "pictures as asked, by the judge (95 % interval); Frechet distance of its features to plain noise's pictures\n"
        "(95 % interval if the mark changed nothing) and its p-value",
        *("mark", "n", "object", "style", "background", "distance", "p"),
    )
    for row in rows:
        seen = (
            f"{v:.3f} ({low:.2f}..{high:.2f})" for v, low, high in (row[n] for n in ("object", "style", "background"))
        )
        far = "", ""
        if row["distance"] is not None:
            far = "{:.3f} ({:.3f}..{:.3f})".format(row["distance"], *row["interval"]), f"{row['p_value']:.3f}"
        table.add_row(row["mark"], str(row["n"]), *seen, *far)
    return table


def forgery_table(rows: list[dict]):
    """Verdicts on pictures whose content is bound, as they are and forged."""
    first = rows[0]
    table = _table(
        f"bound content ({first['draws']:.1f} draws a picture, {first['unbound']} not bound): authentic mark found,"
        " wanted object shown,\nboth; caught of both (content differs); valid of all",
        *("picture", "n"),
    )
    names = "authentic", "shown", "forged", "caught", "valid"
    for heading in ("authentic", "shown", "both", "caught", "valid"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row["attack"], str(row["n"]), *(percent(row[name]) for name in names))
    return table


def percent(share: list[float] | None) -> str:
    """The value of [value, low, high]."""
    return "" if share is None else f"{share[0]:.1%}"


def speed_table(rows: list[dict]):
    """Time and memory of signing one latent and of searching many keys."""
    what = {"sign": "sign one latent", "bank": "search keys for one latent"}
    table = _table("median time; the process's peak memory, and beyond what it had", "what", "shape", "keys", "threads")
    for heading in ("ms", "best ms", "peak MB", "extra MB"):
        table.add_column(heading, justify="right")
    for row in rows:
        times = f"{row['ms']:.2f}", f"{row['best_ms']:.2f}"
        about = what[row["what"]], shape(row), str(row["keys"]), str(row["threads"])
        table.add_row(*about, *times, str(row["peak_mb"]), str(row["extra_mb"]))
    return table


def linked_table(rows: list[dict]):
    """Pairs of one key's latents, in both formats."""
    headings = ("shape", "format", "nonce bits", "latents", "largest agreement, sigma", "pairs above 6")
    table = _table("can pictures of one key be linked", *headings, "nearest neighbour right", "decades of p", "ms")
    for row in rows:
        nearest = f"{row['nearest']:.1%}" if "nearest" in row else ""
        cells = (row[name] for name in ("format", "nonce_bits", "n", "largest", "pairs"))
        table.add_row(shape(row), *map(str, cells), nearest, str(row["decades"]), str(row["ms"]))
    return table


def repaint_table(rows: list[dict]):
    """Attack by attack what each way to read finds."""
    table = _table("repainted and grey pictures: found at p < 1e-3 / 1e-6", "attack", "way", "n", "1e-3", "1e-6")
    for row in rows:
        cells = percent(row["tpr"]), percent(row["detected"])
        table.add_row(row["attack"], row["way"], str(row["n"]), *cells)
    return table


def everyday_table(rows: list[dict]):
    """Conversion by conversion."""
    headings = ("conversion", "n", "found at 1e-6", "valid, payload right", "seconds")
    table = _table("everyday conversions, found without options", *headings)
    for row in rows:
        cells = str(row["n"]), percent(row["detected"]), percent(row["exact"]), f"{row['seconds']:.2f}"
        table.add_row(row["conversion"], *cells)
    return table


def shape(row: dict) -> str:
    return "x".join(map(str, row["shape"]))


def _table(caption: str, *headings: str):
    from rich.table import Table

    table = Table(caption=caption)
    for heading in headings:
        table.add_column(heading)
    return table
