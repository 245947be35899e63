"""`semiperm canvas worlds`: the second edition's workshop; `semiperm canvas check` measures what comes out."""

from pathlib import Path
from typing import Annotated

import typer

from . import common

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Train and export the second edition.")
Workdir = Annotated[Path, typer.Option(help="Folder of checkpoints and logs; run again to resume.")]


@app.command(epilog="Example: semiperm canvas worlds train canvas-flow --workdir canvas-training")
def train(
    part: Annotated[
        str, typer.Argument(help="reading-first, judge-first, canvas (of canvas-scenes), canvas-flow, ...")
    ],
    workdir: Workdir = Path("canvas-training"),
    weights: Annotated[
        Path | None, typer.Option(help="Exported weights to go on from, where the working folder lacks them.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Length of the schedule. Default: the part's own.")] = None,
    stop_after: Annotated[int | None, typer.Option(min=1, help="Stop here; the same command resumes.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=common.MOST_SEED)] = 0,
):
    """Train one part, or go on where it stopped; it picks the quicker precision by timing a step of each."""
    from ..canvas import embedded, pipeline, worlds

    common.quiet()
    try:
        if weights:
            embedded.read_weights(weights, workdir)
        worlds.train_part(part, workdir, pipeline.WEIGHTS, steps=steps, stop_after=stop_after, seed=seed)
    except (ValueError, FileNotFoundError) as error:
        raise common.CliError(common.one_line(error)) from error
    common.console().print(str(workdir), markup=False)


@app.command(epilog="Example: semiperm canvas worlds export weights --workdir canvas-training")
def export(
    folder: Annotated[Path, typer.Argument(help="Where the fp16 weights go.")],
    workdir: Workdir = Path("canvas-training"),
):
    """Write the finished parts of a working folder as weights that `canvas check` and the pipelines read."""
    from ..canvas import embedded

    common.quiet()
    written = embedded.write_weights(workdir, folder)
    common.console().print(f"{folder}: {', '.join(written) or 'nothing is finished'}", markup=False)
