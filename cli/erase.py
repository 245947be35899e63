"""`semiperm erase`: compute closed-form membranes and write them to one file."""

from pathlib import Path
from typing import Annotated

import typer

from . import common

EXAMPLE = 'Example: semiperm erase canvas --concept robot --concept "sketch|outlined" -o erased.safetensors'


def run(
    model: common.Model,
    concept: Annotated[
        list[str], typer.Option(help='A concept to erase; repeatable. Synonyms after bars: "robot|android|droid".')
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The membrane file to write (.safetensors).")],
    surrogate: Annotated[str, typer.Option(help="What the concept turns into. Default: nothing in particular.")] = "",
    preserve: Annotated[
        list[str] | None, typer.Option(help="A prompt whose picture must not change; repeatable.")
    ] = None,
    device: common.Device = "auto",
    dtype: common.DType = "auto",
):
    """Compute a membrane for each concept, in closed form (no training), and write them to one file.

    The file is safetensors in the kohya LoRA layout. `semiperm generate` gates it by the prompt; other programs load
    it as a plain LoRA, always on. The table says how well each concept's detector tells its prompts from others, on
    prompts that it was not fitted on.
    """
    if output.suffix != ".safetensors":
        raise common.CliError(f"-o {output}: membranes are written as safetensors; name it {output.stem}.safetensors")
    console = common.console()
    pipe = common.load_model(model, device, dtype)

    from time import perf_counter

    from ..methods.membranes.file import save_membranes
    from ..pipelines.membranes.erase import erase_concepts

    start = perf_counter()
    membranes = erase_concepts(pipe, concept, surrogate=surrogate, preserve=preserve or None)
    seconds = perf_counter() - start
    output.parent.mkdir(parents=True, exist_ok=True)
    save_membranes(membranes, output)
    common.show_gates(console, membranes)
    console.print(
        f"{output}: {', '.join(membranes.concepts)}; {len(membranes.module_keys)} modules,"
        f" {output.stat().st_size / 1024:.0f} KiB, computed in {seconds:.2f} s",
        markup=False,
    )
