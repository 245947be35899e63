"""Negative token merging: each token is pushed from (or pulled to) its best-matching reference token.

    score_n = max_j cos(x_n, r_j),  index_n = the lowest j that attains it,  over the allowed references and tokens
    out_n   = x_n + a (x_n - r_index)  where score_n > threshold,  else x_n;   a = strength * gate

Shapes: x (B, N, C); reference (R, M, C); pairs (B, R); masks (R, M); gates (B,).
Bytes: eager writes and reads the B x N x M cosines and some fifteen tensors of x's size; here x and the reference are
read once from memory, and the output is written once: at B = 3 + 1, N = M = 4096, C = 3072 in bfloat16, 0.2 GB for 2.3.
Bound: 2 B N M C operations, 440 to 1750 per byte: the tensor cores, on every GPU. On a CPU: see token_match_cpu.
Source: NegToMe (arXiv 2412.01339), section 3. The released code takes the maximum over x's tokens instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import check_tensors, interpreted, jit, kernel_path, needs_grad, next_power_of_2, tl, triton
from .errors import KernelError
from .token_match_cpu import best_match_reference, token_match_merge_reference

__all__ = ["best_match", "compile_cases", "token_match_merge"]

# BM queries against BN keys, BK channels at a time. Larger tiles spill registers, or exceed AMD's 64 KiB shared memory
CONFIGS = {
    "float32": {"BM": 64, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 2},
    "half": {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
    "half_short": {"BM": 64, "BN": 128, "BK": 64, "num_warps": 4, "num_stages": 3},  # few tokens: more programs
}
SHORT = 2048  # tokens, up to which tiles of 128 make 16 programs a row or fewer: too few for a GPU of a hundred cores


def _config(dtype: torch.dtype, tokens: int, channels: int) -> dict[str, int]:
    name = "float32" if dtype == torch.float32 else "half_short" if tokens <= SHORT else "half"
    config = CONFIGS[name]
    return config | {"BK": min(config["BK"], max(16, next_power_of_2(channels)))}


@jit
def _inverse_norms(rows, valid, C: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """1 / |row| of BM rows, from pointers (BM,) to their first channels."""
    total = tl.zeros((BM,), dtype=tl.float32)
    for c0 in range(0, C, BK):
        c = c0 + tl.arange(0, BK)
        value = tl.load(rows[:, None] + c[None, :], mask=valid[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(value * value, axis=1)
    return 1.0 / tl.maximum(tl.sqrt(total), 1e-12)


@jit
def _inverse_norm_kernel(
    keys,  # (R, M, C)
    inverse_norm,  # (R, M) float32
    stride_r,
    stride_m,
    M,
    C: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    r = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    norms = _inverse_norms(keys + r * stride_r + j * stride_m, j < M, C, BM, BK)
    tl.store(inverse_norm + r * M + j, norms, mask=j < M)


@jit
def _token_match_kernel(
    x,  # (B, N, C)
    reference,  # (R, M, C)
    inverse_norm,  # (R, M) float32
    pairs,  # (B, R) bool, or None
    mask,  # (R, M) bool, or None
    gate,  # (B,) float32, or None
    strength,  # (B,) float32, or None: search alone
    merged,  # (B, N, C), or None
    score,  # (B, N) float32
    index,  # (B, N) int64
    threshold,
    stride_xb,
    stride_xn,
    stride_rr,
    stride_rm,
    N,
    M,
    R,
    C: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WIDEN: tl.constexpr,  # the interpreter multiplies bfloat16 as if it were an integer
):
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    valid = n < N
    rows = x + b * stride_xb + n * stride_xn
    references = R
    if gate is not None:
        references = tl.where(tl.load(gate + b) != 0.0, R, 0)  # a closed gate: no turn of the loop

    best = tl.full((BM,), float("-inf"), dtype=tl.float32)
    where = tl.full((BM,), -1, dtype=tl.int64)
    for r in range(0, references):
        length = M
        if pairs is not None:
            length = tl.where(tl.load(pairs + b * R + r) != 0, M, 0)
        offset = tl.zeros((), dtype=tl.int64) + r
        for j0 in range(0, length, BN):
            j = j0 + tl.arange(0, BN)
            keys = reference + offset * stride_rr + j.to(tl.int64) * stride_rm
            product = tl.zeros((BM, BN), dtype=tl.float32)
            for c0 in range(0, C, BK):
                c = c0 + tl.arange(0, BK)
                q = tl.load(rows[:, None] + c[None, :], mask=valid[:, None] & (c < C)[None, :], other=0.0)
                k = tl.load(keys[None, :] + c[:, None], mask=(j < M)[None, :] & (c < C)[:, None], other=0.0)
                if WIDEN:
                    q, k = q.to(tl.float32), k.to(tl.float32)
                product = tl.dot(q, k, product, input_precision="ieee")
            allowed = j < M
            norms = tl.load(inverse_norm + offset * M + j, mask=allowed, other=0.0)
            if mask is not None:
                allowed = allowed & (tl.load(mask + offset * M + j, mask=allowed, other=0) != 0)
            cosine = tl.where(allowed[None, :], product * norms[None, :], float("-inf"))
            found, at = tl.max(cosine, axis=1, return_indices=True)  # the lowest of equals
            better = found > best
            best = tl.where(better, found, best)
            where = tl.where(better, offset * M + j0 + at, where)

    best = best * _inverse_norms(rows, valid, C, BM, BK)
    tl.store(score + b * N + n, best, mask=valid)
    tl.store(index + b * N + n, where, mask=valid)
    if merged is not None:
        amount = tl.load(strength + b)
        if gate is not None:
            amount = amount * tl.load(gate + b)
        hit = best > tl.where(amount != 0.0, threshold, float("inf"))  # -inf exceeds nothing: index is not -1 here
        match = reference + (where // M) * stride_rr + (where % M) * stride_rm
        for c0 in range(0, C, BK):
            c = c0 + tl.arange(0, BK)
            inside = valid[:, None] & (c < C)[None, :]
            token = tl.load(rows[:, None] + c[None, :], mask=inside, other=0.0)
            other = tl.load(match[:, None] + c[None, :], mask=inside & hit[:, None], other=0.0).to(tl.float32)
            value = token.to(tl.float32)
            value = tl.where(hit[:, None], value + amount * (value - other), value)
            tl.store(merged + (b * N + n)[:, None] * C + c[None, :], value.to(token.dtype), mask=inside)


def _launch(x, reference, threshold, pairs, mask, gate, strength) -> tuple[Tensor | None, Tensor, Tensor]:
    """Run the kernel; strength None: search alone."""
    (batch, tokens, channels), (references, length, _) = x.shape, reference.shape
    x, reference = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, reference))
    pairs, mask, gate, strength = (None if t is None else t.contiguous() for t in (pairs, mask, gate, strength))
    config = _config(x.dtype, tokens, channels)
    merged = None if strength is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    score = torch.empty((batch, tokens), dtype=torch.float32, device=x.device)
    index = torch.empty((batch, tokens), dtype=torch.int64, device=x.device)
    inverse_norm = torch.empty((references, length), dtype=torch.float32, device=x.device)
    _inverse_norm_kernel[(triton.cdiv(length, 32), references)](
        reference, inverse_norm, *reference.stride()[:2], length, C=channels, BM=32, BK=config["BK"]
    )
    _token_match_kernel[(triton.cdiv(tokens, config["BM"]), batch)](
        x, reference, inverse_norm, pairs, mask, gate, strength, merged, score, index, float(threshold),
        *x.stride()[:2], *reference.stride()[:2], tokens, length, references, C=channels,
        WIDEN=interpreted() and x.dtype == torch.bfloat16, **config,
    )  # fmt: skip
    return merged, score, index


def compile_cases() -> list[dict]:
    """One case for each default configuration, to be compiled without a GPU: see benchmarks/kernels/resources.py."""
    cases = []
    for name, config in CONFIGS.items():
        dtype = "*fp32" if name == "float32" else "*bf16"
        meta = {key: config[key] for key in ("BM", "BN", "BK")} | {"C": 640, "WIDEN": False}
        pointers = {"x": dtype, "reference": dtype, "inverse_norm": "*fp32", "pairs": "*i1", "mask": "*i1"}
        pointers |= {"gate": "*fp32", "strength": "*fp32", "merged": dtype, "score": "*fp32", "index": "*i64"}
        sizes = dict.fromkeys(("stride_xb", "stride_xn", "stride_rr", "stride_rm", "N", "M"), "i32:16") | {"R": "i32"}
        cases.append(
            {
                "name": f"token_match_merge_{name}",
                "kernel": _token_match_kernel,
                "signature": pointers | {"threshold": "fp32"} | sizes,
                "constexprs": meta,
                "num_warps": config["num_warps"],
                "num_stages": config["num_stages"],
            }
        )
    strides = dict.fromkeys(("stride_r", "stride_m", "M"), "i32:16")
    return cases + [
        {
            "name": "token_match_merge_inverse_norm",
            "kernel": _inverse_norm_kernel,
            "signature": {"keys": "*bf16", "inverse_norm": "*fp32"} | strides,
            "constexprs": {"C": 640, "BM": 32, "BK": 64},
            "num_warps": 4,
            "num_stages": 3,
        }
    ]


def _best_match(queries, keys, pairs, key_mask, gate) -> tuple[Tensor, Tensor]:
    if kernel_path(queries) == "triton":
        return _launch(queries, keys, 0.0, pairs, key_mask, gate, None)[1:]
    return best_match_reference(queries, keys, pairs=pairs, key_mask=key_mask, gate=gate)


def _token_match_merge(x, reference, strength, threshold, pairs, mask, gate) -> tuple[Tensor, Tensor, Tensor]:
    if kernel_path(x) == "triton":
        return _launch(x, reference, threshold, pairs, mask, gate, strength)
    return token_match_merge_reference(x, reference, strength, threshold, pairs=pairs, reference_mask=mask, gate=gate)


_best_match_op = torch.library.custom_op(
    "semiperm::best_match",
    _best_match,
    mutates_args=(),
    schema="(Tensor queries, Tensor keys, Tensor? pairs, Tensor? key_mask, Tensor? gate) -> (Tensor, Tensor)",
)
_token_match_merge_op = torch.library.custom_op(
    "semiperm::token_match_merge",
    _token_match_merge,
    mutates_args=(),
    schema="(Tensor x, Tensor reference, Tensor strength, float threshold, Tensor? pairs, Tensor? mask, Tensor? gate)"
    " -> (Tensor, Tensor, Tensor)",
)


@_best_match_op.register_fake
def _(queries, keys, pairs, key_mask, gate):
    shape = queries.shape[:2]
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


@_token_match_merge_op.register_fake
def _(x, reference, strength, threshold, pairs, mask, gate):
    shape = x.shape[:2]
    scores = x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int64)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), *scores


def best_match(
    queries: Tensor,
    keys: Tensor,
    *,
    pairs: Tensor | None = None,
    key_mask: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return each query's best cosine and the key that attains it, without the N x M matrix.

    Args:
        queries: (B, N, C), float32, float16 or bfloat16.
        keys: (R, M, C), the same dtype and device; it may share memory with queries.
        pairs: (B, R) bool: row b looks at reference r. None: at all.
        key_mask: (R, M) bool: the keys that may win. None: all.
        gate: (B,): rows with 0 are skipped, on the device. None: 1.

    Returns:
        score (B, N) float32, and index (B, N) int64 = r * M + j, the lowest on ties. Without an allowed key, and where
        the gate is 0: -inf and -1. The zero vector's cosine is 0. No gradients.

    Raises:
        KernelError: shapes, dtypes or devices do not fit, or SEMIPERM_KERNELS asks for what cannot run here.
    """
    pairs, key_mask, gate = _checked("best_match", queries, keys, pairs, key_mask, gate)
    run = _best_match_op if torch.compiler.is_compiling() else _best_match
    with torch.no_grad():
        return run(queries.detach(), keys.detach(), pairs, key_mask, gate)


def token_match_merge(
    x: Tensor,
    reference: Tensor,
    strength: float | Tensor,
    threshold: float,
    *,
    pairs: Tensor | None = None,
    reference_mask: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Push each token from its best match: out = x + strength gate (x - r) where their cosine is high.

    Args:
        x: (B, N, C), float32, float16 or bfloat16.
        reference: (R, M, C), the same dtype and device; it may share memory with x, or be x.
        strength: how far, a number or (B,); neutral 0 (bit-identical x), negative pulls towards the reference.
        threshold: cosine above which a token is merged; neutral >= 1.
        pairs: (B, R) bool: row b looks at reference r; `~eye` pushes each image from all others. None: at all.
        reference_mask: (R, M) bool: the reference tokens that may win. None: all.
        gate: (B,), multiplies strength; rows with 0 keep their bits and are skipped, on the device. None: 1.

    Returns:
        merged (B, N, C), x's bits where nothing was merged; and `best_match`'s score and index. Gradients flow through
        merged, except while compiling; the matching has none.

    Raises:
        KernelError: as `best_match`; or strength is neither a number nor (B,).

    Source: NegToMe (arXiv:2412.01339). The released code finds the best x token of every reference token, and applies
    its number to the reference: `best_match` with the arguments exchanged.
    """
    pairs, mask, gate = _checked("token_match_merge", x, reference, pairs, reference_mask, gate)
    if not isinstance(strength, Tensor):
        strength = torch.full((x.shape[0],), float(strength), dtype=torch.float32, device=x.device)
    elif strength.shape != x.shape[:1]:
        raise KernelError(
            f"token_match_merge: strength has shape {tuple(strength.shape)}; expected a number or ({len(x)},)"
        )
    strength = strength.to(x.device, torch.float32)
    if torch.compiler.is_compiling():
        return _token_match_merge_op(x, reference, strength, float(threshold), pairs, mask, gate)
    if not needs_grad(x, reference, strength):
        return _token_match_merge(x, reference, strength, float(threshold), pairs, mask, gate)
    score, index = best_match(x, reference, pairs=pairs, key_mask=mask, gate=gate)
    amount = (strength if gate is None else strength * gate)[:, None, None]
    other = reference[index.clamp_min(0) // reference.shape[1], index.clamp_min(0) % reference.shape[1]]
    merged = (x.float() + amount * (x.float() - other.float())).to(x.dtype)
    return torch.where((score > threshold)[:, :, None] & (amount != 0), merged, x), score, index


def _checked(operation, x, reference, pairs, mask, gate) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Check shapes; return pairs and mask as bool, gate as float32."""
    check_tensors(operation, x, reference=reference)
    shapes = f"{tuple(x.shape)} and {tuple(reference.shape)}"
    if x.dim() != 3 or reference.dim() != 3 or x.shape[2] != reference.shape[2] or 0 in (*x.shape, *reference.shape):
        raise KernelError(f"{operation}: got shapes {shapes}; expected (B, N, C) and (R, M, C), none of them 0")
    expected = {
        "pairs": (pairs, (x.shape[0], reference.shape[0])),
        "mask": (mask, tuple(reference.shape[:2])),
        "gate": (gate, (x.shape[0],)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.device != x.device):
            raise KernelError(
                f"{operation}: {name} is {tuple(tensor.shape)} on {tensor.device};"
                f" expected {shape} on {x.device} beside {shapes}"
            )
        if name != "gate" and tensor is not None and tensor.dtype != torch.bool:
            raise KernelError(f"{operation}: {name} is {tensor.dtype}; expected bool")
    return pairs, mask, None if gate is None else gate.float()
