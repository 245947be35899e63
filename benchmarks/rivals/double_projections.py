"""DP, double projections: what of a concept lies outside the span of what is kept is taken out of text.

    U_1, U_2 = the span of the kept embeddings, and what is at right angles to all of them
    c* = U_1 U_1^T c,   x = U_2^T c,   dW = W (c* - c) x^+ U_2^T

so that W' c = W c*, and W' c_0 = W c_0 for everything kept, exactly. With one concept it is the rank-1 edit
dW = W (c* - c) x^T U_2^T / |x|^2; with K, C = (c_1 ... c_K) and the pseudo-inverse of X = U_2^T C, so that every
concept goes exactly to its own c*.

Source: Closed-Form Concept Erasure via Double Projections (arXiv 2604.10032), read from descriptions of it. We differ:
several concepts are solved together, where one after the other would undo one another's part; what is kept are the
names told and the empty prompt, by their last tokens.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ...methods.errors import MembraneError
from ...methods.membranes.closed_form import Edit
from ...methods.membranes.types import Membranes
from ..erasure.methods import Told, applied
from .shared import edit_membrane, fitted, text_spaces

_SMALL = 1e-6  # of the largest singular value: rounding of embeddings in float32
_NOTHING = 1e-3  # of a concept's norm: what is left outside of the span would be blown up


def erase(pipe, told: Told) -> AbstractContextManager[dict]:
    return applied(pipe, fitted(told, "dp", {}, lambda: _fit(pipe, told)), "always", negative_rows=True)


def _fit(pipe, told: Told) -> Membranes:
    made = Membranes()
    for weights, embed in text_spaces(pipe):
        made += edit_membrane(weights, dp_edit(embed(pipe, told.phrases), embed(pipe, ["", *told.others])), told, "dp")
    return made


def dp_edit(concept: Tensor, preserve: Tensor) -> Edit:
    """The edit e -> e + u (v e): u = C* - C, v = X^+ U_2^T.

    Args:
        concept: (K, d). preserve: (m, d), m may be 0.

    Raises:
        MembraneError: a concept that lies within the span of what is kept.
    """
    concept, preserve = (t.detach().cpu().double() for t in (concept, preserve))
    _, values, rows = torch.linalg.svd(preserve, full_matrices=False)
    kept = rows[values > _SMALL * values.max()] if len(values) else rows
    outside = concept - concept @ kept.T @ kept  # U_2 x, row by row
    share = outside.norm(dim=1) / concept.norm(dim=1)
    if bool((share < _NOTHING).any()):
        raise MembraneError(
            f"DP: an embedding lies within the span of the {len(preserve)} that are kept (of width"
            f" {concept.shape[1]}), so that no edit erases the one and keeps the others; keep fewer"
        )
    return -outside.T, torch.linalg.pinv(outside.T, rtol=_SMALL)
