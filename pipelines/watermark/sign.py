"""Signing the initial noise of diffusers pipelines of the SD1.x, SD2, SDXL, SD3, Flux and Wan families.

latents = sign_noise(pipe, key)
picture = pipe("an eared mascot in striped style on sky", latents=latents).images[0]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...methods.composition import warn_of
from ...methods.errors import WatermarkError
from ...methods.watermark.issued import Issued, issued_in
from ...methods.watermark.keys import WatermarkKey
from ...methods.watermark.mark import KeyedMark, Payload
from ..family import Pipeline, denoiser_of, device_of, family_of
from ..handle import methods_at
from ..latents import latent_shape, pixels_per_latent
from .samplers import check_scheduler

__all__ = ["issued_of", "sign_noise"]


def sign_noise(
    pipe: Pipeline,
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
        pipe: SD1.x, SD2, SDXL, SD3, Flux or Wan pipeline with a sampler that keeps the mark, see
            methods/watermark/samplers.py; leave `eta` of its call at 0. Nothing in it changes.
        key: signs; it needs its MAC key.
        batch: pictures, at least 1.
        height, width: of the pictures, in pixels; None is the model's own size.
        payload: one for all, one each, or None: a fresh unique id each, made now.
        generator: makes the noise reproducible; leave it out otherwise.
        frames: of a video, in pictures, 1 + a multiple of the model's step in time; Wan alone. None is the model's own.
        scope: separates marks of one key further, "" does not; `detect_watermark` needs the same.

    Returns:
        (B, C, H, W), (B, N, C) packed for Flux, (B, C, F, H, W) for Wan; on the pipeline's device, in its dtype.

    Raises:
        ModelError: an unsupported pipeline, or a sampler that loses the mark: by noise of its own, or as measured.
        WatermarkError: a size that the model cannot draw or that holds no payload, a payload too large for it, or a key
            without its MAC secret.

    Source: Gaussian Shading (arXiv 2404.04956) keys the signs, too; methods/watermark/mark.py says where we differ.

    >>> sign_noise(pipe, key, batch=2, payload=Payload(unique_id=7)).shape
    torch.Size([2, 4, 16, 16])
    """
    check_scheduler(pipe)
    if batch < 1:
        raise WatermarkError(f"noise for {batch} pictures was asked for; expected at least 1")
    if frames is not None and not family_of(pipe).video:
        raise WatermarkError(f"{type(pipe).__name__} draws pictures, but {frames} frames were asked for; leave it out")
    warn_of({"mark"}, methods_at(pipe))
    shape = batch, *latent_shape(pipe, height, width, frames)
    return as_pipeline_input(pipe, KeyedMark(key, scope).sample(shape, payload, generator))


def issued_of(
    pipe: Pipeline,
    latents: Tensor,
    key: WatermarkKey,
    height: int | None = None,
    width: int | None = None,
    *,
    scope: str = "",
) -> list[Issued]:
    """What a list of issued marks keeps of noise from `sign_noise`, one entry a picture; for informed detection.

    Args:
        pipe, key, height, width, scope: as `sign_noise` was given.
        latents: as it returned them.

    Raises:
        WatermarkError: noise that does not carry an authentic mark of the key.
    """
    shape, scale = latent_shape(pipe, height, width), pixels_per_latent(pipe)
    if latents.ndim == 3:
        latents = family_of(pipe).unpack(pipe, latents, shape[-2] * scale, shape[-1] * scale)
    return issued_in(latents.float(), key, scope)


def as_pipeline_input(pipe, latents: Tensor) -> Tensor:
    """Latents (B, C, H, W) or (B, C, F, H, W) as the pipeline's call takes them: device, dtype, Flux's packing."""
    family = family_of(pipe)
    latents = latents.to(device_of(pipe), torch.float32 if family.video else denoiser_of(pipe)[0].dtype)
    return family.pack(pipe, latents)
