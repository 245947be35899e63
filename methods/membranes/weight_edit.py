"""Edited weights (UCE, ESD checkpoints) as membranes: the truncated singular value decomposition of the difference."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import MembraneError
from .base_model import base_model_hash
from .types import LowRank, Membrane

__all__ = ["edit_rank", "membrane_from_weights"]

_GAP = 50.0  # a fall this steep separates an edit from its solver's noise: UCE in float32 falls by 70 or more


def membrane_from_weights(
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    concept: str,
    *,
    rank: int | None = None,
    precision: torch.dtype = torch.float32,
    **fields,
) -> Membrane:
    """Turn a weight edit (a UCE or ESD checkpoint) into a membrane: the truncated SVD of W' - W.

    Args:
        before, after: module key -> (out, in) or (out, in, 1, 1); modules that only `before` has are left alone.
        concept: the membrane's name.
        rank: at most so many singular values per module; None keeps all of the edit's own, see `edit_rank`.
        precision: the coarsest that `before` was ever rounded to; that of `after` is seen.
        **fields: further `Membrane` fields, e.g. surrogate or method.

    Raises:
        MembraneError: an edited module is unknown, shapes differ, or nothing was edited.
    """
    modules = {}
    for key, edited in after.items():
        if key not in before or before[key].shape != edited.shape:
            found = tuple(before[key].shape) if key in before else "no such module"
            raise MembraneError(f"{key}: edited weight {tuple(edited.shape)}, base model {found}; wrong base model?")
        base = before[key].detach().flatten(1).double()
        left, values, right = torch.linalg.svd(edited.detach().flatten(1).double() - base, full_matrices=False)
        eps = max(torch.finfo(dtype).eps for dtype in (edited.dtype, precision))
        kept = min(edit_rank(values, base, eps), rank or len(values))
        if kept:
            tail = edited.shape[2:]
            down = (values[:kept, None].sqrt() * right[:kept]).float().reshape(kept, -1, *tail)
            up = (left[:, :kept] * values[:kept].sqrt()).float().reshape(-1, kept, *tail)
            modules[key] = LowRank(down, up.contiguous(), float(kept))
    if not modules:
        raise MembraneError(f"the weights for {concept!r} equal the base model's in all {len(after)} modules")
    return Membrane(concept, modules, base_model=base_model_hash({k: before[k] for k in modules}), **fields)


def edit_rank(values: Tensor, base: Tensor, eps: float) -> int:
    """How many singular values of W' - W are the edit; the others are rounding, or the noise of its solver.

    Rounding W' to a precision of `eps` adds a matrix of independent errors, at most eps |w| / 2 each: its largest
    singular value stays below eps rms(W) (sqrt(out) + sqrt(in)), measured at .3 of that. A solver in float32 (UCE
    inverts a matrix of condition 1e3 to 1e5) leaves more than rounding, but far below the edit: at
    the values' steepest fall, if that is by more than a factor of 50, the edit ends. Those of fine-tuned weights (ESD)
    fall smoothly, and all above rounding are kept.

    Args:
        values: singular values of W' - W, falling.
        base: W (out, in).
    """
    out, width = base.shape
    floor = eps * float(base.pow(2).mean().sqrt()) * (out**0.5 + width**0.5)
    kept = int((values > max(floor, eps * float(values[0]))).sum())
    half = min(kept, len(values) // 2)  # the last value of any square matrix may fall as steeply
    falls = values[:half] / values[1 : half + 1].clamp_min(1e-300)
    steepest = int(falls.argmax()) if half else 0
    return steepest + 1 if half and falls[steepest] > _GAP else kept
