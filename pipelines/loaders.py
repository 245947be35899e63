"""Load a pipeline from wherever a user has it."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from ..methods.errors import MembraneError

_PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")


def load_pipeline(model: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
    """Load a text-to-image pipeline.

    Args:
        model: "canvas" (the embedded model), a diffusers folder, a single .safetensors checkpoint, or a hub id such as
            "stable-diffusion-v1-5/stable-diffusion-v1-5".
        dtype: of all components.
        device: where to.

    Returns:
        The diffusers pipeline of the model's own class.

    Raises:
        MembraneError: a pickle, a path that is nothing of these, or an unsupported name.
        OSError: the hub has no such model, or is out of reach.
    """
    name = str(model)
    if name == "canvas":
        from ..canvas import load_pipeline as load_canvas

        return load_canvas(dtype=dtype, device=device)
    path = Path(name)
    if path.suffix.lower() in _PICKLES:
        raise MembraneError(
            f"{name!r} is a pickle, which can run any code when loaded; expected .safetensors: download that variant,"
            " or convert the file where you trust it"
        )
    if path.is_file():
        if path.suffix.lower() != ".safetensors":
            raise MembraneError(f"{name!r} is no model file; expected .safetensors, a diffusers folder, or a hub id")
        return _single_file(path, dtype).to(device)
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise MembraneError(f"the folder {name!r} has no model_index.json; expected a diffusers pipeline folder")
    if not path.is_dir() and (
        name.count("/") != 1 or name.startswith((".", "/", "~")) or path.suffix == ".safetensors"
    ):
        raise MembraneError(
            f"no model at {name!r}; expected 'canvas', a diffusers folder, a .safetensors file or a hub id"
        )
    from diffusers import DiffusionPipeline

    with warnings.catch_warnings():  # older diffusers know torch_dtype alone, newer ones deprecate it
        warnings.filterwarnings("ignore", ".*torch_dtype.*", FutureWarning)
        pipe = DiffusionPipeline.from_pretrained(name, use_safetensors=True, torch_dtype=dtype)
    return pipe.to(device)


def _single_file(path: Path, dtype: torch.dtype):
    """Pick the pipeline class from the checkpoint's own keys, and let diffusers convert it."""
    import diffusers
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
    except SafetensorError as error:
        raise MembraneError(f"{str(path)!r} is not a readable safetensors file ({error})") from None
    markers = {
        "FluxPipeline": ".double_blocks.0.",
        "StableDiffusion3Pipeline": ".joint_blocks.0.",
        "StableDiffusionXLPipeline": "conditioner.embedders.1.",
        "StableDiffusionPipeline": "model.diffusion_model.input_blocks.",
    }
    for name, marker in markers.items():
        if any(marker in f".{key}" for key in keys):
            return getattr(diffusers, name).from_single_file(str(path), torch_dtype=dtype)
    raise MembraneError(
        f"{str(path)!r} holds no checkpoint of the SD1.x, SD2, SDXL, SD3 or Flux family (its keys look like"
        f" {min(keys, default='none')!r}); is it a LoRA or a membrane? Load the base model and give this as --membrane"
    )
