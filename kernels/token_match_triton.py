"""The Triton kernels of token_match_merge, which has the formula, the launcher and the configurations."""

from __future__ import annotations

from .dispatch import jit, tl

__all__ = ["inverse_norm_kernel", "token_match_kernel", "token_merge_kernel"]

NOTHING = tl.constexpr(-(2**63)) if tl is not None else None  # a split without an allowed key
LOW = tl.constexpr(0xFFFFFFFF) if tl is not None else None


@jit
def _inverse_norms(rows, valid, C: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """1 / |row| of BM rows, from pointers (BM,) to their first channels; -1 where a row holds NaN or Inf."""
    total = tl.zeros((BM,), dtype=tl.float32)
    for c0 in range(0, C, BK):
        c = c0 + tl.arange(0, BK)
        value = tl.load(rows[:, None] + c[None, :], mask=valid[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(value * value, axis=1)
    return tl.where(total < float("inf"), 1.0 / tl.maximum(tl.sqrt(total), 1e-12), -1.0)


@jit
def inverse_norm_kernel(
    keys,  # (R, M, C)
    mask,  # (R, M) bool, or None
    inverse_norm,  # (R, M) float32, -1 for what cannot be matched
    stride_r,
    stride_m,
    M,
    tiles,  # of one reference
    C: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    r = (tl.program_id(0) // tiles).to(tl.int64)
    j = (tl.program_id(0) % tiles).to(tl.int64) * BM + tl.arange(0, BM)
    norms = _inverse_norms(keys + r * stride_r + j * stride_m, j < M, C, BM, BK)
    if mask is not None:
        norms = tl.where(tl.load(mask + r * M + j, mask=j < M, other=0) != 0, norms, -1.0)
    tl.store(inverse_norm + r * M + j, norms, mask=j < M)


@jit
def token_match_kernel(
    x,  # (B, N, C)
    reference,  # (R, M, C)
    inverse_norm,  # (R, M) float32, -1 for what cannot be matched
    pairs,  # (B, R) bool, or None
    gate,  # (B,) float32, or None
    best,  # (splits, B, N) int64
    stride_xb,
    stride_xn,
    stride_rr,
    stride_rm,
    N,
    M,
    R,
    tiles,  # of queries
    splits,
    steps,  # blocks of keys of one split
    C: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WIDEN: tl.constexpr,  # the interpreter multiplies bfloat16 as if it were an integer
):
    # neighbours share a split: their keys come from the cache
    rows_and_splits = tl.program_id(0) // tiles
    b, split = (rows_and_splits // splits).to(tl.int64), rows_and_splits % splits
    n = (tl.program_id(0) % tiles).to(tl.int64) * BM + tl.arange(0, BM)
    rows = x + b * stride_xb + n * stride_xn
    blocks = tl.cdiv(M, BN)  # of one reference
    last = tl.minimum((split + 1) * steps, R * blocks)
    if gate is not None:
        last = tl.where(tl.load(gate + b) != 0.0, last, 0)  # a closed gate: no turn of the loop

    top = tl.full((BM,), float("-inf"), dtype=tl.float32)
    where = tl.full((BM,), 0, dtype=tl.int32)  # in blocks of BN: a number less than 2^31
    for step in range(split * steps, last):
        r = (step // blocks).to(tl.int64)
        j = (step % blocks) * BN + tl.arange(0, BN)
        channels, looks = C, True
        if pairs is not None:
            looks = tl.load(pairs + b * R + r) != 0
            channels = tl.where(looks, C, 0)
        keys = reference + r * stride_rr + j.to(tl.int64) * stride_rm
        product = tl.zeros((BM, BN), dtype=tl.float32)
        for c0 in range(0, channels, BK):
            c = c0 + tl.arange(0, BK)
            q = tl.load(rows[:, None] + c[None, :], mask=(n < N)[:, None] & (c < C)[None, :], other=0.0)
            k = tl.load(keys[None, :] + c[:, None], mask=(j < M)[None, :] & (c < C)[:, None], other=0.0)
            if WIDEN:
                q, k = q.to(tl.float32), k.to(tl.float32)
            product = tl.dot(q, k, product, input_precision="ieee")
        norms = tl.load(inverse_norm + r * M + j, mask=j < M, other=-1.0)[None, :]
        cosine = tl.where(norms >= 0.0, product * norms, float("-inf"))
        found, at = tl.max(cosine, axis=1, return_indices=True)  # the lowest of equals
        better = (found > top) & looks
        top = tl.where(better, found, top)
        where = tl.where(better, step * BN + at, where)

    where = (where // (blocks * BN)).to(tl.int64) * M + where % (blocks * BN)
    bits = (top + 0.0).to(tl.int32, bitcast=True)  # no negative zero
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)  # as the numbers are
    packed = tl.where(top > float("-inf"), (ordered << 32) + (LOW - where), NOTHING)
    batch = tl.num_programs(0) // tiles // splits
    tl.store(best + (split * batch + b) * N + n, packed, mask=n < N)


@jit
def token_merge_kernel(
    x,  # (B, N, C)
    reference,  # (R, M, C)
    best,  # (splits, B, N) int64
    gate,  # (B,) float32, or None
    strength,  # (B, R) float32, or None: search alone
    threshold,  # () float32
    merged,  # (B, N, C), or None
    score,  # (B, N) float32
    index,  # (B, N) int64
    stride_xb,
    stride_xn,
    stride_rr,
    stride_rm,
    N,
    M,
    R,
    tiles,
    splits,
    C: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n = (tl.program_id(0) % tiles).to(tl.int64) * BM + tl.arange(0, BM)
    valid = n < N
    rows = x + b * stride_xb + n * stride_xn
    batch = tl.num_programs(0) // tiles
    packed = tl.full((BM,), NOTHING, dtype=tl.int64)
    for split in range(0, splits):
        packed = tl.maximum(packed, tl.load(best + (split * batch + b) * N + n, mask=valid, other=NOTHING))
    ordered = (packed >> 32).to(tl.int32)
    top = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    norms = _inverse_norms(rows, valid, C, BM, BK)
    matched = (packed != NOTHING) & (norms >= 0.0)
    top = tl.where(matched, top * norms, float("-inf"))
    where = tl.where(matched, LOW - (packed & LOW), -1)
    tl.store(score + b * N + n, top, mask=valid)
    tl.store(index + b * N + n, where, mask=valid)
    if merged is not None:
        r = tl.maximum(where, 0) // M
        amount = tl.load(strength + b * R + r)
        if gate is not None:
            amount = amount * tl.load(gate + b)
        hit = matched & (top > tl.load(threshold)) & (amount != 0.0)
        match = reference + r * stride_rr + (tl.maximum(where, 0) % M) * stride_rm
        for c0 in range(0, C, BK):
            c = c0 + tl.arange(0, BK)
            inside = valid[:, None] & (c < C)[None, :]
            token = tl.load(rows[:, None] + c[None, :], mask=inside, other=0.0)
            other = tl.load(match[:, None] + c[None, :], mask=inside & hit[:, None], other=0.0).to(tl.float32)
            value = token.to(tl.float32)
            value = tl.where(hit[:, None], value + amount[:, None] * (value - other), value)
            tl.store(merged + (b * N + n)[:, None] * C + c[None, :], value.to(token.dtype), mask=inside)
