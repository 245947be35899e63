"""`semiperm demo`: erase a concept from the embedded model, and show the same prompts and seeds before and after."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from . import common

EXAMPLE = "Example: semiperm demo --out semiperm-demo"


@dataclass(frozen=True)
class Column:
    """One prompt of the grid, the concepts erased for it, and what it asks for."""

    title: str
    prompt: str
    erased: tuple[str, ...]
    asked: dict[str, str]  # domain -> concept that the prompt asks for

    def gone(self) -> dict[str, str]:
        return {domain: name for domain, name in self.asked.items() if name in self.erased}


def _column(title: str, prompt: str, asked: tuple[str, str], erased: tuple[str, ...] = ("robot",)) -> Column:
    return Column(title, prompt, erased, {"object": asked[0], "style": asked[1]})


COLUMNS = (
    _column("by name", "a dotted picture of a robot on a sand background", ("robot", "dotted")),
    _column("by synonym", "a tiled picture of a mechanical man on a mint background", ("robot", "mosaic")),
    _column("a neighbour", "a striped picture of a ghost on a sky background", ("ghost", "striped")),
    _column("unrelated", "a flat picture of a red circle on a fog background", ("circle", "flat")),
    _column(
        "two stacked", "a sketch picture of a robot on a lilac background", ("robot", "sketch"), ("robot", "sketch")
    ),
)
PICTURES = 2  # a prompt


def run(
    out: Annotated[Path, typer.Option(help="Folder for demo.png and report.json.")] = Path("semiperm-demo"),
    seed: Annotated[
        int, typer.Option(min=0, max=common.MOST_SEED, help="Seed of the first picture of each prompt.")
    ] = 0,
):
    """Erase a robot from the embedded model (CPU, no download) and show the same pictures before and after.

    Writes demo.png, a labelled grid, and report.json, what the judge saw. The last column erases a style as well.
    """
    from time import perf_counter

    start = perf_counter()
    console = common.console()
    with console.status("loading the embedded model"):
        pipe = common.load_model("canvas", "cpu", "float32")

        from ..canvas import Judge
        from ..pipelines.membranes.apply import apply_membranes, remove_membranes
        from ..pipelines.membranes.erase import erase_concepts

        judge = Judge.load()
    algebra = perf_counter()
    membranes = {name: erase_concepts(pipe, name) for name in ("robot", "sketch")}
    algebra = perf_counter() - algebra

    sampling = common.sampling("canvas", None, None)
    seeds = [seed + i for i in range(PICTURES)]
    stacks = list(dict.fromkeys(column.erased for column in COLUMNS))
    with common.progress("generating", sampling["num_inference_steps"] * (1 + len(stacks))) as advance:

        def pictures(columns):
            prompts = [column.prompt for column in columns for _ in seeds]
            images = pipe(
                prompts,
                generator=common.generators(seeds * len(columns)),
                callback_on_step_end=lambda _pipe, _step, _time, kwargs: advance() or kwargs,
                **sampling,
            ).images
            verdict = judge(images)
            found = [{"object": o, "style": s} for o, s in zip(verdict.object, verdict.style, strict=True)]
            cut = range(0, len(images), PICTURES)
            return [(images[i : i + PICTURES], found[i : i + PICTURES]) for i in cut]

        before = dict(zip((c.title for c in COLUMNS), pictures(COLUMNS), strict=True))
        after = {}
        for stack in stacks:
            columns = [column for column in COLUMNS if column.erased == stack]
            together = membranes[stack[0]]
            for name in stack[1:]:
                together += membranes[name]
            apply_membranes(pipe, together)
            try:
                after |= zip((c.title for c in columns), pictures(columns), strict=True)
            finally:
                remove_membranes(pipe)

    from .grid import demo_grid

    common.write_png(out / "demo.png", demo_grid(COLUMNS, before, after))
    report = {
        "seconds": round(perf_counter() - start, 2),
        "algebra_seconds": round(algebra, 3),
        "seeds": seeds,
        **sampling,
        "before": {c.title: entry(c, before[c.title][1], ()) for c in COLUMNS},
        "after": {c.title: entry(c, after[c.title][1], c.erased) for c in COLUMNS},
    }
    common.write_json(out / "report.json", report)
    show(console, report)
    console.print(
        f"{report['seconds']:.0f} s, of which the algebra {algebra:.2f} s. See {out / 'demo.png'}", markup=False
    )


def entry(column: Column, found: list[dict[str, str]], erased: tuple[str, ...]) -> dict:
    """What the judge saw of one prompt, and whether that is what should be seen with `erased` taken out."""
    gone = column.gone() if erased else {}
    right = [
        all(seen[domain] != name if domain in gone else seen[domain] == name for domain, name in column.asked.items())
        for seen in found
    ]
    return {"prompt": column.prompt, "erased": list(erased), "seen": found, "as_wanted": right}


def show(console, report: dict) -> None:
    """Print the short table."""
    from rich.table import Table

    table = Table()
    for heading in ("", "erased", "prompt", "judge sees before", "and after", "as wanted"):
        table.add_column(heading)
    for title, after in report["after"].items():
        seen = [
            "\n".join(dict.fromkeys(f"{s['object']}, {s['style']}" for s in side["seen"]))
            for side in (report["before"][title], after)
        ]
        right = f"{sum(after['as_wanted'])} of {len(after['as_wanted'])}"
        table.add_row(title, ", ".join(after["erased"]), after["prompt"], *seen, right)
    console.print(table)
