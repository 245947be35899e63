"""Tree-Ring: a keyed pattern in the low frequencies of the initial noise, with an exact p-value.

F = fft2(z[channels]),  F(u, v) <- sqrt(H W) K(u, v) where 0 < |(u / H, v / W)| <= radius / 64,  z <- ifft2(F)

"rand": K as the spectrum of white noise, E|K|^2 = 1, free in one half of the plane; the other half is its conjugate.
"ring": K real and one value a ring: the pattern survives a rotation, but is worth only as many numbers as rings.

The detector compares keys, not pictures: y holds the latent's values in the half plane, k the key's, and k is an
isotropic Gaussian vector of D numbers. For every y the cosine c between both then has the law of a random direction,

p = P(cos >= c) = I_{(1 - c) / 2}((D - 1) / 2, (D - 1) / 2),

which asks nothing of the latent's distribution or scale.

Source: Wen et al., Tree-Ring Watermarks (arXiv 2305.20030). Other than in the released code, K is
Hermitian, so nothing of it is lost in taking the real part; conjugate pairs count once; the p-value is exact (the
release's noncentral chi-square says .001 for .0055 of all latents); the mean (DC) stays the latent's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from einops import rearrange
from scipy.special import betainc, ndtri
from torch import Tensor

from ...errors import WatermarkError
from ..keys import WatermarkKey

__all__ = ["TreeRing"]

SIDE = 64  # latent side that radii are given for: a radius is 64 times a frequency in cycles an element
_LEFT = 0.15  # of the pattern's power, assumed after inversion; measured best on the canvas, flat from .1 to .2
_FEWEST = {"rand": 12, "ring": 4}  # numbers in the key, below which no agreement is convincing


@dataclass(frozen=True, eq=False)
class HalfPlane:
    """Frequencies of one half of the plane, lowest first: the other half is their conjugate.

    Args:
        size: H, W of the latent.
        u, v: (k,) whole cycles along H and W; negative ones index fft2's order from its end, where they lie.
        radius: (k,) SIDE times the frequency.
    """

    size: tuple[int, int]
    u: np.ndarray
    v: np.ndarray
    radius: np.ndarray

    @property
    def unit(self) -> float:
        """The radius of the lowest frequency, and the narrowest ring: 1 from a side of 64 on."""
        return max(1.0, SIDE / min(self.size))

    def read(self, latents: Tensor) -> np.ndarray:
        """(..., H, W) -> (..., k) complex128 values, E|.|^2 = 1 for white noise."""
        spectrum = torch.fft.fft2(latents.detach().to("cpu", torch.float64)).numpy()
        return spectrum[..., self.u, self.v] / np.sqrt(self.size[0] * self.size[1])

    def write(self, latents: Tensor, values: np.ndarray) -> Tensor:
        """(..., H, W) with (..., k) values in place of its own; all other frequencies, the mean too, stay."""
        spectrum = torch.fft.fft2(latents.to(torch.float64))
        values = torch.from_numpy(values * np.sqrt(self.size[0] * self.size[1])).to(spectrum.device)
        spectrum[..., self.u, self.v] = values
        spectrum[..., -self.u, -self.v] = values.conj()
        return torch.fft.ifft2(spectrum).real.to(latents.dtype)


@lru_cache(maxsize=16)
def half_plane(height: int, width: int, lowest: float, highest: float) -> HalfPlane:
    """The frequencies of lowest <= radius <= highest, without the mean."""
    u, v = np.meshgrid(np.arange((height + 1) // 2), np.arange(-((width - 1) // 2), (width + 1) // 2), indexing="ij")
    radius = SIDE * np.hypot(u / height, v / width)
    inside = ((u > 0) | (v > 0)) & (radius >= lowest) & (radius <= highest)
    order = np.argsort(radius[inside], kind="stable")
    return HalfPlane((height, width), u[inside][order], v[inside][order], radius[inside][order])


def normals(key: WatermarkKey, purpose: str, shape: tuple[int, ...], count: int, scope: str) -> np.ndarray:
    """(count,) standard normal numbers of the key."""
    words = np.frombuffer(key.keystream(purpose, shape, 0, 8 * count, scope=scope), "<u8")
    return ndtri(((words >> 11) + 0.5) / (1 << 53))


def complex_normals(key: WatermarkKey, purpose: str, shape: tuple[int, ...], count: int, scope: str) -> np.ndarray:
    """(count,) complex numbers of the key, E|.|^2 = 1."""
    return normals(key, purpose, shape, 2 * count, scope).view(np.complex128) / np.sqrt(2)


def flattened(values: np.ndarray, radius: np.ndarray, unit: float) -> np.ndarray:
    """(..., k) complex values scaled to equal power at all radii: what a picture adds is strongest where it is lowest.

    A map of the latent alone, chosen without the key.
    """
    rings = np.rint(radius / unit).astype(np.int64)
    members = (rings == np.unique(rings)[:, None]).astype(np.float64)
    power = (np.abs(values) ** 2 @ members.T / members.sum(axis=1)) @ members
    return values / np.sqrt(np.maximum(power, np.finfo(np.float64).tiny))


def _ring_values(values: np.ndarray, rings: np.ndarray) -> np.ndarray:
    """(B, c, k) complex values -> (B, c, R) one real value a ring, shrunk where the ring is noisy.

    The pattern is real: a ring's mean real part is its value, its imaginary parts say how far off that may be.
    """
    members = (rings == np.arange(rings.max() + 1)[:, None]).astype(np.float64)
    count = members.sum(axis=1)
    means, errors = values.real @ members.T / count, values.imag**2 @ members.T / count**2
    power = np.median(np.abs(values) ** 2, axis=(1, 2), keepdims=True) / np.log(2)
    return means / np.maximum(_LEFT * power + errors, np.finfo(np.float64).tiny)


def cosine_p_values(found: np.ndarray, pattern: np.ndarray) -> np.ndarray:
    """(B,) tail of the cosine between each of (B, D) rows and a (D,) pattern of isotropic random direction."""
    size = np.linalg.norm(found, axis=1) * np.linalg.norm(pattern)
    cosine = np.divide(found @ pattern, size, out=np.full(len(found), -1.0), where=size > 0)  # nothing there: p = 1
    half = (len(pattern) - 1) / 2
    return betainc(half, half, np.clip((1 - cosine) / 2, 0, 1))


def reals(values: np.ndarray) -> np.ndarray:
    """(..., k) complex -> (..., 2 k): real and imaginary parts."""
    return np.ascontiguousarray(values).view(np.float64)


def checked_image(shape: Sequence[int], channel: int, name: str) -> tuple[int, ...]:
    """(B, C, H, W) -> (C, H, W).

    Raises:
        WatermarkError: another number of dimensions, or fewer channels than that.
    """
    shape = tuple(int(size) for size in shape)
    if len(shape) != 4 or min(shape) < 1 or shape[1] <= channel:
        raise WatermarkError(
            f"latents of shape {shape} were given; {name} needs (B, C, H, W) with more than {channel} channels:"
            " unpack Flux latents first, and take videos frame by frame"
        )
    return shape[1:]


def checked_finite(latents: Tensor) -> Tensor:
    """The latents.

    Raises:
        WatermarkError: NaN or Inf.
    """
    if not latents.isfinite().all():
        raise WatermarkError("the latents hold NaN or Inf; check the VAE's precision (fp32 or bf16 instead of fp16)")
    return latents


@dataclass(frozen=True, eq=False)
class _Layout:
    """Where the pattern lies in one image's latent.

    Args:
        plane: its frequencies. rings: (k,) the ring of each.
        channels: that carry it.
        key: (channels, k, or rings) what the key says there.
    """

    plane: HalfPlane
    rings: np.ndarray
    channels: list[int]
    key: np.ndarray


class TreeRing:
    """Initial noise with a keyed pattern in the low frequencies of some channels.

    Args:
        key: its stream secret makes the pattern.
        pattern: "rand" or "ring".
        channels: those that carry it, each a pattern of its own; None is all of them. The release marks one.
        radius: of the pattern at a latent side of 64, above 0 and below 32; the released 10 is 8 % of a channel.
        scope: a model or tenant name that separates marks of one key.

    Raises:
        WatermarkError: an unknown pattern, or a radius or channel out of range.
    """

    def __init__(
        self,
        key: WatermarkKey,
        pattern: str = "rand",
        *,
        channels: Sequence[int] | None = (0,),
        radius: float = 10.0,
        scope: str = "",
    ):
        if pattern not in _FEWEST:
            raise WatermarkError(f"the pattern {pattern!r} was asked for; expected 'rand' or 'ring'")
        channels = None if channels is None else tuple(channels)
        if not 0 < radius < SIDE / 2:
            raise WatermarkError(f"a radius of {radius} was asked for; expected one above 0 and below {SIDE // 2}")
        if channels is not None and (not channels or min(channels) < 0 or len(set(channels)) < len(channels)):
            raise WatermarkError(f"the channels {channels} were asked for; expected different ones from 0 on, or None")
        self.key, self.pattern, self.channels, self.radius, self.scope = key, pattern, channels, radius, scope
        self.name = "tree-ring" if pattern == "rand" else "tree-ring-rings"

    def sample(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """Marked latents (B, C, H, W), float32, on the generator's device.

        Args:
            shape: (B, C, H, W).
            generator: of the noise; without it torch's global generator.

        Raises:
            WatermarkError: a latent too small for the pattern, or without the channels.
        """
        layout = self._layout(shape)
        source = generator.device if generator is not None else "cpu"
        latents = torch.randn(tuple(shape), generator=generator, device=source)
        values = layout.key if self.pattern == "rand" else layout.key[:, layout.rings].astype(np.complex128)
        latents[:, layout.channels] = layout.plane.write(latents[:, layout.channels], values)
        return latents

    def p_values(self, latents: Tensor) -> np.ndarray:
        """(B,) chance that a latent made without the key is as close to its pattern, exact for every latent.

        Raises:
            WatermarkError: NaN or Inf, and as `sample`.
        """
        layout = self._layout(latents.shape)
        plane, key = layout.plane, layout.key
        found = plane.read(checked_finite(latents)[:, layout.channels])
        if self.pattern == "rand":
            found, key = reals(flattened(found, plane.radius, plane.unit)), reals(key)
        else:
            found = _ring_values(found, layout.rings)
        return cosine_p_values(found.reshape(len(found), -1), key.ravel())

    def _layout(self, shape: Sequence[int]) -> _Layout:
        image = checked_image(shape, 0 if self.channels is None else max(self.channels), "Tree-Ring")
        plane = half_plane(*image[1:], 0, self.radius)
        rings = np.unique(np.ceil(plane.radius / plane.unit - 1e-9), return_inverse=True)[1]
        count = len(plane.u) if self.pattern == "rand" else len(np.unique(rings))
        channels = list(range(image[0]) if self.channels is None else self.channels)
        numbers = count * len(channels) * (2 if self.pattern == "rand" else 1)
        if numbers < _FEWEST[self.pattern]:
            raise WatermarkError(
                f"in a latent of shape {image} a {self.pattern!r} pattern of radius {self.radius:g} holds {numbers}"
                f" numbers; expected at least {_FEWEST[self.pattern]}: use a larger picture, a larger radius or more"
                " channels"
            )
        purpose = f"tree-ring {self.pattern} {channels} {self.radius:g}"
        draw = complex_normals if self.pattern == "rand" else normals
        drawn = draw(self.key, purpose, image, count * len(channels), self.scope)
        return _Layout(plane, rings, channels, rearrange(drawn, "(c k) -> c k", c=len(channels)))
