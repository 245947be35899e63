"""Gates: how far a membrane opens for a prompt, from text features alone. Tensors in, (B,) out.

Every gate answers for one membrane; stack the answers into Gamma (B, K) for `pack`. `fit_probe` makes the detector of
gate "probe" in closed form.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor

from ..errors import MembraneError
from ..text_space import live_columns
from .types import GateProbe

GATES = ("probe", "paper", "official", "always")
# Where the thresholds lie, see `fit_probe`; chosen by hand on public words of the canvases that the fit was not told.
_USUAL, _LOW, _HIGH = 0.99, 0.35, 0.475
_GAIN = 1e-3  # of a probe's separation, which is a share: a round that adds less is the last; chosen by hand


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
    similarity = flat[0] @ flat[1].T
    if any(prompt_token_ids):
        overlap = token_overlap(prompt_token_ids, concept_token_ids)
        similarity = torch.maximum(similarity, torch.tensor(overlap, device=flat[0].device))
    return similarity.amax(dim=1).clamp(0.0, 1.0)


def token_overlap(
    prompt_token_ids: Sequence[Collection[int]], concept_token_ids: Sequence[Collection[int]]
) -> list[list[float]]:
    """|T(c) and T(p)| / |T(c)| for each of B prompts p and P phrases c, as (B, P) numbers."""
    concepts, prompts = [set(ids) for ids in concept_token_ids], [set(ids) for ids in prompt_token_ids]
    return [[len(c & p) / len(c) if c else 0.0 for c in concepts] for p in prompts]


def official_gamma(gamma: Tensor) -> Tensor:
    """Gamma (B, K) -> (B, K^2) for `pack(..., cross_terms=True)`: column i K + j holds gamma_i gamma_j.

    SPM's released inference multiplies both factors by gamma and sums over the membranes before the product, so one
    membrane acts with gamma^2 and several act through each other's directions. Kept to reproduce old images.
    Source: Con6924/SPM @3dd762e, infer_spm.py.
    """
    return rearrange(gamma[:, :, None] * gamma[:, None, :], "b i j -> b (i j)")


def probe_gate(hidden: Tensor, probe: GateProbe, pooled: Tensor | None = None) -> Tensor:
    """gamma = clip((max_t <h_t, weight> - low) / (high - low), 0, 1): exactly 0 for prompts below `low`.

    Args:
        hidden: (B, N, d) per-token hidden states.
        pooled: (B, p) pooled embeddings, judged by `probe.pooled` where there is one; the wider gate counts.

    Returns:
        (B,) float32.
    """
    if hidden.ndim != 3 or hidden.shape[-1] != probe.weight.numel():
        raise MembraneError(
            f"probe of width {probe.weight.numel()} on hidden states {tuple(hidden.shape)}; expected"
            " (B, N, d) of the text encoder it was fitted on"
        )
    response = (hidden.float() @ probe.weight.to(hidden.device, torch.float32)).amax(dim=1)
    gamma = ((response - probe.low) / (probe.high - probe.low)).clamp(0.0, 1.0)
    if probe.pooled is None or pooled is None:
        return gamma
    return torch.maximum(gamma, probe_gate(pooled[:, None], probe.pooled))


def always(batch: int, device: torch.device | str = "cpu") -> Tensor:
    """gamma = 1 for every sample: the ungated membrane."""
    return torch.ones(batch, device=device)


def fit_probe(
    concept_hidden: Tensor,
    other_hidden: Tensor,
    positions: Tensor | None = None,
    *,
    ridge: float = 1e-2,
    rounds: int = 8,
) -> GateProbe:
    """Fit the detector of gate "probe": a ridge discriminant whose *largest* response over a caption's tokens decides.

    w = argmin mean_i (w.h_i + b - 1)^2 + mean_j (w.h_j + b)^2 + lambda |w|^2

    over the tokens i that carry the concept and tokens j of the others. Each round adds every other caption's largest
    response to the tokens j, until the margin stops growing. Where `positions` do not say which tokens carry it, the
    first round takes all of them, and each later one the token with the largest response.

    The thresholds lean towards opening, because words that nobody gave respond less than those that were fitted:
    between the response that all but 1 % of the other captions stay below and the lowest concept response, `low` lies
    0.35 of the way up and `high` 0.475. Where these overlap, `high` is the lowest concept response, so that a
    concept caption still opens the gate fully.

    Args:
        concept_hidden: (n, N, d), captions that ask for the concept, in many phrasings.
        other_hidden: (m, N, d), captions that do not; the same captions with the surrogate make the best contrast.
        positions: (n, s) of the tokens that carry the concept, the last of its phrase in each of s text encoders'
            stretches; None where they are unknown.
        ridge: lambda as a share of the mean squared coordinate, > 0.
        rounds: at most so many refits, >= 1.

    Returns:
        A probe with float32 weight and its training `separation`.

    Raises:
        MembraneError: shapes that disagree, no captions, NaN or Inf.
    """
    shapes = tuple(concept_hidden.shape), tuple(other_hidden.shape)
    if len(shapes[0]) != 3 or len(shapes[1]) != 3 or shapes[0][2] != shapes[1][2] or 0 in shapes[0] + shapes[1]:
        raise MembraneError(
            f"hidden states {shapes[0]} with and {shapes[1]} without the concept; expected (n, N, d)"
            " and (m, N, d), none empty"
        )
    concept, other = (h.detach().cpu().double() for h in (concept_hidden, other_hidden))
    if not (torch.isfinite(concept).all() and torch.isfinite(other).all()):
        raise MembraneError("the hidden states hold NaN or Inf; encode in float32, or check the text encoder")
    width, live = concept.shape[2], live_columns(concept, other)
    if len(live) < width:
        ridge *= len(live) / width  # of a mean over all columns
        concept, other = concept[..., live], other[..., live]
    background = other.flatten(0, 1)
    spread = background.T @ background / len(background), background.mean(dim=0)
    rows = torch.arange(len(concept))
    chosen = concept.flatten(0, 1) if positions is None else concept[rows[:, None], positions.cpu()].flatten(0, 1)
    hard, best = background[:0], None
    for _ in range(rounds):
        weight = _discriminant(chosen, hard, spread, ridge).float()  # the precision it is stored and used in
        on, off = ((h.float() @ weight).double() for h in (concept, other))
        probe = _with_thresholds(weight, on.amax(dim=1), off.amax(dim=1))
        if best is not None and probe.separation <= best.separation + _GAIN:
            break
        best = probe
        if positions is None:
            chosen = concept[rows, on.argmax(dim=1)]
        hard = torch.cat((hard, other[torch.arange(len(other)), off.argmax(dim=1)]))
    return replace(best, weight=best.weight.new_zeros(width).index_copy(0, live, best.weight))


def _discriminant(chosen: Tensor, hard: Tensor, spread: tuple[Tensor, Tensor], ridge: float) -> Tensor:
    """Ridge regression with a free intercept: `chosen` to 1; hard and background tokens, half each, to 0."""
    square, mean = spread
    if len(hard):
        square, mean = (square + hard.T @ hard / len(hard)) / 2, (mean + hard.mean(dim=0)) / 2
    centre = (mean + chosen.mean(dim=0)) / 2
    covariance = (square + chosen.T @ chosen / len(chosen)) / 2 - torch.outer(centre, centre)
    covariance += ridge * covariance.diagonal().mean().clamp_min(1e-30) * torch.eye(len(centre), dtype=centre.dtype)
    return torch.linalg.solve(covariance, (chosen.mean(dim=0) - mean) / 4)


def _with_thresholds(weight: Tensor, on: Tensor, off: Tensor) -> GateProbe:
    lowest, distance = on.min().item(), (on.mean() - off.mean()).abs().clamp_min(1e-6).item()
    usual = off.quantile(_USUAL).item()
    gap = lowest - usual
    low, high = (usual + _LOW * gap, usual + _HIGH * gap) if gap > 0 else (lowest - distance / 3, lowest)
    return GateProbe(weight, low, high, separation=gap / distance)
