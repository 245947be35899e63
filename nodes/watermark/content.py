"""Pictures whose mark knows what they show, in ComfyUI: a sampling run draws, binds the content and draws again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from ...methods.errors import WatermarkError
from ...methods.watermark.content import draw_bound
from ...methods.watermark.keys import WatermarkKey


def sample_bound(draw: Callable[[Tensor], Tensor], noise: Tensor, key: WatermarkKey, vae) -> Tensor:
    """Draw until what a picture shows is what its noise says; the best of up to five draws of each picture.

    Args:
        draw: noise (B, C, H, W) -> latents for the VAE, as ComfyUI's sampling runs return them: always of the whole
            batch, which the run's other inputs belong to.
        noise: signed with `bound=True`.
        vae: decodes the latents; the content is bound to the decoded picture.

    Raises:
        WatermarkError: a picture that shows something else in every round, or videos.
    """
    if noise.ndim != 4:
        raise WatermarkError("content was to be bound in a video; disconnect vae from Watermark Model")

    def drawn(noise: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
        latents = draw(noise)[rows]
        pixels = rearrange(vae.decode(latents)[..., :3], "b h w c -> b c h w")
        return latents, pixels.float().cpu().clamp(0, 1)

    found = draw_bound(drawn, noise, key, advice="take another seed, or disconnect vae")
    return torch.stack([one.picture for one in found])
