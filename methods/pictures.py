"""Pictures and masks as tensors: one reading of PIL images, arrays and tensors for every method and face."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .errors import SemipermError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "FITS",
    "Mask",
    "Picture",
    "Pictures",
    "as_exif_says",
    "as_rgb",
    "check_pixels",
    "fit_to",
    "from_pil",
    "mask_of",
    "picture_and_alpha",
    "picture_of",
    "to_aspect",
]

FITS = ("crop", "pad", "stretch")  # how `fit_to` brings a picture to another shape

# What decoders and resizers in float16 leave beyond 0..1; more is another range, such as -1..1 or 0..255.
_ROUNDING = 1e-3
_ORIENTATION = 0x0112  # in EXIF: how a picture is to be turned before it is shown,
# here as quarters counter-clockwise, and then whether it is mirrored from left to right.
_TURNS = {2: (0, True), 3: (2, False), 4: (2, True), 5: (3, True), 6: (3, False), 7: (1, True), 8: (1, False)}

Picture: TypeAlias = "Image | Tensor | np.ndarray"  # as `picture_of` takes it
Pictures: TypeAlias = "Picture | Sequence[Picture | Sequence[Picture]]"  # one, several, or videos
Mask: TypeAlias = "Image | Tensor"  # as `mask_of` takes it


def from_pil(image) -> Tensor:
    """A PIL image of 8-bit channels -> (C, H, W) float32 in 0..1; its mode stays."""
    pixels = torch.from_numpy(np.array(image))
    return rearrange(pixels if pixels.ndim == 3 else pixels[..., None], "h w c -> c h w").float() / 255


def picture_of(picture) -> Tensor:
    """One picture -> (3, H, W) float32 in 0..1.

    Args:
        picture: a PIL image of any mode, a float tensor (3, H, W) in 0..1, or an array (H, W, 3), float in 0..1 or
            uint8.

    Raises:
        SemipermError: something else, NaN, or values outside 0..1.
    """
    if hasattr(picture, "convert"):
        return from_pil(as_rgb(picture))
    if isinstance(picture, np.ndarray):
        picture = torch.from_numpy(picture)
        picture = picture.float() / 255 if picture.dtype == torch.uint8 else picture
        picture = rearrange(picture, "h w c -> c h w") if picture.ndim == 3 else picture
    if not isinstance(picture, Tensor) or picture.ndim != 3 or picture.shape[0] != 3:
        given = f"shape {tuple(picture.shape)}" if isinstance(picture, Tensor) else type(picture).__name__
        raise SemipermError(f"a picture is {given}; expected a PIL image, a tensor (3, H, W) or an array (H, W, 3)")
    return _checked(picture, "a picture's")


def picture_and_alpha(picture) -> tuple[Tensor, Tensor | None]:
    """One picture -> (3, H, W) float32 in 0..1, and its alpha (H, W) in 0..1; None where all of it is opaque.

    What lies under transparent pixels is not seen: they have the mean colour of what is.

    Args:
        picture: as `picture_of`; PIL images of any mode with transparency, float tensors (4, H, W) and arrays (H, W, 4)
            have an alpha.

    Raises:
        SemipermError: as `picture_of`; or everything is transparent.
    """
    alpha = None
    if hasattr(picture, "convert"):
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            alpha = from_pil(picture)[3]
    elif getattr(picture, "ndim", 0) == 3 and picture.shape[-1 if isinstance(picture, np.ndarray) else 0] == 4:
        array = isinstance(picture, np.ndarray)
        alpha = torch.from_numpy(picture[..., 3]) if array else picture[3]
        alpha = mask_of(alpha)
        picture = picture[..., :3] if array else picture[:3]
    pixels = picture_of(picture)
    if alpha is None or bool((alpha == 1).all()):
        return pixels, None
    if not bool((alpha > 0).any()):
        raise SemipermError("every pixel of a picture is transparent (alpha 0), so there is nothing to see")
    mean = (pixels * alpha).sum((1, 2), keepdim=True) / alpha.sum()
    return pixels * alpha + mean * (1 - alpha), alpha


def to_aspect(images: Tensor, height: int, width: int, fit: str = "crop", fill: Tensor | float = 0.0) -> Tensor:
    """Pictures or masks (..., H, W) cut or padded to the aspect of height x width, at their own resolution.

    Args:
        fit: "crop" keeps the largest middle part of that aspect; "pad" puts `fill` around, as little as it takes;
            "stretch" leaves them as they are, for who then resizes.
        fill: a number, or what goes with (..., H, W).

    Raises:
        SemipermError: another fit.
    """
    if fit not in FITS:
        raise SemipermError(f"fit={fit!r}; expected one of {', '.join(FITS)}")
    if fit == "stretch":
        return images
    rows, columns = images.shape[-2:]
    wanted = round(columns * height / width), round(rows * width / height)
    if fit == "crop":
        size = max(1, min(rows, wanted[0])), max(1, min(columns, wanted[1]))
        top, left = (rows - size[0]) // 2, (columns - size[1]) // 2
        return images[..., top : top + size[0], left : left + size[1]]
    size = max(rows, wanted[0]), max(columns, wanted[1])
    top, left = (size[0] - rows) // 2, (size[1] - columns) // 2
    whole = images.new_zeros(*images.shape[:-2], *size) + fill
    whole[..., top : top + rows, left : left + columns] = images
    return whole


def fit_to(images: Tensor, height: int, width: int, fit: str = "crop", fill: Tensor | float = 0.0) -> Tensor:
    """Pictures (B, C, H, W) or (C, H, W) in 0..1 in another size; only "stretch" gives up their aspect.

    Args: as `to_aspect`.
    """
    images = to_aspect(images, height, width, fit, fill)
    if tuple(images.shape[-2:]) == (height, width):
        return images
    batch = images if images.ndim == 4 else images[None]
    resized = F.interpolate(batch, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
    return resized if images.ndim == 4 else resized[0]


def as_rgb(image):
    """A PIL image of any mode -> RGB, with the EXIF orientation it had; deep greys are scaled, not clipped.

    Grey of 16 or 32 bits is taken as 0..65535 where it goes beyond 255, floats as 0..1, or as 0..255 or 0..65535 where
    they go beyond that.

    Raises:
        SemipermError: floats that are NaN or infinite.
    """
    turned = image.getexif().get(_ORIENTATION)
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise SemipermError("a picture of floats holds NaN or Inf; expected grey from 0 (black) to 1")
        top, floats = float(values.max(initial=0)), image.mode == "F"
        scale = 1 if floats and top <= 1 else 255 if top <= 255 and image.mode in ("F", "I") else max(65535, top)
        grey = np.rint(np.clip(values / scale, 0, 1) * 255).astype(np.uint8)
        from PIL import Image

        image = Image.fromarray(grey)
    rgb = image.convert("RGB")
    if turned:
        rgb.getexif()[_ORIENTATION] = turned
    return rgb


def as_exif_says(image) -> Tensor | None:
    """A PIL image turned as its EXIF orientation says, as `picture_of`; None where there is nothing to turn."""
    orientation = image.getexif().get(_ORIENTATION, 1) if hasattr(image, "getexif") else 1
    if orientation not in _TURNS:
        return None
    quarters, mirrored = _TURNS[orientation]
    turned = picture_of(image).rot90(quarters, (-2, -1))
    return turned.flip(-1) if mirrored else turned


def mask_of(mask) -> Tensor:
    """One mask -> (H, W) float32 in 0..1, 1 (white) inside.

    Args:
        mask: a PIL image, or a tensor (H, W): bool, uint8, or float in 0..1.

    Raises:
        SemipermError: something else, NaN, or values outside 0..1.
    """
    if hasattr(mask, "convert"):
        return from_pil(mask.convert("L"))[0]
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        given = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise SemipermError(f"a mask is {given}; expected a PIL image or a tensor (H, W)")
    if mask.dtype in (torch.bool, torch.uint8):
        mask = mask.float() / (1 if mask.dtype == torch.bool else 255)
    return _checked(mask, "a mask's")


def check_pixels(pixels: Tensor) -> None:
    """Refuse what is no batch of pictures, exactly within 0..1.

    Raises:
        SemipermError: anything but floats (B, 3, H, W) in 0..1.
    """
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
        given = f"{pixels.dtype} {tuple(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels).__name__
        raise SemipermError(f"a batch of pictures is {given}; expected float tensors (B, 3, H, W) in 0..1")
    if not pixels.numel() or not (pixels.amin() >= 0 and pixels.amax() <= 1):  # NaN fails both
        raise SemipermError(
            f"the pictures of shape {tuple(pixels.shape)} are empty, hold NaN or leave 0..1; expected values from"
            " 0 (black) to 1: divide bytes by 255"
        )


def _checked(values: Tensor, whose: str) -> Tensor:
    low, high = (float(v) for v in (values.min(), values.max())) if values.numel() else (float("nan"),) * 2
    if not values.is_floating_point() or not -_ROUNDING <= low <= high <= 1 + _ROUNDING:  # NaN fails too
        raise SemipermError(
            f"{whose} values are {values.dtype} from {low:g} to {high:g} in shape {tuple(values.shape)}; expected"
            " floating point values in 0..1, none NaN: divide bytes by 255"
        )
    return values.detach().float().clamp(0, 1)
