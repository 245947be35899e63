"""`semiperm arena`: every way to erase against every way to bring a concept back."""

from pathlib import Path
from typing import Annotated

import typer

from . import common

EXAMPLE = "Example: semiperm arena --quick --world canvas --json arena.json --markdown arena.md --plot arena.png"


def run(
    quick: Annotated[
        bool, typer.Option("--quick", help="Few pictures of few concepts: under half an hour on two cores.")
    ] = False,
    world: Annotated[list[str] | None, typer.Option(help="An embedded model; repeatable. Default: canvas.")] = None,
    methods: Annotated[
        list[str] | None, typer.Option(metavar="NAME,...", help="Who takes part; repeatable. Default: all.")
    ] = None,
    concepts: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME,...", help="What is erased, one at a time; repeatable. Default: the world's suite."),
    ] = None,
    sets: Annotated[
        str | None,
        typer.Option(
            metavar="N,...", help="Erased at once. Default: 3,10,30, or 3 with --quick, none with --concepts."
        ),
    ] = None,
    membrane: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE[:STRENGTH]", help="Trained membranes that take part as NAME; repeatable."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.0, help="After these nothing new is begun. Default with --quick: 25.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the tables here.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw quality against robustness, with intervals.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep finished cells here and go on from them; parts may share it."),
    ] = None,
    steps: common.Steps = None,
    device: common.Device = "auto",
    dtype: common.DType = "auto",
):
    """Erase concepts by every method, ask and attack, and say what is left and what it cost: JSON, tables, a plot.

    Each method is told the concepts' plain names. Measured are UA in public and in reserved words, what is kept of
    everything else, alone and in scenes, six attacks, seconds to make, time of a step and size; and how far methods
    stand in the order that others published. What cannot be measured says why.
    """
    files = dict(_file(text) for text in membrane or ())
    sizes = None if sets is None else [_size(text) for text in _names([sets])]
    worlds = [common.world_of(name) for name in dict.fromkeys(world or ["canvas"])]

    from dataclasses import asdict, replace

    from ..benchmarks.arena.measure import enter, measure, plan
    from ..benchmarks.arena.orderings import agreement
    from ..benchmarks.arena.settings import FULL, QUICK
    from ..benchmarks.timing import machine, versions

    settings = QUICK if quick else FULL
    settings = replace(settings, minutes=settings.minutes if minutes is None else minutes)
    if minutes is None and settings.minutes is not None:  # of all worlds together
        settings = replace(settings, minutes=settings.minutes / len(worlds))
    entries = [plan(one, quick, _names(methods), _names(concepts), sizes, files) for one in worlds]
    found: dict = {"quick": quick, "settings": asdict(settings), "rows": [], "missing": []}
    for one, entry in zip(worlds, entries, strict=True):
        sampling = common.sampling(one.name, steps or min(settings.steps or one.steps, one.steps), None)

        def load(name: str = one.name):
            return common.load_model(name, device, dtype)

        arena = enter(one, load, entry, settings, resume, **sampling)
        with common.progress(f"cells, {one.name}", arena.total(entry.sets)) as advance:
            arena.on_cell(advance)
            part = measure(arena, entry)
        found["rows"] += part["rows"]
        found["missing"] += part["missing"]
        found |= {"machine": machine(arena.bare.device, arena.bare.dtype), "versions": versions("torch", "diffusers")}
    found["orderings"] = agreement(found["rows"])
    _write(found, [one.name for one in worlds], json_path, markdown, plot)


def _names(texts: list[str] | None) -> list[str]:
    return [part.strip() for text in texts or () for part in text.split(",") if part.strip()]


def _size(text: str) -> int:
    if not text.isdigit() or int(text) < 2:
        raise common.CliError(f"--sets {text}: expected whole numbers of at least 2, such as 3,10")
    return int(text)


def _file(text: str):
    """(name, (path, what loads it for a pipeline))."""
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise common.CliError(f"--membrane {text}: expected NAME=FILE, such as trained=robot.safetensors")
    path, _ = common.split_strength(file)
    return name, (path, lambda pipe: common.load_stack(pipe, [file]))


def _write(found: dict, worlds: list[str], json_path: Path | None, markdown: Path | None, plot: Path | None) -> None:
    from ..benchmarks.arena.plot import arena_plot
    from ..benchmarks.page.arena import tables

    text = "\n\n".join(f"# The arena, {world}\n\n{tables(found, world)}" for world in worlds) + "\n"
    if json_path is not None:
        common.write_json(json_path, found)
    if plot is not None:
        common.write_png(plot, arena_plot(found["rows"]))
    if markdown is not None:
        common.write_file(markdown, text)
    else:
        typer.echo(text)
    for one in found["orderings"]:
        if one["arena"]:  # the others are at the end of the tables
            said = one["why"] if one["rho"] is None else f"rank correlation {one['rho']:.2f}"
            common.say(f"{one['world']}, {one['judge']} judge, {one['what']} ({one['source']}): {said}")
