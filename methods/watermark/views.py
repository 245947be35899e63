"""What a picture may have looked like when it was signed, for a finder who knows nothing of its way.

It may have been signed at the size that it has, or at the size that its model draws and been resized since; and its
pixels may lie as they were drawn, or have to be turned as the file's EXIF orientation says. Where a margin of one
colour runs around it, as in screenshots, what lies within is looked at as well. That is six views at most, mostly one
or two, told by the file and the model alone, never by the keys: each is tested at its share of the error (Bonferroni),
so that not knowing costs at most 2.6 bits of a p-value, and no p-value becomes too small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import WatermarkError
from .edits import within_margin
from .fields import MINIMUM

__all__ = [
    "AS_GIVEN",
    "LARGEST",
    "View",
    "large_enough",
    "latent_mask",
    "resized",
    "signed_sizes",
    "views",
    "whole_cells",
]

AS_GIVEN = "as given"
LARGEST = 4  # times the area that the model draws: what is larger was not signed as it is, and would take minutes
_SQUARE = 0.08  # logarithm of the proportions: a square that lost up to 8 % of one side is looked at as a square
_BUCKET = 64  # pixels: models of 1,024 pixels and more are trained on sides of whole buckets,
_BUCKETED = 768
_SPREAD = 0.12  # and on areas that differ by up to this share of the square's


@dataclass(frozen=True, eq=False)
class View:
    """Pixels to look at, cut to whole latent cells, and what was done to the file's to get them."""

    pixels: Tensor
    transform: str = AS_GIVEN


def views(
    readings: Sequence[Tensor],
    multiple: int,
    native: int | None,
    size: tuple[int, int] | None,
    elements: Callable[[Tensor], int],
) -> list[View]:
    """The views of one picture, likeliest first.

    Args:
        readings: (3, H, W) of the file's pixels as they lie, and turned where there is an EXIF orientation.
        multiple: sides are cut to multiples of it.
        native: side of the square that the model draws, in pixels; None where it is not known.
        size: (height, width) that was signed, where that is known: then it is the only one.
        elements: of the latent that pixels are encoded to.

    Raises:
        WatermarkError: a picture without pixels.
    """
    looked_at = [("turned as its EXIF says" if number else "", pixels) for number, pixels in enumerate(readings)]
    inside = within_margin(readings[-1]) if size is None and native is not None else None
    if inside is not None:
        looked_at.append((", ".join(filter(None, (looked_at[-1][0], "cut out of its margin"))), inside))
    found = []
    for turned, pixels in looked_at:
        sizes = [size] if size is not None else signed_sizes(tuple(pixels.shape[-2:]), native, multiple)
        for side in sizes:
            sized = resized(pixels, side)
            view = large_enough(sized, multiple, elements)
            if view is not sized and len(sizes) > 1 and side is None:  # the model's size is an enlargement, too
                continue
            view = whole_cells(view, multiple)
            told = "" if side is None or size is not None else f"resized to {view.shape[-1]} x {view.shape[-2]}"
            found.append(View(view, ", ".join(filter(None, (turned, told))) or AS_GIVEN))
    return found


def signed_sizes(given: tuple[int, int], native: int | None, multiple: int) -> list[tuple[int, int] | None]:
    """(height, width) in which a picture may have been signed; None is its own."""
    if native is None:
        return [None]
    cut = tuple(n - n % multiple for n in given)
    drawn = _drawn(given, native, multiple)
    if drawn == cut:
        return [None]
    return [drawn] if math.prod(given) > LARGEST * math.prod(drawn) else [None, drawn]


def _drawn(given: tuple[int, int], native: int, multiple: int) -> tuple[int, int]:
    """The size in which the model would draw a picture of these proportions: small models by their shorter side, large
    ones in the bucket of about their area."""
    height, width = given
    if abs(math.log(height / width)) < _SQUARE:
        return native, native
    if native < _BUCKETED:
        return tuple(max(multiple, round(n * native / min(given) / multiple) * multiple) for n in given)
    best, proportion = (native, native), math.log(height / width)
    least = abs(proportion), 0.0
    for down in range(_BUCKET, 4 * native, _BUCKET):
        for across in range(_BUCKET, 4 * native, _BUCKET):
            off = abs(down * across / native**2 - 1)
            if off > _SPREAD:
                continue
            error = round(abs(math.log(down / across) - proportion), 3), off
            if error < least:
                best, least = (down, across), error
    return best


def resized(picture: Tensor, size: tuple[int, int] | None) -> Tensor:
    """A picture or a video of another size; None leaves it as it is."""
    if size is None or picture.shape[-2:] == tuple(size):
        return picture
    frames = picture if picture.ndim == 4 else picture[None]
    out = torch.nn.functional.interpolate(frames, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    return out if picture.ndim == 4 else out[0]


def large_enough(picture: Tensor, multiple: int, elements: Callable[[Tensor], int]) -> Tensor:
    """The picture itself, or enlarged by a whole number where its latent would be too small to carry a mark.

    Raises:
        WatermarkError: a picture without pixels.
    """
    height, width = picture.shape[-2:]
    if not min(height, width):
        raise WatermarkError(f"a picture of {height} x {width} pixels was given; expected at least 1 x 1")
    first = math.ceil(multiple / min(height, width))
    cells = elements(whole_cells(resized(picture, (height * first, width * first)), multiple))
    factor = first * math.ceil(math.sqrt(max(1, MINIMUM / cells)))
    return resized(picture, (height * factor, width * factor))


def whole_cells(picture: Tensor, multiple: int) -> Tensor:
    """Leave out what is beyond the last whole latent cell, on the right and below.

    Raises:
        WatermarkError: nothing is left.
    """
    height, width = (side - side % multiple for side in picture.shape[-2:])
    if not height or not width:
        raise WatermarkError(
            f"a picture of {picture.shape[-2]} x {picture.shape[-1]} pixels is smaller than what the model encodes;"
            f" expected at least {multiple} x {multiple}"
        )
    return picture[..., :height, :width]


def latent_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """(H, W) of a picture -> (height, width) bool of its latent, as inpainting pipelines do: the nearest pixel, at .5.

    Cells on the mask's border still agree with the mark in part, so they count.

    Raises:
        WatermarkError: not two-dimensional, or no cell is inside.
    """
    if mask.ndim != 2:
        raise WatermarkError(f"the mask has shape {tuple(mask.shape)}; expected (H, W) of the picture")
    inside = (mask >= (0.5 if mask.is_floating_point() or mask.dtype == torch.bool else 128)).float()[None, None]
    inside = torch.nn.functional.interpolate(inside, size=(height, width))[0, 0] > 0
    if not inside.any():
        raise WatermarkError(f"the mask holds no cell of the {height} x {width} latent; expected a larger area")
    return inside
