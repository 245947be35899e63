"""`semiperm bench`: time and memory, side by side with the peers."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from . import common

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure time, side by side with the peers.")
Resume = Annotated[Path | None, typer.Option(metavar="FILE", help="Go on from this file, and keep work in it.")]
World = Annotated[str, typer.Option(metavar="MODEL", help="The embedded model to draw with, and to judge.")]
_WHOLE_RUN = "time of a whole run, in times the bare one's (median, middle half)"


@app.command("membranes", epilog="Example: semiperm bench membranes --json membranes.json")
def membranes(
    model: Annotated[str, typer.Option(metavar="MODEL", help=common.MODEL_HELP)] = "canvas",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds, and no 100 membranes.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
):
    """Time a denoising step with 1, 10 and 100 membranes against the bare pipeline, and PEFT beside it."""
    pipe = common.load_model(model, dtype="auto")

    from ..benchmarks.membranes.run import run

    _time(run, pipe, model, quick, json_path)


@app.command("sampling", epilog="Example: semiperm bench sampling --json sampling.json")
def sampling(
    model: Annotated[str, typer.Option(metavar="MODEL", help=common.MODEL_HELP)] = "canvas",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds and steps, and no peers.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
):
    """Time whole sampling runs with negative token merging against bare ones, and the released algorithm beside it."""
    pipe = common.load_model(model, dtype="auto")

    from ..benchmarks.token_merging.sampling import run

    _time(run, pipe, model, quick, json_path, case="window", caption=_WHOLE_RUN)


@app.command("token-merging", epilog="Example: semiperm bench token-merging --json token_merging.json")
def token_merging(
    seeds: Annotated[int, typer.Option(min=1, help="Noises for each prompt.")] = 2,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Four references that the setting was not chosen on, a row each.")
    ] = False,
    world: World = "canvas",
    prompts: Annotated[int, typer.Option(min=4, help="With --held-out: prompts of each reference.")] = 24,
    steps: common.Steps = None,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
):
    """Judge on an embedded world whether negative token merging avoids a picture, and spreads a batch."""
    if held_out:
        _held_out(json_path, world, prompts, steps)
        return
    from ..benchmarks.token_merging.judged import batches, run

    about = common.world_of(world)
    with common.progress("pictures, four at a time", batches(about.name, seeds)) as advance:
        rows = run(about.name, seeds, steps, advance)
    if json_path is not None:
        common.write_json(json_path, rows)
    for mode in ("reference", "diversity"):
        _judged(f"{mode} mode", [row for row in rows if row["mode"] == mode], ("domain", "name", "judge"))


@app.command("guidance", epilog="Example: semiperm bench guidance --world canvas -n 24 --json guidance.json")
def guidance(
    world: World = "canvas",
    n: Annotated[int, typer.Option("-n", min=2, help="Prompts of each kind and hazard.")] = 24,
    steps: common.Steps = None,
    method: Annotated[
        list[str] | None, typer.Option(help="One of the methods of the table; repeatable. Default: all.")
    ] = None,
    attacks: Annotated[
        int, typer.Option(min=0, help="Also an adversary's prompts: searches for each hazard and kind. 0: none.")
    ] = 0,
    attack_steps: Annotated[
        int, typer.Option(min=1, help="Gradient steps of an embedding's search; words get an eighth, 32 tries in each.")
    ] = 200,
    resume: Resume = None,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
):
    """Judge what passes each method of safe guidance, and what is lost, beside a negative prompt and membranes.

    With --attacks also words and embeddings found by gradient, against the untouched model and against each method at
    work: minutes a search.
    """
    from rich.table import Table

    from ..benchmarks.guidance.attacked import Attack
    from ..benchmarks.guidance.judged import METHODS, batches, run

    methods = _among(method, METHODS)
    attack = Attack(attacks, max(1, attack_steps // 8), attack_steps) if attacks else None
    with common.progress("pictures, eight at a time", batches(world, n, methods, attack)) as advance:
        found = run(world, n, methods, resume, advance, steps=steps, attack=attack)
    if json_path is not None:
        common.write_json(json_path, found)
    names = ("method", "categories", "kind", "category", "judge")
    table = Table(caption="categories: all of the world's hazards are steered away from at once, or one at a time")
    for heading in (*names, "hazard", "accuracy"):
        table.add_column(heading)
    for row in found["rows"]:
        said = (row[name] or "-" for name in names)
        table.add_row(*said, *(f"{100 * row[name][0]:.1f} %" for name in ("hazard", "accuracy")))
    common.console().print(table)


@app.command("composition", epilog="Example: semiperm bench composition --world canvas-flow --json composition.json")
def composition(
    world: World = "canvas",
    n: Annotated[int, typer.Option("-n", min=2, help="Prompts of each kind and hazard.")] = 24,
    steps: common.Steps = None,
    method: Annotated[list[str] | None, typer.Option(help="A method to pair; repeatable. Default: all.")] = None,
    resume: Resume = None,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
    table_path: Annotated[
        Path | None,
        typer.Option("--table", metavar="FILE", help="Write what this world makes worse into this table of warnings."),
    ] = None,
):
    """Judge every pair of methods against what is better of each alone: hazards, harmless pictures, the mark."""
    from rich.table import Table

    from ..benchmarks.guidance.composition import batches, run, table_with
    from ..methods.composition import METHODS

    methods = _among(method, METHODS)
    with common.progress("pictures, eight at a time", batches(world, n, methods)) as advance:
        found = run(world, n, methods, resume, advance, steps=steps)
    if json_path is not None:
        common.write_json(json_path, found)
    if table_path is not None:
        before = json.loads(table_path.read_text(encoding="utf-8")) if table_path.is_file() else {}
        common.write_json(table_path, table_with(before, found))
    table = Table(caption="difference: to the better one alone, in points, with an interval of 99.7 %")
    for heading in ("pair", "judge", "verdict", "hazard", "difference", "kept", "difference", "mark", "difference"):
        table.add_column(heading)
    for row in found["pairs"]:
        cells = []
        for outcome in ("hazard", "kept", "mark"):
            if outcome not in row:
                cells += ["-", "-"]
                continue
            value, low, high = (100 * one for one in row["against"][outcome]["difference"])
            cells += [f"{100 * row[outcome][0]:.1f} %", f"{value:+.1f} ({low:+.1f} to {high:+.1f})"]
        table.add_row(" + ".join(row["pair"]), row["judge"], row["verdict"], *cells)
    common.console().print(table)


@app.command("guidance-cost", epilog="Example: semiperm bench guidance-cost --json guidance_cost.json")
def guidance_cost(
    model: Annotated[str, typer.Option(metavar="MODEL", help=common.MODEL_HELP)] = "canvas",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds and steps.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
):
    """Time whole runs with safe guidance against bare ones, in the same process."""
    pipe = common.load_model(model, dtype="auto")

    from ..benchmarks.guidance.cost import run

    _time(run, pipe, model, quick, json_path, caption=_WHOLE_RUN)


def _among(chosen: list[str] | None, known: Iterable[str]) -> tuple[str, ...]:
    """The methods that were asked for, or all."""
    names = tuple(known)
    if unknown := [name for name in chosen or () if name not in names]:
        raise common.CliError(f"no method {unknown[0]!r}; expected one of {', '.join(names)}")
    return tuple(chosen or names)


def _time(run, pipe, model: str, quick: bool, json_path: Path | None, **shown: str) -> None:
    """Run a benchmark of a loaded model, write its rows where asked, and show them: `shown` is for `show`."""
    console = common.console()
    with console.status("timing; keep the machine quiet"):
        rows = [{**row, "model": model} for row in run(pipe, quick=quick)]
    if json_path is not None:
        common.write_json(json_path, rows)
    show(console, rows, **shown)


def _held_out(json_path: Path | None, world: str, prompts: int, steps: int | None) -> None:
    from ..benchmarks.token_merging.references import batches, run

    about = common.world_of(world)
    with common.progress("pictures, four at a time", batches(prompts)) as advance:
        rows = run(about.name, prompts, steps, advance)
    if json_path is not None:
        common.write_json(json_path, rows)
    caption = "setting chosen on the calibration reference; every other one is held out"
    _judged(caption, rows, ("reference", "role", "name", "judge"))


def _judged(caption: str, rows: list[dict], said: tuple[str, ...]) -> None:
    """Print what tells rows apart, and their figures; of shares the value alone."""
    from rich.table import Table

    apart = {"steps", "guidance_scale"}
    figures = [name for name, value in rows[0].items() if isinstance(value, (float, list)) and name not in apart]
    table = Table(caption=caption)
    for heading in (*said, *figures):
        table.add_column(heading.replace("_", " "))
    for row in rows:
        values = (row[name][0] if isinstance(row[name], list) else row[name] for name in figures)
        table.add_row(*(row[name] for name in said), *(f"{value:.3f}" for value in values))
    common.console().print(table)


@app.command("comfyui", epilog="Example: semiperm bench comfyui --path ~/comfy/ComfyUI --json comfyui.json")
def comfyui(
    path: Annotated[Path, typer.Option(envvar="COMFYUI_PATH", help="The ComfyUI folder.")] = Path("~/comfy/ComfyUI"),
    python: Annotated[
        Path | None, typer.Option(envvar="COMFYUI_PYTHON", help="Its Python. Default: that of a venv beside it.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Pairs of runs for each figure.")] = 15,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
):
    """Time sampling in ComfyUI with 1, 10 and 100 membranes against the bare graph."""
    from .bench_watermark import in_comfyui

    console = common.console()
    with console.status("timing; keep the machine quiet"):
        rows = in_comfyui(path, python, Path("membranes", "comfyui.py"), rounds)
    if json_path is not None:
        common.write_json(json_path, rows)
    show(console, rows)


@app.command("results", epilog="Example: semiperm bench results --check")
def results(
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page to write.")] = Path("docs/results.md"),
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; the exit code is 1 if the page is stale.")
    ] = False,
):
    """Write docs/results.md from benchmarks/results/*.json; run it in a clone."""
    from ..benchmarks.page.results import page, read

    try:
        text = page(read(Path("benchmarks/results")))
    except FileNotFoundError as error:
        raise common.CliError(f"there is no {error.filename} here; run this in the folder of a clone") from error
    if check:
        if not out.is_file() or out.read_text(encoding="utf-8") != text:
            typer.echo(f"{out} is stale; run: semiperm bench results --out {out}", err=True)
            raise typer.Exit(1)
    else:
        common.write_file(out, text)
    common.console().print(str(out), markup=False, soft_wrap=True)


def show(
    console,
    rows: list[dict],
    case: str = "k",
    caption: str = "time of one step, in times the bare pipeline's (median, middle half)",
) -> None:
    """Print the table: the median ratio to the bare pipeline, and its spread; `case` is what else tells rows apart."""
    from rich.table import Table

    table = Table(caption=caption)
    for heading in ("name", case, "ratio", "spread"):
        table.add_column(heading)
    for row in rows:
        low, high = row["spread"]
        table.add_row(row["name"], str(row[case]), f"{row['ratio']:.3f}", f"{low:.3f} to {high:.3f}")
    console.print(table)
