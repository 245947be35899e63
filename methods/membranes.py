"""Membranes as mathematics: K low-rank adapters packed as one pair, gated per sample.

    y = W x + sum_k gamma_k scale_k up_k (down_k x)  =  W x + ((x D^T) * Gamma[:, owner]) U

with D (R, in), U (R, out) all pairs of one module stacked by rank rows, scale folded into U, and owner (R,) naming the
membrane of each row. This is Eq. 9 of SPM (arXiv 2312.16145) for any mix of ranks: exact, per sample, no cross terms.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from .errors import MembraneError
from .gates import GATES, always, facilitated_transport, official_gamma, probe_gate
from .membrane_file import load_membranes, save_membranes
from .membrane_types import GateProbe, LowRank, Membrane, Membranes

__all__ = [
    "GATES",
    "GateProbe",
    "LowRank",
    "Membrane",
    "MembraneError",
    "Membranes",
    "always",
    "base_model_distance",
    "base_model_hash",
    "check_base_model",
    "check_base_models",
    "facilitated_transport",
    "fold",
    "load_membranes",
    "membrane_from_weights",
    "official_gamma",
    "pack",
    "probe_gate",
    "save_membranes",
]

_HASH_BITS = 64
_SAME_BASE_BITS = 12  # two unrelated models agree this closely with probability 2e-7; fine-tunes differ by a few bits


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


def base_model_hash(weights: dict[str, Tensor]) -> str:
    """A 64-bit fingerprint of the wrapped base weights, as 16 hex digits: near for near weights.

    bit_b = [sum_k a_kb^T W_k c_kb / |W_k| > 0],  a, c = +-1 drawn from SHAKE-256(key, shape)

    A cryptographic hash would call an fp16 and a bf16 copy of one model different models. Signs of random projections
    differ in a share angle / pi of the bits: none or one for another dtype, a few for a fine-tune, half for another
    model. Compare by `base_model_distance`.

    Args:
        weights: module key -> (out, in) or (out, in, 1, 1), any floating dtype.
    """
    if not weights:
        raise MembraneError("no weights to fingerprint; expected the wrapped projections' weights by module key")
    total = torch.zeros(_HASH_BITS, dtype=torch.float64)
    for key, weight in weights.items():
        matrix = weight.detach().flatten(1).float()
        out, size = matrix.shape
        noise = hashlib.shake_256(f"{key} {out} {size}".encode()).digest(_HASH_BITS * (out + size) // 8)
        noise = torch.frombuffer(bytearray(noise), dtype=torch.uint8)[:, None] >> torch.arange(8, dtype=torch.uint8)
        left, right = ((noise & 1).to(matrix) * 2 - 1).reshape(_HASH_BITS, out + size).split([out, size], dim=1)
        projected = ((left @ matrix) * right).sum(dim=1) / matrix.norm().clamp_min(1e-30)
        total += projected.double().cpu()
    return f"{sum(1 << b for b, on in enumerate((total > 0).tolist()) if on):016x}"


def base_model_distance(first: str, second: str) -> int:
    """How many of 64 bits two fingerprints differ in: 0 to 2 same weights, up to 12 relatives, about 32 unrelated."""
    return (int(first, 16) ^ int(second, 16)).bit_count()


def check_base_model(membrane: Membrane, weights: dict[str, Tensor]) -> None:
    """Refuse a membrane that was computed for another base model; one without a fingerprint passes.

    Args:
        weights: module key -> base weight; those that the membrane wraps are compared.

    Raises:
        MembraneError: a wrapped module is missing, a shape differs, or the fingerprint says another model.
    """
    for key, pair in membrane.modules.items():
        expected = (pair.out_features, pair.in_features)
        if key not in weights or tuple(weights[key].shape[:2]) != expected:
            found = f"a weight of shape {tuple(weights[key].shape)}" if key in weights else "no such module"
            raise MembraneError(
                f"the membrane for {membrane.concept!r} wraps {key} with (out, in) {expected}; the"
                f" model has {found}: it was made for another base model"
            )
    if membrane.base_model is None:
        return
    found = base_model_hash({key: weights[key] for key in membrane.modules})
    if (distance := base_model_distance(found, membrane.base_model)) > _SAME_BASE_BITS:
        raise MembraneError(
            f"the membrane for {membrane.concept!r} was computed for base model {membrane.base_model}, this one is"
            f" {found} ({distance} of {_HASH_BITS} bits differ, at most {_SAME_BASE_BITS} for the same or a fine-tuned"
            " model); compute it for this model, e.g. `semiperm erase MODEL --concept ...`"
        )


def check_base_models(membranes: Iterable[Membrane], weights: dict[str, Tensor]) -> None:
    """`check_base_model` for a stack; membranes of one origin share one fingerprint, which is the slow part."""
    for membrane in {(m.base_model, tuple(m.modules)): m for m in membranes}.values():
        check_base_model(membrane, weights)


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
