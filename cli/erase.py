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
    side: Annotated[
        str,
        typer.Option(help="text: what words say. image: what pictures show, however it was asked for. both: two each."),
    ] = "text",
    picture: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A picture of the one concept, for its image side; at least 4 of them."),
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option(help='A caption with "{}" in the concept\'s place; repeatable.')
    ] = None,
    other: Annotated[
        list[str] | None, typer.Option(help="What stands in its place in pictures without it; repeatable.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Of the image side's runs. Default: 5.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of these runs. Default: the model's.")] = None,
    device: common.Device = "auto",
    dtype: common.DType = "auto",
):
    """Compute a membrane for each concept, in closed form (no training), and write them to one file.

    The file is safetensors in the kohya LoRA layout. `semiperm generate` gates it by the prompt; other programs load
    it as a plain LoRA, always on. The table says how well each concept's detector tells its prompts from others, on
    prompts that it was not fitted on.

    The image side draws some hundred pictures in few steps, which takes as long as that takes.
    """
    if output.suffix != ".safetensors":
        raise common.CliError(f"-o {output}: membranes are written as safetensors; name it {output.stem}.safetensors")
    console = common.console()
    pipe = common.load_model(model, device, dtype)

    from time import perf_counter

    from ..methods.membranes.file import save_membranes
    from ..pipelines.membranes.erase import erase_concepts

    options: dict = {"surrogate": surrogate, "preserve": preserve or None, "templates": template or None, "side": side}
    start = perf_counter()
    if side == "text" and not picture:
        membranes = erase_concepts(pipe, concept, **options)
    else:
        options["visual"] = _visual(model, steps, guidance, other)
        if picture and len(concept) > 1:
            raise common.CliError(f"--picture with {len(concept)} concepts: one file is of one concept, make two files")
        if picture:
            options["pictures"] = {concept[0].split("|")[0].strip(): picture}
        with common.progress("drawing", None) as advance:
            membranes = erase_concepts(pipe, concept, progress=advance, **options)
    seconds = perf_counter() - start
    output.parent.mkdir(parents=True, exist_ok=True)
    save_membranes(membranes, output)
    common.show_gates(console, membranes)
    console.print(
        f"{output}: {', '.join(membranes.concepts)}; {len(membranes.module_keys + membranes.image_keys)} modules,"
        f" {output.stat().st_size / 1024:.0f} KiB, computed in {seconds:.2f} s",
        markup=False,
    )


def _visual(model: str, steps: int | None, guidance: float | None, other: list[str] | None):
    """How the image side is fitted."""
    from ..methods.membranes.visual_fit import VisualConfig

    sampling = {k: v for k, v in common.sampling(model, steps, guidance).items() if k == "guidance_scale"}
    given = {} if steps is None else {"steps": steps}
    return VisualConfig(others=tuple(other or ()), sampling=sampling, **given)
