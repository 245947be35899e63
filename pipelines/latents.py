"""A pipeline's latents: their sizes, and from pixels to them and back, for every family."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from einops import rearrange
from torch import Tensor

from ..methods.errors import SemipermError
from .family import denoiser_of, device_of, family_of


def pixels_per_latent(pipe) -> int:
    """Along one side."""
    if family_of(pipe).video:
        return pipe.vae_scale_factor_spatial
    return 2 ** (len(pipe.vae.config.block_out_channels) - 1)


def latent_shape(pipe, height: int | None = None, width: int | None = None, frames: int | None = None) -> tuple:
    """The shape of one picture's latents, (C, H, W) or (C, F, H, W), for a size in pixels; None is the model's own.

    Raises:
        SemipermError: a size that the model cannot draw.
    """
    family, scale, step = family_of(pipe), pixels_per_latent(pipe), multiple_of(pipe)
    native = getattr(pipe, "default_sample_size", None)
    if family.video:
        defaults = 480, 832  # Wan's
    else:
        native = native or denoiser_of(pipe)[0].config.sample_size
        defaults = native * scale, native * scale
    height, width = height or defaults[0], width or defaults[1]
    if height < step or width < step or height % step or width % step:
        raise SemipermError(f"{type(pipe).__name__} cannot draw {height} x {width}; expected multiples of {step}")
    channels = pipe.vae.config.get("latent_channels") or pipe.vae.config.z_dim
    if not family.video:
        return channels, height // scale, width // scale
    frames = 81 if frames is None else frames
    steps = pipe.vae_scale_factor_temporal
    if frames < 1 or (frames - 1) % steps:
        raise SemipermError(f"{type(pipe).__name__} cannot draw {frames} frames; expected a multiple of {steps}, + 1")
    return channels, (frames - 1) // steps + 1, height // scale, width // scale


def multiple_of(pipe) -> int:
    """What height and width in pixels are a multiple of."""
    return pixels_per_latent(pipe) * family_of(pipe).patch(denoiser_of(pipe)[0])[1]


@torch.no_grad()
def encode_pixels(pipe, batches: Iterable[Tensor]) -> Tensor:
    """The latents that the pipeline's decoder would have been given, without chance.

    Args:
        batches: (B, 3, H, W), for Wan (B, 3, F, H, W), each in -1..1.

    Returns:
        (sum of B, C, ...), float32: the encoder's mode, scaled and shifted as the denoiser expects.
    """
    vae, device = pipe.vae, device_of(pipe)
    with _wide_enough(vae):
        parts = [vae.encode(pixels.to(device, vae.dtype)).latent_dist.mode() for pixels in batches]
    latents = torch.cat(parts).float()
    if family_of(pipe).video:
        mean, std = (
            rearrange(torch.tensor(values, device=device), "c -> 1 c 1 1 1")
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return (latents - mean) / std
    return (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(pipe, latents: Tensor, batch_size: int = 16) -> Tensor:
    """(B, C, h, w) as the denoiser has them -> pictures (B, 3, H, W) in 0..1, float32; undoes `encode_pixels`."""
    vae = pipe.vae
    latents = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
    with _wide_enough(vae):
        parts = latents.to(device_of(pipe), vae.dtype).split(batch_size)
        pixels = torch.cat([vae.decode(part, return_dict=False)[0] for part in parts])
    return (pixels.float() / 2 + 0.5).clamp(0, 1)


@contextlib.contextmanager
def _wide_enough(vae) -> Iterator[None]:
    """SDXL's autoencoder overflows in float16 and says so."""
    dtype = vae.dtype
    upcast = dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(dtype)
