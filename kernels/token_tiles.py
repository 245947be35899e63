"""What kernels on tokens and directions share: a tile of tokens times directions, and the precision of its products."""

from __future__ import annotations

import torch

from .dispatch import jit, tl

__all__ = ["token_products", "tokens_times_directions"]


@jit
def tokens_times_directions(
    x_ptr,  # (N, C) of one row of the batch, channels contiguous
    directions_ptr,  # (R, C), contiguous
    tokens,  # (BLOCK_N,) int64
    ranks,  # (BLOCK_R,)
    n_tokens,
    rank,
    channels,
    stride_xn,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDEN: tl.constexpr,  # the interpreter multiplies bfloat16 as if it were an integer
):
    """(BLOCK_N, BLOCK_R) float32: x D^T of these tokens and directions, 0 beyond the last ones."""
    columns = tl.arange(0, BLOCK_C)
    x_ptrs = x_ptr + tokens[:, None] * stride_xn + columns[None, :]
    directions_ptrs = directions_ptr + ranks[None, :].to(tl.int64) * channels + columns[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for start in range(0, channels, BLOCK_C):
        left = channels - start
        x = tl.load(x_ptrs, mask=(tokens[:, None] < n_tokens) & (columns[None, :] < left), other=0.0)
        directions = tl.load(directions_ptrs, mask=(ranks[None, :] < rank) & (columns[:, None] < left), other=0.0)
        if WIDEN:
            x, directions = x.to(tl.float32), directions.to(tl.float32)
        acc = tl.dot(x, directions, acc, input_precision="ieee")
        x_ptrs += BLOCK_C
        directions_ptrs += BLOCK_C
    return acc


def token_products(dtype: torch.dtype) -> str:
    """Input precision of dots with such a tile, for tokens of a dtype. TF32 holds float16 and bfloat16 exactly, with
    float32's range; AMD has it on one chip only, and three bfloat16 products of halves keep 16 bits."""
    return "ieee" if dtype is torch.float32 else "bf16x3" if torch.version.hip else "tf32"
