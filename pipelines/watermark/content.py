"""Pictures whose mark knows what they show: draw, write the content into the noise, and draw again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...methods.errors import WatermarkError
from ...methods.watermark.content import ENOUGH, LEAST, ROUNDS, Embedding, agreement, bind, perceptual_hash
from ...methods.watermark.keys import WatermarkKey
from ...methods.watermark.mark import Payload
from ..family import Pipeline, family_of
from ..latents import pixels_per_latent
from .inversion import pixels_of
from .sign import draw_noise, packed

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class BoundImages:
    """What `generate_bound` drew.

    Args:
        images: PIL, one a prompt.
        latents: (B, ...) their initial noise, as the pipeline takes it.
        agreement: share, 0 to 1, of the bound content bits that each final picture has itself.
        draws: how often each was drawn, 2 or more.
    """

    images: list[Image]
    latents: Tensor
    agreement: list[float]
    draws: list[int]


def generate_bound(
    pipe: Pipeline,
    key: WatermarkKey,
    prompt: str | Sequence[str],
    *,
    payload: Payload | Sequence[Payload] | None = None,
    generator: torch.Generator | None = None,
    height: int | None = None,
    width: int | None = None,
    rounds: int = ROUNDS,
    embedding: Embedding = perceptual_hash,
    scope: str = "",
    **kwargs: Any,
) -> BoundImages:
    """Draw marked pictures whose content is bound to their mark; `detect_watermark` then tells a transplanted mark.

    Each picture is drawn two times or more: the first says what it will show, the second starts from noise that says
    so. Rewriting an eighth of the signs hardly changes a picture; where it does, the new content is written again.

    Args:
        pipe: as for `sign_noise`; Wan's videos are not supported.
        prompt: one, or one for each picture.
        key, payload, generator, height, width, scope: as for `sign_noise`, one picture a prompt.
        rounds: redraws at most, at least 1.
        embedding: pictures (B, 3, H, W) in 0..1 -> (B, D); `detect_watermark` needs the same one.
        kwargs: of the pipeline's call: guidance_scale, num_inference_steps, ... Lists with an entry for each prompt
            are not split: give one value for all.

    Raises:
        ModelError: an unsupported pipeline, one of videos, or a sampler that adds noise.
        WatermarkError: no prompts, what `sign_noise` refuses, or a picture that shows something else in every
            round.

    Source: SEAL (arXiv 2503.12172) binds patches to a caption; methods/watermark/content.py says where we differ.
    """
    family_of(pipe, video=False)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or rounds < 1:
        raise WatermarkError(f"{len(prompts)} prompts in {rounds} rounds were asked for; expected at least 1 of each")
    latents = draw_noise(pipe, key, len(prompts), height, width, payload, generator, scope=scope, bound=True)
    scale = pixels_per_latent(pipe)
    kwargs |= {"height": latents.shape[-2] * scale, "width": latents.shape[-1] * scale}
    images: dict[int, Image] = {}
    features: dict[int, Tensor] = {}
    share, draws = [0.0] * len(prompts), [0] * len(prompts)
    pending, kept = list(range(len(prompts))), latents.clone()
    for turn in range(rounds + 1):
        drawn = pipe([prompts[i] for i in pending], latents=packed(pipe, latents[pending]), **kwargs).images
        seen = embedding(torch.stack(pixels_of(pipe, drawn)))
        for i, image, shown in zip(pending, drawn, seen, strict=True):
            draws[i] += 1
            stayed = float(agreement(features[i], shown)) if turn else 0.0
            if stayed > share[i]:
                share[i], images[i], kept[i] = stayed, image, latents[i]
            features[i] = shown
        pending = [i for i in pending if share[i] < ENOUGH]
        if not pending or turn == rounds:
            break
        latents[pending] = bind(latents[pending], torch.stack([features[i] for i in pending]), key, scope)
    if lost := [i for i, stayed in enumerate(share) if stayed < LEAST]:
        raise WatermarkError(
            f"the content of {len(lost)} of {len(prompts)} pictures (the first: {prompts[lost[0]]!r}) changed whenever"
            f" it was bound, at best {max(share[i] for i in lost):.0%} of its bits stayed; expected {LEAST:.0%}: allow"
            " more rounds, take another seed, or an embedding that looks at what matters"
        )
    return BoundImages([images[i] for i in range(len(prompts))], packed(pipe, kept), share, draws)
