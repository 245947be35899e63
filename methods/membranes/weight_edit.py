"""Edited weights (UCE, ESD checkpoints) as membranes: the truncated singular value decomposition of the difference."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import MembraneError
from .base_model import base_model_hash
from .types import LowRank, Membrane


def membrane_from_weights(
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    concept: str,
    *,
    rank: int | None = None,
    tolerance: float = 1e-6,
    **fields,
) -> Membrane:
    """Turn a weight edit (a UCE or ESD checkpoint) into a membrane: the truncated SVD of W' - W.

    Args:
        before, after: module key -> (out, in) or (out, in, 1, 1); modules that only `before` has are left alone.
        concept: the membrane's name.
        rank: at most so many singular values per module; None keeps all above `tolerance`.
        tolerance: singular values below this share of the largest are rounding, and dropped.
        **fields: further `Membrane` fields, e.g. surrogate or method.

    Raises:
        MembraneError: an edited module is unknown, shapes differ, or nothing was edited.
    """
    modules = {}
    for key, edited in after.items():
        if key not in before or before[key].shape != edited.shape:
            found = tuple(before[key].shape) if key in before else "no such module"
            raise MembraneError(f"{key}: edited weight {tuple(edited.shape)}, base model {found}; wrong base model?")
        left, values, right = torch.linalg.svd(
            edited.detach().flatten(1).double() - before[key].detach().flatten(1).double(), full_matrices=False
        )
        kept = min(int((values > tolerance * values[0]).sum()), rank or len(values))
        if kept and values[0] > 0:
            tail = edited.shape[2:]
            down = (values[:kept, None].sqrt() * right[:kept]).float().reshape(kept, -1, *tail)
            up = (left[:, :kept] * values[:kept].sqrt()).float().reshape(-1, kept, *tail)
            modules[key] = LowRank(down, up.contiguous(), float(kept))
    if not modules:
        raise MembraneError(f"the weights for {concept!r} equal the base model's in all {len(after)} modules")
    return Membrane(concept, modules, base_model=base_model_hash({k: before[k] for k in modules}), **fields)
