"""What negative token merging pushes away from, how far, and when; in every face."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import TokenMergingError
from ..pictures import FITS, Mask, Picture, mask_of, picture_and_alpha
from ..schedule import Window

_CHOICES = {
    "rows": ("conditional", "all"),
    "matching": ("reference", "output"),
    "diversity": ("symmetric", "first"),
    "compat": (None, "official"),
    "fit": FITS,
}


@dataclass(frozen=True, eq=False)
class NegativeTokenMergingConfig:
    """What to push away from, how far, and when.

    Args:
        reference: image(s) to push away from: PIL images or float tensors (3, H, W) in 0..1, one or several; any
            size. An alpha, also as a fourth channel, is a mask: transparent is not avoided. None is diversity mode: the
            images of a batch push each other away.
        mask: where in the reference to look, for each image or one for all: PIL image or float tensor (H, W), white
            is what to avoid; of another size than its image, it is stretched onto it. None is everywhere.
        strength: how far, 0 is exactly the untouched model, below 0 pulls towards the reference; one for all references
            or one each: a token is pushed by the strength of the reference that it matches best, so that 0 keeps what
            is like that one. In the paper 0.9; strong prompts want 2 to 3.
        threshold: least cosine, -1 to 1, at which a token is pushed; -1 pushes every token.
        fit: how a reference of another aspect is brought to the picture's: "crop" (the middle that has it), "pad" (all
            of it, with borders that are not avoided) or "stretch".
        start, end: the `Window` of the noise schedule in which it pushes, 0 pure noise, 1 the image. The default is the
            paper's.
        rows: "conditional" (guidance then amplifies the push) or "all" rows of the batch, as released.
        reference_prompt: words for what the reference shows, with which its row is denoised, so that the features
            that belong to these words stand out. None takes each image's own prompt.
        blocks: only attention layers whose path starts with one of these; None is the paper's choice: ("up_blocks",) of
            a UNet, all of a transformer. ("",) is all.
        cross_attention: push the outputs of cross-attention, too (UNets).
        max_downscale: layers at a resolution coarser than latent / max_downscale are left alone.
        noise_reference: bring the reference to each step's noise level; False feeds it clean, as released.
        seed: of the reference's noise, which is the same at every step.
        matching: "reference" finds for each output token the best reference token; "output" is the released code's
            axis: for each reference position the best output token, whose index then picks from the reference.
        diversity: "symmetric" pushes each image from its best matches in all others, "first" only from image 0.
        compat: "official" sets matching, diversity, rows, cross_attention and noise_reference as released.

    Raises:
        TokenMergingError: a value outside its range, or a mask without reference.
        SemipermError: a window out of order, or an image or mask of the wrong shape or range.
    """

    reference: Picture | Sequence[Picture] | None = None
    mask: Mask | Sequence[Mask] | None = None
    strength: float | Sequence[float] = 0.9
    threshold: float = 0.65
    start: float = 0.0
    end: float = 0.2
    rows: str = "conditional"
    reference_prompt: str | None = None
    blocks: Sequence[str] | None = None
    cross_attention: bool = False
    max_downscale: int = 4
    noise_reference: bool = True
    seed: int = 0
    matching: str = "reference"
    diversity: str = "symmetric"
    compat: str | None = None
    fit: str = "crop"

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise TokenMergingError(f"{name}={getattr(self, name)!r}; expected one of {choices}")
        if self.compat == "official":
            released = {"matching": "output", "diversity": "first", "rows": "all"}
            self._set(**released, cross_attention=True, noise_reference=False)
        if not -1.0 <= self.threshold <= 1.0:
            raise TokenMergingError(f"threshold={self.threshold}; expected a cosine from -1 to 1")
        if self.max_downscale < 1:
            raise TokenMergingError(f"max_downscale={self.max_downscale}; expected 1 (full resolution only) or more")
        Window(self.start, self.end)
        images, alphas = as_images(self.reference)
        masks = as_masks(self.mask)
        if self.reference is not None and not images:
            raise TokenMergingError("reference has no image in it; expected one or more, or None for diversity mode")
        if masks and not images:
            raise TokenMergingError("a mask without a reference; it says where in the reference to look")
        if masks and len(masks) not in (1, len(images)):
            raise TokenMergingError(f"{len(masks)} masks for {len(images)} references; expected one each, or one")
        masks = masks * (len(images) if len(masks) == 1 else 1)
        if masks or any(alpha is not None for alpha in alphas):
            masks = masks or tuple(torch.ones(image.shape[1:]) for image in images)
            masks = tuple(map(_visible, masks, images, alphas))
        self._set(strength=_strength_of(self.strength, len(images)))
        if self.reference_prompt is not None and not images:
            raise TokenMergingError("a reference_prompt without a reference; diversity mode has no reference row")
        if isinstance(self.blocks, str):
            raise TokenMergingError(
                f"blocks={self.blocks!r}; expected a sequence of path prefixes, e.g. ('up_blocks',)"
            )
        self._set(reference=images or None, mask=masks or None)
        self._set(blocks=None if self.blocks is None else tuple(self.blocks))

    def _set(self, **values) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def strengths(self) -> tuple[float, ...]:
        """Of each reference; in diversity mode of all images."""
        if isinstance(self.strength, Sequence):
            return tuple(self.strength)
        return (self.strength,) * (len(self.reference) if isinstance(self.reference, tuple) else 1)

    @property
    def mode(self) -> str:
        """ "reference" or "diversity"."""
        return "diversity" if self.reference is None else "reference"

    @property
    def window(self) -> Window:
        return Window(self.start, self.end)


def _strength_of(strength, references: int) -> float | tuple[float, ...]:
    """One number for all, also where all have the same, or one each."""
    each = tuple(map(float, strength)) if isinstance(strength, Sequence) else (float(strength),)
    if len(each) not in (1, references):
        raise TokenMergingError(f"{len(each)} strengths for {references} references; expected one each, or one")
    if not all(map(math.isfinite, each)):
        raise TokenMergingError(f"strength={strength}; expected finite numbers, 0 to do nothing")
    return each[0] if len(set(each)) == 1 else each


def _visible(mask: Tensor, image: Tensor, alpha: Tensor | None) -> Tensor:
    """A mask of its image's size, where that can be seen."""
    mask = F.adaptive_max_pool2d(mask[None], image.shape[1:])[0]  # no white pixel is lost
    visible = mask if alpha is None else mask * alpha
    if not bool((visible > 0.5).any()):
        raise TokenMergingError("a mask is white only where its picture is transparent, so nothing would be avoided")
    return visible


def as_images(value) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """PIL images or tensors (3 or 4, H, W), (R, 3 or 4, H, W), one or a sequence -> float tensors (3, H, W), alphas."""
    found = [picture_and_alpha(item) for item in _items(value, 4)]
    return tuple(image for image, _ in found), tuple(alpha for _, alpha in found)


def as_masks(value) -> tuple[Tensor, ...]:
    """PIL images or tensors (H, W), (R, H, W), one or a sequence -> float tensors (H, W) in 0..1."""
    masks = tuple(map(mask_of, _items(value, 3)))
    if any(not bool((mask > 0.5).any()) for mask in masks):
        raise TokenMergingError("a mask is black everywhere, so nothing would be avoided; white marks what to avoid")
    return masks


def _items(value, batched: int) -> list:
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        return [item for part in value for item in _items(part, batched)]
    return list(value) if isinstance(value, Tensor) and value.ndim == batched else [value]
