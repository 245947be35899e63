"""RingID: rings of two levels in one channel's spectrum and a keyed noise pattern in another's, with an exact p-value.

Ring channel:   F(u, v) <- sqrt(H W) s_j (-1)^(u + v) in ring j,  s_j = +1 or -1 from the key; rings 4 to 14 of 64
Noise channel:  F(u, v) <- sqrt(H W) K(u, v) up to radius 14, K as the spectrum of white noise

(-1)^(u + v) moves the rings' centre from the latent's corner to its middle, where rotation and cropping leave it.

Rings: T = sum_j s_j X_j with X_j the sum of the real parts in ring j; its law over the key is the list of all 2^R sums.
Noise: the cosine of Tree-Ring. Both are exact for every latent and the keys of both are independent, so p1 p2 has a
known law as well: p1 is uniform over m / 2^R and p2 over 0..1, p = 2^-R sum_m min(1, p1 p2 2^R / m).

Source: Ci et al., RingID (arXiv 2404.14055): multi-channel heterogeneous marks, discretised rings,
time shift. Other than in the released code, ring masks are not averaged over rotations, rings are Hermitian by
construction (real and symmetric), and the smallest distance over all keys gives way to a p-value for one key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import WatermarkError
from ..keys import WatermarkKey
from .tree_ring import (
    HalfPlane,
    checked_finite,
    checked_image,
    complex_normals,
    cosine_p_values,
    flattened,
    half_plane,
    reals,
)

__all__ = ["RingID"]

_RADIUS, _CUTOFF = 14, 3  # at a latent side of 64: 11 rings, as released
_FEWEST = 3  # rings: the least p-value of fewer is above 1 / 8


@dataclass(frozen=True, eq=False)
class RingLayout:
    """Where the pattern lies in one image's latent.

    Args:
        image: (C, H, W).
        rings: the rings' frequencies. members: (R, k) 0 or 1, which ring each of them is in.
        disc: the noise's frequencies.
    """

    image: tuple[int, ...]
    rings: HalfPlane
    members: np.ndarray
    disc: HalfPlane


class RingID:
    """Initial noise with keyed rings in one channel and a keyed pattern in another.

    Args:
        key: its stream secret makes both.
        ring_channel, noise_channel: the two channels, different ones.
        scope: a model or tenant name that separates marks of one key.

    Raises:
        WatermarkError: the same channel twice, or one below 0.
    """

    name = "ring-id"

    def __init__(self, key: WatermarkKey, *, ring_channel: int = 3, noise_channel: int = 0, scope: str = ""):
        if ring_channel == noise_channel or min(ring_channel, noise_channel) < 0:
            raise WatermarkError(
                f"rings in channel {ring_channel} and noise in channel {noise_channel} were asked for; expected two"
                " different channels from 0 on"
            )
        self.key, self.ring_channel, self.noise_channel, self.scope = key, ring_channel, noise_channel, scope

    def sample(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """Marked latents (B, C, H, W), float32, on the generator's device.

        Args:
            shape: (B, C, H, W).
            generator: of the noise; without it torch's global generator.

        Raises:
            WatermarkError: a latent too small for 3 rings, or without the channels.
        """
        layout = self.layout(shape)
        source = generator.device if generator is not None else "cpu"
        latents = torch.randn(tuple(shape), generator=generator, device=source)
        signs = self.signs(layout.image, len(layout.members)) @ layout.members * _shift(layout.rings)
        for channel, where, values in (
            (self.ring_channel, layout.rings, signs.astype(np.complex128)),
            (self.noise_channel, layout.disc, self._pattern(layout.image, layout.disc)),
        ):
            latents[:, channel] = where.write(latents[:, channel], values)
        return latents

    def p_values(self, latents: Tensor) -> np.ndarray:
        """(B,) chance that a latent made without the key fits it as well, exact for every latent.

        Raises:
            WatermarkError: NaN or Inf, and as `sample`.
        """
        layout = self.layout(latents.shape)
        image, plane, members, disc = layout.image, layout.rings, layout.members, layout.disc
        latents = checked_finite(latents)
        values = flattened(plane.read(latents[:, self.ring_channel]), plane.radius, plane.unit)
        sums = (values.real * _shift(plane)) @ members.T
        rings = sign_tail(sums, self.signs(image, len(members)))
        values = flattened(disc.read(latents[:, self.noise_channel]), disc.radius, disc.unit)
        noise = cosine_p_values(reals(values), reals(self._pattern(image, disc)))
        levels = np.arange(1, (1 << len(members)) + 1) / (1 << len(members))
        return np.minimum(1, (rings * noise)[:, None] / levels).mean(axis=1)

    def layout(self, shape: Sequence[int]) -> RingLayout:
        """Where rings and noise lie in one image of latents of this shape."""
        image = checked_image(shape, max(self.ring_channel, self.noise_channel), "RingID")
        size, unit = image[1:], half_plane(*image[1:], 0, 0).unit
        rings = np.arange(int(_CUTOFF // unit) + 1, int(_RADIUS // unit) + 1)
        if len(rings) < _FEWEST:
            raise WatermarkError(
                f"a latent of shape {image} has room for {len(rings)} rings; RingID needs at least {_FEWEST}: use a"
                " latent of side 14 or more"
            )
        plane = half_plane(*size, (rings[0] - 0.5) * unit, (rings[-1] + 0.5) * unit)
        nearest = np.clip(np.rint(plane.radius / unit), rings[0], rings[-1])
        members = (nearest == rings[:, None]).astype(np.float64)
        return RingLayout(image, plane, members, half_plane(*size, 0, _RADIUS))

    def signs(self, image: tuple[int, ...], rings: int) -> np.ndarray:
        """+1 or -1 for each ring: the key's pattern."""
        return 1 - 2.0 * self.key.stream(f"ring-id rings {self.ring_channel}", image, 0, rings, scope=self.scope)

    def _pattern(self, image: tuple[int, ...], disc: HalfPlane) -> np.ndarray:
        return complex_normals(self.key, f"ring-id noise {self.noise_channel}", image, len(disc.u), self.scope)


def _shift(plane: HalfPlane) -> np.ndarray:
    """(k,) the sign that moves the origin to the middle, (H / 2, W / 2)."""
    return 1 - 2.0 * ((plane.u + plane.v) % 2)


def sign_tail(values: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """(B,) share of all 2^R sign vectors whose sum with the (B, R) values is at least that with `signs`."""
    count = values.shape[1]
    every = 1 - 2.0 * ((np.arange(1 << count)[:, None] >> np.arange(count)) & 1)
    slack = 1e-9 * np.abs(values).sum(axis=1)  # of rounding: a tie counts as reached
    return (values @ every.T >= (values @ signs - slack)[:, None]).mean(axis=1)
