"""Best-matching reference token in plain torch: blocks of queries against blocks of keys, and no N x M matrix.

    score_n = max_j cos(q_n, k_j),    index_n = the lowest j that attains it

A CPU with bfloat16 dot products searches in two stages, with exactly the winners of one in float32:

1. Scan. Let c be the block's mean key, k' = k / |k| - c and q' = q / |q| - c: a score is q' k' + c k', plus a number
   that is the same for all keys. q', k' and b = c k' are rounded to bfloat16: that product is 4 to 5 times as fast as
   in float32, and what tokens have in common costs no precision. t_j = q' k'_j + b_j, so computed, is off by at most
       e = |dq'| max|k' + dk'| + |q'| max|dk'| + max|db| + float32 rounding,
   with the rounding errors dq', dk', db as measured. The result is rounded once more, and rounding is monotone. So the
   winner is among the keys with round(t_j) >= round(top - 2^-8 |top| - 2 e), top = max_j round(t_j).
2. Exact scores in float32 for those keys alone: about two a query. Queries with more than `MAX_CANDIDATES` (smooth
   regions: many keys are nearly equal) are compared with all that any of them has; where that is most of the block of
   keys, the scan is given up for it.

Extra memory: one block of keys in bfloat16 and one tile of scores, whatever N and M are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from .dispatch import without_autocast
from .token_match_gpu import pushes

__all__ = ["best_match_reference", "token_match_merge_reference"]

QUERY_BLOCK = 256  # with these keys a tile of bfloat16 scores is 2 MiB: about a core's cache
KEY_BLOCK = 4096
SMALL = 2**20  # scores of one query row, and elements to blend, up to which one step is quicker than blocks
CHUNK = 1024  # rows of C channels that are worked on in float32 at once
MAX_CANDIDATES = 16  # of a query, eight times the usual number; chosen by hand
EPSILON = 1e-12  # a shorter vector has cosine 0 with everything


@without_autocast
def best_match_reference(
    queries: Tensor,
    keys: Tensor,
    *,
    pairs: Tensor | None = None,
    key_mask: Tensor | None = None,
    gate: Tensor | None = None,
    seen: Sequence[Sequence[int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """`best_match` in plain torch; the arguments are checked there."""
    (batch, tokens, _), (references, length, _) = queries.shape, keys.shape
    if seen is None:
        seen = _seen(batch, references, pairs, gate)
    (queries, matchable), (keys, matched) = _numbers(queries), _numbers(keys)
    if matched is not None:
        key_mask = matched if key_mask is None else key_mask & matched
    search = _best_match_small if tokens * references * length <= SMALL else _best_match_blocks
    score, index = search(queries, keys, seen, key_mask)
    if matchable is not None:
        score, index = score.masked_fill_(~matchable, -torch.inf), index.masked_fill_(~matchable, -1)
    return score, index


def _seen(batch: int, references: int, pairs: Tensor | None, gate: Tensor | None) -> list[tuple[int, ...]]:
    """For each row the references that it looks at."""
    active = [True] * batch if gate is None else gate.ne(0).tolist()
    allowed = [[True] * references] * batch if pairs is None else pairs.tolist()
    return [tuple(r for r in range(references) if on and row[r]) for on, row in zip(active, allowed, strict=True)]


def _numbers(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Tokens, those that hold NaN or Inf as zeros, and which are numbers (B, N); None: all of them."""
    finite = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) < torch.inf  # nor NaN
    return (x, None) if bool(finite.all()) else (x.masked_fill(~finite[:, :, None], 0), finite)


def _best_match_blocks(queries, keys, seen, key_mask) -> tuple[Tensor, Tensor]:
    """Blocks of queries against blocks of keys."""
    (batch, tokens, _), (references, length, _) = queries.shape, keys.shape
    score = queries.new_full((batch, tokens), -torch.inf, dtype=torch.float32)
    index = queries.new_full((batch, tokens), -1, dtype=torch.int64)
    scan = _has_fast_bfloat16(queries)
    for r in range(references):
        rows = [b for b in range(batch) if r in seen[b]]
        columns = None if key_mask is None else key_mask[r].nonzero().flatten()
        count = length if columns is None else len(columns)
        for start in range(0, count if rows else 0, KEY_BLOCK):
            stop = min(start + KEY_BLOCK, count)
            block = _Block(
                keys[r, start:stop] if columns is None else keys[r].index_select(0, columns[start:stop]), scan
            )
            for b in rows:
                for first in range(0, tokens, QUERY_BLOCK):
                    part = slice(first, first + QUERY_BLOCK)
                    found, where = block.search(queries[b, part], score[b, part])
                    where = where + start if columns is None else columns[where + start]
                    better = found > score[b, part]  # strictly: on ties the first block keeps its lower index
                    torch.where(better, where + r * length, index[b, part], out=index[b, part])
                    torch.where(better, found, score[b, part], out=score[b, part])
    return score, index


def _best_match_small(queries, keys, seen, key_mask) -> tuple[Tensor, Tensor]:
    """With one product for all rows, or, where that tile is large, for all rows that look at the same references."""
    (batch, tokens, _), length = queries.shape, keys.shape[1]
    score = queries.new_full((batch, tokens), -torch.inf, dtype=torch.float32)
    index = queries.new_full((batch, tokens), -1, dtype=torch.int64)
    groups: dict[tuple[int, ...], list[int]] = {}
    for b in range(batch):
        if len(seen[b]):
            groups.setdefault(tuple(seen[b]), []).append(b)
    rows, used = sorted(sum(groups.values(), [])), sorted(set().union(*groups))
    if len(groups) > 1 and len(rows) * tokens * len(used) * length <= SMALL:
        groups = {tuple(used): rows}
    if not groups:
        return score, index
    wide = keys.float()
    scale = _inverse_norm(wide)  # of the products, not of the keys: equal keys stay equal to the last bit (ties)
    for used, rows in groups.items():
        at, of = torch.tensor(rows, device=queries.device), torch.tensor(used, device=queries.device)
        mine = rearrange(queries.index_select(0, at).float(), "b n c -> (b n) c")
        cosine = mine @ rearrange(wide.index_select(0, of), "r m c -> c (r m)")
        cosine *= scale.index_select(0, of).flatten()
        if key_mask is not None:
            cosine.masked_fill_(~key_mask.index_select(0, of).flatten(), -torch.inf)
        tiles = rearrange(cosine, "(b n) (r m) -> b n r m", n=tokens, m=length)  # a view: cosine is written to
        for i, b in enumerate(rows):
            for k, r in enumerate(used):
                if r not in seen[b]:
                    tiles[i, :, k] = -torch.inf
        found, column = cosine.max(1)
        found *= _inverse_norm(mine)
        column = (of[column // length] * length + column % length).masked_fill_(found == -torch.inf, -1)
        score.index_copy_(0, at, rearrange(found, "(b n) -> b n", n=tokens))
        index.index_copy_(0, at, rearrange(column, "(b n) -> b n", n=tokens))
    return score, index


def token_match_merge_reference(
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
    score, index = best_match_reference(x, reference, pairs=pairs, key_mask=reference_mask, gate=gate, seen=seen)
    length = reference.shape[1]
    best, amount, hit = pushes(score, index, strength, threshold, gate, length)
    merged = x.clone(memory_format=torch.contiguous_format)
    if x.numel() <= SMALL:
        rows = hit.any(1).nonzero().flatten()
        token = x.index_select(0, rows)
        match = reference.flatten(0, 1).index_select(0, best.index_select(0, rows).flatten())
        push = (token.float() - match.view(token.shape)).mul_(amount.index_select(0, rows)[:, :, None])
        pushed = hit.index_select(0, rows)[:, :, None]
        merged.index_copy_(0, rows, torch.where(pushed, push.add_(token).to(x.dtype), token))
        return merged, score, index
    for b in range(x.shape[0]):
        for rows in hit[b].nonzero().flatten().split(QUERY_BLOCK):
            at = best[b].index_select(0, rows)
            token = x[b].index_select(0, rows).float()
            # indexing two dimensions at once needs no contiguous copy of the references
            push = (token - reference[at // length, at % length].float()).mul_(amount[b].index_select(0, rows)[:, None])
            merged[b].index_copy_(0, rows, token.add_(push).to(x.dtype))
    return merged, score, index


class _Block:
    """Keys (m, C) of one reference, ready to be searched."""

    def __init__(self, keys: Tensor, scan: bool):
        self.keys = keys
        chunks = keys.split(CHUNK)
        self.inverse_norm = torch.cat([_inverse_norm(chunk.float()) for chunk in chunks])
        self.rounded = None
        if not scan:
            return
        scales = self.inverse_norm.split(CHUNK)
        total = sum(scale @ chunk.float() for scale, chunk in zip(scales, chunks, strict=True))
        self.centre = total / len(keys)
        offset = torch.cat([chunk.float() @ self.centre for chunk in chunks]).mul_(self.inverse_norm)
        offset -= self.centre @ self.centre
        self.offset = offset.to(torch.bfloat16)
        self.rounded = keys.new_empty(keys.shape, dtype=torch.bfloat16)
        self.radius = self.error = 0.0
        for chunk, scale, rounded in zip(chunks, scales, self.rounded.split(CHUNK), strict=True):
            centred = (chunk.float() * scale[:, None]).sub_(self.centre)
            rounded.copy_(centred)
            self.radius = max(self.radius, float(_norm(rounded.float()).max()))
            self.error = max(self.error, float(_norm(centred.sub_(rounded)).max()))
        self.relative = (keys.shape[1] + 2) * 2.0**-23  # float32 sums over C, at worst
        self.absolute = float((offset - self.offset).abs().max()) + 2.0**-20  # closer scores are ties
        self.tile = keys.new_empty((QUERY_BLOCK, len(keys)), dtype=torch.bfloat16)
        self.mask = keys.new_empty((QUERY_BLOCK, len(keys)), dtype=torch.bool)

    def search(self, queries: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
        """Return (score, column) of each query's (n, C) best key; where none beats `best` (n,) they may be lower."""
        queries = queries.float()
        queries = queries * _inverse_norm(queries)[:, None]
        if self.rounded is None:
            return self._exact(queries)
        mask = self._candidates(queries, best)
        crowded = (mask.sum(1, dtype=torch.int32) > MAX_CANDIDATES).nonzero().flatten()
        if not len(crowded):
            return self._rescored(queries, mask)
        # what neighbours are like is alike: together they have few candidates
        columns = mask.index_select(0, crowded).any(0).nonzero().flatten()
        if 2 * len(columns) > len(self.keys):
            self.rounded = None  # too much alike here: the scan decides too little to pay
            return self._exact(queries)
        mask.index_fill_(0, crowded, False)
        score, column = self._rescored(queries, mask)
        score[crowded], column[crowded] = self._exact(queries.index_select(0, crowded), columns)
        return score, column

    def _candidates(self, queries: Tensor, best: Tensor) -> Tensor:
        """Mask (n, m) of the keys that can win: see the bound above."""
        centred = queries - self.centre
        rounded = centred.to(torch.bfloat16)
        error = _norm(centred) * (self.error + self.radius * self.relative) + self.absolute
        error += _norm(centred.sub_(rounded)) * self.radius
        tile = torch.addmm(self.offset, rounded, self.rounded.t(), out=self.tile[: len(queries)])
        top = tile.amax(1).float()
        floor = torch.maximum(top - top.abs() * 2.0**-8 - 2 * error, best - queries @ self.centre - error)
        return torch.ge(tile, floor.to(torch.bfloat16)[:, None], out=self.mask[: len(queries)])

    def _rescored(self, queries: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = mask.nonzero().unbind(1)
        scores = [
            (queries.index_select(0, row).mul_(self.keys.index_select(0, column))).sum(1)
            for row, column in zip(rows.split(CHUNK), columns.split(CHUNK), strict=True)
        ]
        scores = torch.cat(scores).mul_(self.inverse_norm.index_select(0, columns))
        score = queries.new_full((len(queries),), -torch.inf).scatter_reduce_(0, rows, scores, "amax")
        won = (scores == score.index_select(0, rows)).nonzero().flatten()
        column = columns.new_zeros(len(queries))
        # rows ascend, then columns: written backwards, the lowest column of a row is the last that stays
        won = won.flip(0)
        column[rows.index_select(0, won)] = columns.index_select(0, won)
        return score, column

    def _exact(self, queries: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Every key, or those of `columns`, in float32."""
        keys = self.keys if columns is None else self.keys.index_select(0, columns)
        scale = self.inverse_norm if columns is None else self.inverse_norm.index_select(0, columns)
        score, column = None, None
        for start in range(0, len(keys), CHUNK):
            part = slice(start, start + CHUNK)
            tile = torch.mm(queries, keys[part].float().t()).mul_(scale[part])
            found, where = tile.max(1)
            if score is None:
                score, column = found, where
            else:
                column = torch.where(found > score, where + start, column)
                score = torch.maximum(score, found)
        return score, column if columns is None else columns.index_select(0, column)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1)


def _inverse_norm(x: Tensor) -> Tensor:
    return _norm(x).clamp_min_(EPSILON).reciprocal_()


def _has_fast_bfloat16(x: Tensor) -> bool:
    """Whether a bfloat16 product beats a float32 one here: oneDNN on a CPU with AVX-512 BF16."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return x.device.type == "cpu" and torch.backends.mkldnn.enabled and supported is not None and supported()
