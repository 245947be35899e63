"""y + ((x D^T) * gamma) U: K membranes of any ranks, stacked as one low-rank pair, added to a projection's output.

    h[b, n, r] = gamma[b, r] sum_i x[b, n, i] D[r, i]
    out[b, n, :] = y[b, n, :] + sum_r h[b, n, r] U[r, :]

Shapes: y (B, N, out), x (B, N, in), D (R, in), U (R, out), gamma (B or 1, R). Two kernels, h between them in float32.

Bytes per token, s bytes an element: eager moves s (in + 4 R) for h, then s (R + out) for the delta and 3 s out for the
sum; here s in + 4 R for h, 4 R a tile of out, and 2 s out. What further tiles read again (x for each 128 ranks, or 32
in float32; h for each 64 or 128 of out) comes mostly from the cache. One kernel would have to compute h again for every
tile of out, 80 times at out = 10240, or to hold (tokens, R) in registers: not at R = 512. Bound: memory up to R of
about 100, arithmetic beyond. A tile of ranks whose gates are all zero is skipped in both: a dead row costs a copy of y.
"""

from __future__ import annotations

from itertools import groupby

import torch
from einops import rearrange
from torch import Tensor

from .dispatch import check_tensors, interpreted, jit, kernel_path, needs_grad, next_power_of_2, tl, triton
from .errors import KernelError
from .token_tiles import token_products, tokens_times_directions

__all__ = ["compile_cases", "gated_low_rank", "gated_low_rank_reference"]


def gated_low_rank_reference(y: Tensor, x: Tensor, down: Tensor, up: Tensor, gamma: Tensor) -> Tensor:
    """`gated_low_rank` in plain torch, differentiable. Dead rows keep their bits unless a gradient is asked for.

    float16 on a CPU is computed in float32: 5 to 17 times faster than its own matmul there. Elsewhere the matmuls run
    in x's dtype and accumulate in float32: in bfloat16 on a CPU that is 2 to 4 times faster than converting.
    """
    if needs_grad(y, x, down, up, gamma):
        return _formula(y, x, down, up, gamma)
    live = gamma.ne(0).any(dim=1)
    if y.device.type != "cpu" or torch.compiler.is_compiling():  # no row is skipped: asking which would wait for it
        return torch.where(live.view(-1, *[1] * (y.ndim - 1)), _formula(y, x, down, up, gamma), y)
    live = live.tolist()
    if all(live):
        return _formula(y, x, down, up, gamma)
    out = y.clone(memory_format=torch.contiguous_format)
    start = 0
    for lives, run in groupby(live if any(live) else ()):
        rows = slice(start, start := start + len(list(run)))
        if lives:
            out[rows] = _formula(y[rows], x[rows], down, up, gamma[rows])
    return out


def _formula(y: Tensor, x: Tensor, down: Tensor, up: Tensor, gamma: Tensor) -> Tensor:
    rows, dtype = x.shape[0], y.dtype
    if dtype is torch.float16 and x.device.type == "cpu":
        y, x, down, up = y.float(), x.float(), down.float(), up.float()
    h = rearrange(x.reshape(-1, x.shape[-1]) @ down.T, "(b n) r -> b n r", b=rows)
    gates = gamma.to(x.dtype).unsqueeze(1)
    h = h * gates if needs_grad(h, gates) else h.mul_(gates)
    return torch.addmm(y.reshape(-1, y.shape[-1]), rearrange(h, "b n r -> (b n) r"), up).view(y.shape).to(dtype)


# tile of ranks -> (tokens, features of out, features of in, warps, stages): the more ranks, the less beside them, so
# that nothing spills (tests/kernels/test_resources.py)
_CONFIGS = {16: (64, 128, 64, 4, 3), 32: (64, 128, 32, 4, 3), 64: (64, 128, 64, 4, 3), 128: (64, 64, 32, 8, 3)}


@jit
def _down_kernel(
    x_ptr,  # (B, N, in)
    down_ptr,  # (R, in)
    gamma_ptr,  # (B or 1, R)
    h_ptr,  # (B, N, R) float32
    n_tokens,
    n_in,
    rank,
    stride_xb,
    stride_xn,
    stride_gb,  # 0: one row of gates for all
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    gamma = tl.load(gamma_ptr + batch * stride_gb + ranks, mask=ranks < rank, other=0.0).to(tl.float32)
    if tl.max((gamma != 0).to(tl.int32), axis=0) != 0:  # else _up_kernel does not read this tile
        acc = tokens_times_directions(
            x_ptr + batch * stride_xb, down_ptr, tokens, ranks, n_tokens, rank, n_in, stride_xn,
            BLOCK_N, BLOCK_R, BLOCK_K, WIDEN,
        )  # fmt: skip
        h_ptrs = h_ptr + (batch * n_tokens + tokens[:, None]) * rank + ranks[None, :]
        tl.store(h_ptrs, acc * gamma[None, :], mask=(tokens[:, None] < n_tokens) & (ranks[None, :] < rank))


@jit
def _up_kernel(
    y_ptr,  # (B, N, out)
    h_ptr,  # (B, N, R) float32
    up_ptr,  # (R, out)
    gamma_ptr,  # (B or 1, R)
    out_ptr,  # (B, N, out), contiguous
    n_tokens,
    n_out,
    rank,
    stride_yb,
    stride_yn,
    stride_gb,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    features = tl.program_id(1).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask = (tokens[:, None] < n_tokens) & (features[None, :] < n_out)
    live = 0
    acc = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for start in range(0, rank, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        gamma = tl.load(gamma_ptr + batch * stride_gb + ranks, mask=ranks < rank, other=0.0).to(tl.float32)
        if tl.max((gamma != 0).to(tl.int32), axis=0) != 0:
            live = 1
            h_ptrs = h_ptr + (batch * n_tokens + tokens[:, None]) * rank + ranks[None, :]
            h = tl.load(h_ptrs, mask=(tokens[:, None] < n_tokens) & (ranks[None, :] < rank), other=0.0)
            up_ptrs = up_ptr + ranks[:, None].to(tl.int64) * n_out + features[None, :]
            up = tl.load(up_ptrs, mask=(ranks[:, None] < rank) & (features[None, :] < n_out), other=0.0)
            acc = tl.dot(h, up.to(tl.float32), acc, input_precision=PRECISION)
    y = tl.load(y_ptr + batch * stride_yb + tokens[:, None] * stride_yn + features[None, :], mask=mask)
    out = y
    if live != 0:  # y + 0 would lose the sign of a zero
        out = (y.to(tl.float32) + acc).to(y.dtype)
    tl.store(out_ptr + (batch * n_tokens + tokens[:, None]) * n_out + features[None, :], out, mask=mask)


def _config(rank: int, dtype: torch.dtype) -> tuple[int, tuple[int, int, int, int, int]]:
    widest = 32 if dtype is torch.float32 else 128  # no tensor cores in exact float32: wider tiles spill
    block_r = min(widest, max(16, next_power_of_2(rank)))
    return block_r, _CONFIGS[block_r]


def _up_ranks(block_r: int) -> int:
    """Ranks of a step of the second kernel, which holds more beside them: half of the first one's wide tiles."""
    return block_r // 2 if block_r >= 64 else block_r


def _gated_low_rank_triton(y: Tensor, x: Tensor, down: Tensor, up: Tensor, gamma: Tensor) -> Tensor:
    shape = y.shape
    y, x = (_last_contiguous(t.reshape(t.shape[0], -1, t.shape[-1])) for t in (y, x))
    down, up, gamma = down.contiguous(), up.contiguous(), gamma.contiguous()
    (rows, n_tokens, n_in), n_out, rank = x.shape, y.shape[-1], down.shape[0]
    stride_gb = rank if gamma.shape[0] > 1 else 0
    block_r, (block_n, block_o, block_k, warps, stages) = _config(rank, y.dtype)
    h = torch.empty(rows, n_tokens, rank, dtype=torch.float32, device=x.device)
    out = torch.empty(shape, dtype=y.dtype, device=y.device)
    tiles, how = triton.cdiv(n_tokens, block_n), {"num_warps": warps, "num_stages": stages}
    _down_kernel[tiles, triton.cdiv(rank, block_r), rows](
        x, down, gamma, h, n_tokens, n_in, rank, x.stride(0), x.stride(1), stride_gb,
        BLOCK_N=block_n, BLOCK_R=block_r, BLOCK_K=block_k, WIDEN=interpreted() and y.dtype is torch.bfloat16, **how,
    )  # fmt: skip
    _up_kernel[tiles, triton.cdiv(n_out, block_o), rows](
        y, h, up, gamma, out, n_tokens, n_out, rank, y.stride(0), y.stride(1), stride_gb,
        BLOCK_N=block_n, BLOCK_R=_up_ranks(block_r), BLOCK_O=block_o, PRECISION=token_products(y.dtype), **how,
    )  # fmt: skip
    return out


def _last_contiguous(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


@torch.library.custom_op("semiperm::gated_low_rank", mutates_args=())
def _gated_low_rank_op(y: Tensor, x: Tensor, down: Tensor, up: Tensor, gamma: Tensor) -> Tensor:
    with torch.no_grad():
        if kernel_path(y, products=True, rows=y.shape[0]) == "triton":
            return _gated_low_rank_triton(y, x, down, up, gamma)
        return gated_low_rank_reference(y, x, down, up, gamma).contiguous()


@_gated_low_rank_op.register_fake
def _(y, x, down, up, gamma):
    return torch.empty(y.shape, dtype=y.dtype, device=y.device)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx, grad: Tensor):
    """With g = dL/dout in float32: t = g U^T, then t gamma for x and D, t h for gamma, and h gamma for U."""
    x, down, up, gamma = ctx.saved_tensors
    g, wide_x = (t.reshape(x.shape[0], -1, t.shape[-1]).float() for t in (grad, x))
    wide_down, wide_up, wide_gamma = down.float(), up.float(), gamma.float().unsqueeze(1)
    h = wide_x @ wide_down.T
    t = g @ wide_up.T
    gated = (t * wide_gamma).flatten(0, 1)
    grad_gamma = (t * h).sum(dim=1)
    if gamma.shape[0] == 1:
        grad_gamma = grad_gamma.sum(dim=0, keepdim=True)
    return (
        grad,
        (gated @ wide_down).view(x.shape).to(x.dtype),
        (gated.T @ wide_x.flatten(0, 1)).to(down.dtype),
        ((h * wide_gamma).flatten(0, 1).T @ g.flatten(0, 1)).to(up.dtype),
        grad_gamma.to(gamma.dtype),
    )


_gated_low_rank_op.register_autograd(_backward, setup_context=_setup_context)


def gated_low_rank(y: Tensor, x: Tensor, down: Tensor, up: Tensor, gamma: Tensor) -> Tensor:
    """out = y + ((x D^T) * gamma) U.

    Args:
        y: (B, ..., out), what the projection answered. float32, float16 or bfloat16; all but gamma share it.
        x: (B, ..., in), what it was given.
        down, up: D (R, in) and U (R, out), R >= 1.
        gamma: (B, R), a gate per row and rank, or (1, R) for all rows; y's dtype or float32. A row of zeros returns y's
            bits for its sample.

    Returns:
        (B, ..., out), a new tensor, in y's dtype. Differentiable in all five.

    Raises:
        KernelError: shapes, dtypes or devices that do not fit each other.

    Source: SPM (arXiv 2312.16145), eq. 9, for K adapters stacked as one.
    """
    _check(y, x, down, up, gamma)
    if kernel_path(y, products=True, rows=y.shape[0]) == "reference":
        return gated_low_rank_reference(y, x, down, up, gamma)
    if torch.compiler.is_compiling() or needs_grad(y, x, down, up, gamma):
        return _gated_low_rank_op(y, x, down, up, gamma)
    return _gated_low_rank_triton(y, x, down, up, gamma)


def _check(y: Tensor, x: Tensor, down: Tensor, up: Tensor, gamma: Tensor) -> None:
    check_tensors("gated_low_rank", y, x=x, down=down, up=up, gamma=None if gamma.dtype is torch.float32 else gamma)
    if (
        y.ndim < 2
        or x.shape[:-1] != y.shape[:-1]
        or (down.ndim, up.ndim, gamma.ndim) != (2, 2, 2)
        or not 0 < down.shape[0] == up.shape[0] == gamma.shape[1]
        or (down.shape[1], up.shape[1]) != (x.shape[-1], y.shape[-1])
        or gamma.shape[0] not in (1, y.shape[0])
        or gamma.device != y.device
    ):
        shapes = ", ".join(
            f"{name} {tuple(t.shape)}" for name, t in (("y", y), ("x", x), ("down", down), ("up", up), ("gamma", gamma))
        )
        raise KernelError(
            f"gated_low_rank: {shapes}, gamma on {gamma.device}; expected (B, ..., out), (B, ..., in), (R, in),"
            f" (R, out) and (B or 1, R) on {y.device}, R at least 1"
        )


def compile_cases() -> list[dict]:
    """What kernel_resources.py compiles: every tile of ranks in each kind of dtype."""
    cases = []
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    for kind, rank in (("fp16", 16), ("bf16", 32), ("bf16", 64), ("bf16", 128), ("fp32", 16), ("fp32", 32)):
        block_r, (block_n, block_o, block_k, warps, stages) = _config(rank, dtypes[kind])
        pointer, size = f"*{kind}", "i32:16"
        down = {"x_ptr": pointer, "down_ptr": pointer, "gamma_ptr": pointer, "h_ptr": "*fp32", "n_tokens": "i32"}
        down |= dict.fromkeys(("n_in", "rank", "stride_xb", "stride_xn", "stride_gb"), size)
        up = {"y_ptr": pointer, "h_ptr": "*fp32", "up_ptr": pointer, "gamma_ptr": pointer, "out_ptr": pointer}
        up |= {"n_tokens": "i32"} | dict.fromkeys(("n_out", "rank", "stride_yb", "stride_yn", "stride_gb"), size)
        tiles, about = {"BLOCK_N": block_n}, {"num_warps": warps, "num_stages": stages}
        for stage, kernel, signature, constexprs in (
            ("down", _down_kernel, down, {"BLOCK_R": block_r, "BLOCK_K": block_k, "WIDEN": False}),
            (
                "up",
                _up_kernel,
                up,
                {
                    "BLOCK_R": _up_ranks(block_r),
                    "BLOCK_O": block_o,
                    "PRECISION": "ieee" if kind == "fp32" else "tf32",
                },
            ),
        ):
            case = {"name": f"gated_low_rank {stage}, {kind}, R {rank}", "kernel": kernel, "signature": signature}
            case["products"] = True
            if stage == "up" and kind != "fp32":
                case["hip"] = {"PRECISION": "bf16x3"}
            cases.append(case | {"constexprs": tiles | constexprs} | about)
    return cases
