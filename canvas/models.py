"""The embedded models by name: where their weights lie, what they are made of, how they are sampled. Light to import.

`canvas` is the first edition; the others are of the second, whose `canvas` is called `canvas-scenes` until its weights
take the first one's place.
"""

from dataclasses import dataclass
from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
WORLDS = WEIGHTS / "worlds"
AIDS = ("reader", "channels")  # files that help to read marks: methods/watermark/reader.py and channels.py


@dataclass(frozen=True)
class Model:
    """An embedded model.

    Args:
        about: for people.
        steps, guidance_scale: it was made for.
        folder: of its weights, unless another is given.
        parts: their names; a safetensors file each.
        autoencoder: whose latents it draws, "canvas" (4 channels) or "canvas-flow" (16).
        edition: of the world; each has words and judges of its own.
        sampler, scheduler: ComfyUI's names of those that suit it.
    """

    about: str
    steps: int
    guidance_scale: float
    folder: Path
    parts: tuple[str, ...]
    autoencoder: str
    edition: int
    sampler: str
    scheduler: str


_FLOW = ("text-first", "text-second", "vae-canvas-flow", "transformer")
MODELS = {
    "canvas": Model(
        about="Stable Diffusion 1.5's architecture, one object a picture",
        steps=25,
        guidance_scale=4.0,
        folder=WEIGHTS,
        parts=("unet", "text_encoder", "vae"),
        autoencoder="canvas",
        edition=1,
        sampler="ddim",
        scheduler="ddim_uniform",
    ),
    "canvas-scenes": Model(
        about="the same architecture, scenes of one or two objects",
        steps=25,
        guidance_scale=4.0,
        folder=WORLDS,
        parts=("text-first", "vae-canvas", "unet"),
        autoencoder="canvas",
        edition=2,
        sampler="ddim",
        scheduler="ddim_uniform",
    ),
    "canvas-flow": Model(
        about="Stable Diffusion 3's architecture, the same scenes",
        steps=28,
        guidance_scale=4.0,
        folder=WORLDS,
        parts=_FLOW,
        autoencoder="canvas-flow",
        edition=2,
        sampler="euler",
        scheduler="simple",
    ),
    "canvas-turbo": Model(
        about="canvas-flow in four steps without guidance",
        steps=4,
        guidance_scale=1.0,
        folder=WORLDS,
        parts=(*_FLOW, "turbo"),
        autoencoder="canvas-flow",
        edition=2,
        sampler="euler",
        scheduler="simple",
    ),
}


def model_of(name: str) -> Model:
    """The row of a name.

    Raises: ValueError for another name, with those that there are.
    """
    if not isinstance(name, str) or name not in MODELS:
        raise ValueError(f"no embedded model is called {name!r}; choose from {', '.join(MODELS)}")
    return MODELS[name]


def aid_files(name: str, folder: Path | None = None) -> dict[str, Path]:
    """The files that help to read marks in a model's pictures, by kind (AIDS); none of another than an embedded model.

    Args:
        folder: of the model's weights; None takes the shipped one.
    """
    if name not in MODELS:
        return {}
    paths = {kind: aid_path(kind, name, folder) for kind in AIDS}
    return {kind: path for kind, path in paths.items() if path.is_file()}


def aid_path(kind: str, name: str, folder: Path | None = None) -> Path:
    """Where such a file lies; the models of the second edition share a folder."""
    model = model_of(name)
    stem = kind if model.edition == 1 else f"{kind}-{name}"
    return (folder or model.folder) / f"{stem}.safetensors"


def weights_of(name: str, folder: Path | None = None) -> Path:
    """The folder of a model's weights, of which every file is there.

    Args:
        folder: another than the shipped one.

    Raises: ValueError for another name, FileNotFoundError naming the missing file and the command that makes it.
    """
    model = model_of(name)
    folder = Path(folder) if folder else model.folder
    made = {
        1: f"`semiperm canvas train --out {folder}` makes it",
        2: f"`semiperm canvas worlds export {folder}` makes it of what `semiperm canvas worlds train` has learnt",
    }
    for file in (*(f"{part}.safetensors" for part in model.parts), "tokenizer/tokenizer.json"):
        if not (folder / file).exists():
            raise FileNotFoundError(f"{folder / file} is missing, so {name} cannot be loaded; {made[model.edition]}")
    return folder
