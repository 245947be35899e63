"""Small questions about tensors and modules that every method at work in a model asks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["checksum", "is_own_forward", "ordinary", "same_bits", "stamp"]


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


def ordinary(weight: Tensor) -> bool:
    """Whether a weight's numbers are what it says: floating point of 16 bits or more, in memory, no quantised kind."""
    if type(weight) not in (Tensor, nn.Parameter) or weight.is_meta:
        return False
    return weight.is_floating_point() and weight.element_size() >= 2


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> Tensor:
    """The sum of its bits read as integers: () int64, exact, and the same on every device."""
    return tensor.detach().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
