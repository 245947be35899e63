"""Which projections of a denoiser are trained."""

from __future__ import annotations

import re
from typing import Any

from ..family import Pipeline, denoiser_of, family_of
from ..text import module_keys, text_projections

__all__ = ["trained_layers"]

_BLOCK = re.compile(r"(^|\.)(attentions|transformer_blocks|single_transformer_blocks)\.\d+\.")


def trained_layers(pipe: Pipeline, layers: str) -> dict[str, Any]:
    """Module key -> module, of `TrainingConfig.layers`.

    "all" in a UNet is SPM's choice: every linear layer and 1x1 convolution of its transformers. In SD3 and Flux it is
    every linear layer of the blocks but for those that modulate norms, which see the time and the pooled text alone.

    Source: SPM's released code (Con6924/SPM, src/models/spm.py), which finds them by the names of classes.
    """
    denoiser, attribute = denoiser_of(pipe)
    tokens, pooled = text_projections(pipe)
    found = dict(tokens | pooled)
    family = family_of(pipe)
    attention = family.cross_attention or family.self_attention
    for key, (path, module) in module_keys(denoiser, attribute).items():
        pointwise = set(getattr(module, "kernel_size", (1,))) == {1}
        if layers == "text" or not _BLOCK.search(path) or not pointwise or "norm" in path:
            continue
        if layers == "all" or attention & set(path.split(".")):
            found[key] = module
    return found
