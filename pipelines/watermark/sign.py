"""Signing the initial noise of diffusers pipelines of the SD1.x, SD2, SDXL, SD3, Flux and Wan families.

latents = sign_noise(pipe, key)
picture = pipe("an eared mascot in striped style on sky", latents=latents).images[0]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...methods.errors import WatermarkError
from ...methods.watermark.keys import WatermarkKey
from ...methods.watermark.mark import KeyedMark, Payload
from ..family import denoiser_of, device_of, family_of
from ..latents import latent_shape
from .samplers import check_scheduler

__all__ = ["sign_noise"]


def sign_noise(
    pipe,
    key: WatermarkKey,
    batch: int = 1,
    height: int | None = None,
    width: int | None = None,
    payload: Payload | Sequence[Payload] | None = None,
    generator: torch.Generator | None = None,
    *,
    frames: int | None = None,
    scope: str = "",
) -> Tensor:
    """Draw the marked initial noise of `batch` pictures, ready for `pipe(..., latents=latents)`.

    Each picture's noise is exactly N(0, I). Give the call of the pipeline the same height and width.

    Args:
        pipe: SD1.x, SD2, SDXL, SD3, Flux or Wan pipeline with a deterministic sampler; nothing in it changes.
        key: signs; it needs its MAC key.
        batch: pictures, at least 1.
        height, width: of the pictures, in pixels; None is the model's own size.
        payload: one for all, one each, or None: a fresh unique id each, made now.
        generator: makes the noise reproducible; leave it out otherwise.
        frames: of a video, in pictures; Wan alone.
        scope: separates marks of one key further; `detect_watermark` needs the same.

    Returns:
        (B, C, H, W), (B, N, C) packed for Flux, (B, C, F, H, W) for Wan; on the pipeline's device, in its dtype.

    Raises:
        SemipermError: a sampler that adds noise, a size that the model cannot draw or that holds no payload.
    """
    return as_pipeline_input(
        pipe, draw_noise(pipe, key, batch, height, width, payload, generator, frames=frames, scope=scope)
    )


def draw_noise(
    pipe, key, batch=1, height=None, width=None, payload=None, generator=None, *, frames=None, scope="", bound=False
) -> Tensor:
    """As `sign_noise`, in float32 and before `as_pipeline_input`; `bound` as in `KeyedMark.sample`."""
    check_scheduler(pipe)
    if batch < 1:
        raise WatermarkError(f"noise for {batch} pictures was asked for; expected at least 1")
    if frames is not None and not family_of(pipe).video:
        raise WatermarkError(f"{type(pipe).__name__} draws pictures, but {frames} frames were asked for; leave it out")
    shape = batch, *latent_shape(pipe, height, width, frames)
    return KeyedMark(key, scope).sample(shape, payload, generator, bound=bound)


def as_pipeline_input(pipe, latents: Tensor) -> Tensor:
    """Latents (B, C, H, W) or (B, C, F, H, W) as the pipeline's call takes them: device, dtype, Flux's packing."""
    family = family_of(pipe)
    latents = latents.to(device_of(pipe), torch.float32 if family.video else denoiser_of(pipe)[0].dtype)
    return family.pack(pipe, latents)
