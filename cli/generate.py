"""`semiperm generate`: pictures, with any number of membranes."""

import re
from pathlib import Path
from typing import Annotated

import typer

from . import common

EXAMPLE = (
    'Example: semiperm generate canvas "a robot in sketch style on sky" --membrane erased.safetensors -o robot.png'
)


def run(
    model: common.Model,
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts.", metavar="PROMPT...", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .png file, or a folder for several prompts.")],
    membrane: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:strength]", help="A membrane file; repeatable. Strength 0 to 1.")
    ] = None,
    gate: Annotated[str, typer.Option(help="auto, probe, paper, official or always (see the README).")] = "auto",
    negative: Annotated[str | None, typer.Option(help="Negative prompt.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture; the next ones count up.")] = 0,
    steps: common.Steps = None,
    guidance: common.Guidance = None,
    device: common.Device = "auto",
    dtype: common.DType = "auto",
):
    """Generate one picture a prompt. What the gates did is kept in each PNG's text chunk `semiperm`."""
    paths = output_paths(output, prompt)
    for text in membrane or ():
        common.split_strength(text)
    pipe = common.load_model(model, device, dtype)
    stack = common.load_stack(pipe, membrane or [])
    sampling = common.sampling(model, steps, guidance)

    from ..pipelines.membranes import MembraneConfig, apply_membranes

    handle = apply_membranes(pipe, stack, MembraneConfig(gate=gate)) if len(stack) else None
    if negative is not None:
        sampling["negative_prompt"] = negative
    with common.progress("generating", len(prompt)) as advance:
        for index, (words, path) in enumerate(zip(prompt, paths, strict=True)):
            image = pipe(words, generator=common.generators([seed + index]), **sampling).images[0]
            record = {"model": model, "prompt": words, "seed": seed + index, **sampling}
            if handle is not None:
                record |= {"membranes": list(stack.concepts), "fired": handle.report()}
            common.write_png(path, image, record)
            advance()
    console = common.console()
    for path in paths:
        console.print(str(path), markup=False)


def output_paths(output: Path, prompts: list[str]) -> list[Path]:
    """One path a prompt: the .png itself, or numbered names in the folder."""
    if output.suffix.lower() == ".png":
        if len(prompts) > 1:
            raise common.CliError(f"{len(prompts)} prompts do not fit into one file {output}; give a folder to -o")
        return [output]
    if output.suffix:
        raise common.CliError(f"-o {output}: pictures are written as .png; give a .png file or a folder")
    names = (re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48] for text in prompts)
    return [output / f"{index:03d}-{name or 'prompt'}.png" for index, name in enumerate(names)]
