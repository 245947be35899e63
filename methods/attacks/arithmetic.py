"""Concept arithmetic: the direction of an erased concept, put together from texts that do not name it alone.

    e = e(none) + g sum_i w_i [e(p_i) - e(none)]

Source: Petsiuk and Saenko (arXiv 2404.13706), concept arithmetic for compositional inference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import SemipermError

__all__ = ["combined"]


def combined(unconditional: Tensor, conditional: Tensor, weights: Sequence[float], guidance_scale: float) -> Tensor:
    """The guided prediction.

    Args:
        unconditional: (B, C, H, W) e(none). conditional: (n, B, C, H, W) e(p_i).
        weights: n, of any sign. guidance_scale: g; with one weight of 1 it is classifier-free guidance.

    Raises:
        SemipermError: another number of weights.

    >>> none, robot = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1, 1)
    >>> combined(none, robot, [2.0], 3.0).item()
    6.0
    """
    if len(weights) != len(conditional) or not len(weights):
        raise SemipermError(
            f"{len(weights)} weights for {len(conditional)} predictions; expected as many, at least one"
        )
    scale = torch.tensor([float(w) for w in weights], device=conditional.device, dtype=conditional.dtype)
    away = conditional - unconditional
    return unconditional + guidance_scale * torch.tensordot(scale, away, dims=1)
