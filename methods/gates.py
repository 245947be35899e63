"""Gates: how far a membrane opens for a prompt, from text features alone. Tensors in, (B,) out.

Every gate answers one membrane at a time; stack the answers into Gamma (B, K) for `pack`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from .membrane_types import GateProbe, MembraneError

GATES = ("probe", "paper", "official", "always")


def facilitated_transport(
    prompt_hidden: Tensor,
    concept_hidden: Tensor,
    prompt_token_ids: Sequence[Collection[int]],
    concept_token_ids: Sequence[Collection[int]],
) -> Tensor:
    """SPM's gate: gamma(p) = max over phrases c of max(s_f, s_t).

    s_f = cosine of the flattened hidden states of p and c;  s_t = |T(c) and T(p)| / |T(c)|.

    Args:
        prompt_hidden: (B, N, d).
        concept_hidden: (P, N, d), one row per phrase of the concept.
        prompt_token_ids: B collections of token ids, without the special tokens.
        concept_token_ids: P collections of token ids, without the special tokens.

    Returns:
        (B,) float32 in [0, 1].

    Raises:
        MembraneError: shapes or counts disagree.

    Source: arXiv 2312.16145, Eq. 10 and 11.
    """
    (batch, *rest), (phrases, *expected) = prompt_hidden.shape, concept_hidden.shape
    if rest != expected or len(prompt_token_ids) != batch or len(concept_token_ids) != phrases:
        raise MembraneError(
            f"facilitated_transport: prompts {tuple(prompt_hidden.shape)} with {len(prompt_token_ids)} id sets, phrases"
            f" {tuple(concept_hidden.shape)} with {len(concept_token_ids)}; expected (B, N, d) and (P, N, d) with one"
            " id set per row, encoded at the same length"
        )
    flat = [torch.nn.functional.normalize(h.float().flatten(1), dim=1) for h in (prompt_hidden, concept_hidden)]
    concept_sets, prompt_sets = [set(ids) for ids in concept_token_ids], [set(ids) for ids in prompt_token_ids]
    overlap = [[len(c & p) / len(c) if c else 0.0 for c in concept_sets] for p in prompt_sets]
    similarity = torch.maximum(flat[0] @ flat[1].T, torch.tensor(overlap, device=flat[0].device))
    return similarity.amax(dim=1).clamp(0.0, 1.0)


def official_gamma(gamma: Tensor) -> Tensor:
    """Gamma (B, K) -> (B, K^2) for `pack(..., cross_terms=True)`: column i K + j holds gamma_i gamma_j.

    SPM's released inference multiplies both factors by gamma and sums over the membranes before the product, so one
    membrane acts with gamma^2 and several act through each other's directions. Kept to reproduce old images.
    Source: Con6924/SPM @3dd762e, infer_spm.py.
    """
    return (gamma[:, :, None] * gamma[:, None, :]).flatten(1)


def probe_gate(hidden: Tensor, probe: GateProbe) -> Tensor:
    """gamma = clip((max_t <h_t, weight> - low) / (high - low), 0, 1): exactly 0 for prompts below `low`.

    Args:
        hidden: (B, N, d) per-token hidden states.

    Returns:
        (B,) float32.
    """
    if hidden.ndim != 3 or hidden.shape[-1] != probe.weight.numel():
        raise MembraneError(
            f"probe of width {probe.weight.numel()} on hidden states {tuple(hidden.shape)}; expected"
            " (B, N, d) of the text encoder it was fitted on"
        )
    response = (hidden.float() @ probe.weight.to(hidden.device, torch.float32)).amax(dim=1)
    return ((response - probe.low) / (probe.high - probe.low)).clamp(0.0, 1.0)


def always(batch: int, device: torch.device | str = "cpu") -> Tensor:
    """gamma = 1 for every sample: the ungated membrane."""
    return torch.ones(batch, device=device)
