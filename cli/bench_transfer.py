"""`semiperm bench transfer`: membranes of an embedded model on a fine-tuned copy of it."""

from pathlib import Path
from typing import Annotated

import typer

from . import common

EXAMPLE = "Example: semiperm bench transfer --world canvas-scenes --concept robot --work transfer --json transfer.json"


def run(
    world: Annotated[str, typer.Option(metavar="MODEL", help="The embedded model to copy.")] = "canvas",
    concept: Annotated[list[str] | None, typer.Option(help="A concept to erase from its name; repeatable.")] = None,
    side: Annotated[str, typer.Option(help="Of these membranes: text, image or both.")] = "text",
    membrane: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Membranes made on that model, in place of --concept.")
    ] = None,
    shift: Annotated[str, typer.Option(help="The copy's other style: colours or texture.")] = "colours",
    train_steps: Annotated[int, typer.Option(min=1, help="Of the copy's fine-tuning.")] = 400,
    pictures: Annotated[int, typer.Option(min=1, help="That it is fine-tuned on.")] = 1024,
    each: Annotated[int, typer.Option(min=1, help="Pictures that ask for a concept, and as many that do not.")] = 24,
    steps: common.Steps = None,
    work: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep what is done here, and go on from it.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
    device: common.Device = "auto",
    dtype: common.DType = "auto",
):
    """Fine-tune a copy of the model to another style, apply membranes made on the original, and count points lost."""
    if bool(concept) == bool(membrane):
        raise common.CliError("give either --concept NAME (one or more) or --membrane FILE (one or more)")

    from ..benchmarks.membranes.transfer import TransferConfig
    from ..benchmarks.membranes.transfer import run as measure

    about = common.world_of(world)
    config = TransferConfig(shift=shift, steps=train_steps, pictures=pictures, each=each)
    pipe, sampling = common.load_model(world, device, dtype), common.sampling(world, steps, None)
    if membrane:
        made: dict = {}
        for one in common.load_stack(pipe, membrane):
            made.setdefault(about.resolve(one.concept)[0], []).append(one)
    else:
        from ..methods.membranes.visual_fit import VisualConfig
        from ..pipelines.membranes.erase import erase_concepts

        visual = VisualConfig(sampling={k: v for k, v in sampling.items() if k == "guidance_scale"})
        names = [about.resolve(name)[0] for name in concept or ()]
        made = {name: erase_concepts(pipe, "|".join(about.phrases(name)), side=side, visual=visual) for name in names}
    with common.progress("training steps and pictures", None) as advance:
        result = measure(pipe, about, made, config, work, advance, **sampling)
    if json_path is not None:
        common.write_json(json_path, result)

    from rich.table import Table

    table = Table(caption="shares of pictures; lost: original - copy")
    shown = ("ua_original", "ua_copy", "ua_lost", "untouched_ua_copy", "ira_original", "ira_copy", "kept_lost")
    for heading in ("concept", "judge", *(name.replace("_", " ") for name in shown)):
        table.add_column(heading)
    for row in result["rows"]:
        values = [row[name][0] if isinstance(row[name], list) else row[name] for name in shown]
        table.add_row(row["concept"], row["judge"], *("-" if v is None else f"{v:.3f}" for v in values))
    common.console().print(table)
