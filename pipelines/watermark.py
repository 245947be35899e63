"""The keyed mark on diffusers pipelines of the SD1.x, SD2, SDXL, SD3, Flux and Wan families: sign noise, read pictures.

latents = sign_noise(pipe, key)
picture = pipe("an eared mascot in striped style on sky", latents=latents).images[0]
result = detect(picture, pipe, keyring)[0]  # result.verdict, result.p_value, result.payload
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..methods.content_binding import Embedding, perceptual_hash
from ..methods.errors import WatermarkError
from ..methods.watermark import KeyedMark, Payload
from ..methods.watermark_detection import LADDER, DetectionResult, detect_in
from ..methods.watermark_keys import WatermarkKey
from ..methods.watermark_search import Search
from .text import denoiser_of, device_of
from .watermark_inversion import (
    check_scheduler,
    encode_images,
    family_of,
    invert,
    latent_shape,
    multiple_of,
    pixels_of,
)

__all__ = ["LADDER", "DetectionResult", "WatermarkMixin", "detect", "sign_noise"]


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
        scope: separates marks of one key further; `detect` needs the same.

    Returns:
        (B, C, H, W), (B, N, C) packed for Flux, (B, C, F, H, W) for Wan; on the pipeline's device, in its dtype.

    Raises:
        WatermarkError: a sampler that adds noise, a size that the model cannot draw or that holds no payload.
    """
    return packed(pipe, draw_noise(pipe, key, batch, height, width, payload, generator, frames=frames, scope=scope))


def draw_noise(
    pipe, key, batch=1, height=None, width=None, payload=None, generator=None, *, frames=None, scope="", bound=False
) -> Tensor:
    """As `sign_noise`, in float32 and before `packed`; `bound` as in `KeyedMark.sample`."""
    check_scheduler(pipe)
    if batch < 1:
        raise WatermarkError(f"noise for {batch} pictures was asked for; expected at least 1")
    if frames is not None and family_of(pipe) != "wan":
        raise WatermarkError(f"{type(pipe).__name__} draws pictures, but {frames} frames were asked for; leave it out")
    shape = batch, *latent_shape(pipe, height, width, frames)
    return KeyedMark(key, scope).sample(shape, payload, generator, bound=bound)


def packed(pipe, latents: Tensor) -> Tensor:
    """Latents (B, C, H, W) or (B, C, F, H, W) as the pipeline's call takes them: device, dtype, Flux's packing."""
    family = family_of(pipe)
    latents = latents.to(device_of(pipe), torch.float32 if family == "wan" else denoiser_of(pipe)[0].dtype)
    return pipe._pack_latents(latents, *latents.shape) if family == "flux" else latents


class PipelineInverter:
    """A diffusers pipeline as detection sees it.

    Args:
        pipe: of a supported family.
        batch_size: pictures in the model at a time.
    """

    def __init__(self, pipe, batch_size: int = 16):
        self._pipe, self._batch_size = pipe, batch_size
        self.multiple = multiple_of(pipe)

    def encode(self, pixels: list[Tensor]) -> Tensor:
        return encode_images(self._pipe, pixels, self._batch_size)

    def invert(self, latents: Tensor, steps: int) -> Tensor:
        return invert(self._pipe, latents, steps, batch_size=self._batch_size)


def detect(
    images,
    pipe,
    keyring: Iterable[WatermarkKey],
    *,
    alpha: float = 1e-6,
    ladder: Sequence[int] = LADDER,
    scope: str = "",
    batch_size: int = 16,
    mask=None,
    search: Search | bool = False,
    size: tuple[int, int] | None = None,
    embedding: Embedding = perceptual_hash,
) -> list[DetectionResult]:
    """Look for the mark of any key in pictures, taking more inversion steps only where fewer do not settle it.

    Args:
        images: PIL images, tensors (3, H, W) in 0..1 or arrays (H, W, 3), of any sizes, or one of them; for Wan,
            videos: sequences of frames.
        pipe: a pipeline of the model that drew them; which scheduler it has does not matter.
        keyring: the keys to try, a `Keyring` or any others.
        alpha: the false positive rate at which a mark counts as present, above 0, below 1.
        ladder: inversion steps of each rung, rising; (1,) costs a single evaluation of the denoiser.
        scope: as in `sign_noise`.
        batch_size: pictures at a time.
        mask: PIL image or tensor (H, W), white (1, in uint8 255) where an inpainting drew; see `signed_noise`. After
            img2img nothing need be said: inverting all the way finds as much as inverting to its strength.
        search: where nothing is found, undo flips, turns, shifts and crops; True for the usual ones.
        size: (height, width) that was signed, where pictures may have been resized or cropped since.
        embedding: as given to `generate_bound`.

    Returns:
        One result a picture, in order.

    Raises:
        WatermarkError: no keys, no pictures, other things than pictures, or an argument out of range.
    """
    if hasattr(mask, "convert"):
        mask = torch.from_numpy(np.array(mask.convert("L")))
    return detect_in(
        pixels_of(pipe, images),
        PipelineInverter(pipe, batch_size),
        keyring,
        alpha=alpha,
        ladder=ladder,
        scope=scope,
        batch_size=batch_size,
        mask=mask,
        search=Search() if search is True else search or None,
        size=size,
        embedding=embedding,
    )


class WatermarkMixin:
    """The mark as methods of a pipeline: put it before any diffusers pipeline class of a supported family.

    class Marked(WatermarkMixin, StableDiffusionPipeline): ...
    """

    def sign_noise(self, key: WatermarkKey, batch: int = 1, *args, **kwargs) -> Tensor:
        """`semiperm.sign_noise(self, ...)`."""
        return sign_noise(self, key, batch, *args, **kwargs)

    def detect_watermark(self, images, keyring: Iterable[WatermarkKey], **kwargs) -> list[DetectionResult]:
        """`semiperm.detect(images, self, ...)`."""
        return detect(images, self, keyring, **kwargs)
