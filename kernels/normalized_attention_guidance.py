"""Normalized attention guidance: extrapolate away from the negative branch's attention, with a bounded norm.

    Z~ = Z+ + phi (Z+ - Z-);  R = |Z~|_1 / |Z+|_1 per token, over all C;  Z^ = Z~ min(R, tau) / R
    out = alpha Z^ + (1 - alpha) Z+

Shapes: positive and out (B, N, C), negative (B or 1, N, C). Bytes: each input read once and out written once, 3 passes
over (B, N, C), against 18 in eager torch. Bound: memory. A program holds whole tokens in registers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dispatch import check_tensors, jit, kernel_path, needs_grad, next_power_of_2, tl, triton
from .errors import KernelError

__all__ = ["compile_cases", "normalized_attention_guidance", "normalized_attention_guidance_reference"]


def normalized_attention_guidance_reference(
    positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float
) -> Tensor:
    """`normalized_attention_guidance` in plain torch: float32 inside, one downcast."""
    wide = torch.promote_types(positive.dtype, torch.float32)
    z, z_negative = positive.to(wide), negative.to(wide)
    extrapolated = z + scale * (z - z_negative)
    bound = tau * z.abs().sum(dim=-1, keepdim=True)
    norm = extrapolated.abs().sum(dim=-1, keepdim=True)
    factor = torch.where(norm > bound, bound / norm, 1.0)  # min(R, tau) / R, without the division by |Z+|_1 = 0
    return ((alpha * factor) * extrapolated + (1 - alpha) * z).to(positive.dtype)


# channels up to which it serves -> (tokens a program, warps): a thread then holds 16 values of each input, at 8,192
# channels 32
_CONFIGS = {512: (4, 4), 2048: (1, 4), 8192: (1, 8)}
_WIDEST = (1, 16)


@jit
def _normalized_attention_guidance_kernel(
    positive_ptr,  # (B, N, C)
    negative_ptr,  # (B or 1, N, C)
    out_ptr,  # (B, N, C), contiguous
    n_tokens,
    channels,
    stride_pb,
    stride_pn,
    stride_nb,  # 0: one negative row for all
    stride_nn,
    scale,
    tau,
    alpha,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    columns = tl.arange(0, BLOCK_C)[None, :]
    mask = (tokens < n_tokens) & (columns < channels)
    z = tl.load(positive_ptr + batch * stride_pb + tokens * stride_pn + columns, mask=mask, other=0.0)
    z_negative = tl.load(negative_ptr + batch * stride_nb + tokens * stride_nn + columns, mask=mask, other=0.0)
    wide = z.to(tl.float32)
    extrapolated = wide + scale * (wide - z_negative.to(tl.float32))
    bound = tau * tl.sum(tl.abs(wide), axis=1, keep_dims=True)
    norm = tl.sum(tl.abs(extrapolated), axis=1, keep_dims=True)
    clipped = norm > bound  # then norm > 0
    factor = tl.where(clipped, bound / tl.where(clipped, norm, 1.0), 1.0)
    out = (alpha * factor) * extrapolated + (1.0 - alpha) * wide
    tl.store(out_ptr + (batch * n_tokens + tokens) * channels + columns, out.to(z.dtype), mask=mask)


def _config(channels: int) -> tuple[int, int]:
    return next((config for limit, config in _CONFIGS.items() if channels <= limit), _WIDEST)


def _normalized_attention_guidance_triton(
    positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float
) -> Tensor:
    positive, negative = (t if t.stride(-1) == 1 else t.contiguous() for t in (positive, negative))
    rows, n_tokens, channels = positive.shape
    out = torch.empty(positive.shape, dtype=positive.dtype, device=positive.device)
    block_n, warps = _config(channels)
    _normalized_attention_guidance_kernel[triton.cdiv(n_tokens, block_n), rows](
        positive, negative, out, n_tokens, channels, positive.stride(0), positive.stride(1),
        negative.stride(0) if negative.shape[0] > 1 else 0, negative.stride(1), float(scale), float(tau), float(alpha),
        BLOCK_N=block_n, BLOCK_C=next_power_of_2(channels), num_warps=warps,
    )  # fmt: skip
    return out


@torch.library.custom_op("semiperm::normalized_attention_guidance", mutates_args=())
def _normalized_attention_guidance_op(
    positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float
) -> Tensor:
    if kernel_path(positive, rows=positive.shape[0]) == "triton":
        return _normalized_attention_guidance_triton(positive, negative, scale, tau, alpha)
    return normalized_attention_guidance_reference(positive, negative, scale, tau, alpha).contiguous()


@_normalized_attention_guidance_op.register_fake
def _(positive, negative, scale, tau, alpha):
    return torch.empty(positive.shape, dtype=positive.dtype, device=positive.device)


def normalized_attention_guidance(positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float) -> Tensor:
    """Guide attention away from a negative prompt; no second pass of the network, any guidance scale.

    Args:
        positive: Z+ (B, N, C), all heads side by side. float32, float16 or bfloat16.
        negative: Z- (B, N, C), or (1, N, C) for all rows.
        scale: phi, finite; 0 returns Z+'s bits.
        tau: largest growth of a token's L1 norm, at least 1.
        alpha: share of the guided attention, 0 to 1; 0 returns Z+'s bits.

    Returns:
        (B, N, C), a new tensor. A token with Z+ = 0 stays 0. Gradients: on the reference path only; backward
        through the Triton path raises.

    Raises:
        KernelError: shapes, dtypes, devices or values outside these.

    Source: NAG (arXiv 2505.21179). The released code's `nag_scale` is phi + 1.
    """
    check_tensors("normalized_attention_guidance", positive, negative=negative)
    if (
        positive.ndim != 3
        or negative.ndim != 3
        or negative.shape[0] not in (1, positive.shape[0])
        or (negative.shape[1:] != positive.shape[1:])
    ):
        raise KernelError(
            f"normalized_attention_guidance: positive {tuple(positive.shape)}, negative {tuple(negative.shape)};"
            " expected (B, N, C), and the same or (1, N, C)"
        )
    if not (math.isfinite(scale) and 1 <= tau < math.inf and 0 <= alpha <= 1):
        raise KernelError(
            f"normalized_attention_guidance: scale={scale}, tau={tau}, alpha={alpha}; expected a finite scale, tau from"
            " 1 (which allows no growth), alpha from 0 to 1"
        )
    if scale == 0 or alpha == 0:
        return positive.clone(memory_format=torch.contiguous_format)
    arguments = positive, negative, float(scale), float(tau), float(alpha)
    if kernel_path(positive, rows=positive.shape[0]) == "reference":
        return normalized_attention_guidance_reference(*arguments)  # which a compiler fuses better than we could
    if torch.compiler.is_compiling() or needs_grad(positive, negative):
        return _normalized_attention_guidance_op(*arguments)  # whose backward raises
    return _normalized_attention_guidance_triton(*arguments)


def compile_cases() -> list[dict]:
    """What kernel_resources.py compiles: each config at its widest, and the widest model's 10240 channels."""
    cases = []
    for kind, channels in (("fp16", 512), ("fp16", 2048), ("bf16", 8192), ("bf16", 10240), ("fp32", 8192)):
        block_n, warps = _config(channels)
        signature = {name: f"*{kind}" for name in ("positive_ptr", "negative_ptr", "out_ptr")} | {"n_tokens": "i32"}
        signature |= dict.fromkeys(("channels", "stride_pb", "stride_pn", "stride_nb", "stride_nn"), "i32:16")
        signature |= dict.fromkeys(("scale", "tau", "alpha"), "fp32")
        cases.append(
            {
                "name": f"normalized_attention_guidance, {kind}, C {channels}",
                "kernel": _normalized_attention_guidance_kernel,
                "signature": signature,
                "constexprs": {"BLOCK_N": block_n, "BLOCK_C": next_power_of_2(channels)},
                "num_warps": warps,
                "num_stages": 3,
            }
        )
    return cases
