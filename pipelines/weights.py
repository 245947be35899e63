"""What a layer multiplies by, however it is stored: the weight that membranes are made from, and held against.

A layer of floating point numbers in memory says so itself. Every other one (cast to 8 bits by layerwise casting, a
tensor subclass of torchao, linears of bitsandbytes and GGUF, offloaded to the meta device) is run on an identity, as
the pipeline runs it: no format is known here, so none can be read wrongly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..methods.errors import ModelError
from ..methods.modules import is_own_forward, ordinary
from .family import Pipeline, denoiser_of, device_of

__all__ = ["base_layer", "shape_of", "weight_of", "weights_of"]

# What a layer with a bias is given in place of 1: what rounding takes from w s + b is then small beside w s. A power of
# two, so that dividing by it is exact; 256 times any weight is far below float16's largest number.
_SCALE = 256.0
# How far, of the norm, a layer may be from linear: 8-bit activations are off by 1 %, another kernel or a nonlinearity
# by far more.
_LINEAR = 0.1


def base_layer(module: nn.Module) -> nn.Module:
    """The layer under PEFT's adapters, or the layer itself: adapters come and go, it stays."""
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        module = module.base_layer
    return module


def shape_of(module: Any) -> tuple[int, int]:
    """(out, in) of a linear layer or a convolution, which a packed weight does not tell."""
    out = getattr(module, "out_features", getattr(module, "out_channels", None))
    into = getattr(module, "in_features", getattr(module, "in_channels", None))
    return (module.weight.shape[0], module.weight.shape[1]) if out is None or into is None else (out, into)


@torch.no_grad()
def weight_of(module: nn.Module, name: str, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The true weight of a layer: (out, in), or a convolution's own shape; its own tensor where that says it.

    W^T = (layer(s I) - layer(0)) / s

    Args:
        name: of the layer, for errors.
        dtype, device: of what the pipeline gives it.

    Raises:
        ModelError: it has no weight in memory, does not run, or is not linear; with the reason.
    """
    module = base_layer(module)
    weight = module.weight
    if ordinary(weight) and is_own_forward(module):
        return weight.detach()
    out, into = shape_of(module)
    kind = f"{name} ({type(module).__name__}, weight {type(weight).__name__} of {weight.dtype} on {weight.device})"
    absent = ModelError(
        f"{kind} has no weight in memory: it is on the meta device, and nothing (no accelerate hook) brings it in; load"
        " the model's weights first"
    )
    if weight.is_meta and is_own_forward(module):
        raise absent
    if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
        raise ModelError(f"{kind} is a convolution of {module.kernel_size}, which membranes do not wrap")
    scale = 1.0 if getattr(module, "bias", None) is None else _SCALE
    identity = torch.eye(into, dtype=dtype, device=device)
    probe = torch.linspace(-1.0, 1.0, into, dtype=torch.float32).sin()[None].to(device, dtype)
    try:
        answers = [_run(module, given) for given in (identity * scale, probe * 0, probe)]
    except Exception as error:  # whatever a foreign layer raises
        raise ModelError(
            f"{kind} is stored in another form than plain numbers, and could not be run to see its weight"
            f" ({type(error).__name__}: {str(error).strip()[:200]}); load the model unquantised, or move it to the"
            " device that its format needs"
        ) from error
    if any(answer.is_meta for answer in answers) or answers[0].shape != (into, out):
        raise absent
    columns, nothing, expected = (answer.float() for answer in answers)
    found = ((columns - nothing) / scale).T.contiguous()
    missed = probe.float().to(found.device) @ found.T + nothing - expected
    missed = missed.norm() / expected.norm().clamp_min(1e-12)
    if not bool(missed <= _LINEAR):  # NaN, too
        raise ModelError(
            f"{kind} is not linear in what it reads (off by {float(missed):.0%} of its answer), so that no weight"
            " stands for it; unload what wraps it, or load the model unquantised"
        )
    return found[..., None, None] if isinstance(module, nn.Conv2d) else found


def _run(module: nn.Module, rows: Tensor) -> Tensor:
    """The layer without hooks of ours, on rows (n, in): (n, out)."""
    call = getattr(type(module), "_semiperm_base", type(module)).__call__
    if isinstance(module, nn.Conv2d):
        return call(module, rows[..., None, None]).flatten(1)
    return call(module, rows)


def weights_of(pipe: Pipeline, modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """`weight_of` several layers of a pipeline's denoiser, by the same names."""
    denoiser, device = denoiser_of(pipe)[0], device_of(pipe)
    dtype = denoiser.dtype if denoiser.dtype.is_floating_point and denoiser.dtype.itemsize > 1 else torch.float32
    return {name: weight_of(module, name, dtype, device) for name, module in modules.items()}
