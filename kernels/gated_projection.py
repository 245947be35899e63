"""y - ((gamma g) a) U, a = y D^T - offset: what tokens show along R directions, taken out where two gates open.

    a[b, n, r]   = sum_c y[b, n, c] D[r, c] - offset[r]
    p[b, r]      = ramp((max_n a[b, n, r] - seen[r]) steep[r])                     ramp(z) = min(max(z, 0), 1)
    g[b, n, r]   = ramp((a[b, n, r] - low[r]) slope[r]) p[b, r]
    out[b, n, :] = y[b, n, :] - sum_r gamma[b, r] g[b, n, r] a[b, n, r] U[r, :]

Shapes: y and out (B, N, C), D (read) and U (write) (R, C), gates (5, R), gamma (B or 1, R), g (B, N, R). Two kernels, a
between them in float32: no token may be written before the last one of its picture was read.

Bytes per token, s bytes an element: s C + 4 R for a; 4 R, s R for g and 2 s C, of which the second look at y comes from
the cache where the pictures' tokens fit. Eager moves 5 s C for y and the delta, and 40 R between. Bound: memory up to R
of about 100. A tile in which no gate opens is copied, to the bit, without the second product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import (
    check_tensors,
    forced,
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
from .token_tiles import token_products, tokens_times_directions

__all__ = ["compile_cases", "gated_projection", "gated_projection_reference"]


@without_autocast
def gated_projection_reference(
    y: Tensor, read: Tensor, write: Tensor, gates: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor]:
    """`gated_projection` in plain torch, differentiable: float32 inside, one downcast. A token without an open gate
    keeps its bits."""
    wide = torch.promote_types(y.dtype, torch.float32)
    values, (offset, low, slope, seen, steep) = y.to(wide), gates.to(wide)
    a = values @ read.to(wide).T - offset
    picture = ((a.amax(dim=1, keepdim=True) - seen) * steep).clamp(0.0, 1.0)
    g = ((a - low) * slope).clamp(0.0, 1.0) * picture
    h = g * a * gamma.to(wide).unsqueeze(1)
    live = h.ne(0).any(dim=-1, keepdim=True)
    asked = (
        y.device.type == "cpu" and not torch.compiler.is_compiling() and not needs_grad(y, read, write, gates, gamma)
    )
    if asked and not live.any():  # elsewhere asking would wait for the device
        return y.clone(memory_format=torch.contiguous_format), g.to(y.dtype)
    return torch.where(live, (values - h @ write.to(wide)).to(y.dtype), y), g.to(y.dtype)


# tile of ranks -> (tokens, channels read at a time, channels written, warps, stages): the more ranks, the less beside
# them, so that nothing spills (tests/kernels/test_resources.py)
_CONFIGS = {16: (64, 64, 128, 4, 3), 32: (64, 64, 64, 4, 3), 64: (64, 64, 64, 4, 3), 128: (64, 32, 64, 8, 3)}
_MOST_RANKS = 128  # that one program holds; more take torch


@jit
def _read_kernel(
    y_ptr,  # (B, N, C)
    read_ptr,  # (R, C)
    gates_ptr,  # (5, R) float32: offset, low, slope, seen, steep
    a_ptr,  # (B, N, R) float32
    top_ptr,  # (B, tiles of N, R) float32: the largest a of each tile
    n_tokens,
    channels,
    rank,
    n_tiles,
    stride_yb,
    stride_yn,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDEN: tl.constexpr,
):
    batch, tile = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    tokens = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    acc = tokens_times_directions(
        y_ptr + batch * stride_yb, read_ptr, tokens, ranks, n_tokens, rank, channels, stride_yn,
        BLOCK_N, BLOCK_R, BLOCK_C, WIDEN,
    )  # fmt: skip
    acc -= tl.load(gates_ptr + ranks, mask=ranks < rank, other=0.0)[None, :]
    a_ptrs = a_ptr + (batch * n_tokens + tokens[:, None]) * rank + ranks[None, :]
    tl.store(a_ptrs, acc, mask=(tokens[:, None] < n_tokens) & (ranks[None, :] < rank))
    top = tl.max(tl.where(tokens[:, None] < n_tokens, acc, float("-inf")), axis=0)
    tl.store(top_ptr + (batch * n_tiles + tile) * rank + ranks, top, mask=ranks < rank)


@jit
def _write_kernel(
    y_ptr,  # (B, N, C)
    a_ptr,  # (B, N, R) float32
    top_ptr,  # (B, tiles of N, R) float32
    write_ptr,  # (R, C)
    gates_ptr,  # (5, R) float32
    gamma_ptr,  # (B or 1, R) float32
    out_ptr,  # (B, N, C), contiguous
    opened_ptr,  # (B, N, R), contiguous
    n_tokens,
    channels,
    rank,
    n_tiles,
    stride_yb,
    stride_yn,
    stride_gb,  # 0: one row for all
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    ranks = tl.arange(0, BLOCK_R)
    known = ranks < rank
    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    for tile in range(0, n_tiles):
        top = tl.maximum(top, tl.load(top_ptr + (batch * n_tiles + tile) * rank + ranks, mask=known, other=0.0))
    low = tl.load(gates_ptr + rank + ranks, mask=known, other=0.0)
    slope = tl.load(gates_ptr + 2 * rank + ranks, mask=known, other=0.0)
    seen = tl.load(gates_ptr + 3 * rank + ranks, mask=known, other=0.0)
    steep = tl.load(gates_ptr + 4 * rank + ranks, mask=known, other=0.0)
    gamma = tl.load(gamma_ptr + batch * stride_gb + ranks, mask=known, other=0.0)
    picture = tl.minimum(tl.maximum((top - seen) * steep, 0.0), 1.0)
    inside = (tokens[:, None] < n_tokens) & known[None, :]
    where = (batch * n_tokens + tokens[:, None]) * rank + ranks[None, :]
    a = tl.load(a_ptr + where, mask=inside, other=0.0)
    g = tl.minimum(tl.maximum((a - low[None, :]) * slope[None, :], 0.0), 1.0) * picture[None, :]
    if tl.program_id(1) == 0:
        tl.store(opened_ptr + where, g.to(opened_ptr.dtype.element_ty), mask=inside)
    h = tl.where(inside, g * a * gamma[None, :], 0.0)
    live = tl.max((h != 0).to(tl.int32), axis=1)
    mask = (tokens[:, None] < n_tokens) & (columns[None, :] < channels)
    y = tl.load(y_ptr + batch * stride_yb + tokens[:, None] * stride_yn + columns[None, :], mask=mask, other=0.0)
    out = y
    if tl.max(live, axis=0) != 0:
        write_ptrs = write_ptr + ranks[:, None].to(tl.int64) * channels + columns[None, :]
        write = tl.load(write_ptrs, mask=known[:, None] & (columns[None, :] < channels), other=0.0)
        delta = tl.dot(h, write.to(tl.float32), input_precision=PRECISION)
        out = tl.where(live[:, None] != 0, (y.to(tl.float32) - delta).to(y.dtype), y)  # y - 0 may lose a zero's sign
    tl.store(out_ptr + (batch * n_tokens + tokens[:, None]) * channels + columns[None, :], out, mask=mask)


def _config(rank: int) -> tuple[int, tuple[int, int, int, int, int]]:
    block_r = max(16, next_power_of_2(rank))
    return block_r, _CONFIGS[block_r]


def _gated_projection_triton(
    y: Tensor, read: Tensor, write: Tensor, gates: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor]:
    y = y if y.stride(-1) == 1 else y.contiguous()
    read, write, gates, gamma = (t.contiguous() for t in (read, write, gates, gamma))
    (rows, n_tokens, channels), rank = y.shape, read.shape[0]
    block_r, (block_n, block_c, block_o, warps, stages) = _config(rank)
    tiles, how = triton.cdiv(n_tokens, block_n), {"num_warps": warps, "num_stages": stages}
    a = torch.empty((rows, n_tokens, rank), dtype=torch.float32, device=y.device)
    top = torch.empty((rows, tiles, rank), dtype=torch.float32, device=y.device)
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    opened = torch.empty((rows, n_tokens, rank), dtype=y.dtype, device=y.device)
    _read_kernel[tiles, rows](
        y, read, gates, a, top, n_tokens, channels, rank, tiles, y.stride(0), y.stride(1),
        BLOCK_N=block_n, BLOCK_R=block_r, BLOCK_C=block_c, WIDEN=interpreted() and y.dtype is torch.bfloat16, **how,
    )  # fmt: skip
    _write_kernel[tiles, triton.cdiv(channels, block_o), rows](
        y, a, top, write, gates, gamma, out, opened, n_tokens, channels, rank, tiles, y.stride(0), y.stride(1),
        rank if gamma.shape[0] > 1 else 0, BLOCK_N=block_n, BLOCK_R=block_r, BLOCK_O=block_o,
        PRECISION=token_products(y.dtype), **how,
    )  # fmt: skip
    return out, opened


@torch.library.custom_op("semiperm::gated_projection", mutates_args=())
def _gated_projection_op(y: Tensor, read: Tensor, write: Tensor, gates: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    return _gated_projection_triton(y, read, write, gates, gamma)


@_gated_projection_op.register_fake
def _(y, read, write, gates, gamma):
    opened = (*y.shape[:2], read.shape[0])
    return torch.empty(y.shape, dtype=y.dtype, device=y.device), torch.empty(opened, dtype=y.dtype, device=y.device)


def gated_projection(y: Tensor, read: Tensor, write: Tensor, gates: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Take out of each token what it shows along R directions, where the picture's and the token's gates open.

    Args:
        y: (B, N, C) tokens. float32, float16 or bfloat16; read and write share it.
        read, write: D (R, C) that a token is held against, U (R, C) that is taken out; R >= 1.
        gates: (5, R) float32: offset, low, slope, seen, steep. A token's gate opens from `low` on, fully 1 / slope
            above it; all of a picture's stay shut until its strongest token reaches `seen`, and open fully 1 / steep
            above it; slope, steep > 0.
        gamma: (B, R) or (1, R) float32: how strongly; 0 leaves a row's bits.

    Returns:
        out (B, N, C), a new tensor in y's dtype, in which tokens without an open gate keep their bits; and the gates
        g (B, N, R) in y's dtype. Differentiable: where a gradient is wanted, torch computes it.

    Raises:
        KernelError: shapes, dtypes or devices that do not fit each other, or a forced path that cannot run.

    Source: CASteer (arXiv 2503.09630) for R = 1, D = U and no gate but a > 0.
    """
    _check(y, read, write, gates, gamma)
    fits = read.shape[0] <= _MOST_RANKS
    if forced() and not fits:
        raise KernelError(
            f"SEMIPERM_KERNELS=triton, but {read.shape[0]} directions are more than one program holds ({_MOST_RANKS});"
            " unset it, and torch computes them"
        )
    # exact float32 has no matrix units, and its products spill on NVIDIA's
    fits = fits and (y.dtype is not torch.float32 or forced()) and not needs_grad(y, read, write, gates, gamma)
    if not fits or kernel_path(y, products=True, rows=y.shape[0]) == "reference":
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
        or gates.shape != (5, rank)
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
            f" (R, C), and float32 (5, R) and (B or 1, R) on {y.device}, R at least 1"
        )


def compile_cases() -> list[dict]:
    """What kernel_resources.py compiles: every tile of ranks, of the dtypes that `auto` takes."""
    cases = []
    for kind, rank in (("fp16", 16), ("bf16", 32), ("bf16", 64), ("bf16", 128)):
        block_r, (block_n, block_c, block_o, warps, stages) = _config(rank)
        pointers = {name: "*fp32" for name in ("gates_ptr", "a_ptr", "top_ptr", "gamma_ptr")}
        pointers |= {name: f"*{kind}" for name in ("y_ptr", "read_ptr", "write_ptr", "out_ptr", "opened_ptr")}
        sizes = dict.fromkeys(("channels", "stride_yb", "stride_yn"), "i32:16")
        sizes |= dict.fromkeys(("n_tokens", "rank", "n_tiles", "stride_gb"), "i32")
        tiles = {"BLOCK_N": block_n, "BLOCK_R": block_r}
        precision = {"PRECISION": "tf32"}
        for stage, kernel, constexprs in (
            ("read", _read_kernel, {"BLOCK_C": block_c, "WIDEN": False}),
            ("write", _write_kernel, {"BLOCK_O": block_o, **precision}),
        ):
            case = {
                "name": f"gated_projection {stage}, {kind}, R {rank}",
                "kernel": kernel,
                "signature": {n: t for n, t in (pointers | sizes).items() if n in kernel.arg_names},
                "constexprs": tiles | constexprs,
                "num_warps": warps,
                "num_stages": stages,
                "products": True,
            }
            if stage == "write":
                case["hip"] = {"PRECISION": "bf16x3"}
            cases.append(case)
    return cases
