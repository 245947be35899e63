"""Membranes on any diffusers pipeline of the SD1.x, SD2, SDXL, SD3 and Flux families.

membranes = erase_concepts(pipe, ["robot"], surrogate="tree")
handle = apply_membranes(pipe, membranes)
image = pipe("a photo of a robot").images[0]
handle.report()
remove_membranes(pipe)
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ...methods.errors import MembraneError
from ...methods.membranes.base_model import check_base_models
from ...methods.membranes.config import MembraneConfig
from ...methods.membranes.gate_bank import GateBank
from ...methods.membranes.packing import pack
from ...methods.membranes.types import Membrane, Membranes
from ..family import Pipeline, denoiser_of, family_of
from ..text import encode_text, module_keys
from ..weights import shape_of, weights_of
from .state import MembraneHandle
from .visual import image_layers

__all__ = ["apply_membranes", "remove_membranes"]


def apply_membranes(
    pipe: Pipeline, membranes: Membrane | Iterable[Membrane | Membranes], config: MembraneConfig | None = None
) -> MembraneHandle:
    """Let membranes act on a loaded pipeline, in place of those it has; nothing changes if anything is wrong.

    y = W x + sum_k gamma_k(row) up_k (down_k x) in every wrapped projection, with gamma per row of the batch.
    Image-side membranes act on what layers answer (methods/membranes/visual.py), with a gate for every token. The
    negative and unconditional rows are left alone (`MembraneConfig.negative_rows`).

    Args:
        pipe: SD1.x, SD2, SDXL, SD3 or Flux pipeline (text-to-image, image-to-image, ...), `torch.compile`d or not.
        membranes: one, several, or stacks of them.
        config: see `MembraneConfig`.

    Returns:
        A handle: `.report()` tells what fired in the last call, `.remove()` undoes; also a context manager.

    Raises:
        ModelError: an unsupported pipeline.
        MembraneError: no membranes, keys that match no module, shapes that disagree, another base model, or a gate that
            a membrane cannot serve.

    Source: SPM (arXiv 2312.16145), equations 3, 8 and 9; methods/membranes/gates.py says where we differ.

    >>> with apply_membranes(pipe, membranes) as handle:
    ...     image = pipe("a robot in sketch style on sky", num_inference_steps=2).images[0]
    >>> handle.report()["concepts"]
    ['robot', 'ghost']
    """
    config = config or MembraneConfig()
    membranes = _flatten(membranes)
    family = family_of(pipe)
    denoiser, attribute = denoiser_of(pipe)
    available = {key: module for key, (_, module) in module_keys(denoiser, attribute).items()}
    for membrane in membranes:
        _check_keys(membrane, available, denoiser)
    layers = image_layers(denoiser, attribute, family) if membranes.image_keys else {}
    sites = {}
    for key in membranes.module_keys:
        pair = pack(membranes, key, cross_terms=config.gate == "official")
        _check_shape(key, available[key], pair)
        sites[key] = (available[key], pair)
    if config.check_base:
        wrapped = dict.fromkeys((*membranes.module_keys, *(key for key in membranes.image_keys if key in layers)))
        check_base_models(membranes, weights_of(pipe, {key: available[key] for key in wrapped}))
    bank = GateBank(functools.partial(encode_text, pipe), membranes, config.gate, config.negative_rows)
    handle = MembraneHandle(pipe, membranes, config, sites, bank, layers)
    handle.replace(pipe)
    return handle


def remove_membranes(pipe: Pipeline) -> None:
    """Undo `apply_membranes`: the pipeline computes the untouched model's bits again. Without membranes: nothing."""
    MembraneHandle.clear(pipe)


def _flatten(membranes: Membrane | Iterable[Membrane | Membranes]) -> Membranes:
    if isinstance(membranes, Membrane):
        membranes = [membranes]
    flat = [m for item in membranes for m in ([item] if isinstance(item, Membrane) else item)]
    if not flat:
        raise MembraneError("apply_membranes got no membranes; expected at least one, or call remove_membranes")
    return Membranes(flat)


def _check_keys(membrane: Membrane, available: dict[str, nn.Module], denoiser: nn.Module) -> None:
    missing = [key for key in membrane.modules if key not in available]
    if missing:
        example = next(iter(available), "none")
        raise MembraneError(
            f"the membrane for {membrane.concept!r} matched {len(membrane.modules) - len(missing)} of"
            f" {len(membrane.modules)} modules of this {type(denoiser).__name__}; it wraps e.g. {missing[0]!r}, which"
            f" does not exist here (this model has e.g. {example!r}): it belongs to another architecture, or wraps a"
            " text encoder, which is not supported"
        )


def _check_shape(key: str, module: Any, pair: tuple[Tensor, Tensor, Tensor]) -> None:
    down, up, _ = pair
    shape = shape_of(module)
    pointwise = not hasattr(module, "kernel_size") or (
        set(module.kernel_size) == {1} and set(module.stride) == {1} and module.groups == 1 and not any(module.padding)
    )
    if not pointwise or shape != (up.shape[1], down.shape[1]):
        raise MembraneError(
            f"{key}: membrane of (out, in) = {(up.shape[1], down.shape[1])} on a {type(module).__name__} of {shape};"
            f" expected the same (out, in) and, for convolutions, a 1x1 kernel: it was made for"
            " another base model"
        )
