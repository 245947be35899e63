"""SPEED: a ridge regression within the null space of what is kept, layer by layer.

    min_D  |(W + D) C_1 - W C*|^2 + |D|^2   with  D = D P,  D C_2 = 0

C_1 are the concepts' last tokens, C* the empty prompt's, C_2 what is held exactly (the begin-of-text token and three
cluster centres of the empty prompt's other tokens), P the projector on the eigenvectors of C_0 C_0^T below `threshold`,
with C_0 the kept names:

    D = W (C* - C_1) X^T (X X^T + I)^-1 B^T,   X = B^T C_1,   B an orthonormal basis of range(P) less the span of P C_2

C_0 is chosen in each layer: names which the free regression (P = I) would move by more than the mean, and ten copies of
each, moved by noise along the layer's weakest right singular vector w (c + z w, z normal), chosen in the same way.

Source: SPEED (arXiv 2503.07392), its null-space constraint, prior filtering, augmentation and invariant tokens. We
differ: the two constraints are solved as one subspace, which is the same optimum; the ridge of 1, the threshold of .1
and the noise are in units of a mean squared coordinate, which is about 1 in CLIP's text space, elsewhere not.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ...methods.errors import MembraneError
from ...methods.membranes.base_model import base_model_hash
from ...methods.membranes.closed_form import Edit
from ...methods.membranes.types import Membrane, Membranes
from ...pipelines.text import encode_text
from ...pipelines.weights import weights_of
from ..erasure.methods import Told, applied
from .shared import cross_attention, edit_membrane, fitted, last_tokens

_COPIES, _CENTRES, _ROUNDS = 10, 3, 20  # the paper's first two; rounds of k-means, which settles in a few


def erase(pipe, told: Told, threshold: float = 0.1, seed: int = 0) -> AbstractContextManager[dict]:
    """Erase by SPEED.

    Args:
        threshold: of eigenvalues, > 0. seed: of the noise.
    """
    options = {"threshold": threshold, "seed": seed}
    return applied(pipe, fitted(told, "speed", options, lambda: _fit(pipe, told, **options)), "always", True)


def _fit(pipe, told: Told, threshold: float, seed: int) -> Membranes:
    weights = weights_of(pipe, cross_attention(pipe, "attn2.to_v", "SPEED"))
    concept, target, names = (
        last_tokens(pipe, t).cpu().double() for t in (told.phrases, [""] * len(told.phrases), told.others)
    )
    empty = encode_text(pipe, [""]).hidden[0].cpu().double()
    held = torch.cat((empty[:1], _centres(empty[1:], _CENTRES)))
    unit, modules = float(concept.square().mean()), {}
    generator = torch.Generator().manual_seed(seed)
    for key, weight in weights.items():
        kept = _chosen(weight.cpu().double(), concept, target, names, unit, generator)
        edit = speed_edit(concept, target, kept, held, unit, threshold * unit)
        modules |= edit_membrane({key: weight}, edit, told, "speed")[0].modules
    base = base_model_hash(weights)
    return Membranes(Membrane("+".join(told.words), modules, method="rival/speed", base_model=base))


def speed_edit(concept: Tensor, target: Tensor, kept: Tensor, held: Tensor, ridge: float, threshold: float) -> Edit:
    """The edit e -> e + u (v e) of one layer: u = C* - C_1, v = X^T (X X^T + ridge I)^-1 B^T.

    Args:
        concept, target: (K, d). kept: (m, d), C_0. held: (h, d), C_2. All float64.

    Raises:
        MembraneError: a threshold or ridge of 0, or nothing is left outside of what is kept.
    """
    if not threshold > 0 or not ridge > 0:
        raise MembraneError(f"threshold={threshold}, ridge={ridge}; expected both above 0")
    values, vectors = torch.linalg.eigh(kept.T @ kept)
    basis = vectors[:, values < threshold]
    inside = basis.T @ held.T
    left, sizes, _ = torch.linalg.svd(inside, full_matrices=True)
    taken = int((sizes > 1e-9 * sizes.max()).sum()) if sizes.numel() else 0
    basis = basis @ left[:, taken:]
    x = basis.T @ concept.T
    if not basis.shape[1] or not bool(x.abs().max() > 0):
        raise MembraneError(
            f"SPEED: {len(kept)} embeddings that are kept leave no direction of {concept.shape[1]} below the threshold;"
            " keep fewer names, or take a larger threshold"
        )
    return (target - concept).T, torch.linalg.solve(x.T @ x + ridge * torch.eye(len(concept)).double(), (basis @ x).T)


def _chosen(
    weight: Tensor, concept: Tensor, target: Tensor, names: Tensor, unit: float, generator: torch.Generator
) -> Tensor:
    """C_0 of a layer."""
    free = torch.linalg.solve(concept @ concept.T + unit * torch.eye(len(concept)).double(), concept)
    moves = weight @ (target - concept).T @ free

    def moved(rows: Tensor) -> Tensor:
        shift = (rows @ moves.T).norm(dim=1)
        far = shift > shift.mean()
        return rows[far] if far.any() else rows

    near = moved(names)
    weakest = torch.linalg.eigh(weight.T @ weight)[1][:, 0]
    noise = torch.randn(len(near) * _COPIES, generator=generator, dtype=torch.float64) * unit**0.5
    return torch.cat((near, moved(near.repeat_interleave(_COPIES, 0) + noise[:, None] * weakest)))


def _centres(rows: Tensor, count: int) -> Tensor:
    """(count, d): k-means from rows spread evenly over the sequence."""
    centres = rows[torch.linspace(0, len(rows) - 1, count).long()]
    for _ in range(_ROUNDS):
        owner = torch.cdist(rows, centres).argmin(dim=1)
        centres = torch.stack([rows[owner == k].mean(0) if (owner == k).any() else c for k, c in enumerate(centres)])
    return centres
