"""The families of models, one row each: all that tells them apart stands here, and nobody asks for a family elsewhere.

To support another family add a row, and its class of denoiser is known everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..methods.errors import ModelError

__all__ = ["FAMILIES", "Denoiser", "Family", "Pipeline", "Segments", "denoiser_of", "device_of", "family_of", "unwrap"]

# A pipeline is told by what it holds (`denoiser_of`, `family_of`), whatever its class: diffusers', custom ones, ours.
# No Protocol names what they share: one has `unet`, another `transformer`, one tokenizer or three.
Pipeline: TypeAlias = Any
# An nn.Module, whose `config`, `dtype` and `device` type checkers take for "Tensor | Module".
Denoiser: TypeAlias = Any


@dataclass(frozen=True)
class Segments:
    """A stretch of the text axis: which of the pipeline's tokenizers fills it, if its encoder is there.

    causal: later positions see earlier ones only (CLIP), or all see all (T5).
    """

    tokenizer: str
    encoder: str
    causal: bool


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Args:
        name: for people.
        denoiser: diffusers' class.
        second_encoder: whether pipelines of it have a `text_encoder_2`; None where that does not tell.
        img2img: diffusers' class of the same family that redraws pictures; None for videos.
        removed: parts that the img2img class must be told are not there.
        flow: whether it predicts a velocity on z = (1 - sigma) image + sigma noise; else noise or v, by the scheduler.
        noise_timestep: the timestep that its denoiser is given at pure noise (Flux: t / 1000).
        one_call: whether guidance is one call with rows [negative, positive]; else two calls, one each.
        segments: of the text axis, in order.
        pooled: whether its denoiser also reads a pooled text embedding.
        packed: whether latents travel as tokens (B, N, C) of 2 x 2 patches.
        video: whether it draws frames, latents (B, C, F, H, W).
        uneven: whether its attention layers have several resolutions.
        self_attention, cross_attention: last names of its attention layers.
        token_merging: prefixes of the layers that negative token merging takes, the paper's choice.
        inputs: (pipe, latents (B, C, H, W), hidden (B, N, d), pooled) -> what else its denoiser is called with.
    """

    name: str
    denoiser: str
    second_encoder: bool | None
    img2img: str | None
    flow: bool
    one_call: bool
    segments: tuple[Segments, ...]
    pooled: bool
    inputs: Callable[..., dict]
    removed: dict = field(default_factory=dict)
    noise_timestep: float = 1000.0
    packed: bool = False
    video: bool = False
    uneven: bool = False
    self_attention: frozenset[str] = frozenset({"attn", "attn1"})
    cross_attention: frozenset[str] = frozenset()
    token_merging: tuple[str, ...] = ("",)

    def patch(self, denoiser: nn.Module) -> tuple[int, int, int]:
        """(frames, rows, columns) of latent cells in one image token of a transformer; (1, 1, 1) for UNets."""
        if self.packed:
            return 1, 2, 2
        size = denoiser.config.get("patch_size") or 1
        return tuple(size) if isinstance(size, (tuple, list)) else (1, size, size)

    def pack(self, pipe, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) as the denoiser is given them."""
        return pipe._pack_latents(latents, *latents.shape) if self.packed else latents

    def unpack(self, pipe, latents: Tensor, height: int, width: int) -> Tensor:
        """The inverse of `pack`; height and width in pixels."""
        return pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor) if self.packed else latents


def _nothing(pipe, latents: Tensor, hidden: Tensor, pooled: Tensor | None) -> dict:
    return {}


def _pooled(pipe, latents: Tensor, hidden: Tensor, pooled: Tensor | None) -> dict:
    return {"pooled_projections": pooled}


def _sdxl(pipe, latents: Tensor, hidden: Tensor, pooled: Tensor | None) -> dict:
    size = tuple(side * pipe.vae_scale_factor for side in latents.shape[-2:])
    last = (6.0,) if pipe.config.get("requires_aesthetics_score") else size  # the refiner's
    ids = torch.tensor([[*size, 0, 0, *last]], device=latents.device, dtype=hidden.dtype)
    return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids.expand(len(latents), -1)}}


def _flux(pipe, latents: Tensor, hidden: Tensor, pooled: Tensor | None) -> dict:
    rows, _, height, width = latents.shape
    where, dtype = latents.device, hidden.dtype
    denoiser, _ = denoiser_of(pipe)
    return {
        "pooled_projections": pooled,
        "txt_ids": torch.zeros(hidden.shape[1], 3, device=where, dtype=dtype),
        "img_ids": pipe._prepare_latent_image_ids(rows, height // 2, width // 2, where, dtype),
        "guidance": latents.new_ones(rows) if denoiser.config.guidance_embeds else None,
    }


_CLIP, _SD3_T5 = Segments("tokenizer", "text_encoder", True), Segments("tokenizer_3", "text_encoder_3", False)
_UNET = {
    "denoiser": "UNet2DConditionModel",
    "flow": False,
    "one_call": True,
    "uneven": True,
    "cross_attention": frozenset({"attn2"}),
    "token_merging": ("up_blocks",),
}
FAMILIES = (
    Family(
        name="SD1.x or SD2",
        second_encoder=False,
        img2img="StableDiffusionImg2ImgPipeline",
        removed={"safety_checker": None, "requires_safety_checker": False},
        segments=(_CLIP,),
        pooled=False,
        inputs=_nothing,
        **_UNET,
    ),
    Family(
        name="SDXL",
        second_encoder=True,
        img2img="StableDiffusionXLImg2ImgPipeline",
        removed={"add_watermarker": False},
        segments=(_CLIP,),
        pooled=True,
        inputs=_sdxl,
        **_UNET,
    ),
    Family(
        name="SD3",
        denoiser="SD3Transformer2DModel",
        second_encoder=None,
        img2img="StableDiffusion3Img2ImgPipeline",
        flow=True,
        one_call=True,
        segments=(_CLIP, _SD3_T5),
        pooled=True,
        self_attention=frozenset({"attn", "attn1", "attn2"}),  # SD3.5's attn2 is self-attention
        inputs=_pooled,
    ),
    Family(
        name="Flux",
        denoiser="FluxTransformer2DModel",
        second_encoder=None,
        img2img="FluxImg2ImgPipeline",
        flow=True,
        noise_timestep=1.0,
        one_call=False,
        segments=(Segments("tokenizer_2", "text_encoder_2", False),),
        pooled=True,
        packed=True,
        inputs=_flux,
    ),
    Family(
        name="Wan",
        denoiser="WanTransformer3DModel",
        second_encoder=None,
        img2img=None,
        flow=True,
        one_call=False,
        segments=(Segments("tokenizer", "text_encoder", False),),
        pooled=False,
        video=True,
        inputs=_nothing,
    ),
)


def unwrap(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


def denoiser_of(pipe: Pipeline) -> tuple[Denoiser, str]:
    """Return the pipeline's denoiser (unwrapped from `torch.compile`) and its attribute: "unet" or "transformer".

    Raises:
        ModelError: the pipeline has neither.
    """
    for name in ("unet", "transformer"):
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            return unwrap(module), name
    raise ModelError(
        f"{type(pipe).__name__} has no unet and no transformer; expected a loaded diffusers text-to-image pipeline"
    )


def family_of(pipe: Pipeline, *, video: bool = True) -> Family:
    """The row of a pipeline.

    Args:
        video: whether families that draw videos are taken, too.

    Raises:
        ModelError: another architecture.
    """
    denoiser, _ = denoiser_of(pipe)
    names = {cls.__name__ for cls in type(denoiser).__mro__}
    second = getattr(pipe, "text_encoder_2", None) is not None
    for family in FAMILIES:
        if family.denoiser in names and family.second_encoder in (None, second) and (video or not family.video):
            return family
    known = [family.name for family in FAMILIES if video or not family.video]
    raise ModelError(
        f"{type(pipe).__name__} with a {type(denoiser).__name__} is not supported; expected a pipeline of the"
        f" {', '.join(known[:-1])} or {known[-1]} family"
    )


def device_of(pipe: Pipeline) -> torch.device:
    """The device on which the pipeline computes, offloading included."""
    return getattr(pipe, "_execution_device", None) or denoiser_of(pipe)[0].device
