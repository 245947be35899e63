"""Load a pipeline from wherever a user has it."""

from __future__ import annotations

import contextlib
import importlib
import socket
import threading
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..canvas.models import MODELS
from ..methods.errors import ModelError, SemipermError
from ..methods.files import PICKLES, open_safetensors
from .family import Pipeline


def load_pipeline(
    model: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Pipeline:
    """Load a text-to-image pipeline from wherever it is.

    Args:
        model: an embedded model ("canvas", "canvas-scenes", "canvas-flow" or "canvas-turbo"), a diffusers folder, a
            single .safetensors checkpoint, or a hub id such as "stable-diffusion-v1-5/stable-diffusion-v1-5".
        dtype: of all components, a floating-point one.
        device: where to; "cpu" is the default, "cuda" the usual one for all but embedded models.

    Returns:
        The diffusers pipeline of the model's own class.

    Raises:
        ModelError: a pickle, a path that is nothing of these, a checkpoint of an unsupported family, or a single file
            whose settings are neither cached nor to be had from the hub.
        OSError: the hub has no such model, or is out of reach; an embedded model's weights are not there.

    >>> load_pipeline("canvas").unet.config.in_channels
    4
    """
    name = str(model)
    if name in MODELS:
        from ..canvas import load_pipeline as load_embedded

        return load_embedded(name, dtype=dtype, device=device)
    path = Path(name)
    if path.is_file():
        return _single_file(path, dtype).to(device)
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ModelError(f"the folder {name!r} has no model_index.json; expected a diffusers pipeline folder")
    if not path.is_dir() and (
        name.count("/") != 1 or name.startswith((".", "/", "~")) or path.suffix.lower() in (".safetensors", *PICKLES)
    ):
        raise ModelError(
            f"no model at {name!r}; expected {', '.join(MODELS)} (embedded), a diffusers folder, a .safetensors file or"
            " a hub id"
        )
    from diffusers import DiffusionPipeline

    with warnings.catch_warnings():  # older diffusers know torch_dtype alone, newer ones deprecate it
        warnings.filterwarnings("ignore", ".*torch_dtype.*", FutureWarning)
        pipe = DiffusionPipeline.from_pretrained(name, use_safetensors=True, torch_dtype=dtype)
    return pipe.to(device)


# How long the hub has to answer: a name that resolves and a host that is there take well below a second.
_PATIENCE = 3.0


def _hub() -> Any:
    """The settings of the hub's client, which diffusers brings along and reads at every call."""
    return importlib.import_module("huggingface_hub.constants")


def hub_answers() -> bool:
    """Whether the hub can be reached. With a proxy, which knows better, it is taken to be there."""
    constants = _hub()
    if constants.HF_HUB_OFFLINE:
        return False
    url = urllib.parse.urlsplit(constants.ENDPOINT)
    host, port = url.hostname or "huggingface.co", url.port or (80 if url.scheme == "http" else 443)
    if urllib.request.getproxies().keys() & {url.scheme, "all"} and not urllib.request.proxy_bypass(host):
        return True
    found = []

    def look() -> None:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=_PATIENCE):
            found.append(True)

    looking = threading.Thread(target=look, daemon=True)  # looking a name up has no timeout of its own
    looking.start()
    looking.join(_PATIENCE)
    return bool(found)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Inside, Hugging Face's libraries take what is cached, and fail at once where something is not."""
    constants = _hub()
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _single_file(path: Path, dtype: torch.dtype) -> Pipeline:
    """Pick the pipeline class from the checkpoint's own keys, and let diffusers convert it."""
    import diffusers

    try:
        with open_safetensors(path) as file:
            keys = set(file.keys())
    except SemipermError as error:  # a pickle, a truncated file, or something else altogether
        raise ModelError(f"{error}; other models are {', '.join(MODELS)}, a diffusers folder, or a hub id") from None
    markers = {
        "FluxPipeline": ".double_blocks.0.",
        "StableDiffusion3Pipeline": ".joint_blocks.0.",
        "StableDiffusionXLPipeline": "conditioner.embedders.1.",
        "StableDiffusionPipeline": "model.diffusion_model.input_blocks.",
    }
    for name, marker in markers.items():
        if any(marker in f".{key}" for key in keys):
            cls = getattr(diffusers, name)
            if hub_answers():
                return cls.from_single_file(str(path), torch_dtype=dtype)
            with offline():
                try:
                    return cls.from_single_file(str(path), torch_dtype=dtype)
                except (OSError, ValueError) as error:
                    raise ModelError(
                        f"{str(path)!r} holds weights alone; the rest of a {name} (its settings, tokenizers) is not in"
                        " the cache, and the hub does not answer: load it once with a network, or give a diffusers"
                        f" folder ({type(error).__name__}: {str(error).strip().splitlines()[0][:120]})"
                    ) from error
    raise ModelError(
        f"{str(path)!r} holds no checkpoint of the SD1.x, SD2, SDXL, SD3 or Flux family (its keys look like"
        f" {min(keys, default='none')!r}); is it a LoRA or a membrane? Load the base model and give this as --membrane"
    )
