"""Pictures whose mark knows what they show: draw, write the content into the noise, and draw again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...methods.errors import WatermarkError
from ...methods.watermark.config import DetectionConfig
from ...methods.watermark.content import ROUNDS, Embedding, draw_bound, perceptual_hash
from ...methods.watermark.detection import CONTENT, detect_in
from ...methods.watermark.keys import WatermarkKey
from ...methods.watermark.ladder import LADDER
from ...methods.watermark.mark import KeyedMark, Payload
from ..family import Pipeline, family_of
from ..latents import latent_shape, pixels_per_latent
from .detect import PipelineInverter
from .inversion import pixels_of
from .samplers import check_eta, check_scheduler
from .sign import as_pipeline_input

if TYPE_CHECKING:
    from PIL.Image import Image


# Inversion steps with which a bound picture is looked at before it is given away: a detector's own first rungs.
_CHECKED = LADDER[:3]
# It has to fit its content by as much more than is asked later, so that it still does after an edit.
_MARGIN = 0.1


@dataclass(frozen=True)
class BoundImages:
    """Pictures whose mark knows what they show.

    Args:
        images: PIL, one a prompt.
        latents: (B, ...) their initial noise, as the pipeline takes it.
        content_agreement: share of the bound content bits that each final picture has itself.
        draws: how often each was drawn, 2 or more.
    """

    images: list[Image]
    latents: Tensor
    content_agreement: list[float]
    draws: list[int]


def generate_bound(
    pipe: Pipeline,
    key: WatermarkKey,
    prompt: str | Sequence[str],
    *,
    payload: Payload | Sequence[Payload] | None = None,
    generator: torch.Generator | None = None,
    rounds: int = ROUNDS,
    embedding: Embedding = perceptual_hash,
    scope: str = "",
    **kwargs: Any,
) -> BoundImages:
    """Draw marked pictures whose content is bound to their mark; `detect_watermark` then tells a transplanted mark.

    Each picture is drawn two times or more, see `methods.watermark.content.draw_bound`, and looked at by the detector:
    none is given away that it would not find valid.

    Args:
        pipe: as for `sign_noise`; Wan's videos are not supported.
        prompt: one, or one for each picture.
        key, payload, generator, scope: as for `sign_noise`, one picture a prompt.
        rounds: redraws at most, at least 1.
        embedding: pictures (B, 3, H, W) in 0..1 -> (B, D); `detect_watermark` needs the same one.
        kwargs: of the pipeline's call: height, width, guidance_scale, num_inference_steps, ... Lists with an entry for
            each prompt are not split: give one value for all.

    Raises:
        ModelError: an unsupported pipeline, one of videos, or a sampler or an `eta` that loses the mark.
        WatermarkError: no prompts, what `sign_noise` refuses, or a picture that shows something else in every
            round, or that the detector never finds valid.

    Source: SEAL (arXiv 2503.12172) binds patches to a caption; methods/watermark/content.py says where we differ.
    """
    family_of(pipe, video=False)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or rounds < 1:
        raise WatermarkError(f"{len(prompts)} prompts in {rounds} rounds were asked for; expected at least 1 of each")
    check_scheduler(pipe, kwargs.get("num_inference_steps"))
    check_eta(kwargs.get("eta"))
    shape = len(prompts), *latent_shape(pipe, kwargs.get("height"), kwargs.get("width"))
    latents = KeyedMark(key, scope).sample(shape, payload, generator, bound=True)
    scale = pixels_per_latent(pipe)
    kwargs |= {"height": latents.shape[-2] * scale, "width": latents.shape[-1] * scale}

    def draw(noise: Tensor, rows: list[int]) -> tuple[list, Tensor]:
        given = as_pipeline_input(pipe, noise[rows])
        images = pipe([prompts[i] for i in rows], latents=given, **kwargs).images
        return images, torch.stack(pixels_of(pipe, images))

    inverter = PipelineInverter(pipe)
    config = DetectionConfig(ladder=_CHECKED, scope=scope, embedding=embedding)

    def holds(pixels: Tensor) -> list[bool]:
        found = detect_in(list(pixels), inverter, [key], config)
        return [one.verdict == "valid" and (one.content_p_value or 0.0) <= CONTENT * _MARGIN for one in found]

    advice = "allow more rounds, take another seed, or an embedding that looks at what matters"
    found = draw_bound(draw, latents, key, advice=advice, rounds=rounds, embedding=embedding, scope=scope, holds=holds)
    return BoundImages(
        images=[one.picture for one in found],
        latents=as_pipeline_input(pipe, torch.stack([one.noise for one in found])),
        content_agreement=[one.content_agreement for one in found],
        draws=[one.draws for one in found],
    )
