"""Which projections of a ComfyUI model are trained: the same as on diffusers, by the same names."""

from __future__ import annotations

import re
from dataclasses import dataclass

import comfy.lora
from torch import Tensor

from ...methods.errors import MembraneError
from ..base_weights import base_weights
from ..membranes.concept_text import reads_text
from ..membranes.patch import part_of, target_of

__all__ = ["Layer", "trained_layers"]

# diffusers' names only, as membrane files have them
_OURS = re.compile(r"^lora_(unet_(down|mid|up)_block|transformer_)")
_BLOCK = re.compile(r"_(attentions|transformer_blocks|single_transformer_blocks)_\d+_")
_CROSS = re.compile(r"^lora_(unet_.*_attn2_|transformer_.*_attn_)")


@dataclass(frozen=True)
class Layer:
    """One projection: its path in the model, the rows of that weight that are its own (None: all), and these rows."""

    path: str
    part: tuple[int, int] | None
    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.weight.shape[:2])


def trained_layers(model, layers: str) -> dict[str, Layer]:
    """Module key -> layer, of `TrainingConfig.layers`.

    Raises:
        MembraneError: an architecture without known projections.
    """
    found, weights = {}, base_weights(model)
    for key, target in comfy.lora.model_lora_keys_unet(model.model, {}).items():
        wanted = reads_text(key) or (
            layers != "text"
            and _OURS.match(key)
            and _BLOCK.search(key)
            and "norm" not in key
            and (layers == "all" or _CROSS.match(key))
        )
        if not wanted or (place := target_of(target)) is None:
            continue
        path, part = place
        if f"{path}.weight" not in weights:  # ComfyUI's table also names what other models of the family have
            continue
        weight = part_of(weights, path, part)
        if weight.ndim in (2, 4) and weight[0, 0].numel() == 1:  # a projection, or a 1x1 convolution that is one
            found[key] = Layer(path, part, weight)
    if not found:
        raise MembraneError(
            f"a {type(model.model).__name__} model has no known projections to train; expected SD1.x, SD2, SDXL, SD3 or"
            " Flux"
        )
    return found
