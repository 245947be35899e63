"""Reading the keyed mark out of pictures, with the pipeline of the model that drew them.

result = detect_watermark(pipe, picture, keyring)[0]  # result.verdict, result.p_value, result.payload
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from ...methods.pictures import Mask, Pictures, as_exif_says, mask_of
from ...methods.watermark.config import DetectionConfig, DetectionResult
from ...methods.watermark.detection import detect_in
from ...methods.watermark.keys import WatermarkKey
from ..family import Pipeline, family_of
from ..latents import latent_shape, multiple_of, pixels_per_latent
from .inversion import encode_images, invert, pixels_of

__all__ = ["PipelineInverter", "detect_watermark"]


class PipelineInverter:
    """A diffusers pipeline as detection sees it.

    Args:
        pipe: of a supported family.
        batch_size: pictures in the model at a time.
    """

    def __init__(self, pipe: Pipeline, batch_size: int = 16):
        self._pipe, self._batch_size = pipe, batch_size
        self.multiple = multiple_of(pipe)
        self.native = None if family_of(pipe).video else latent_shape(pipe)[-1] * pixels_per_latent(pipe)

    def encode(self, pixels: list[Tensor]) -> Tensor:
        return encode_images(self._pipe, pixels, self._batch_size)

    def invert(self, latents: Tensor, steps: int) -> Tensor:
        return invert(self._pipe, latents, steps, batch_size=self._batch_size)


def detect_watermark(
    pipe: Pipeline,
    images: Pictures,
    keyring: Iterable[WatermarkKey],
    config: DetectionConfig | None = None,
    *,
    mask: Mask | None = None,
    **settings: Any,
) -> list[DetectionResult]:
    """Look for the mark of any key in pictures, taking more inversion steps only where fewer do not settle it.

    Pictures need not have the size that was signed: their own and the model's are both looked at, and so is what the
    EXIF orientation of PIL images says.

    Args:
        pipe: a pipeline of the model that drew them; which scheduler it has does not matter.
        images: PIL images, tensors (3, H, W) in 0..1 or arrays (H, W, 3), of any sizes, or one of them; for Wan,
            videos: sequences of frames.
        keyring: the keys to try, a `Keyring` or any others.
        config: how to look.
        mask: PIL image or tensor (H, W), white where an inpainting drew; see `replace_noise`. After
            img2img nothing need be said: inverting all the way finds as much as inverting to its strength.
        settings: fields of `DetectionConfig` in place of the config's: false_positive_rate, ladder, scope, batch_size,
            search, size, embedding, reader, channels, issued.

    Returns:
        One result a picture, in order.

    Raises:
        ModelError: an unsupported pipeline.
        WatermarkError: no keys, no pictures, pictures too small to encode, or an argument out of range.
        SemipermError: other things than pictures or masks.

    >>> latents = sign_noise(pipe, key, generator=torch.Generator().manual_seed(0))
    >>> prompt, options = "a robot in sketch style on sky", {"guidance_scale": 4, "num_inference_steps": 4}
    >>> image = pipe(prompt, latents=latents, **options).images[0]
    >>> result = detect_watermark(pipe, image, [key])[0]
    >>> result.verdict, result.p_value < 1e-6
    ('valid', True)
    """
    config = replace(config or DetectionConfig(), **settings)
    inverter = PipelineInverter(pipe, config.batch_size)
    mask = None if mask is None else mask_of(mask)
    pixels = pixels_of(pipe, images)
    files: Sequence[Any] = [images] if hasattr(images, "convert") else cast("Sequence[Any]", images)
    if family_of(pipe).video or len(files) != len(pixels):
        return detect_in(pixels, inverter, keyring, config, mask=mask)
    turned = [as_exif_says(file) for file in files]
    both = [one if other is None else (one, other) for one, other in zip(pixels, turned, strict=True)]
    return detect_in(both, inverter, keyring, config, mask=mask)
