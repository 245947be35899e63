"""`semiperm train`: membranes by latent anchoring, with checkpoints, a plot and sample pictures."""

from pathlib import Path
from typing import Annotated

import typer

from . import common

EXAMPLE = 'Example: semiperm train canvas --concept "robot|android" --steps 100 -o trained.safetensors'
PLOT, SAMPLES = "training.png", "samples.png"  # in the working folder
_SHOWN = 4  # concepts in the grid of samples


def run(
    model: common.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The membrane file to write (.safetensors).")],
    concept: Annotated[
        list[str] | None,
        typer.Option(help='A concept to erase; repeatable. Synonyms after bars: "robot|android|droid".'),
    ] = None,
    surrogate: Annotated[str | None, typer.Option(help="What the concept turns into. Default: nothing.")] = None,
    preserve: Annotated[
        list[str] | None, typer.Option(help="A caption to draw anchors from; repeatable. Default: a general list.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE.toml", help="concepts, surrogate, preserve, templates, and a table [training]."),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of [training], as in TOML; repeatable."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the optimiser, at most.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=common.MOST_SEED, help="Of all that is drawn.")] = None,
    workdir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Of the checkpoint, log, plot and samples. Default: beside the output."),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, max=8, help="Pictures of each concept, untouched and erased, at the end; 0: none.")
    ] = 2,
    device: common.Device = "auto",
    dtype: common.DType = "auto",
):
    """Train a membrane for each concept by latent anchoring, from the closed form on, and write them to one file.

    A run that was stopped goes on when the same command is given again, and ends with the same membranes. Under
    `accelerate launch -m semiperm train ...`, the processes share the pictures of each step (batch_size must be a
    multiple of their number).
    """
    if output.suffix != ".safetensors":
        raise common.CliError(f"-o {output}: membranes are written as safetensors; name it {output.stem}.safetensors")

    from ..methods.training.config import TrainingConfig, TrainingFile, read_training

    read = TrainingFile() if config is None else read_training(config)
    given = {"steps": steps, "seed": seed}
    settings = {**read.settings, **_settings(setting or []), **{k: v for k, v in given.items() if v is not None}}
    try:
        training = TrainingConfig(**settings)
    except TypeError:
        unknown = sorted(set(settings) - set(TrainingConfig.__dataclass_fields__))
        raise common.CliError(
            f"--set {', '.join(unknown)}: no such setting; choose from {', '.join(TrainingConfig.__dataclass_fields__)}"
        ) from None
    concepts = concept or list(read.concepts)
    if not concepts:
        raise common.CliError("no concept to erase was given; give --concept NAME, or concepts = [...] in --config")
    folder = workdir or output.with_suffix(".training")
    place, first = _place(device)
    pipe = common.load_model(model, place, dtype)

    from time import perf_counter

    from ..methods.membranes.file import save_membranes
    from ..pipelines.training.train import train_membranes

    start = perf_counter()
    with common.progress("training", training.steps) if first else _silence() as advance:
        membranes = train_membranes(
            pipe,
            concepts,
            read.surrogate if surrogate is None else surrogate,
            preserve or (None if read.preserve is None else list(read.preserve)),
            templates=None if read.templates is None else list(read.templates),
            config=training,
            workdir=folder,
            progress=_counter(advance),
        )
    if not first:
        return
    console = common.console()
    save_membranes(membranes, output)
    rows = _finish(folder)
    if samples:
        common.write_png(folder / SAMPLES, _sample_grid(pipe, model, membranes, samples, training.seed))
    for membrane in membranes:
        trained = next((r["validation"][membrane.concept] for r in reversed(rows)
                        if membrane.concept in r.get("validation", {})), None)  # fmt: skip
        about = "" if trained is None else f": erased to {trained['erased']:.3f}, moved {trained['moved']:.4f}"
        best = membrane.metadata.get("step")
        console.print(f"{membrane.concept}{about}{'' if best is None else f', best at step {best}'}", markup=False)
    console.print(
        f"{output}: {', '.join(membranes.concepts)}; {len(membranes.module_keys)} modules,"
        f" {output.stat().st_size / 1024:.0f} KiB, trained in {perf_counter() - start:.0f} s; plot and samples in"
        f" {folder}",
        markup=False,
    )


def _settings(texts: list[str]) -> dict:
    """NAME=VALUE with a TOML value; a word without quotes is a string."""
    from ..methods.training.config import tomllib

    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise common.CliError(f"--set {text}: expected NAME=VALUE, such as learning_rate=5e-4")
        try:
            found[name.strip()] = tomllib.loads(f"value = {value.strip()}")["value"]
        except tomllib.TOMLDecodeError:
            found[name.strip()] = value.strip()
    return found


def _place(device: str) -> tuple[str, bool]:
    """The device of this process, and whether it is the one that writes."""
    import os

    if "WORLD_SIZE" not in os.environ:
        return device, True
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device == "cpu")
    return str(accelerator.device), accelerator.is_main_process


def _silence():
    from contextlib import nullcontext

    return nullcontext(lambda n=1: None)


def _counter(advance):
    """A resumed run begins where it stopped."""
    seen = 0

    def count(figures: dict) -> None:
        nonlocal seen
        advance(figures["step"] - seen)
        seen = figures["step"]

    return count


def _finish(folder: Path) -> list[dict]:
    """Draw the log; returns its rows."""
    import json

    from ..methods.training.plot import training_plot
    from ..methods.training.run import LOG

    rows = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
    common.write_png(folder / PLOT, training_plot(rows))
    return rows


def _sample_grid(pipe, model: str, membranes, count: int, seed: int):
    """A row for each concept: its pictures untouched, and the same seeds through its membrane."""
    from ..pipelines.membranes.apply import apply_membranes
    from .attack import attack_grid, thumbnail

    rows = []
    for membrane in membranes[:_SHOWN]:
        pictures = []
        for on in (False, True):
            handle = apply_membranes(pipe, membrane) if on else None
            try:
                prompts = [f"a photo of {membrane.concept}"] * count
                seeds = common.generators([seed + n for n in range(count)])
                pictures += pipe(prompts, generator=seeds, **common.sampling(model, None, None)).images
            finally:
                if handle is not None:
                    handle.remove()
        rows.append((membrane.concept, [thumbnail(picture) for picture in pictures]))
    labels = [f"{what}, seed {seed + n}" for what in ("untouched", "erased") for n in range(count)]
    return attack_grid(labels, rows)
