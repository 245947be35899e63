"""Reading the keyed mark out of pictures, with the pipeline of the model that drew them.

result = detect_watermark(pipe, picture, keyring)[0]  # result.verdict, result.p_value, result.payload
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from ...methods.pictures import Mask, Pictures, mask_of
from ...methods.watermark.content import Embedding, perceptual_hash
from ...methods.watermark.detection import LADDER, DetectionResult, detect_in
from ...methods.watermark.keys import WatermarkKey
from ...methods.watermark.search import Search
from ..family import Pipeline
from .inversion import encode_images, invert, multiple_of, pixels_of

__all__ = ["PipelineInverter", "detect_watermark"]


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


def detect_watermark(
    pipe: Pipeline,
    images: Pictures,
    keyring: Iterable[WatermarkKey],
    *,
    false_positive_rate: float = 1e-6,
    ladder: Sequence[int] = LADDER,
    scope: str = "",
    batch_size: int = 16,
    mask: Mask | None = None,
    search: Search | bool = False,
    size: tuple[int, int] | None = None,
    embedding: Embedding = perceptual_hash,
) -> list[DetectionResult]:
    """Look for the mark of any key in pictures, taking more inversion steps only where fewer do not settle it.

    Args:
        pipe: a pipeline of the model that drew them; which scheduler it has does not matter.
        images: PIL images, tensors (3, H, W) in 0..1 or arrays (H, W, 3), of any sizes, or one of them; for Wan,
            videos: sequences of frames.
        keyring: the keys to try, a `Keyring` or any others.
        false_positive_rate: at which a mark counts as present, above 0, below 1.
        ladder: inversion steps of each rung, rising; (1,) costs a single evaluation of the denoiser.
        scope: as in `sign_noise`.
        batch_size: pictures at a time.
        mask: PIL image or tensor (H, W), white where an inpainting drew; see `replace_noise`. After
            img2img nothing need be said: inverting all the way finds as much as inverting to its strength.
        search: where nothing is found, undo flips, turns, shifts and crops; True for the usual ones.
        size: (height, width) that was signed, in pixels, where pictures may have been resized or cropped since; None is
            each picture's own.
        embedding: as given to `generate_bound`.

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
    return detect_in(
        pixels_of(pipe, images),
        PipelineInverter(pipe, batch_size),
        keyring,
        false_positive_rate=false_positive_rate,
        ladder=ladder,
        scope=scope,
        batch_size=batch_size,
        mask=None if mask is None else mask_of(mask),
        search=Search() if search is True else search or None,
        size=size,
        embedding=embedding,
    )
