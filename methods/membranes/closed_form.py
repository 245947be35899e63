"""Closed-form membranes: erase a concept by linear regression on text embeddings, without training.

Every text projection sees the same embedding e, so one low-rank edit of text space, e -> e + u (v e), serves them all:
W (I + u v) = W + (W u) v is a membrane with up = W u and down = v. The edit solves

    min_A_k  s mean_i |(I + A_k) e_ki - g_ki|^2  +  p mean_j |A_k c_j|^2
             + p/K sum_l!=k mean_i |A_k e_li|^2  +  lambda |A_k|^2

with e_ki the embeddings of concept k, g_ki what they become (the same captions with the surrogate), c_j what must not
move. The solution is A_k = S_k M_k^-1, S_k = s mean_i (g_ki - e_ki) e_ki^T, M_k = lambda I + s mean_i e_ki e_ki^T
+ p mean_j c_j c_j^T + p/K sum_l!=k mean_i e_li e_li^T: it moves concept k and stays silent on the other concepts, so
that the K edits add up, and each works alone. All M_k share one factorisation. The best edit of rank r *for this
objective* is U U^T A_k, with U the r leading eigenvectors of S_k M_k^-1 S_k^T (reduced-rank regression).
UCE (arXiv 2308.14761) is the case of one concept and one embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import MembraneError
from ..text_space import live_columns
from .base_model import base_model_hash
from .types import LowRank, Membrane

__all__ = [
    "METHODS",
    "ClosedFormConfig",
    "Edit",
    "aligned_pairs",
    "closed_form_edit",
    "closed_form_edits",
    "closed_form_membrane",
    "derive_embeddings",
    "moved_share",
]

METHODS = ("uce", "null_space", "rece")

Edit = tuple[Tensor, Tensor]  # u (d, r), v (r, d), float64: e -> e + u (v e)


@dataclass(frozen=True)
class ClosedFormConfig:
    """How to solve for the edit.

    Args:
        method: "uce" (ridge regression), "null_space" (in addition the edit is exactly zero on the strong directions
            of the preserved embeddings; after SPEED, arXiv 2503.07392), "rece" (in addition the embeddings that still
            produce the concept after the edit are derived and edited too; after RECE, arXiv 2407.12383).
        rank: of each concept's membrane, >= 1.
        push: eta >= 0, how far beyond the target: g' = g + eta (g - e), as in SPM's training loss. 0 goes to the
            target and, being a regression, mostly falls short of it; 1 is SPM's default.
        erase_scale: s >= 0, weight of a concept's mean squared error; 0 leaves everything as it is.
        preserve_scale: p >= 0, weight of the mean squared movement of the preserved embeddings, and (on average)
            of the other concepts'.
        ridge: lambda > 0 as a share of the mean squared embedding coordinate.
        null_threshold: "null_space" freezes the directions in which the preserved embeddings' mean square exceeds
            this share of the average over all directions; > 0.
        rece_epochs: "rece" derives embeddings this many times, >= 1.
        rece_ridge: how close derived embeddings stay to 0, as a share of the mean squared weight; > 0.

    Raises:
        MembraneError: a value outside its range.
    """

    method: str = "uce"
    rank: int = 2
    push: float = 1.0
    erase_scale: float = 1.0
    preserve_scale: float = 8.0
    ridge: float = 1e-3
    null_threshold: float = 1.0
    rece_epochs: int = 2
    rece_ridge: float = 1e-3

    def __post_init__(self):
        if self.method not in METHODS:
            raise MembraneError(f"closed-form method {self.method!r}; expected one of {', '.join(METHODS)}")
        for name in ("rank", "rece_epochs"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise MembraneError(f"{name}={getattr(self, name)!r}; expected an integer >= 1")
        for name, positive in (
            ("ridge", True),
            ("null_threshold", True),
            ("rece_ridge", True),
            ("push", False),
            ("erase_scale", False),
            ("preserve_scale", False),
        ):
            value = getattr(self, name)
            if not 0 <= value < float("inf") or (positive and value == 0):
                raise MembraneError(f"{name}={value!r}; expected a finite number {'>' if positive else '>='} 0")


def closed_form_edit(
    concept: Tensor,
    target: Tensor,
    preserve: Tensor,
    config: ClosedFormConfig | None = None,
    gram: Tensor | None = None,
) -> Edit:
    """Solve for one concept; see `closed_form_edits`."""
    return closed_form_edits([concept], [target], preserve, config, gram)[0]


def closed_form_edits(
    concepts: Sequence[Tensor],
    targets: Sequence[Tensor],
    preserve: Tensor,
    config: ClosedFormConfig | None = None,
    gram: Tensor | None = None,
) -> list[Edit]:
    """Solve for K concepts at once, with one factorisation; each gets its own edit, and their sum is the joint one.

    Args:
        concepts: K tensors (n_k, d), text embeddings that carry the concept.
        targets: K tensors (n_k, d), row for row what they become.
        preserve: (m, d), embeddings that must not move; m may be 0.
        config: how; None is the default.
        gram: (d, d) sum over projections of W^T W, for "rece" to measure in what the model sees; None is the identity.

    Returns:
        K pairs u (d, r), v (r, d) in float64; r is at most config.rank, less where fewer rows were given.

    Raises:
        MembraneError: no rows, shapes that disagree, NaN or Inf.
    """
    config = config or ClosedFormConfig()
    rows, aims, preserve = _checked(concepts, targets, preserve)
    width, live = preserve.shape[1], live_columns(*rows, *aims, preserve)
    if len(live) < width and config.method != "rece":  # RECE's attack may use columns that no caption does
        share = len(live) / width  # a mean over the live columns is so much larger than one over all of them
        config = replace(config, ridge=config.ridge * share, null_threshold=config.null_threshold * share)
        rows, aims, preserve = [r[:, live] for r in rows], [a[:, live] for a in aims], preserve[:, live]
    else:
        live = torch.arange(width)
    edits = _solved(rows, aims, preserve, config, gram)
    return [(u.new_zeros(width, u.shape[1]).index_copy(0, live, u), v.new_zeros(len(v), width).index_copy(1, live, v))
            for u, v in edits]  # fmt: skip


def moved_share(edit: Edit, concept: Tensor, target: Tensor, captions: Tensor) -> Tensor:
    """(m,): how far an edit moves each caption's most moved token, as a share of the concept's mean way to its target.

    Args:
        edit: of these (n, d) concept and target rows. captions: (m, N, d) hidden states.
    """
    u, v = (factor.float() for factor in edit)
    way = (target.float() - concept.float()).norm(dim=1).mean().clamp_min(1e-30)
    return ((captions.cpu().float() @ v.T) @ u.T).norm(dim=2).amax(dim=1) / way


def _solved(rows, aims, preserve, config, gram):
    moved = preserve.T @ preserve / max(len(preserve), 1)
    basis = _null_basis(moved, config.null_threshold) if config.method == "null_space" else None
    if config.method == "rece":
        rows, aims = _with_derived(rows, aims, moved, config, gram)
    return _regress(rows, aims, moved, basis, config)


def _with_derived(rows, targets, moved, config, gram):
    """Append to each concept's pairs (c, g) the pairs (a c', a g) that still produce c after the edit so far.

    a = min(1, |c| / |c'|) max(0, 1 - |T c' - c|^2 / |g - c|^2): a pair weighs no more than (c, g) does, and nothing
    where the attack fails. The distances are those that the projections see.
    """
    gram = torch.eye(len(moved), dtype=torch.float64) if gram is None else gram.detach().cpu().double()
    plain = replace(config, push=0.0)  # beyond the target, the attack's answer would be the concept's opposite
    all_rows, all_targets = list(rows), list(targets)
    for _ in range(config.rece_epochs):
        edits = _regress(all_rows, all_targets, moved, None, plain)
        for k, (c, g, (u, v)) in enumerate(zip(rows, targets, edits, strict=True)):
            attack = derive_embeddings(c, (u, v), gram, config.rece_ridge)
            miss = attack + (attack @ v.T) @ u.T - c
            shift, miss = (((x @ gram) * x).sum(dim=1) for x in (g - c, miss))
            success = (1 - miss / shift.clamp_min(1e-30)).clamp_min(0.0)
            weight = (success * (c.norm(dim=1) / attack.norm(dim=1).clamp_min(1e-30)).clamp_max(1.0))[:, None]
            all_rows[k] = torch.cat((all_rows[k], weight * attack))
            all_targets[k] = torch.cat((all_targets[k], weight * g))
    return all_rows, all_targets


def derive_embeddings(rows: Tensor, edit: Edit, gram: Tensor, ridge: float) -> Tensor:
    """RECE's attack on an edit: the embeddings c' that the edited projections map closest to what c used to give.

    c' = (sum W'^T W' + lambda I)^-1 (sum W'^T W) c,  W' = W (I + A):  (T^T H T + lambda I) c' = T^T H c, T = I + A

    Args:
        rows: (n, d) float64.
        edit: the edit under attack.
        gram: H = sum W^T W, (d, d) float64.
        ridge: lambda as a share of mean(diag H).

    Source: arXiv 2407.12383, Eq. 6.
    """
    identity = torch.eye(len(gram), dtype=torch.float64)
    edited = identity + edit[0] @ edit[1]
    normal = edited.T @ gram @ edited + ridge * gram.diagonal().mean() * identity
    return torch.linalg.solve(normal, edited.T @ gram @ rows.T).T


def closed_form_membrane(
    weights: dict[str, Tensor],
    edit: Edit,
    concept: str,
    *,
    method: str = "closed_form/uce",
    dtype: torch.dtype = torch.float32,
    **fields,
) -> Membrane:
    """The membrane of an edit of text space: up = W u, down = v for every projection W that reads this text.

    Args:
        weights: module key -> (out, d).
        edit: from `closed_form_edit`.
        concept: the membrane's name.
        dtype: of the stored pairs; W u is computed in float32 (float64 for float64 weights).
        **fields: further `Membrane` fields: phrases, surrogate, probe, metadata, base_model (default: the hash of
            `weights`).

    Raises:
        MembraneError: no weights, or a width that is not the edit's.
    """
    u, v = edit
    down, modules = v.to(dtype), {}
    for key, weight in weights.items():
        if weight.ndim != 2 or weight.shape[1] != len(u):
            raise MembraneError(f"{key}: weight {tuple(weight.shape)} does not read text embeddings of width {len(u)}")
        wide = torch.promote_types(weight.dtype, torch.float32)
        up = weight.detach().to(wide) @ u.to(weight.device, wide)
        modules[key] = LowRank(down, up.to("cpu", dtype), float(len(v)))
    fields.setdefault("base_model", base_model_hash(weights))
    return Membrane(concept, modules, method=method, **fields)


def aligned_pairs(
    concept_hidden: Tensor,
    surrogate_hidden: Tensor,
    concept_span: tuple[int, int],
    surrogate_span: tuple[int, int],
    *,
    whole_phrase: bool = False,
) -> tuple[Tensor, Tensor]:
    """Training pairs from one caption and the same caption with the surrogate in the concept's place.

    A causal text encoder carries the concept on to every later position, padding included, so each of them is a pair:
    the j-th position after the phrase with the j-th after the surrogate (with the last, where the surrogate's caption
    ends earlier). The phrase's last token pairs with the surrogate's last token; with the token that follows, if the
    surrogate is empty.

    Args:
        concept_hidden: (N, d).
        surrogate_hidden: (N', d).
        concept_span: token positions [start, end) of the phrase.
        surrogate_span: the same for the surrogate; start = end if it is empty.
        whole_phrase: pair every token of the phrase, not only its last, with that same surrogate token.

    Returns:
        rows (k, d), targets (k, d).

    Raises:
        MembraneError: spans outside the captions, or an empty phrase.
    """
    (start, end), (other_start, other_end) = concept_span, surrogate_span
    length, other_length = len(concept_hidden), len(surrogate_hidden)
    if not 0 <= start < end <= length or not 0 <= other_start <= other_end <= other_length or not other_length:
        raise MembraneError(
            f"phrase at {concept_span} of {length} tokens, surrogate at {surrogate_span} of"
            f" {other_length}; expected start < end within the caption (surrogate: <=)"
        )
    stand_in = other_end - 1 if other_end > other_start else min(other_end, other_length - 1)
    first = start if whole_phrase else end - 1
    after = torch.arange(length - end) + other_end
    partners = torch.cat((torch.full((end - first,), stand_in), after.clamp(max=other_length - 1)))
    return concept_hidden[first:], surrogate_hidden[partners.to(surrogate_hidden.device)]


# ---- algebra, float64 ------------------------------------------------------------------------------------------------


def _checked(concepts, targets, preserve):
    given = [tuple(t.shape) for t in (*concepts, *targets, preserve)]
    width = preserve.shape[-1]
    ok = len(concepts) == len(targets) > 0 and all(len(s) == 2 and s[1] == width for s in given)
    if not ok or not all(map(len, concepts)) or any(c.shape != t.shape for c, t in zip(concepts, targets, strict=True)):
        raise MembraneError(
            f"embeddings of shapes {given} (concepts, targets, preserve); expected for each concept two"
            " equal (n, d) with n > 0, and one (m, d) to preserve"
        )
    wide = [t.detach().cpu().double() for t in (*concepts, *targets, preserve)]
    if not all(torch.isfinite(t).all() for t in wide):
        raise MembraneError("the text embeddings hold NaN or Inf; encode in float32, or check the text encoder")
    count = len(concepts)
    return wide[:count], wide[count:-1], wide[-1]


def _null_basis(moved: Tensor, threshold: float) -> Tensor:
    """Orthonormal (d, k) basis of the directions in which the preserved embeddings hardly extend."""
    values, vectors = torch.linalg.eigh(moved)
    basis = vectors[:, values <= threshold * values.mean()]
    if not basis.shape[1]:
        raise MembraneError(f"null_threshold={threshold} leaves no direction to edit; raise it, or preserve less")
    return basis


def _regress(rows: list[Tensor], targets: list[Tensor], moved: Tensor, basis: Tensor | None, config: ClosedFormConfig):
    """Reduced-rank regression of each concept against all: rows (n_k, d) -> K edits."""
    scale = (moved.diagonal().mean() + sum(r.square().mean() for r in rows) / len(rows)) / 2
    ridge = config.ridge * scale.clamp_min(1e-30)
    deltas = [(1 + config.push) * (target - row) for row, target in zip(rows, targets, strict=True)]
    if basis is not None:  # e -> basis^T e: an edit of these coordinates cannot move what lies outside of them
        moved, rows = basis.T @ moved @ basis, [row @ basis for row in rows]
    other = config.preserve_scale / len(rows) if len(rows) > 1 else 0.0
    shared = config.preserve_scale * moved + ridge * torch.eye(len(moved), dtype=torch.float64)
    for row in rows:
        shared.addmm_(row.T, row, alpha=other / len(row))
    factor = torch.linalg.cholesky(shared)
    edits = []
    for row, delta, solved in zip(rows, deltas, _apply_inverse(factor, rows), strict=True):
        own = (config.erase_scale - other) / len(row)  # M_k = shared + own e e^T, summed over the rows
        if len(row) < len(shared):  # e^T M_k^-1 from e^T shared^-1, without factorising M_k
            solved = torch.linalg.solve(torch.eye(len(row), dtype=torch.float64) + own * solved @ row.T, solved)
        else:
            (solved,) = _apply_inverse(torch.linalg.cholesky(shared.addmm(row.T, row, alpha=own)), [row])
        u = _leading(delta, solved, row, config.rank)
        v = config.erase_scale / len(row) * (u.T @ delta.T) @ solved
        edits.append((u, v if basis is None else v @ basis.T))
    return edits


def _apply_inverse(factor: Tensor, rows: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.cholesky_solve(torch.cat(rows).T, factor).T.split([len(row) for row in rows])


# Further directions that a block power iteration carries, and its steps. What it misses falls with the 12th power of
# the ratio of the first eigenvalue left out to the last one wanted; both chosen by hand.
_OVERSAMPLE, _ITERATIONS = 4, 12


def _leading(delta: Tensor, solved: Tensor, row: Tensor, rank: int):
    """The `rank` leading eigenvectors (d, r) of delta^T (solved row^T) delta, by block power iteration.

    Exact once rank + `_OVERSAMPLE` reaches the number of rows; never forms a (d, d) product.
    """
    width = min(rank + _OVERSAMPLE, *delta.shape)
    generator = torch.Generator().manual_seed(0)  # its own: the user's random stream stays untouched
    block = torch.randn(delta.shape[1], width, dtype=delta.dtype, generator=generator)
    for _ in range(_ITERATIONS):
        block = torch.linalg.qr(delta.T @ (solved @ (row.T @ (delta @ block))))[0]
    small = (block.T @ delta.T) @ solved @ (row.T @ (delta @ block))
    return block @ torch.linalg.eigh((small + small.T) / 2)[1][:, -min(rank, width) :].flip(1)
