"""The weights of a checkpoint as they were loaded, whatever LoRA ComfyUI has patched into them in the meantime.

ComfyUI adds LoRAs to the weights in place and leaves them there between runs; all clones of a model share these weights
and the copies that ComfyUI keeps of the originals.
"""

from __future__ import annotations

from torch import Tensor

_DENOISER = "diffusion_model."


def base_weights(model) -> dict[str, Tensor]:
    """Path in the model -> weight of the denoiser as loaded: neither this clone's LoRAs nor another's are in it.

    Args:
        model: ComfyUI's ModelPatcher. Merged models count as the first of their models, since ComfyUI patches the other
            ones in like LoRAs.
    """
    found = {}
    for path, (original, *_) in model.get_key_patches(_DENOISER).items():
        weight, convert = original if isinstance(original, tuple) else (original, None)
        if getattr(_layer(model, path), "scale_weight", None) is not None:  # scaled 8-bit weights: times their scale
            weight = convert(weight.float())
        found[path] = weight.detach()
    return found


def _layer(model, path: str):
    layer = model.model
    for name in path.rpartition(".")[0].split("."):
        layer = getattr(layer, name)
    return layer
