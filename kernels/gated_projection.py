"""y - ((gamma g(a) a) U), a = y D^T - offset: what a token shows along R directions, taken out where a gate opens.

    a[b, n, r]   = sum_c y[b, n, c] D[r, c] - offset[r]
    g[b, n, r]   = min(max((a[b, n, r] - low[r]) slope[r], 0), 1)
    out[b, n, :] = y[b, n, :] - sum_r gamma[b, r] g[b, n, r] a[b, n, r] U[r, :]

Shapes: y and out (B, N, C), D (read) and U (write) (R, C), offset, low and slope (R,), gamma (B or 1, R), g (B, N, R).
Bytes per token, s bytes an element: y read once and out written once, 2 s C, and s R for g; the second look at y comes
from the cache, which holds a tile of tokens (64 x C). Eager moves 4 s C for y, the delta and the difference, and 20 R
between. Bound: memory up to R of about 100. A tile in which no gate opens is copied, to the bit, without the second
product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import (
    check_tensors,
    interpreted,
    jit,
    kernel_path,
    needs_grad,
    next_power_of_2,
    tl,
    triton,
    without_autocast,
)
from .errors import KernelError

__all__ = ["compile_cases", "gated_projection", "gated_projection_reference"]


@without_autocast
def gated_projection_reference(
    y: Tensor, read: Tensor, write: Tensor, gates: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor]:
    """`gated_projection` in plain torch, differentiable: float32 inside, one downcast. A token without an open gate
    keeps its bits."""
    wide = torch.promote_types(y.dtype, torch.float32)
    values, (offset, low, slope) = y.to(wide), gates.to(wide)
    a = values @ read.to(wide).T - offset
    g = ((a - low) * slope).clamp(0.0, 1.0)
    h = g * a * gamma.to(wide).unsqueeze(1)
    live = h.ne(0).any(dim=-1, keepdim=True)
    return torch.where(live, (values - h @ write.to(wide)).to(y.dtype), y), g.to(y.dtype)


# tile of ranks -> (tokens, channels, warps, stages): the more ranks, the less beside them, so that nothing spills
# (tests/kernels/test_resources.py)
_CONFIGS = {16: (64, 64, 4, 3), 32: (64, 64, 4, 3), 64: (64, 64, 4, 3), 128: (64, 32, 8, 3)}
_MOST_RANKS = 128  # that one program holds; more take torch


@jit
def _gated_projection_kernel(
    y_ptr,  # (B, N, C)
    read_ptr,  # (R, C)
    write_ptr,  # (R, C)
    gates_ptr,  # (3, R) float32: offset, low, slope
    gamma_ptr,  # (B or 1, R) float32
    out_ptr,  # (B, N, C), contiguous
    opened_ptr,  # (B, N, R), contiguous
    n_tokens,
    channels,
    rank,
    stride_yb,
    stride_yn,
    stride_gb,  # 0: one row for all
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # the interpreter multiplies bfloat16 as if it were an integer
):
    batch = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_C)
    y_ptrs = y_ptr + batch * stride_yb + tokens[:, None] * stride_yn
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for start in range(0, channels, BLOCK_C):
        here = start + columns
        y = tl.load(y_ptrs + here[None, :], mask=(tokens[:, None] < n_tokens) & (here[None, :] < channels), other=0.0)
        read_ptrs = read_ptr + ranks[None, :].to(tl.int64) * channels + here[:, None]
        read = tl.load(read_ptrs, mask=(ranks[None, :] < rank) & (here[:, None] < channels), other=0.0)
        if WIDEN:
            y, read = y.to(tl.float32), read.to(tl.float32)
        acc = tl.dot(y, read, acc, input_precision="ieee")
    offset = tl.load(gates_ptr + ranks, mask=ranks < rank, other=0.0)
    low = tl.load(gates_ptr + rank + ranks, mask=ranks < rank, other=0.0)
    slope = tl.load(gates_ptr + 2 * rank + ranks, mask=ranks < rank, other=0.0)
    gamma = tl.load(gamma_ptr + batch * stride_gb + ranks, mask=ranks < rank, other=0.0)
    acc -= offset[None, :]
    g = tl.minimum(tl.maximum((acc - low[None, :]) * slope[None, :], 0.0), 1.0)
    inside = (tokens[:, None] < n_tokens) & (ranks[None, :] < rank)
    opened_ptrs = opened_ptr + (batch * n_tokens + tokens[:, None]) * rank + ranks[None, :]
    tl.store(opened_ptrs, g.to(opened_ptr.dtype.element_ty), mask=inside)
    h = tl.where(inside, g * acc * gamma[None, :], 0.0)
    live = tl.max((h != 0).to(tl.int32), axis=1)
    some = tl.max(live, axis=0) != 0
    out_ptrs = out_ptr + (batch * n_tokens + tokens[:, None]) * channels
    for start in range(0, channels, BLOCK_C):
        here = start + columns
        mask = (tokens[:, None] < n_tokens) & (here[None, :] < channels)
        y = tl.load(y_ptrs + here[None, :], mask=mask, other=0.0)
        out = y
        if some:
            write_ptrs = write_ptr + ranks[:, None].to(tl.int64) * channels + here[None, :]
            write = tl.load(write_ptrs, mask=(ranks[:, None] < rank) & (here[None, :] < channels), other=0.0)
            delta = tl.dot(h, write.to(tl.float32), input_precision=PRECISION)
            out = tl.where(live[:, None] != 0, (y.to(tl.float32) - delta).to(y.dtype), y)  # y - 0 may lose a sign
        tl.store(out_ptrs + here[None, :], out, mask=mask)


def _config(rank: int) -> tuple[int, tuple[int, int, int, int]]:
    block_r = max(16, next_power_of_2(rank))
    return block_r, _CONFIGS[block_r]


def _precision(dtype: torch.dtype) -> str:
    """Of products with h, as `kernels.gated_low_rank` has them."""
    return "ieee" if dtype is torch.float32 else "bf16x3" if torch.version.hip else "tf32"


def _gated_projection_triton(
    y: Tensor, read: Tensor, write: Tensor, gates: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor]:
    y = y if y.stride(-1) == 1 else y.contiguous()
    read, write, gates, gamma = (t.contiguous() for t in (read, write, gates, gamma))
    (rows, n_tokens, channels), rank = y.shape, read.shape[0]
    block_r, (block_n, block_c, warps, stages) = _config(rank)
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    opened = torch.empty((rows, n_tokens, rank), dtype=y.dtype, device=y.device)
    _gated_projection_kernel[triton.cdiv(n_tokens, block_n), rows](
        y, read, write, gates, gamma, out, opened, n_tokens, channels, rank, y.stride(0), y.stride(1),
        rank if gamma.shape[0] > 1 else 0, BLOCK_N=block_n, BLOCK_R=block_r, BLOCK_C=block_c,
        PRECISION=_precision(y.dtype), WIDEN=interpreted() and y.dtype is torch.bfloat16, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    return out, opened


@torch.library.custom_op("semiperm::gated_projection", mutates_args=())
def _gated_projection_op(
    y: Tensor, read: Tensor, write: Tensor, gates: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor]:
    return _gated_projection_triton(y, read, write, gates, gamma)


@_gated_projection_op.register_fake
def _(y, read, write, gates, gamma):
    opened = (*y.shape[:2], read.shape[0])
    return torch.empty(y.shape, dtype=y.dtype, device=y.device), torch.empty(opened, dtype=y.dtype, device=y.device)


def gated_projection(y: Tensor, read: Tensor, write: Tensor, gates: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Take out of each token what it shows along R directions, where their gates open.

    Args:
        y: (B, N, C) tokens. float32, float16 or bfloat16; read and write share it.
        read, write: D (R, C) that a token is held against, U (R, C) that is taken out; R >= 1.
        gates: (3, R) float32: offset, low, slope. A gate opens from `low` on, fully 1 / slope above it; slope >= 0.
        gamma: (B, R) or (1, R) float32: how strongly; 0 leaves a row's bits.

    Returns:
        out (B, N, C), a new tensor in y's dtype, in which tokens without an open gate keep their bits; and the gates
        g (B, N, R) in y's dtype. Differentiable: where a gradient is wanted, torch computes it.

    Raises:
        KernelError: shapes, dtypes or devices that do not fit each other.

    Source: CASteer (arXiv 2503.09630) for R = 1, D = U, no gate but a > 0.
    """
    _check(y, read, write, gates, gamma)
    fits = read.shape[0] <= _MOST_RANKS and not needs_grad(y, read, write, gates, gamma)
    if not fits or kernel_path(y, products=True) == "reference":
        return gated_projection_reference(y, read, write, gates, gamma)  # which a compiler fuses by itself
    if torch.compiler.is_compiling():
        return _gated_projection_op(y, read, write, gates, gamma)
    return _gated_projection_triton(y, read, write, gates, gamma)


def _check(y: Tensor, read: Tensor, write: Tensor, gates: Tensor, gamma: Tensor) -> None:
    check_tensors("gated_projection", y, read=read, write=write)
    rank = read.shape[0] if read.ndim == 2 else 0
    if (
        y.ndim != 3
        or rank < 1
        or not read.shape == write.shape == (rank, y.shape[-1])
        or gates.shape != (3, rank)
        or gamma.shape not in ((1, rank), (y.shape[0], rank))
        or (gates.dtype, gamma.dtype) != (torch.float32, torch.float32)
        or not gates.device == gamma.device == y.device
    ):
        shapes = ", ".join(
            f"{name} {tuple(t.shape)}"
            for name, t in (("y", y), ("read", read), ("write", write), ("gates", gates), ("gamma", gamma))
        )
        raise KernelError(
            f"gated_projection: {shapes}, gates {gates.dtype} and gamma {gamma.dtype}; expected (B, N, C), (R, C),"
            f" (R, C), and float32 (3, R) and (B or 1, R) on {y.device}, R at least 1"
        )


def compile_cases() -> list[dict]:
    """What kernel_resources.py compiles: every tile of ranks in each kind of dtype."""
    cases = []
    for kind, rank in (("fp16", 16), ("bf16", 32), ("bf16", 64), ("bf16", 128), ("fp32", 16), ("fp32", 128)):
        block_r, (block_n, block_c, warps, stages) = _config(rank)
        signature = {name: f"*{kind}" for name in ("y_ptr", "read_ptr", "write_ptr", "out_ptr", "opened_ptr")}
        signature |= {"gates_ptr": "*fp32", "gamma_ptr": "*fp32", "n_tokens": "i32", "rank": "i32"}
        signature |= dict.fromkeys(("channels", "stride_yb", "stride_yn"), "i32:16") | {"stride_gb": "i32"}
        case = {
            "name": f"gated_projection, {kind}, R {rank}",
            "kernel": _gated_projection_kernel,
            "signature": signature,
            "constexprs": {
                "BLOCK_N": block_n,
                "BLOCK_R": block_r,
                "BLOCK_C": block_c,
                "PRECISION": "ieee" if kind == "fp32" else "tf32",
                "WIDEN": False,
            },
            "num_warps": warps,
            "num_stages": stages,
            "products": True,
        }
        cases.append(case if kind == "fp32" else case | {"hip": {"PRECISION": "bf16x3"}})
    return cases
