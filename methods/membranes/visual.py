"""Image-side membranes: the gate and the edit read the image tokens that a layer answers, not the prompt's words.

For a token o (C,) at share t of the schedule, and R directions of one concept at one layer:

    a_r = <o, read_r(t)> - offset_r(t)                            0 for the mean of other pictures, 1 for the concept's
    g_r = ramp(a_r; low_r, high_r) ramp(max over the picture's tokens of a_r; seen_r, sure_r)
    o'  = o - strength beta sum_r g_r a_r write_r(t),             ramp(a; l, h) = min(max((a - l) / (h - l), 0), 1)

The picture's ramp says whether the concept is there at all, at a calibrated rate; the token's says where. Everything
stands at J knots of the schedule and is linear between them, so that any sampler and any number of steps finds its own.
K membranes are one projection: their directions are stacked (image_site.py).

Source: CASteer (arXiv 2503.09630) is read = write = a normalised mean difference, a gate at 0, beta 2. Ours differs in
the discriminant, the calibrated gate and the knots; methods/membranes/visual_fit.py says how they are found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import MembraneError

__all__ = ["VisualSide", "VisualSite"]


@dataclass(frozen=True, eq=False)
class VisualSite:
    """One concept at one layer.

    Args:
        read, write: (J, R, C) at J knots.
        gates: (J, R, 5): offset, low, high, seen, sure, with low < high and seen < sure.

    Raises:
        MembraneError: shapes that do not fit together, thresholds out of order, NaN or Inf.
    """

    read: Tensor
    write: Tensor
    gates: Tensor

    def __post_init__(self):
        shape = tuple(self.read.shape)
        fits = len(shape) == 3 and 0 not in shape and tuple(self.write.shape) == shape
        if not fits or tuple(self.gates.shape) != (*shape[:2], 5):
            raise MembraneError(
                f"an image-side layer has read {shape}, write {tuple(self.write.shape)} and gates"
                f" {tuple(self.gates.shape)}; expected (J, R, C) twice and (J, R, 5)"
            )
        if not all(t.is_floating_point() and torch.isfinite(t).all() for t in (self.read, self.write, self.gates)):
            raise MembraneError("an image-side layer holds NaN, Inf or integers; the file or the fit is broken")
        _, low, high, seen, sure = self.gates.unbind(-1)
        if not bool((low < high).all() and (seen < sure).all()):
            raise MembraneError(
                "an image-side layer has thresholds low >= high or seen >= sure; expected the other order at every knot"
            )

    @property
    def rank(self) -> int:
        return self.read.shape[1]

    @property
    def channels(self) -> int:
        return self.read.shape[2]


@dataclass(frozen=True, eq=False)
class VisualSide:
    """What one concept looks like to a model's layers, and when that counts as seen.

    Args:
        shares: J increasing knots of the schedule, 0 pure noise, 1 the image.
        sites: module key of a layer -> what is read and written there.
        beta: how far beyond its own share a direction is taken out; 1 makes the token look like others' mean.
        false_open: share of pictures without the concept in which a gate opens anywhere, at most, on average over
            pictures drawn as the thresholds' were. None if unknown.
        calibrated: on how many pictures kept out of the fit the thresholds were set.
        false_closed: share, of pictures with the concept kept out of the fit, in which no gate opened; None if unknown.
        checked: how many those were.

    Raises:
        MembraneError: no layer, knots out of order or of another number than the layers', a beta that is not finite.
    """

    shares: tuple[float, ...]
    sites: dict[str, VisualSite]
    beta: float = 1.0
    false_open: float | None = None
    calibrated: int = 0
    false_closed: float | None = None
    checked: int = 0

    def __post_init__(self):
        shares = tuple(float(share) for share in self.shares)
        object.__setattr__(self, "shares", shares)
        rising = all(a < b for a, b in zip(shares, shares[1:], strict=False))
        if not shares or not rising or not 0.0 <= shares[0] <= shares[-1] <= 1.0:
            raise MembraneError(f"knots {shares}; expected increasing shares of the schedule in 0..1")
        if not self.sites or any(len(site.read) != len(shares) for site in self.sites.values()):
            raise MembraneError(f"{len(self.sites)} layers; expected at least one, each with {len(shares)} knots")
        if not math.isfinite(self.beta):
            raise MembraneError(f"beta={self.beta}; expected a finite number")
