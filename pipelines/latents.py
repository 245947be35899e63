"""From pixels to a pipeline's latents, for every family."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..methods.errors import MembraneError
from .text import device_of, family_of


def pixels_per_latent(pipe) -> int:
    """Along one side."""
    if family_of(pipe, wan=True) == "wan":
        return pipe.vae_scale_factor_spatial
    return 2 ** (len(pipe.vae.config.block_out_channels) - 1)


@torch.no_grad()
def encode_pixels(pipe, batches: Iterable[Tensor]) -> Tensor:
    """The latents that the pipeline's decoder would have been given, without chance.

    Args:
        batches: (B, 3, H, W), for Wan (B, 3, F, H, W), each in -1..1.

    Returns:
        (sum of B, C, ...), float32: the encoder's mode, scaled and shifted as the denoiser expects.
    """
    vae, device = pipe.vae, device_of(pipe)
    dtype = vae.dtype
    upcast = dtype == torch.float16 and getattr(vae.config, "force_upcast", False)  # SDXL's overflows in float16
    if upcast:
        vae.to(torch.float32)
    try:
        parts = [vae.encode(pixels.to(device, vae.dtype)).latent_dist.mode() for pixels in batches]
    finally:
        if upcast:
            vae.to(dtype)
    latents = torch.cat(parts).float()
    if family_of(pipe, wan=True) == "wan":
        mean, std = (
            torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return (latents - mean) / std
    return (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor


def alphas_of(pipe, error: type[MembraneError]) -> Tensor:
    """The scheduler's alphas_cumprod, by which a UNet's step has a noise level.

    Raises:
        error: the scheduler has none.
    """
    alphas = getattr(pipe.scheduler, "alphas_cumprod", None)
    if alphas is None:
        raise error(
            f"{type(pipe.scheduler).__name__} has no alphas_cumprod, so the noise level of a UNet's step is unknown;"
            " use DDIM, Euler, DPM-Solver or another scheduler of that family"
        )
    return alphas
