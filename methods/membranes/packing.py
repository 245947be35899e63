"""Membranes as mathematics: K low-rank adapters stacked as one pair, gated per sample.

    y = W x + sum_k gamma_k scale_k up_k (down_k x)  =  W x + ((x D^T) * Gamma[:, owner]) U

with D (R, in), U (R, out) all pairs of one module stacked by rank rows, scale folded into U, and owner (R,) naming the
membrane of each row. This is Eq. 9 of SPM (arXiv 2312.16145) for any mix of ranks: exact, per sample, no cross terms.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import MembraneError
from .types import Membrane

__all__ = ["fold", "pack"]


def pack(
    membranes: Iterable[Membrane], key: str, *, cross_terms: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Stack all pairs that wrap one module into a single rank-R pair.

    delta y = ((x D^T) * Gamma[:, owner]) U

    Args:
        membranes: K membranes; those that do not wrap `key` contribute nothing.
        key: the module's kohya key.
        cross_terms: reproduce SPM's released inference, which scales up *and* down by gamma and multiplies the sums:
            delta W = (sum_i gamma_i up_i)(sum_j gamma_j down_j). All K^2 products become rank rows, row (i, j) owned
            by i K + j, to be gated by `official_gamma`. Needs equal ranks.
        dtype: of D and U; float32 keeps fp16 and bf16 files exact.

    Returns:
        D (R, in), U (R, out), owner (R,) int64.

    Raises:
        MembraneError: nothing wraps `key`, or the shapes disagree.
    """
    membranes = list(membranes)
    entries = [(k, m.modules[key]) for k, m in enumerate(membranes) if key in m.modules]
    if not entries:
        raise MembraneError(f"none of the {len(membranes)} membranes wraps {key!r}; see Membranes.module_keys")
    shapes = {(pair.in_features, pair.out_features) for _, pair in entries}
    if len(shapes) > 1:
        raise MembraneError(
            f"{key}: membranes of (in, out) {sorted(shapes)} cannot be stacked; they belong to different base models"
        )
    downs = [pair.down.flatten(1).to(dtype) for _, pair in entries]
    ups = [pair.up.flatten(1).to(dtype).T * pair.scale for _, pair in entries]
    owners = [k for k, _ in entries]
    if cross_terms:
        if len({pair.rank for _, pair in entries}) > 1:
            raise MembraneError(
                f"{key}: the official gate adds the factors of all membranes, which needs equal ranks;"
                " use gate='paper' for mixed ranks"
            )
        count = len(entries)
        owners = [i * len(membranes) + j for i in owners for j in owners]
        ups, downs = [up for up in ups for _ in range(count)], downs * count
    repeats = torch.tensor([d.shape[0] for d in downs], device=downs[0].device)
    owner = torch.tensor(owners, device=downs[0].device).repeat_interleave(repeats)
    return torch.cat(downs), torch.cat(ups), owner


def fold(weight: Tensor, down: Tensor, up: Tensor, gamma_per_rank: Tensor) -> Tensor:
    """W' = W + U^T diag(gamma) D, computed in float32 (float64 for float64 weights) and rounded once.

    Args:
        weight: (out, in) or (out, in, 1, 1).
        down, up: (R, in), (R, out) from `pack`.
        gamma_per_rank: (R,); all zeros returns the weight's bits.
    """
    if not gamma_per_rank.any():
        return weight.clone()
    wide = torch.promote_types(weight.dtype, torch.float32)
    down, up, gamma = (t.to(weight.device, wide) for t in (down, up, gamma_per_rank))
    delta = (up * gamma[:, None]).T @ down
    return (weight.to(wide) + delta.reshape(weight.shape)).to(weight.dtype)
