"""`semiperm demo`: erase concepts from two embedded models, and show the same prompts and seeds before and after."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from . import common

EXAMPLE = "Example: semiperm demo --out semiperm-demo"


@dataclass(frozen=True)
class Column:
    """One prompt of the grid, the names of what it asks for, and the concepts erased for it."""

    title: str
    prompt: str
    asked: tuple[str, ...]
    erased: tuple[str, ...] = ("robot",)

    def as_wanted(self, seen, erased: bool) -> bool:
        """Whether a judge sees (canvas.world.Shown) what was asked for, without what is erased."""
        return all((name in seen) != (erased and name in self.erased) for name in self.asked)


# model -> its prompts
COLUMNS = {
    "canvas": (
        Column("by name", "a dotted picture of a robot on a sand background", ("robot", "dotted")),
        Column("by synonym", "a tiled picture of a mechanical man on a mint background", ("robot", "mosaic")),
        Column("a neighbour", "a striped picture of a ghost on a sky background", ("ghost", "striped")),
        Column("unrelated", "a flat picture of a red circle on a fog background", ("circle", "flat")),
        Column(
            "two stacked", "a sketch picture of a robot on a lilac background", ("robot", "sketch"), ("robot", "sketch")
        ),
    ),
    "canvas-flow": (
        Column("by name", "a flat picture of a robot on a sand background", ("robot", "flat")),
        Column("by synonym", "Can you paint an android? Dotted, mint", ("robot", "dotted")),
        Column(
            "one of two",
            "a robot to the left of a blue heart, flat, sky background",
            ("robot", "heart", "flat"),
        ),
        Column("a neighbour", "a striped picture of a ghost on a night background", ("ghost", "striped")),
        Column("unrelated", "a red circle, flat, fog background", ("circle", "flat")),
    ),
}
PICTURES = 2  # a prompt


def run(
    out: Annotated[Path, typer.Option(help="Folder for demo.png and report.json.")] = Path("semiperm-demo"),
    seed: Annotated[
        int, typer.Option(min=0, max=common.MOST_SEED, help="Seed of the first picture of each prompt.")
    ] = 0,
):
    """Erase a robot from two embedded models (CPU, no download) and show the same pictures before and after.

    Writes demo.png, a labelled grid for each, and report.json, what the judge saw. One column erases a style as well.
    """
    from time import perf_counter

    start = perf_counter()
    console = common.console()
    seeds = [seed + i for i in range(PICTURES)]
    grids, report = [], {"seconds": 0.0, "seeds": seeds, "models": {}}
    for name, columns in COLUMNS.items():
        grid, report["models"][name] = _one(console, name, columns, seeds)
        grids.append(grid)

    from .grid import stacked

    common.write_png(out / "demo.png", stacked(grids))
    report["seconds"] = round(perf_counter() - start, 2)
    common.write_json(out / "report.json", report)
    algebra = sum(row["algebra_seconds"] for row in report["models"].values())
    console.print(
        f"{report['seconds']:.0f} s, of which the algebra {algebra:.1f} s. See {out / 'demo.png'}", markup=False
    )


def _one(console, model: str, columns: Sequence[Column], seeds: list[int]):
    """One model's grid and its part of the report; its table is printed."""
    from time import perf_counter

    with console.status(f"loading {model}"):
        pipe = common.load_model(model, "cpu", "float32")

        from ..canvas.editions import world_of
        from ..canvas.models import MODELS
        from ..pipelines.membranes.apply import apply_membranes, remove_membranes
        from ..pipelines.membranes.erase import erase_concepts

        judge = next(iter(world_of(model).judges().values()))
    stacks = list(dict.fromkeys(column.erased for column in columns))
    algebra = perf_counter()
    membranes = {name: erase_concepts(pipe, name) for name in dict.fromkeys(sum(stacks, ()))}
    algebra = perf_counter() - algebra

    sampling = common.sampling(model, None, None)
    with common.progress(f"generating with {model}", sampling["num_inference_steps"] * (1 + len(stacks))) as advance:

        def pictures(columns, erased):
            prompts = [column.prompt for column in columns for _ in seeds]
            images = pipe(
                prompts,
                generator=common.generators(seeds * len(columns)),
                callback_on_step_end=lambda _pipe, _step, _time, kwargs: advance() or kwargs,
                **sampling,
            ).images
            seen = judge(images).shown
            cuts = [slice(i, i + PICTURES) for i in range(0, len(images), PICTURES)]
            return {
                column.title: (images[cut], entry(column, seen[cut], erased))
                for column, cut in zip(columns, cuts, strict=True)
            }

        before, after = pictures(columns, False), {}
        for stack in stacks:
            own = [column for column in columns if column.erased == stack]
            together = membranes[stack[0]]
            for name in stack[1:]:
                together += membranes[name]
            apply_membranes(pipe, together)
            try:
                after |= pictures(own, True)
            finally:
                remove_membranes(pipe)

    from .grid import demo_grid

    report = {
        "algebra_seconds": round(algebra, 3),
        **sampling,
        "before": {title: row for title, (_, row) in before.items()},
        "after": {column.title: after[column.title][1] for column in columns},
    }
    show(console, model, report)
    return demo_grid(f"{model}: {MODELS[model].about}", columns, before, after), report


def said(seen) -> str:
    """What a judge saw (canvas.world.Shown) in a few words."""
    return ", ".join((" + ".join(seen.objects) or "nothing", seen.style))


def entry(column: Column, seen: Sequence, erased: bool) -> dict:
    """What the judge saw of one prompt, and whether that is what should be seen."""
    return {
        "prompt": column.prompt,
        "erased": list(column.erased) if erased else [],
        "seen": [said(one) for one in seen],
        "as_wanted": [column.as_wanted(one, erased) for one in seen],
    }


def show(console, model: str, report: dict) -> None:
    """Print the short table."""
    from rich.table import Table

    table = Table(title=model)
    for heading in ("", "erased", "prompt", "judge sees before", "and after", "as wanted"):
        table.add_column(heading)
    for title, after in report["after"].items():
        seen = ["\n".join(dict.fromkeys(side["seen"])) for side in (report["before"][title], after)]
        right = f"{sum(after['as_wanted'])} of {len(after['as_wanted'])}"
        table.add_row(title, ", ".join(after["erased"]), after["prompt"], *seen, right)
    console.print(table)
