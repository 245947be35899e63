"""The textbook UCE edit (arXiv 2308.14761) as membranes: one rank-1 membrane for each concept embedding, exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import MembraneError
from .base_model import base_model_hash
from .closed_form import closed_form_membrane
from .types import Membranes


def uce_membranes(
    weights: dict[str, Tensor],
    concept: Tensor,
    target: Tensor,
    preserve: Tensor,
    names: Sequence[str],
    *,
    ridge: float = 0.5,
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
    **fields,
) -> Membranes:
    """The textbook UCE edit, as one rank-1 membrane per concept embedding: exactly its weight edit.

    W* = (lambda W + s sum W g e^T + p sum W c c^T) M^-1,  M = lambda I + s sum e e^T + p sum c c^T
    W* - W = sum_i W (g_i - e_i) (s M^-1 e_i)^T:  up = W (g_i - e_i), down = s M^-1 e_i

    Args:
        weights: module key -> (out, d).
        concept, target: (K, d), by the paper the last token of each bare phrase and of its surrogate.
        preserve: (m, d), m may be 0.
        names: K concept names.
        ridge, erase_scale, preserve_scale: absolute, in sums rather than means: the released code's defaults.
        **fields: dtype and others as in `closed_form_membrane`.

    Source: arXiv 2308.14761, Eq. 7; rohitgandikota/unified-concept-editing, uce_sd_erase.py.
    """
    concept, target, preserve = (t.detach().cpu().double() for t in (concept, target, preserve))
    if concept.shape != target.shape or len(names) != len(concept) or preserve.shape[1:] != concept.shape[1:]:
        raise MembraneError(
            f"{len(names)} names, concept {tuple(concept.shape)}, target {tuple(target.shape)},"
            f" preserve {tuple(preserve.shape)}; expected K names, (K, d), (K, d), (m, d)"
        )
    metric = erase_scale * concept.T @ concept + preserve_scale * preserve.T @ preserve
    metric += ridge * torch.eye(len(metric), dtype=torch.float64)
    down = torch.linalg.solve(metric, erase_scale * concept.T).T
    fields.setdefault("base_model", base_model_hash(weights))
    edits = [((g - e)[:, None], v[None]) for e, g, v in zip(concept, target, down, strict=True)]
    return Membranes(
        closed_form_membrane(weights, edit, name, **fields) for edit, name in zip(edits, names, strict=True)
    )
