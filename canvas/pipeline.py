"""Assemble, save and load the embedded model as a plain StableDiffusionPipeline."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from . import autoencoder, denoiser, text
from .loop import save_tensors

WEIGHTS = Path(__file__).parent / "weights"
READER = "reader.safetensors"  # of marks, see methods/watermark/reader.py
DEFAULT_GUIDANCE = 4.0
DEFAULT_STEPS = 25


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
    pipe.semiperm_canvas = True
    return pipe


def load_pipeline(dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", weights: Path | None = None):
    """Load the embedded model: 128x128 pictures, captions of semiperm.canvas.captions, SD1.5's classes.

    Args:
        dtype: torch.float32 (default), float16 or bfloat16. device: where to put it.
        weights: folder with unet, text_encoder, vae .safetensors and tokenizer/; None takes the shipped one.

    Raises: FileNotFoundError naming the missing file and the command that trains the model.
    """
    folder = Path(weights) if weights else WEIGHTS
    for name in ("unet.safetensors", "text_encoder.safetensors", "vae.safetensors", "tokenizer/tokenizer.json"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder / name} is missing; `semiperm canvas train --out {folder}` makes it")
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"))
    parts = {
        "vae": AutoencoderKL(**autoencoder.CONFIG),
        "unet": denoiser.build_unet(),
        "text_encoder": text.build_text_encoder(tokenizer),
    }
    for name, module in parts.items():
        module.load_state_dict({k: v.float() for k, v in load_file(str(folder / f"{name}.safetensors")).items()})
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
