"""Which path a kernel takes: Triton on a GPU (or in Triton's interpreter, on request), else plain torch.

| device | matrix kernels | elementwise kernels |
|---|---|---|
| NVIDIA from sm_80; AMD gfx90a, gfx942, gfx950 | Triton | Triton |
| other GPUs: Turing spills and has no bfloat16 products, RDNA spills | torch, made for GPUs | Triton |
| GPUs without Triton (Windows) | torch, made for GPUs | torch |
| CPU | torch, made for CPUs | torch |

`SEMIPERM_KERNELS` is `auto` (default, the table), `triton` or `reference` (torch, made for the tensor's device); a
forced path that cannot run raises.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from .errors import KernelError

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS and slim installations: the reference runs
    triton = tl = None

__all__ = [
    "KernelError",
    "check_tensors",
    "forced",
    "has_matrix_units",
    "interpreted",
    "jit",
    "kernel_path",
    "needs_grad",
    "next_power_of_2",
    "tl",
    "triton",
    "without_autocast",
]


def jit(function):
    """`triton.jit`, or the function itself where Triton is absent: then nothing launches it."""
    return triton.jit(function) if triton is not None else function


# AMD's chips with matrix units that Triton reaches without spilling; what benchmarks/kernels/resources.py compiles for.
_CDNA = ("gfx90a", "gfx942", "gfx950")
_AMPERE = (8, 0)  # the first NVIDIA capability with bfloat16 products and copies to shared memory beside arithmetic


def has_matrix_units(x: Tensor) -> bool:
    """Whether the kernels' matrix products run on the matrix units of x's device, and spill nothing there."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(x.device).gcnArchName.split(":")[0] in _CDNA
    return torch.cuda.get_device_capability(x.device) >= _AMPERE


_MOST_ROWS = 65_535  # programs along the second and third axis of a CUDA grid


def kernel_path(x: Tensor, products: bool = False, rows: int = 1) -> str:
    """Return "triton" or "reference" for an operation on x.

    Args:
        products: whether the operation's Triton kernel needs matrix units (`has_matrix_units`) to pay.
        rows: programs that the kernel lays along the second or third axis of its grid; torch takes more of them than
            such an axis holds.

    Raises:
        KernelError: SEMIPERM_KERNELS is none of its three values, or forces Triton where it cannot run.
    """
    wanted = os.environ.get("SEMIPERM_KERNELS", "auto")
    if wanted not in ("auto", "triton", "reference"):
        raise KernelError(f"SEMIPERM_KERNELS={wanted!r}; expected 'auto', 'triton' or 'reference'")
    if wanted == "reference":
        return "reference"
    if wanted == "auto":
        fits = triton is not None and x.is_cuda and rows <= _MOST_ROWS and (not products or has_matrix_units(x))
        return "triton" if fits else "reference"
    if triton is None:
        raise KernelError("SEMIPERM_KERNELS=triton, but Triton is not installed; pip install triton, or unset it")
    if rows > _MOST_ROWS:
        raise KernelError(
            f"SEMIPERM_KERNELS=triton, but {rows} rows were given where a grid holds {_MOST_ROWS}; give fewer, or unset"
            " it, and torch computes them"
        )
    if not x.is_cuda and not interpreted():
        raise KernelError(
            f"SEMIPERM_KERNELS=triton, but the tensor is on {x.device}; move it to a GPU, set TRITON_INTERPRET=1 before"
            " semiperm is imported, or unset SEMIPERM_KERNELS"
        )
    return "triton"


def forced() -> bool:
    """Whether SEMIPERM_KERNELS forces Triton, also where it does not pay."""
    return os.environ.get("SEMIPERM_KERNELS", "auto") == "triton"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: decided when they were made, by TRITON_INTERPRET."""
    return type(_probe).__name__ == "InterpretedFunction"


@jit
def _probe():
    pass


def without_autocast(function):
    """The function with autocast off: its matmuls run in the precision that it says, not in the caller's."""

    @functools.wraps(function)
    def exact(first: Tensor, *args, **kwargs):
        if not torch.is_autocast_enabled(first.device.type):
            return function(first, *args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return exact


def needs_grad(*tensors: Tensor) -> bool:
    """Whether autograd has to record an operation on these tensors."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def check_tensors(operation: str, first: Tensor, **others: Tensor | None) -> None:
    """Refuse tensors that do not share the first one's device and dtype, or that are not floating point.

    Raises:
        KernelError: names the operation, the tensor, and both devices and dtypes.
    """
    if first.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise KernelError(f"{operation}: dtype {first.dtype}; expected float32, float16 or bfloat16")
    for name, tensor in others.items():
        if tensor is not None and (tensor.device != first.device or tensor.dtype != first.dtype):
            raise KernelError(
                f"{operation}: {name} is {tensor.dtype} on {tensor.device}; expected {first.dtype} on {first.device},"
                " as the first argument"
            )
