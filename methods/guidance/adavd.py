"""AdaVD: what text gives to attention loses its part along the categories' values.

    v <- v - g sum_r <v, e_r> e_r        per token and head, e an orthonormal basis of the categories' values

with g = strength, or, where `centre` is given, strength times 2 / (1 + exp(-slope (cos - centre))) of the cosine
between v and its part. Values of the categories are computed once and cached. Source: arXiv 2412.06143. We differ from
the released code, which knows 8 heads only, and computes the cosine over values of prompt and negative prompt at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange, reduce
from torch import Tensor

from .algorithm import Algorithm, orthonormal

__all__ = ["AdaVD"]


@dataclass(frozen=True)
class AdaVD(Algorithm):
    """Value decomposition.

    Args:
        centre: cosine at which the gate is 1; None takes the whole part from every token, as the paper's plain form.
        slope: of the gate.
        rank: directions that are taken away at most, for each head; a head has 40 to 128.

    Raises:
        GuidanceError: a value outside its range.
    """

    NAME: ClassVar[str] = "adavd"
    SEAMS: ClassVar[frozenset[str]] = frozenset({"values"})

    centre: float | None = None
    slope: float = 100.0
    rank: int = 8

    def __post_init__(self) -> None:
        if self.centre is not None:
            self._check(centre=(-1, 1))
        self._check(slope=(0, 1e4), rank=(1, 128))

    def edit_values(self, values: Tensor, harm: Tensor, heads: int, strength: float) -> tuple[Tensor, Tensor]:
        with torch.autocast(values.device.type, enabled=False):
            return self._edit(values, harm, heads, strength)

    def _edit(self, values: Tensor, harm: Tensor, heads: int, strength: float) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(values.dtype, torch.float32)
        v = rearrange(values.to(wide), "b n (h c) -> b n h c", h=heads)
        basis = self.basis(harm.to(wide), heads)
        along = torch.einsum("bnhc,hrc->bnhr", v, basis)
        part = torch.einsum("bnhr,hrc->bnhc", along, basis)
        share = _share(part, v)
        gain: float | Tensor = strength
        if self.centre is not None:  # over all heads of a token, as released
            cosine = (reduce(part * part, "b n h c -> b n 1 1", "sum") / _squares(v)).clamp(0, 1).sqrt()
            gain = strength * 2.0 * torch.sigmoid(self.slope * (cosine - self.centre))
        edited = rearrange(v - gain * part, "b n h c -> b n (h c)").to(values.dtype)
        return edited, share

    def basis(self, harm: Tensor, heads: int) -> Tensor:
        """(H, R, C / H): orthonormal directions of the categories' values (K, C), for each head."""
        return orthonormal(rearrange(harm, "k (h c) -> h k c", h=heads), self.rank)


def _squares(v: Tensor) -> Tensor:
    return reduce(v * v, "b n h c -> b n 1 1", "sum").clamp_min(1e-20)


def _share(part: Tensor, v: Tensor) -> Tensor:
    """(B,): the mean over tokens of |part| / |v|."""
    squares = reduce(part * part, "b n h c -> b n 1 1", "sum") / _squares(v)
    return reduce(squares.sqrt(), "b n 1 1 -> b", "mean").float()
