"""Which model a membrane was made for: a fingerprint of its weights that outlives other dtypes and fine-tunes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import MembraneError
from .types import Membrane

_HASH_BITS = 64  # 16 hex digits in a file; between unrelated models 32 differ, give or take 4
SAME_BASE_BITS = 12  # two unrelated models agree this closely with probability 2e-7; fine-tunes differ by a few bits
_AXES = {1: "(out,)", 2: "(out, in)"}  # what is known of a wrapped layer's weight


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
    shapes = {key: (pair.out_features, pair.in_features) for key, pair in membrane.modules.items()}
    if membrane.visual is not None:  # it reads what a layer answers, whatever that is given
        shapes = {key: (site.channels,) for key, site in membrane.visual.sites.items()}
    for key, expected in shapes.items():
        if key not in weights or tuple(weights[key].shape[: len(expected)]) != expected:
            found = f"a weight of shape {tuple(weights[key].shape)}" if key in weights else "no such module"
            raise MembraneError(
                f"the membrane for {membrane.concept!r} wraps {key} with {_AXES[len(expected)]} {expected}; the"
                f" model has {found}: it was made for another base model"
            )
    if membrane.base_model is None:
        return
    found = base_model_hash({key: weights[key] for key in membrane.keys})
    if (distance := base_model_distance(found, membrane.base_model)) > SAME_BASE_BITS:
        raise MembraneError(
            f"the membrane for {membrane.concept!r} was computed for base model {membrane.base_model}, this one is"
            f" {found} ({distance} of {_HASH_BITS} bits differ, at most {SAME_BASE_BITS} for the same or a fine-tuned"
            " model); compute it for this model, e.g. `semiperm erase MODEL --concept ...`"
        )


def check_base_models(membranes: Iterable[Membrane], weights: dict[str, Tensor]) -> None:
    """`check_base_model` for a stack; membranes of one origin share one fingerprint, which is the slow part."""
    for membrane in {(m.base_model, m.keys): m for m in membranes}.values():
        check_base_model(membrane, weights)
