"""Measuring how much each channel of a model's latents says of the noise (methods/watermark/channels.py)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...methods.watermark.channels import ChannelWeights, correlation
from ...methods.watermark.ladder import LADDER
from ...methods.watermark.statistics import levelled
from ..latents import latent_shape
from .fingerprint import fingerprint
from .inversion import encode_images, invert

__all__ = ["drawn", "measure_channels"]

_BATCH = 8


def drawn(pipe, prompts: list[str], noise: Tensor, steps: int, guidance_scale: float) -> Tensor:
    """(B, 3, H, W) pictures of that noise, rounded to bytes as files are."""
    call = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "pt"}
    return pipe(prompts, latents=noise, **call).images.float().cpu().mul(255).round().div(255)


@torch.no_grad()
def measure_channels(
    pipe,
    prompts: Callable[[int], str],
    *,
    pictures: int = 32,
    steps: int = 25,
    guidance_scale: float = 4.0,
    seed: int = 0,
    advance: Callable[[int], object] = lambda n: None,
) -> ChannelWeights:
    """Draw a model's pictures from plain noise, invert them, and see in which channels the noise comes back.

    No key is involved, so that p-values stay exact with these weights.

    Args:
        pipe: text-to-image pipeline; nothing in it changes.
        prompts: f(number) -> what to draw; take others than those that detection is measured on.
        pictures: each says C x h x w signs; 16 tell channels apart.
        steps, guidance_scale: of the drawing.
        advance: told of finished pictures.

    Returns:
        The correlations after every number of inversion steps of the ladder.
    """
    generator, found = torch.Generator().manual_seed(seed), {steps: [] for steps in LADDER}
    for start in range(0, pictures, _BATCH):
        count = min(_BATCH, pictures - start)
        noise = torch.randn(count, *latent_shape(pipe), generator=generator)
        pixels = drawn(pipe, [prompts(start + i) for i in range(count)], noise, steps, guidance_scale)
        latents = encode_images(pipe, list(pixels), count)
        for rung, sums in found.items():
            estimate = levelled(invert(pipe, latents, rung, batch_size=count).float().cpu())
            sums.append(count * correlation(noise, estimate))
        advance(count)
    return ChannelWeights({rung: sum(sums) / pictures for rung, sums in found.items()}, fingerprint(pipe))
