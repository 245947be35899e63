"""Pictures whose mark knows what they show, in ComfyUI: a sampling run draws, binds the content and draws again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...methods.errors import WatermarkError
from ...methods.watermark.content import ENOUGH, LEAST, ROUNDS, agreement, bind, perceptual_hash
from ...methods.watermark.keys import WatermarkKey


def sample_bound(draw: Callable[[Tensor], Tensor], noise: Tensor, key: WatermarkKey, vae) -> Tensor:
    """Draw until what a picture shows is what its noise says; the best of up to five draws of each picture.

    Args:
        draw: noise (B, C, H, W) -> latents for the VAE, as ComfyUI's sampling runs return them.
        noise: signed with `bound=True`.
        vae: decodes the latents; the content is bound to the decoded picture.

    Raises:
        WatermarkError: a picture that shows something else in every round, or videos.
    """
    if noise.ndim != 4:
        raise WatermarkError("content was to be bound in a video; disconnect vae from Watermark Model")
    kept, before, noise = None, None, noise.clone()
    share = torch.zeros(len(noise))
    for _ in range(ROUNDS + 1):
        latents = draw(noise)
        shown = perceptual_hash(vae.decode(latents)[..., :3].movedim(-1, 1).float().cpu().clamp(0, 1))
        if before is None:
            kept = latents.clone()
        else:
            stayed = agreement(before, shown)
            better = stayed > share
            kept[better.to(kept.device)] = latents[better.to(latents.device)]
            share = torch.maximum(share, stayed)
        pending = (share < ENOUGH).nonzero().flatten().tolist()
        if not pending:
            break
        before = shown
        noise[pending] = bind(noise[pending], shown[pending], key)
    if (lost := int((share < LEAST).sum())) > 0:
        raise WatermarkError(
            f"the content of {lost} of {len(noise)} pictures changed whenever it was bound, at best"
            f" {float(share.min()):.0%} of its bits stayed; expected {LEAST:.0%}: take another seed, or disconnect vae"
        )
    return kept
