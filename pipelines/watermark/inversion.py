"""From a picture back to the noise it was drawn from: encode it, then walk the sampler's path in reverse.

UNets (SD1.x, SD2, SDXL), with a = alphas_cumprod and the denoiser's noise e (converted from v):

    z_(next) = sqrt(a_next) (z - sqrt(1 - a) e) / sqrt(a) + sqrt(1 - a_next) e

Flow matching (SD3, Flux, Wan), with the velocity v = noise - image:  z_(next) = z + (sigma_next - sigma) v

The prompt is unknown to a detector, so it is the empty one without guidance: one evaluation of the denoiser a step.
Latents are (B, C, H, W) here, for videos (B, C, F, H, W), for Flux too: its packing is left to `sign_noise`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from ...methods.errors import WatermarkError
from ...methods.pictures import Pictures, picture_of
from ...methods.watermark.ladder import FIRST, inversion_times
from ...methods.watermark.views import whole_cells
from ..family import Family, device_of, family_of
from ..latents import encode_pixels, multiple_of
from ..prediction import Predictor
from ..scheduler import alphas_of
from ..text import encode_text

__all__ = ["encode_images", "invert", "pixels_of"]


def pixels_of(pipe, images: Pictures) -> list[Tensor]:
    """Pictures as (3, H, W), videos as (F, 3, H, W), in 0..1."""
    video = family_of(pipe).video
    one = hasattr(images, "convert") or (
        isinstance(images, (Tensor, np.ndarray)) and images.ndim == (4 if video else 3)
    )
    items = [images] if one else images
    found = [torch.stack([picture_of(frame) for frame in item]) if video else picture_of(item) for item in items]
    if not found:
        raise WatermarkError("no pictures were given; expected at least one PIL image or tensor (3, H, W) in 0..1")
    return found


def encode_images(pipe, images, batch_size: int = 16) -> Tensor:
    """Pictures of one size to the latents that the pipeline's decoder would have been given, without chance.

    Args:
        images: PIL images, tensors (3, H, W) in 0..1, arrays (H, W, 3) in 0..1 or uint8, or one of them; for Wan,
            videos: sequences of such frames. Pixels beyond the last whole latent on the right and below are left out.

    Returns:
        (B, C, H, W) or (B, C, F, H, W), float32, the encoder's mode, scaled and shifted as the denoiser expects.

    Raises:
        WatermarkError: no pictures, too small ones, or pictures of different sizes.
        SemipermError: other things than pictures.
    """
    pixels = [whole_cells(picture, multiple_of(pipe)) for picture in pixels_of(pipe, images)]
    sizes = sorted({tuple(p.shape) for p in pixels})
    if len(sizes) > 1:
        raise WatermarkError(f"pictures of {len(sizes)} sizes, {sizes[0]} and {sizes[1]} among them; expected one size")
    starts = range(0, len(pixels), batch_size)
    batches = (torch.stack(pixels[i : i + batch_size]) * 2 - 1 for i in starts)
    if family_of(pipe).video:
        batches = (rearrange(batch, "b f c h w -> b c f h w") for batch in batches)
    return encode_pixels(pipe, batches)


@torch.no_grad()
def invert(pipe, latents0: Tensor, steps: int, prompt: str = "", batch_size: int = 16) -> Tensor:
    """Estimate the initial noise of latents: `steps` reverse steps, each one evaluation of the denoiser.

    Args:
        latents0: (B, C, H, W) or (B, C, F, H, W) from `encode_images`.
        steps: 0 returns the latents themselves: their signs already lean towards the noise's.
        prompt: "" where it is unknown, as it is to a detector.

    Returns:
        As latents0, float32.

    Raises:
        ModelError: a model that predicts neither noise nor v nor a flow.
        WatermarkError: negative steps, or latents of another number of dimensions.

    Source: DDIM (arXiv 2010.02502), equation 14; the flow's Euler steps in reverse as T2SMark (arXiv 2510.22366).
    """
    family = family_of(pipe)
    if steps < 0 or latents0.ndim != (5 if family.video else 4):
        raise WatermarkError(
            f"{steps} steps from latents of shape {tuple(latents0.shape)}; expected steps >= 0 and"
            f" {'(B, C, F, H, W)' if family.video else '(B, C, H, W)'} from encode_images(pipe, images)"
        )
    if not steps:
        return latents0.float()
    device = device_of(pipe)
    features = encode_text(pipe, [prompt])
    reverse = _flow if family.flow else _ddim
    parts = latents0.float().to(device).split(batch_size)
    words = features.hidden, features.pooled
    return torch.cat([reverse(pipe, part, steps, predictor(pipe, family, part, *words)) for part in parts])


def predictor(pipe, family: Family, latents: Tensor, hidden: Tensor, pooled: Tensor | None) -> Callable:
    """f(latents, share) -> prediction in float32, at a share of the schedule from 0 (the image) to 1 (pure noise)."""
    predictor, rows = Predictor(pipe), len(latents)
    hidden = repeat(hidden, "1 n d -> b n d", b=rows)
    pooled = pooled if pooled is None else repeat(pooled, "1 d -> b d", b=rows)

    def predict(latents: Tensor, share: float) -> Tensor:
        return predictor(latents, latents.new_full((rows,), share * family.noise_timestep), hidden, pooled)

    return predict


def _ddim(pipe, z: Tensor, steps: int, predict: Callable) -> Tensor:
    alphas, kind = alphas_of(pipe), Predictor(pipe).kind
    times, count = inversion_times(steps), len(alphas)
    levels = [1.0, *(float(alphas[min(count - 1, round(t * count))]) for t in times[1:])]
    for t, a, b in zip(times[:-1], levels[:-1], levels[1:], strict=True):
        out = predict(z, max(t, FIRST))
        if kind == "v_prediction":  # at the level that the denoiser is told, not at the one of z
            told = float(alphas[round(max(t, FIRST) * count)])
            noise = told**0.5 * out + (1 - told) ** 0.5 * z
        else:
            noise = out
        image = (z - (1 - a) ** 0.5 * noise) / a**0.5
        z = b**0.5 * image + (1 - b) ** 0.5 * noise
    return z


def _flow(pipe, z: Tensor, steps: int, predict: Callable) -> Tensor:
    times = inversion_times(steps)
    for t, then in zip(times, [*times[1:-1], 1.0], strict=False):
        z = z + (then - t) * predict(z, max(t, FIRST))
    return z
