"""Image-side membranes on a denoiser's layers: which layers, and the hook around each.

The layers are those that safe guidance's attention seam pushes, at their answer: `attn2.to_out.0` where text is read by
cross-attention, `attn.to_out.0` of joint attention (the image's part), and `proj_out` of Flux's single blocks, where
text and image are one sequence, text first. What cross-attention answers says little of a picture that its text does
not speak of; for membranes that are fitted on pictures there is `attn1.to_out.0`, too.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from ...methods.errors import MembraneError
from ...methods.membranes.image_site import ImageSite, Openings
from ...methods.membranes.types import Membranes
from ..family import Family
from ..text import module_keys
from ..weights import shape_of

__all__ = ["Chained", "ImageHook", "grid_of", "image_hooks", "image_layers", "opening_pictures", "reads_text"]

_CROSS = re.compile(r"(^|\.)attn[12]\.to_out\.0$")
_READS_TEXT = re.compile(r"(^|_)(attn2?_to_out_0|proj_out)$")
_JOINT = re.compile(r"(^|\.)transformer_blocks\.\d+\.attn\.to_out\.0$|^single_transformer_blocks\.\d+\.proj_out$")


def image_layers(denoiser: nn.Module, attribute: str, family: Family) -> dict[str, tuple[nn.Module, bool]]:
    """Module key -> (layer, whether its tokens are text first) of every layer whose image tokens can be read.

    Raises:
        MembraneError: there is none.
    """
    pattern = _CROSS if family.cross_attention else _JOINT
    found = {
        key: (module, path.startswith("single_"))
        for key, (path, module) in module_keys(denoiser, attribute).items()
        if pattern.search(path) and getattr(module, "weight", None) is not None
    }
    if not found:
        raise MembraneError(
            f"0 layers of this {type(denoiser).__name__} give image tokens that a membrane can read (attn1.to_out.0,"
            " attn2.to_out.0, attn.to_out.0, single blocks' proj_out): expected SD1.x, SD2, SDXL, SD3 or Flux; take"
            " side='text'"
        )
    return found


def reads_text(key: str) -> bool:
    """Whether a layer of `image_layers` sees the text: all but the self-attention of UNets."""
    return bool(_READS_TEXT.search(key))


def image_hooks(
    handle, membranes: Membranes, layers: dict[str, tuple[nn.Module, bool]], columns: Sequence[int], width: int
) -> list[tuple[nn.Module, ImageHook]]:
    """(layer, hook) of all layers that image-side membranes read.

    Args:
        columns: of gamma (B, width), one a membrane.

    Raises:
        MembraneError: a layer that this model has not, or another width.
    """
    found = []
    for key in membranes.image_keys:
        parts = [(c, m) for c, m in zip(columns, membranes, strict=True) if m.visual and key in m.visual.sites]
        concept = parts[0][1].concept
        if key not in layers:
            raise MembraneError(
                f"the image-side membrane for {concept!r} reads {key}, which this {type(handle.denoiser).__name__} has"
                f" not (it has e.g. {next(iter(layers))!r}): it was made for another architecture"
            )
        module, after_text = layers[key]
        out = shape_of(module)[0]
        wrong = [m.concept for _, m in parts if m.visual.sites[key].channels != out]
        if wrong:
            raise MembraneError(
                f"{key} answers tokens of {out} channels, the image-side membrane for {wrong[0]!r} reads"
                f" {parts[0][1].visual.sites[key].channels}: it was made for another base model"
            )
        site = ImageSite(key, [(column, m.visual) for column, m in parts], width, after_text)
        found.append((module, ImageHook(handle, site)))
    return found


class ImageHook:
    """Around one layer: its answer without the concepts that its tokens show."""

    def __init__(self, handle, site: ImageSite):
        self.handle, self.site, self.key = handle, site, site.key
        self.graphed = False

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        self.site.place(device)

    def __call__(self, original: Callable, module: nn.Module, x: Tensor, *args, **kwargs) -> Tensor:
        y, call, site = original(x, *args, **kwargs), self.handle.call, self.site
        if call is None:
            raise MembraneError(
                f"{self.key} was called before its denoiser; membranes see a call at the denoiser's forward, call that"
            )
        if torch.compiler.is_compiling():
            self.graphed = True
            if self.handle.strength == 0:
                return y
            return site.edit(y, site.packed_at(call.share, y.dtype), call.gamma, call.text)[0]
        plan = call.plan
        plan.ran.add(self)
        if plan.neutral or not call.active:
            return y
        site.place(y.device)
        gamma = plan.gamma.to(y.device)
        y, opened = site.edit(y, site.packed_at(call.share, y.dtype), gamma, call.text)
        plan.openings.add(opened.detach(), site, gamma)
        return y


class Chained:
    """Two hooks around one layer."""

    def __init__(self, outer: Callable, inner: Callable):
        self.outer, self.inner = outer, inner

    def __call__(self, original: Callable, module: nn.Module, *args, **kwargs):
        return self.outer(functools.partial(self.inner, original, module), module, *args, **kwargs)


def grid_of(inputs: dict, sample: Tensor) -> Tensor | tuple[int, int]:
    """What tells (rows, columns) of a call's image tokens: the latents' size, or the tokens' places."""
    ids = inputs.get("img_ids")
    return tuple(sample.shape[-2:]) if ids is None else ids


def opening_pictures(openings: Sequence[tuple[Openings, int]], column: int, grid) -> list[Image.Image]:
    """Where a membrane opened in each row, as grey pictures of the latents' size: white is fully open."""
    if isinstance(grid, Tensor):
        grid = tuple(int(n) + 1 for n in grid.reshape(-1, grid.shape[-1])[:, 1:].max(dim=0).values.tolist())
    maps = [each.map(row, column, *grid) for each, row in openings]
    return [Image.fromarray((found * 255).round().byte().numpy()) for found in maps]
