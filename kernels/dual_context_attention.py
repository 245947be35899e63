"""Attention of one set of queries over two contexts that share keys: the shared part is computed once.

    Z+ = softmax(s Q [K0 K+]^T) [V0 V+],   Z- = softmax(s Q [K0 K-]^T) [V0 V-]
    norms = (|Z+|_1, |Z+ + phi (Z+ - Z-)|_1) per token, over all heads: what normalized attention guidance asks for

Shapes: Q, Z+, Z- (B, H, N, D); K0, V0 (B, H, S, D), the image's in joint attention, None in cross-attention; K+, V+
(B, H, P, D) and K-, V- (B or 1, H, M, D), the words'; norms (B, N, 2).
How: the online softmax (running maximum, sum and output) of the shared part is where both contexts begin, so that each
adds its own keys to a copy of it. A program has a tile of queries of one head, keeps two outputs in registers, and
writes both and its head's part of the norms.
Operations: 4 B H N D (S + P + M) instead of 4 B H N D (2 S + P + M): at Flux's 4096 + 512 tokens (H 24, D 128) 258 for
464 GFLOP a layer. Bytes: Q once instead of twice, and no further pass over Z+ and Z- for the norms. Bound: the tensor
cores.
Which path: the kernel, where `dual_context_pays`; else torch's attention, once for each context.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
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

__all__ = ["compile_cases", "dual_context_attention", "dual_context_attention_reference", "dual_context_pays"]


@without_autocast
def dual_context_attention_reference(
    q: Tensor,
    shared: tuple[Tensor, Tensor] | None,
    positive: tuple[Tensor, Tensor],
    negative: tuple[Tensor, Tensor],
    scale: float,
    phi: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`dual_context_attention` with torch's attention, once for each context, which sums in float32."""
    outputs = []
    for own in (positive, negative):
        own = tuple(t.expand(len(q), -1, -1, -1) for t in own)
        k, v = own if shared is None else (torch.cat(parts, 2) for parts in zip(shared, own, strict=True))
        outputs.append(F.scaled_dot_product_attention(q, k, v, scale=scale))
    z, z_negative = (output.float() for output in outputs)
    extrapolated = z + phi * (z - z_negative)
    norms = torch.stack([part.abs().sum((1, 3)) for part in (z, extrapolated)], -1)
    return *outputs, norms


# widest head -> (queries, keys of a step, warps, stages): two outputs and a tile of scores stay in registers
_CONFIGS = {64: (64, 32, 4, 3), 128: (64, 32, 8, 2)}
_WIDEST = max(_CONFIGS)
_LOG2E = 1.4426950408889634  # exp2 is one instruction


@jit
def _attend(
    q,  # (BM, BD)
    k_ptr,  # (L, D) of this row and head
    v_ptr,
    stride_k,
    stride_v,
    length,
    scale,
    top,  # (BM,) running maximum
    total,  # (BM,) running sum
    out,  # (BM, BD) running output
    D: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The online softmax goes on over these keys."""
    d = tl.arange(0, BD)
    for start in range(0, length, BN):
        j = start + tl.arange(0, BN)
        k = tl.load(k_ptr + j[None, :].to(tl.int64) * stride_k + d[:, None],
                    mask=(j < length)[None, :] & (d < D)[:, None], other=0.0)  # fmt: skip
        if WIDEN:
            k = k.to(tl.float32)
        score = tl.dot(q, k, input_precision="ieee")
        score = tl.where((j < length)[None, :], score * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        weight = tl.exp2(score - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weight, axis=1)
        v = tl.load(v_ptr + j[:, None].to(tl.int64) * stride_v + d[None, :],
                    mask=(j < length)[:, None] & (d < D)[None, :], other=0.0)  # fmt: skip
        if WIDEN:
            v = v.to(tl.float32)
        out = tl.dot(weight.to(v.dtype), v, out * fade[:, None], input_precision="ieee")
        top = higher
    return top, total, out


@jit
def _dual_context_attention_kernel(
    q_ptr,  # (B, H, N, D)
    k0_ptr,  # (B, H, S, D); not read where S = 0
    v0_ptr,
    k_positive_ptr,  # (B, H, P, D)
    v_positive_ptr,
    k_negative_ptr,  # (B or 1, H, M, D)
    v_negative_ptr,
    z_positive_ptr,  # (B, H, N, D), contiguous
    z_negative_ptr,
    norms_ptr,  # (2, B, H, N) float32
    N,
    S,
    P,
    M,
    H,
    tiles,
    scale,  # times log2(e)
    phi,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_0b,
    stride_0h,
    stride_0n,
    stride_pb,
    stride_ph,
    stride_pn,
    stride_mb,  # 0: one negative row for all
    stride_mh,
    stride_mn,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    WIDEN: tl.constexpr,  # the interpreter multiplies bfloat16 as if it were an integer
):
    heads = tl.program_id(0) // tiles
    b, h = (heads // H).to(tl.int64), (heads % H).to(tl.int64)
    n = (tl.program_id(0) % tiles).to(tl.int64) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    inside = (n < N)[:, None] & (d < D)[None, :]
    raw = tl.load(q_ptr + b * stride_qb + h * stride_qh + n[:, None] * stride_qn + d[None, :], mask=inside, other=0.0)
    q = raw
    if WIDEN:
        q = raw.to(tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    out = tl.zeros((BM, BD), tl.float32)
    at = b * stride_0b + h * stride_0h
    top, total, out = _attend(
        q, k0_ptr + at, v0_ptr + at, stride_0n, stride_0n, S, scale, top, total, out, D, BN, BD, WIDEN
    )
    at = b * stride_pb + h * stride_ph
    _, sum_positive, z = _attend(
        q, k_positive_ptr + at, v_positive_ptr + at, stride_pn, stride_pn, P, scale, top, total, out, D, BN, BD, WIDEN
    )
    z = z / sum_positive[:, None]
    row = (b * H + h) * N + n
    tl.store(z_positive_ptr + row[:, None] * D + d[None, :], z.to(raw.dtype), mask=inside)
    at = b * stride_mb + h * stride_mh
    _, sum_negative, other = _attend(
        q, k_negative_ptr + at, v_negative_ptr + at, stride_mn, stride_mn, M, scale, top, total, out, D, BN, BD, WIDEN
    )
    other = other / sum_negative[:, None]
    tl.store(z_negative_ptr + row[:, None] * D + d[None, :], other.to(raw.dtype), mask=inside)
    heads_of_all = tl.num_programs(0).to(tl.int64) // tiles
    tl.store(norms_ptr + row, tl.sum(tl.abs(z), axis=1), mask=n < N)
    extrapolated = z + phi * (z - other)
    tl.store(norms_ptr + heads_of_all * N + row, tl.sum(tl.abs(extrapolated), axis=1), mask=n < N)


def _config(width: int) -> tuple[int, int, int, int]:
    return next((config for limit, config in _CONFIGS.items() if width <= limit), (16, 16, 8, 1))


def _dual_context_attention_triton(q, shared, positive, negative, scale, phi) -> tuple[Tensor, Tensor, Tensor]:
    (rows, heads, tokens, width), none = q.shape, q[:, :, :0]
    q = _last_contiguous(q)
    k0, v0 = _pair(*(shared or (none, none)))
    (kp, vp), (km, vm) = _pair(*positive), _pair(*negative)
    bm, bn, warps, stages = _config(width)
    z, z_negative = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    norms = torch.empty((2, rows, heads, tokens), dtype=torch.float32, device=q.device)
    tiles = triton.cdiv(tokens, bm)
    _dual_context_attention_kernel[(tiles * rows * heads,)](
        q, k0, v0, kp, vp, km, vm, z, z_negative, norms,
        tokens, k0.shape[2], kp.shape[2], km.shape[2], heads, tiles, scale * _LOG2E, phi,
        *q.stride()[:3], *k0.stride()[:3], *kp.stride()[:3], km.stride(0) if len(km) > 1 else 0, *km.stride()[1:3],
        D=width, BM=bm, BN=bn, BD=max(16, next_power_of_2(width)),
        WIDEN=interpreted() and q.dtype is torch.bfloat16, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return z, z_negative, rearrange(norms.sum(2), "two b n -> b n two")


def _last_contiguous(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _pair(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with the same strides, so that the kernel takes them once."""
    k, v = _last_contiguous(k), _last_contiguous(v)
    return (k, v) if k.stride() == v.stride() else (k.contiguous(), v.contiguous())


@torch.library.custom_op("semiperm::dual_context_attention", mutates_args=())
def _dual_context_attention_op(
    q: Tensor,
    k0: Tensor | None,
    v0: Tensor | None,
    k_positive: Tensor,
    v_positive: Tensor,
    k_negative: Tensor,
    v_negative: Tensor,
    scale: float,
    phi: float,
) -> tuple[Tensor, Tensor, Tensor]:
    shared = None if k0 is None else (k0, v0)
    return _dual_context_attention_triton(q, shared, (k_positive, v_positive), (k_negative, v_negative), scale, phi)


@_dual_context_attention_op.register_fake
def _(q, *_):
    z, z_negative = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    return z, z_negative, torch.empty((q.shape[0], q.shape[2], 2), dtype=torch.float32, device=q.device)


def dual_context_pays(q: Tensor, shared: int, positive: int, negative: int) -> bool:
    """Whether the kernel is taken: it must save a quarter of the operations: S >= (P + M) / 2.

    torch's own attention is worth up to a third more of the tensor cores than a Triton kernel without warp
    specialisation (FlashAttention 3 against 2, arXiv 2407.08608), which the rest of the saving has to exceed. In
    float32, and for heads wider than 128, two outputs do not fit the registers.

    Args:
        q: (B, H, N, D). shared, positive, negative: S, P and M.
    """
    saves = 2 * shared >= positive + negative  # (S + P + M) / (2 S + P + M) <= 3 / 4
    return saves and q.dtype is not torch.float32 and q.shape[-1] <= _WIDEST


def dual_context_attention(
    q: Tensor,
    shared: tuple[Tensor, Tensor] | None,
    positive: tuple[Tensor, Tensor],
    negative: tuple[Tensor, Tensor],
    *,
    phi: float,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend with one set of queries to a positive and to a negative context that have their first keys in common.

    Args:
        q: (B, H, N, D), float32, float16 or bfloat16, as all others.
        shared: K0, V0 (B, H, S, D), which both contexts have; None: they share nothing.
        positive: K+, V+ (B, H, P, D), P at least 1.
        negative: K-, V- (B, H, M, D), or (1, H, M, D) for all rows, M at least 1.
        phi: of the extrapolation whose norm is returned, finite: `normalized_attention_guidance`'s scale.
        scale: of the scores; None is 1 / sqrt(D).

    Returns:
        Z+ and Z- (B, H, N, D), and norms (B, N, 2) float32: |Z+|_1 and |Z+ + phi (Z+ - Z-)|_1 over all heads. New
        tensors. Gradients: by torch's attention, which is then taken.

    Raises:
        KernelError: shapes, dtypes, devices or values outside these, or SEMIPERM_KERNELS asks for what cannot run here.

    Source: the online softmax is FlashAttention's (arXiv 2205.14135); the two contexts are NAG's (arXiv 2505.21179),
    whose released code attends twice.
    """
    _check(q, shared, positive, negative, phi)
    arguments = q, shared, positive, negative, float(q.shape[-1] ** -0.5 if scale is None else scale), float(phi)
    lengths = 0 if shared is None else shared[0].shape[2], positive[0].shape[2], negative[0].shape[2]
    tensors = (q, *(shared or ()), *positive, *negative)
    if kernel_path(q, products=True) == "reference" or needs_grad(*tensors):
        return dual_context_attention_reference(*arguments)
    if not forced() and not dual_context_pays(q, *lengths):
        return dual_context_attention_reference(*arguments)
    if torch.compiler.is_compiling():
        return _dual_context_attention_op(q, *(shared or (None, None)), *positive, *negative, *arguments[4:])
    return _dual_context_attention_triton(*arguments)


def _check(q, shared, positive, negative, phi) -> None:
    named = {"k_positive": positive[0], "v_positive": positive[1], "k_negative": negative[0], "v_negative": negative[1]}
    if shared is not None:
        named |= {"k_shared": shared[0], "v_shared": shared[1]}
    check_tensors("dual_context_attention", q, **named)

    def fits(pair, rows: tuple[int, ...]) -> bool:
        k, v = pair
        return (
            k.ndim == 4
            and k.shape == v.shape
            and k.shape[0] in rows
            and k.shape[2] > 0
            and (k.shape[1], k.shape[3]) == (q.shape[1], q.shape[3])
        )

    if (
        q.ndim != 4
        or 0 in q.shape
        or not fits(positive, (len(q),))
        or not fits(negative, (1, len(q)))
        or not (shared is None or fits(shared, (len(q),)))
    ):
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in named.items())
        raise KernelError(
            f"dual_context_attention: q {tuple(q.shape)}, {shapes}; expected (B, H, N, D), and keys and values (B, H,"
            " any, D), the negative ones also (1, H, any, D), none of them empty"
        )
    if not math.isfinite(phi):
        raise KernelError(f"dual_context_attention: phi={phi}; expected a finite number")


def compile_cases() -> list[dict]:
    """What kernel_resources.py compiles: each width of heads at its widest, in both half precisions."""
    cases = []
    for kind, width in (("bf16", 64), ("fp16", 64), ("bf16", 128), ("fp16", 128)):
        bm, bn, warps, stages = _config(width)
        tensors = ("q", "k0", "v0", "k_positive", "v_positive", "k_negative", "v_negative", "z_positive", "z_negative")
        signature = {f"{name}_ptr": f"*{kind}" for name in tensors} | {"norms_ptr": "*fp32"}
        signature |= dict.fromkeys(("N", "S", "P", "M", "H", "tiles"), "i32") | dict.fromkeys(("scale", "phi"), "fp32")
        signature |= {f"stride_{of}{axis}": "i32:16" for of in "q0pm" for axis in "bhn"}
        cases.append(
            {
                "name": f"dual_context_attention, {kind}, D {width}",
                "kernel": _dual_context_attention_kernel,
                "products": True,
                "signature": signature,
                "constexprs": {"D": width, "BM": bm, "BN": bn, "BD": width, "WIDEN": False},
                "num_warps": warps,
                "num_stages": stages,
            }
        )
    return cases
