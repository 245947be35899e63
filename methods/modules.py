"""Small questions about tensors and modules that every method at work in a model asks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["is_own_forward", "same_bits", "stamp"]


def stamp(tensor: Tensor) -> Tensor | int:
    """What tells a later in-place change: the version counter, or a copy where inference mode keeps none."""
    return tensor.clone() if tensor.is_inference() else tensor._version


def same_bits(tensor: Tensor, then: Tensor | int) -> bool:
    """Whether a tensor is as it was when `stamp` returned `then`."""
    return torch.equal(tensor, then) if isinstance(then, Tensor) else tensor._version == then


def is_own_forward(module: nn.Module) -> bool:
    """Whether nobody has put another `forward` on this module."""
    forward = module.__dict__.get("forward")
    return forward is None or getattr(forward, "__func__", None) is type(module).forward
