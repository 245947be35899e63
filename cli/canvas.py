"""`semiperm canvas`: the embedded model's own workshop: render its world, train it, check it."""

import random
from pathlib import Path
from typing import Annotated

import typer

from . import common, worlds

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Render, train and check the embedded model.")
app.add_typer(worlds.app, name="worlds")
EmbeddedModel = Annotated[str, typer.Argument(metavar="MODEL", help=f"{', '.join(common.MODELS)}.")]
Weights = Annotated[Path | None, typer.Option(help="Folder of the model's weights. Default: the shipped ones.")]


@app.command(epilog="Example: semiperm canvas render --object robot --style sketch -o robot.png")
def render(
    output: Annotated[Path, typer.Option("--output", "-o", help="The .png file to write.")],
    object_: Annotated[str | None, typer.Option("--object", help="Default: drawn at random, like all below.")] = None,
    style: Annotated[str | None, typer.Option()] = None,
    color: Annotated[str | None, typer.Option()] = None,
    background: Annotated[str | None, typer.Option()] = None,
    hazard: Annotated[bool | None, typer.Option("--hazard/--no-hazard")] = None,
    seed: Annotated[int, typer.Option(min=0, max=common.MOST_SEED)] = 0,
):
    """Draw one picture of the canvas world, without the model, and print a caption of it."""
    from ..canvas import captions
    from ..canvas import render as renderer

    fixed = {"object": object_, "style": style, "color": color, "background": background, "hazard": hazard}
    rng = random.Random(seed)
    try:
        scene = renderer.random_scene(rng, **{key: value for key, value in fixed.items() if value is not None})
    except ValueError as error:
        raise common.CliError(str(error)) from error
    common.write_png(output, renderer.render(scene))
    common.console().print(f"{output}: {captions.caption(scene, rng)}", markup=False)


@app.command(epilog="Example: semiperm canvas gallery -o gallery.png")
def gallery(
    output: Annotated[Path, typer.Option("--output", "-o", help="The .png file to write.")],
    samples: Annotated[bool, typer.Option("--samples", help="Pictures by the model, not the renderer.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=common.MOST_SEED)] = 0,
):
    """Lay out every object in every style on one sheet."""
    from PIL import Image

    from ..canvas import captions
    from ..canvas import render as renderer

    scenes = [
        renderer.random_scene(random.Random(f"{seed}-{name}-{style}"), object=name, style=style, hazard=False)
        for name in captions.OBJECTS
        for style in captions.STYLES
    ]
    columns, size = len(captions.STYLES), renderer.SIZE
    sheet = Image.new("RGB", (columns * size, len(captions.OBJECTS) * size))
    pipe = common.load_model("canvas") if samples else None
    sampling = common.sampling("canvas", None, None)
    with common.progress("pictures", len(scenes)) as advance:
        for start in range(0, len(scenes), columns):
            part = scenes[start : start + columns]
            if pipe is None:
                images = [renderer.render(scene) for scene in part]
            else:
                texts = [captions.caption(scene, random.Random(seed), complete=True) for scene in part]
                images = pipe(
                    texts, generator=common.generators([seed + start + i for i in range(columns)]), **sampling
                ).images
            for column, image in enumerate(images):
                sheet.paste(image, (column * size, start // columns * size))
            advance(len(part))
    common.write_png(output, sheet)
    common.console().print(str(output), markup=False)


@app.command(epilog="Example: semiperm canvas train --out weights")
def train(
    out: Annotated[Path, typer.Option(help="Folder of the finished weights.")],
    workdir: Annotated[Path, typer.Option(help="Folder of checkpoints and logs; run again to resume.")] = Path(
        "canvas-training"
    ),
    part: Annotated[
        list[str] | None, typer.Option(help="autoencoder, judge or denoiser; repeatable. Default: all.")
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Rendered pictures to learn from.")] = 24_000,
    autoencoder_steps: Annotated[int, typer.Option(min=1)] = 1500,
    judge_steps: Annotated[int, typer.Option(min=1)] = 1400,
    denoiser_steps: Annotated[int, typer.Option(min=1)] = 16_000,
    compile_: Annotated[bool, typer.Option("--compile/--no-compile", help="Train through torch.compile.")] = True,
    start_from: Annotated[
        Path | None, typer.Option(help="Finished weights to go on from: keeps the autoencoder, trains the denoiser on.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=common.MOST_SEED)] = 0,
):
    """Train the embedded model and its judge from nothing; takes hours on two cores and can be resumed."""
    from ..canvas.training import PARTS, train_canvas

    if unknown := sorted(set(part or ()) - set(PARTS)):
        raise common.CliError(f"--part {unknown[0]} is unknown; choose from {', '.join(PARTS)}")
    common.quiet()
    train_canvas(
        out, workdir, pictures=pictures, autoencoder_steps=autoencoder_steps, judge_steps=judge_steps,
        denoiser_steps=denoiser_steps, parts=tuple(part or PARTS), compile=compile_, seed=seed, start_from=start_from,
    )  # fmt: skip
    common.console().print(str(out), markup=False)


@app.command(epilog="Example: semiperm canvas reader canvas-flow --out weights/reader-canvas-flow.safetensors")
def reader(
    out: Annotated[Path, typer.Option(help="The reader's .safetensors file.")],
    model: EmbeddedModel = "canvas",
    workdir: Annotated[Path, typer.Option(help="Folder of pictures and checkpoints; run again to resume.")] = Path(
        "canvas-training"
    ),
    weights: Weights = None,
    pictures: Annotated[int, typer.Option(min=16, help="To learn from, in whole sixteens.")] = 1600,
    steps: Annotated[int, typer.Option(min=1)] = 1500,
    seed: Annotated[int, typer.Option(min=0)] = 0,
):
    """Train the reader of marks: what `detect` asks between inversion's short and long ways. Tied to these weights.

    It draws and edits pictures of the model, without any key, and learns to tell the signs of their noise. It picks the
    quicker precision by timing a step of each, and says which.
    """
    from ..pipelines.watermark.reader import SAMPLING, Schedule, train_reader

    pipe, world, prompt = _drawing(model, weights, "reader")
    sampling = SAMPLING if world.guidance_scale > 1 else ((world.steps, world.guidance_scale),)
    schedule = Schedule(pictures, steps, seed, sampling)
    with common.progress("pictures", -(-pictures // 16) * 16) as advance:
        _, precision = train_reader(pipe, prompt, out, workdir, schedule, advance=advance)
    common.console().print(f"{out}: trained in {precision}", markup=False)


@app.command(epilog="Example: semiperm canvas channels canvas-flow --out weights/channels-canvas-flow.safetensors")
def channels(
    out: Annotated[Path, typer.Option(help="The .safetensors file of the weights.")],
    model: EmbeddedModel = "canvas",
    weights: Weights = None,
    pictures: Annotated[int, typer.Option(min=4, help="To measure on.")] = 32,
    seed: Annotated[int, typer.Option(min=0)] = 0,
):
    """Measure how much each channel of a model's latents says of the noise: what `detect` weighs its signs by.

    It draws pictures of the model, without any key, and inverts them. Tied to these weights.
    """
    from ..methods.watermark.channels import save_channels
    from ..pipelines.watermark.channels import measure_channels

    pipe, world, prompt = _drawing(model, weights, "channels")
    call = {"steps": world.steps, "guidance_scale": world.guidance_scale}
    with common.progress("pictures", pictures) as advance:
        found = measure_channels(pipe, prompt, pictures=pictures, seed=seed, advance=advance, **call)
    save_channels(found, out, call | {"pictures": pictures, "seed": seed})
    for rung, values in found.correlations.items():
        said = " ".join(f"{value:.2f}" for value in values.tolist())
        common.console().print(f"{rung} steps: {said}", markup=False)
    common.console().print(str(out), markup=False)


def _drawing(model: str, weights: Path | None, what: str):
    """The pipeline of a model, its world, and prompts of it that no benchmark asks."""
    from ..canvas import load_pipeline
    from ..canvas.editions import world_of
    from ..canvas.world import PUBLIC

    common.quiet()
    try:
        world, pipe = world_of(model), load_pipeline(model, weights=weights)
    except (ValueError, FileNotFoundError) as error:
        raise common.CliError(common.one_line(error)) from error
    return pipe, world, lambda number: world.asked(random.Random(f"{what}-{number}"), PUBLIC).prompt


@app.command(epilog="Example: semiperm canvas check canvas-flow --json check.json")
def check(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"{', '.join(common.MODELS)}.")] = "canvas",
    weights: Annotated[Path | None, typer.Option(help="Folder of weights. Default: the shipped ones.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="canvas: samples for each pair of object and style. Default: 2.")
    ] = None,
    pictures: Annotated[
        int | None,
        typer.Option(min=4, help="The others: pictures of two things; other groups follow it. Default: 100."),
    ] = None,
    marks: Annotated[int, typer.Option(min=1, help="Pictures whose initial noise is looked for.")] = 200,
    guidance: common.Guidance = None,
):
    """Measure an embedded model: does it draw what is asked, does its noise survive, what do its judges say.

    Of the second edition it is asked in public and in reserved words, and both judges answer.
    """
    common.quiet()

    from ..canvas import load_pipeline
    from ..canvas.models import model_of, weights_of

    try:
        edition, folder = model_of(model).edition, weights_of(model, weights)
        unfit = {"--pictures": pictures} if edition == 1 else {"--repeats": repeats, "--guidance": guidance}
        for option in [name for name, value in unfit.items() if value is not None]:
            raise common.CliError(f"{option} is not of the check of {model}; leave it out")
        pipe = load_pipeline(model, weights=folder)
    except ValueError as error:  # an unknown name, or weights of another model
        raise common.CliError(common.one_line(error)) from error
    measure = _check_first if edition == 1 else _check_second
    figures = measure(pipe, folder, marks, repeats=repeats or 2, pictures=pictures or 100, guidance=guidance)
    if json_path is not None:
        common.write_json(json_path, figures)
    common.console().print_json(data=figures)


def _check_first(pipe, folder: Path, marks: int, repeats: int, guidance: float | None, **_) -> dict:
    from ..canvas import DEFAULT_GUIDANCE, Judge
    from ..canvas.check import check as measure

    scale = DEFAULT_GUIDANCE if guidance is None else guidance
    judge = Judge.load(folder / "judge.safetensors")
    return measure(pipe, judge, repeats=repeats, marks=marks, guidance_scale=scale)


def _check_second(pipe, folder: Path, marks: int, pictures: int, **_) -> dict:
    from ..benchmarks.timing import machine
    from ..canvas import examining, judging, recovering

    judges, prompts, seed = examining.load_judges(folder), [], 0
    while len(prompts) < marks:
        prompts, seed = prompts + [asked.prompt for asked in examining.pairs("public", seed)], seed + 1
    return {
        "model": pipe.semiperm_canvas,
        "samples": examining.check(pipe, judges, n=pictures),
        "noise": recovering.recover(pipe, prompts[:marks]),
        "judges": judging.trust(judges, n=10 * pictures, smudges=5 * pictures),
        "machine": machine(pipe.device, pipe.dtype),
    }
