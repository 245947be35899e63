"""Load the embedded models as plain diffusers pipelines; assemble and save the first edition's."""

import json
from pathlib import Path

import torch
from torch import nn

from . import autoencoder, denoiser, embedded, text
from .loop import load_tensors, save_tensors
from .models import MODELS, WEIGHTS, model_of, weights_of

__all__ = ["DEFAULT_GUIDANCE", "DEFAULT_STEPS", "WEIGHTS", "assemble", "load_pipeline", "save_weights"]

DEFAULT_GUIDANCE = MODELS["canvas"].guidance_scale
DEFAULT_STEPS = MODELS["canvas"].steps


def assemble(vae: nn.Module, unet: nn.Module, text_encoder: nn.Module, tokenizer):
    """Return a StableDiffusionPipeline with DDIM (SD's schedule), marked `semiperm_canvas`."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(**denoiser.SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.semiperm_canvas = "canvas"
    return pipe


def load_pipeline(
    name: str = "canvas",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    weights: Path | None = None,
):
    """Load an embedded model: 128x128 pictures, Stable Diffusion 1.5's classes or 3's; marked `semiperm_canvas`.

    Args:
        name: "canvas" (the first edition, captions of semiperm.canvas.captions), or of the second edition
            "canvas-scenes", "canvas-flow" or "canvas-turbo" (captions of semiperm.canvas.sentences).
        dtype: torch.float32 (default), float16 or bfloat16. device: where to put it.
        weights: folder of the weights that semiperm.canvas.models names; None takes the shipped one.

    Raises: ValueError for another name, FileNotFoundError naming the missing file and the command that makes it.
    """
    if model_of(name).edition == 2:
        return embedded.load_pipeline(name, weights, dtype, device)
    folder = weights_of(name, weights)
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"))
    parts = {
        "vae": AutoencoderKL(**autoencoder.CONFIG),
        "unet": denoiser.build_unet(),
        "text_encoder": text.build_text_encoder(tokenizer),
    }
    for name, module in parts.items():
        module.load_state_dict(load_tensors(folder / f"{name}.safetensors"))
        module.to(device=device, dtype=dtype).eval()
    pipe = assemble(parts["vae"], parts["unet"], parts["text_encoder"], tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_weights(pipe, folder: Path, info: dict | None = None) -> None:
    """Write fp16 safetensors and the tokenizer to a folder that `load_pipeline(weights=folder)` reads."""
    folder = Path(folder)
    for name in ("vae", "unet", "text_encoder"):
        tensors = {k: v.half() for k, v in getattr(pipe, name).state_dict().items() if v.is_floating_point()}
        save_tensors(
            tensors,
            folder / f"{name}.safetensors",
            {"format": "pt", **{k: json.dumps(v) for k, v in (info or {}).items()}},
        )
    text.save_tokenizer(pipe.tokenizer, folder / "tokenizer")
