"""What all commands share: one-line errors, atomic files, model loading, progress bars. Light to import."""

import io
import json
import math
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..canvas.models import MODELS

MODEL_HELP = f"{', '.join(MODELS)} (embedded), a diffusers folder, a hub id or a single .safetensors file"
Model = Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL", show_default=False)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")]
DType = Annotated[str, typer.Option(help="auto (float16 on a GPU, else float32), float32, float16 or bfloat16")]
# The most steps that a schedule has: every model here was trained with 1,000, and samplers refuse more.
MOST_STEPS = 1000
# What torch's generators take, with room for the pictures that count up from it.
MOST_SEED = 2**62
Steps = Annotated[int | None, typer.Option(min=1, max=MOST_STEPS, help="Denoising steps. Default: the model's own.")]


def finite(value: float | None) -> float | None:
    """A number that is one, for typer."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


Guidance = Annotated[float | None, typer.Option(callback=finite, help="Guidance scale. Default: the model's own.")]


class CliError(Exception):
    """A mistake of the user's: printed as one line, exit code 2."""


class OneLineErrors(TyperGroup):
    """Prints the errors a user can act on as one line, without a traceback, and exits with 2."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (CliError, OSError) as error:
            _fail(error)
        except MemoryError as error:
            _fail(CliError(f"out of memory: {one_line(error)}; take a smaller model or fewer pictures at once"))
        except ValueError as error:
            from ..kernels.errors import SemipermError

            if not isinstance(error, SemipermError):
                raise
            _fail(error)


def _fail(error: Exception):
    complain(error)
    raise typer.Exit(2) from error


def one_line(error: Exception) -> str:
    """The first line of an error's text, with the file's name where there is one; see `printable`."""
    if isinstance(error, OSError) and error.strerror:
        return printable(f"{error.strerror}: {error.filename}" if error.filename else error.strerror)
    lines = str(error).strip().splitlines()
    return printable(lines[0]) if lines else type(error).__name__


def printable(value: Any) -> str:
    """Text of files, keys and names, without the control characters that would steer a terminal."""
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return "".join(c if c.isprintable() else "?" for c in text)


def say(text: str) -> None:
    """Print one line on standard output."""
    typer.echo(printable(text))


def complain(error: Exception, about: str | Path = "") -> None:
    """Print an error as one line on standard error."""
    typer.echo(f"error: {printable(about)}: {one_line(error)}" if about else f"error: {one_line(error)}", err=True)


Gate = Annotated[str, typer.Option(help="auto, probe, paper, official or always (see docs/python.md).")]
NegativeRows = Annotated[
    bool,
    typer.Option(
        "--negative-rows",
        help="Let gates open for the negative prompt, too. Without, it is left alone, so that it can name the concept.",
    ),
]
Concept = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="What the files erase that do not say it, in their order; repeatable."),
]
TextEncoder = Annotated[
    str,
    typer.Option(metavar="refuse|drop", help="A LoRA's part for the text encoder: refuse the file, or drop the part."),
]
Bias = Annotated[str, typer.Option(metavar="refuse|drop", help="Edits of biases: refuse the file, or drop them.")]


def existing_adapter(path: Path, what: str) -> Path:
    """Return the path of a file, or of an adapter's folder; CliError if there is neither."""
    return path if path.is_dir() else existing_file(path, what)


def existing_file(path: Path, what: str) -> Path:
    """Return the path; CliError if there is no such file."""
    if not path.is_file():
        raise CliError(f"there is no {what} {str(path)!r}")
    return path


def write_file(path: str | Path, data: bytes | str) -> Path:
    """Write a whole file or nothing."""
    from ..methods import files

    return files.write_file(path, data)


def write_json(path: str | Path, value: Any) -> Path:
    return write_file(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_png(path: str | Path, image, record: dict | None = None) -> Path:
    """Write a PIL image as PNG; `record` is kept in its text chunk `semiperm`, as JSON."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if record is not None:
        info.add_text("semiperm", json.dumps(record, allow_nan=False))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return write_file(path, buffer.getvalue())


def console():
    from rich.console import Console

    return Console(highlight=False)


@contextmanager
def progress(label: str, total: int | None):
    """A progress bar on stderr, with what is printed meanwhile above it; yields `advance(n=1)`."""
    import sys

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Lines for another program must go to stdout itself, not through the bar's console.
    how = {"transient": True, "redirect_stdout": sys.stdout.isatty()}
    with Progress(*columns, console=Console(stderr=True), **how) as bar:
        task = bar.add_task(label, total=total)
        yield lambda n=1: bar.advance(task, n)


def load_model(model: str, device: str = "auto", dtype: str = "auto"):
    """Load a pipeline onto a device.

    Raises:
        CliError: an unknown device or dtype; a model that is not there.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float16" if device.startswith("cuda") else "float32"
    if dtype not in ("float32", "float16", "bfloat16"):
        raise CliError(f"--dtype {dtype} is not supported; choose auto, float32, float16 or bfloat16")
    check_device(device)
    quiet()
    from ..methods.errors import SemipermError
    from ..pipelines.loaders import load_pipeline

    try:
        pipe = load_pipeline(model, dtype=getattr(torch, dtype), device=device)
    except SemipermError:
        raise
    except (OSError, ValueError) as error:
        raise CliError(f"cannot load the model {model!r}: {one_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def world_of(name: str):
    """The embedded world of a model's name.

    Raises:
        CliError: there is none.
    """
    from ..canvas.editions import WORLDS

    if name not in WORLDS:
        raise CliError(f"--world {name} is no embedded model; choose from {', '.join(WORLDS)}")
    return WORLDS[name]


def check_device(device: str) -> None:
    """Refuse a device that torch does not know, or that is not in this machine.

    Raises:
        CliError: with what there is.
    """
    import torch

    try:
        torch.empty(1, device=torch.device(device)).add_(1)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["mps"] * torch.backends.mps.is_available()
        raise CliError(
            f"--device {device} cannot be used ({one_line(error)}); there is {', '.join(['cpu', *there])}"
        ) from error


def quiet():
    """Silence the progress bars and notices of the libraries below; our own remain."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def sampling(model: str, steps: int | None, guidance: float | None) -> dict[str, Any]:
    """The pipeline's keyword arguments for steps and guidance; embedded models have defaults of their own."""
    if own := MODELS.get(model):
        steps, guidance = steps or own.steps, own.guidance_scale if guidance is None else guidance
    given = {"num_inference_steps": steps, "guidance_scale": guidance}
    return {name: value for name, value in given.items() if value is not None}


def generators(seeds: list[int]) -> list:
    """One CPU generator a seed: an image depends on its own seed, not on the batch or the device."""
    import torch

    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def split_strength(text: str) -> tuple[Path, float]:
    """Parse FILE[:strength], or zoo:NAME[:strength].

    Raises:
        CliError: no such file, or a strength that is no number from 0 to 1.
    """
    from ..methods.membranes.zoo import PREFIX, located

    if text.startswith(PREFIX):
        name, colon, tail = text.removeprefix(PREFIX).partition(":")
        text = f"{located(PREFIX + name)}{colon}{tail}"
    name, colon, tail = text.rpartition(":")
    if not Path(text).exists() and colon and name and len(name) > 1:
        path = existing_adapter(Path(name), "membrane file")
        try:
            strength = float(tail)
        except ValueError as error:
            raise CliError(f"--membrane {text}: {tail!r} is not a strength; write FILE:0.5") from error
        if not 0 <= strength <= 1:
            raise CliError(f"--membrane {text}: the strength is {tail}; expected 0 (nothing) to 1 (as it was made)")
        return path, strength
    return existing_adapter(Path(text), "membrane file"), 1.0


def load_stack(pipe, texts: list[str], names: list[str] = (), **options):
    """Read FILE[:strength] arguments as one stack; strength multiplies each pair's alpha, and the beta of an image
    side; 0 leaves a file out.

    Args:
        names: what the files erase that do not say it, in their order; another number of names names none of them.
        **options: as `import_membranes` takes them.
    """
    from dataclasses import replace

    from ..methods.membranes.types import Membranes
    from ..pipelines.membranes.adapters import import_membranes

    stack = []
    for path, strength in map(split_strength, texts):
        for membrane in import_membranes(pipe, path, **options) if strength else ():
            modules = {key: replace(pair, alpha=pair.alpha * strength) for key, pair in membrane.modules.items()}
            side = membrane.visual and replace(membrane.visual, beta=membrane.visual.beta * strength)
            stack.append(membrane if strength == 1 else replace(membrane, modules=modules, visual=side))
    nameless = [index for index, membrane in enumerate(stack) if not membrane.named]
    if len(nameless) == len(names):
        for index, name in zip(nameless, names, strict=True):
            stack[index] = stack[index].with_concept(name)
    return Membranes(stack)


def output_paths(output: Path, files: list[Path], labels: list[str], grid: Path | None = None) -> list[list[Path]]:
    """For each picture one path an attack; pictures of one name are numbered.

    Raises:
        CliError: a path that is one of the pictures, or not a folder.
    """
    if output.exists() and not output.is_dir():
        raise CliError(f"-o {output} is a file; give a folder")
    stems = [file.stem for file in files]
    if len({stem.lower() for stem in stems}) < len(stems):  # some file systems tell no case
        stems = [f"{number:03d}-{stem}" for number, stem in enumerate(stems)]
    ends = [label.replace(":", "-").replace("+", "_") for label in labels]
    paths = [[output / f"{stem}-{end}.png" for end in ends] for stem in stems]
    originals = {file.resolve() for file in files}
    for path in [*([] if grid is None else [grid]), *(path for row in paths for path in row)]:
        if path.resolve() in originals:
            raise CliError(f"{path} is one of the pictures to attack and would be replaced; give another name")
    return paths


def show_gates(console, membranes) -> None:
    """Print what is known of each membrane's detector, and which gate `auto` is for it."""
    from rich.table import Table
    from rich.text import Text

    about = "detectors, on prompts (an image side's on pictures) kept out of their fit; auto is a detector or the words"
    table = Table(caption=about)
    for heading in ("concept", "separation", "false closed", "false open", "gate auto is"):
        table.add_column(heading, overflow="fold")
    for membrane in membranes:
        table.add_row(*map(Text, (membrane.concept, *gate_figures(membrane).values())))
    console.print(table)


def gate_figures(membrane) -> dict[str, str]:
    """separation, false_closed, false_open and gate of one membrane, in words; a dash where nothing is known."""
    probe, side = membrane.probe, membrane.visual
    if side is not None:
        closed = "-" if side.false_closed is None else f"{100 * side.false_closed:.1f} % of {side.checked}"
        opened = "-" if side.false_open is None else f"at most {100 * side.false_open:g} %, by {side.calibrated}"
        return {"separation": "-", "false_closed": closed, "false_open": opened, "gate": "image"}
    gate = ("paper" if membrane.named else "always") if probe is None else probe.gate
    if probe is None:
        return {"separation": "-", "false_closed": "-", "false_open": "-", "gate": gate}
    counts = probe.checked or (None, None)
    rates = [
        "-" if rate is None else f"{100 * rate:.1f} %" + (f" of {count}" if count else "")
        for rate, count in zip((probe.false_closed, probe.false_open), counts, strict=True)
    ]
    separation = "-" if probe.separation is None else f"{probe.separation:.2f}"
    return {"separation": separation, "false_closed": rates[0], "false_open": rates[1], "gate": gate}
