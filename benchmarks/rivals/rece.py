"""RECE: UCE, attacked and repeated.

    W_1 = UCE(W_0; c -> g)
    c'  = (sum W_n^T W_n + lambda I)^-1 (sum W_n^T W_0) c        what W_n still makes of it what W_0 made of c
    W_n+1 = UCE(W_n; c' -> g)

UCE's steps are edits of text space, which is common to all layers: W_n = W_0 T_n, T_n+1 = T_n (I + (g - c') M^-1 c').
Their product is one edit of rank K (epochs + 1).

Source: arXiv 2407.12383, equations 3 to 6; lambda = .1 and two epochs are what its code takes for objects and unsafe
content. We differ: c is the last token of each phrasing, as in our UCE, where the released code derives from all 77;
c' is always derived from the first c; no picture is judged between the epochs, whose number is fixed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ...methods.errors import MembraneError
from ...methods.membranes.closed_form import Edit, derive_embeddings
from ...methods.membranes.types import Membranes
from ...pipelines.weights import weights_of
from ..erasure.methods import Told, applied
from .shared import cross_attention, edit_membrane, fitted, last_tokens

_RIDGE = 0.5  # UCE's lambda


def erase(pipe, told: Told, epochs: int = 2, ridge: float = 0.1) -> AbstractContextManager[dict]:
    """Erase by RECE.

    Args:
        epochs: attacks, >= 1. ridge: lambda > 0 of the attack.
    """
    options = {"epochs": epochs, "ridge": ridge}
    return applied(pipe, fitted(told, "rece", options, lambda: _fit(pipe, told, **options)), "always", True)


def _fit(pipe, told: Told, epochs: int, ridge: float) -> Membranes:
    weights = weights_of(pipe, cross_attention(pipe, ("attn2.to_k", "attn2.to_v"), "RECE"))
    concept, target, preserve = (last_tokens(pipe, t) for t in (told.phrases, [""] * len(told.phrases), told.others))
    gram = sum(w.detach().cpu().double().T @ w.detach().cpu().double() for w in weights.values())
    return edit_membrane(weights, rece_edit(concept, target, preserve, gram, epochs, ridge), told, "rece")


def rece_edit(concept: Tensor, target: Tensor, preserve: Tensor, gram: Tensor, epochs: int, ridge: float) -> Edit:
    """The edit e -> e + u (v e) that T_(epochs + 1) is.

    Args:
        concept, target: (K, d). preserve: (m, d). gram: (d, d) sum of W^T W.

    Raises:
        MembraneError: no epoch, or no ridge.
    """
    if epochs < 1 or not 0 < ridge < float("inf"):
        raise MembraneError(f"epochs={epochs}, ridge={ridge}; expected at least one, and a ridge above 0")
    concept, target, preserve = (t.detach().cpu().double() for t in (concept, target, preserve))
    gram = gram.detach().cpu().double()
    identity, rows = torch.eye(len(gram), dtype=torch.float64), concept
    u, v = identity[:, :0], identity[:0]
    for epoch in range(epochs + 1):
        if epoch:
            rows = derive_embeddings(concept, (u, v), gram, ridge / float(gram.diagonal().mean()))
        metric = _RIDGE * identity + rows.T @ rows + preserve.T @ preserve
        away = (target - rows).T
        away = away + u @ (v @ away)  # W_n's answers, not W_0's
        u, v = torch.cat((u, away), 1), torch.cat((v, torch.linalg.solve(metric, rows.T).T))
    return u, v
