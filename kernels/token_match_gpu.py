"""Best-matching reference token in plain torch for GPUs without our kernels: few large products, and no host reads.

    score_n = max_j cos(q_n, k_j),    index_n = the lowest j that attains it

Unit tokens are multiplied in float16 (float32 stays float32): Turing and RDNA have matrix units for it, and none, or
slow ones, for bfloat16. A product's sums are rounded to 11 bits, so that a winner is within 2e-3 of the best; the naive
algorithm in bfloat16 is off by ten times as much. A mask is the product's bias, 0 or -inf, and costs no pass.

Bytes beside the inputs: both sides' unit tokens, and one tile of at most `TILE` scores. What is left to a loop on the
host is decided by shapes, and by what the host knows (`seen`): nothing is read from the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .dispatch import without_autocast

__all__ = ["best_match_tiles", "pushes", "token_match_merge_tiles"]

TILE = 2**24  # scores, 32 MiB in float16: 4,096 queries of 4,096 keys, enough tiles of cuBLAS' for any GPU


@without_autocast
def best_match_tiles(
    queries: Tensor,
    keys: Tensor,
    *,
    pairs: Tensor | None = None,
    key_mask: Tensor | None = None,
    gate: Tensor | None = None,
    seen: Sequence[Sequence[int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """`best_match` in plain torch; the arguments are checked there."""
    (batch, tokens, _), length = queries.shape, keys.shape[1]
    (unit, matchable), (unit_keys, allowed) = _unit(queries), _unit(keys)
    if key_mask is not None:
        allowed = allowed & key_mask
    score = torch.full((batch, tokens), -torch.inf, dtype=torch.float32, device=queries.device)
    index = torch.full((batch, tokens), -1, dtype=torch.int64, device=queries.device)
    for rows, own in _runs(batch, len(keys), seen, pairs is not None):
        usable = allowed[own]
        if seen is None and pairs is not None:  # a run of one row
            usable = usable & pairs[rows, own].T
        bias = torch.where(usable, 0.0, -torch.inf).to(unit.dtype).flatten()
        columns, mine = unit_keys[own].flatten(0, 1), unit[rows].flatten(0, 1)
        tops, places = score[rows].view(-1), index[rows].view(-1)
        width = min(len(columns), TILE)
        height = max(1, TILE // width)
        for start in range(0, len(columns), width):
            part = slice(start, start + width)
            for first in range(0, len(mine), height):
                some = slice(first, first + height)
                found, at = torch.addmm(bias[part], mine[some], columns[part].T).max(1)
                better = found > tops[some]  # strictly: on ties the first tile keeps its lower index
                places[some] = torch.where(better, at + (own.start * length + start), places[some])
                tops[some] = torch.maximum(tops[some], found)
    if gate is not None:
        matchable = matchable & (gate != 0)[:, None]
    return torch.where(matchable, score, -torch.inf), torch.where(matchable, index, -1)


def token_match_merge_tiles(
    x: Tensor,
    reference: Tensor,
    strength: Tensor,
    threshold: Tensor,
    *,
    pairs: Tensor | None = None,
    reference_mask: Tensor | None = None,
    gate: Tensor | None = None,
    seen: Sequence[Sequence[int]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`token_match_merge` in plain torch, with strength (B, R) and threshold (); the arguments are checked there."""
    score, index = best_match_tiles(x, reference, pairs=pairs, key_mask=reference_mask, gate=gate, seen=seen)
    best, amount, hit = pushes(score, index, strength, threshold, gate, reference.shape[1])
    match = reference.reshape(-1, x.shape[2]).index_select(0, best.flatten()).view(x.shape)
    wide = x.float()
    merged = torch.addcmul(wide, amount[:, :, None], wide - match.float()).to(x.dtype)
    return torch.where(hit[:, :, None], merged, x), score, index


def pushes(
    score: Tensor, index: Tensor, strength: Tensor, threshold: Tensor, gate: Tensor | None, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of matches (B, N) with references of `length` tokens: the winner, 0 where there is none; how far each token is
    pushed from it, by the strength (B, R) of its reference and the row's gate; and which are pushed at all."""
    best = index.clamp_min(0)
    amount = strength.gather(1, best // length)
    amount = amount if gate is None else amount * gate[:, None]
    return best, amount, (score > threshold) & (amount != 0)


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of length 1 in the dtype of the products, and which are numbers at all, (B, N); the others are zeros."""
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    finite = norm < torch.inf  # nor NaN
    unit = torch.where(finite[:, :, None], x.float() / norm.clamp_min(1e-12)[:, :, None], 0.0)
    return unit.to(x.dtype if x.dtype is torch.float32 else torch.float16), finite


def _runs(
    batch: int, references: int, seen: Sequence[Sequence[int]] | None, paired: bool
) -> Iterator[tuple[slice, slice]]:
    """Runs of rows, each with a run of references that all of them look at."""
    if seen is None:
        for start in range(batch if paired else 1):
            yield slice(start, start + 1) if paired else slice(0, batch), slice(0, references)
        return
    start = 0
    while start < batch:
        stop = start + 1
        while stop < batch and seen[stop] == seen[start]:
            stop += 1
        own = sorted(seen[start])
        first = 0
        for i in range(1, len(own) + 1):
            if i == len(own) or own[i] != own[i - 1] + 1:
                yield slice(start, stop), slice(own[first], own[i - 1] + 1)
                first = i
        start = stop
