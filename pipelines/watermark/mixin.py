"""The mark as methods of a pipeline."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ...methods.watermark.detection import DetectionResult
from ...methods.watermark.keys import WatermarkKey
from .detect import detect_watermark
from .sign import sign_noise


class WatermarkMixin:
    """The mark as methods of a pipeline: put it before any diffusers pipeline class of a supported family.

    class Marked(WatermarkMixin, StableDiffusionPipeline): ...
    """

    def sign_noise(self, key: WatermarkKey, batch: int = 1, *args, **kwargs) -> Tensor:
        """`semiperm.sign_noise(self, ...)`."""
        return sign_noise(self, key, batch, *args, **kwargs)

    def detect_watermark(self, images, keyring: Iterable[WatermarkKey], **kwargs) -> list[DetectionResult]:
        """`semiperm.detect_watermark(self, images, ...)`."""
        return detect_watermark(self, images, keyring, **kwargs)
