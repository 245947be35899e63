"""Where tokens are pushed: the outputs of the attention layers of ComfyUI's UNets, SD3, Flux and Wan.

UNets have patches for it. SD3 and Flux are reached through the attention override, or, in newer ComfyUI, by the UNets'
patch; Wan at each self-attention. What other packs patched there stays in the chain.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.wan.model import WanModel
from einops import repeat
from torch import Tensor, cat

from ...methods.errors import TokenMergingError
from ...methods.token_merging.merging import grid_of, merge_tokens, token_mask
from ..extra_rows import rows_of

KNOWN = (UNetModel, MMDiT, Flux, WanModel)
_UNET_BLOCKS = {"input": "input_blocks.{}.1", "middle": "middle_block.1", "output": "output_blocks.{}.1"}


class Layers:
    """The attention layers of one denoiser.

    Args:
        patch: the TokenMergingPatch: its `config`, `images`, `layout` of the current call, and `record`.
        unet: the denoiser.
    """

    def __init__(self, patch, unet):
        self.patch, self.unet = patch, unet
        self.blocks = patch.config.blocks or (("output_blocks",) if isinstance(unet, UNetModel) else ("",))
        self.names = [
            f"{name}.{i}"
            for name in ("joint_blocks", "double_blocks", "single_blocks")
            for i in range(len(getattr(unet, name, ())))
        ]
        self.begin_run()

    def begin_run(self) -> None:
        """Forget: a new run begins."""
        self._masks, self._number = {}, 0
        self.reached: set[str] = set()  # paths of the layers that were pushed
        self._by_override, self._by_patch = False, False

    def begin_call(self) -> None:
        """The denoiser begins with its first layer."""
        self._number = 0

    def grid(self, shape) -> tuple[int, int, int] | None:
        """(tokens, rows, columns) of the layers for a latent of this shape; None: it differs from layer to layer."""
        if isinstance(self.unet, UNetModel):
            return None
        size = self.unet.patch_size
        size = (1, size, size) if isinstance(size, int) else tuple(size)
        frames, rows, columns = (math.ceil(n / p) for n, p in zip((1, *shape[2:])[-3:], size, strict=True))
        return frames * rows * columns, rows, columns

    def install(self, patched) -> None:
        """Reach the layers of this clone. With closures: ComfyUI deep-copies what lies in model_options."""
        if isinstance(self.unet, UNetModel):
            patched.set_model_attn1_output_patch(lambda n, extra: self._unet(n, extra, "attn1"))
            if self.patch.config.cross_attention:
                patched.set_model_attn2_output_patch(lambda n, extra: self._unet(n, extra, "attn2"))
        elif isinstance(self.unet, WanModel):
            for i in range(len(self.unet.blocks)):
                path = f"blocks.{i}.self_attn"
                name = f"diffusion_model.{path}.forward"
                patched.add_object_patch(name, self._wan(patched.get_model_object(name), path))
        else:
            options = patched.model_options["transformer_options"]
            options["optimized_attention_override"] = self._override(options.get("optimized_attention_override"))
            patched.set_model_attn1_output_patch(lambda n, extra: self._sliced(n, extra))

    def _unet(self, n: Tensor, extra: dict, kind: str) -> Tensor:
        block = extra.get("block") or ("", 0)
        place = _UNET_BLOCKS.get(block[0], block[0]).format(block[1])
        return self._push(n, f"{place}.transformer_blocks.{extra.get('block_index', 0)}.{kind}", extra)

    def _wan(self, original: Callable, path: str) -> Callable:
        def forward(*args, **kwargs):
            return self._push(original(*args, **kwargs), path, kwargs.get("transformer_options") or {})

        return forward

    def _override(self, previous: Callable | None) -> Callable:
        def attend(func, q, k, *args, **kwargs):
            out = previous(func, q, k, *args, **kwargs) if previous else func(q, k, *args, **kwargs)
            if self.patch.layout is None or self._by_patch or out.ndim != 3 or q.shape[-2] != k.shape[-2]:
                return out
            return self._joint(out, kwargs.get("transformer_options") or {})

        return attend

    def _joint(self, out: Tensor, options: dict) -> Tensor:
        """After an attention over [text, image] of SD3 or Flux, or over the image alone (SD3.5's second one)."""
        layout, length = self.patch.layout, out.shape[1]
        tokens = layout.grid[0]
        # behind Flux's image there may be further ones, before SD3's tokens that are no text of ours
        start = length - tokens if isinstance(self.unet, MMDiT) else layout.text
        if start < 0 or start + tokens > length:
            return out
        self._number += start > 0
        self._by_override = True
        return self._part(out, start, self._path(options) + (".attn2" if start == 0 else ""), options)

    def _sliced(self, n: Tensor, extra: dict) -> Tensor:
        """The same, called by a newer ComfyUI's Flux, which says where the image is; the override then rests."""
        if self.patch.layout is None or "img_slice" not in extra:
            return n
        already = self._by_override and not self._by_patch  # this first layer, in the override
        self._by_patch = True
        return n if already else self._part(n, extra["img_slice"][0], self._path(extra), extra)

    def _path(self, options: dict) -> str:
        if options.get("block_type") in ("double", "single"):  # newer ComfyUI says it
            return f"{options['block_type']}_blocks.{options.get('block_index')}"
        return self.names[min(max(self._number, 1), len(self.names)) - 1]

    def _part(self, out: Tensor, start: int, path: str, options: dict) -> Tensor:
        end = start + self.patch.layout.grid[0]
        part = out[:, start:end]
        pushed = self._push(part, path, options)
        return out if pushed is part else cat([out[:, :start], pushed, out[:, end:]], dim=1)

    def _push(self, x: Tensor, path: str, options: dict) -> Tensor:
        """Push the tokens (B, N, C) of one layer, where the window, `blocks` and `max_downscale` let it in."""
        layout, config = self.patch.layout, self.patch.config
        if layout is None or not path.startswith(self.blocks) or (layout.grid and x.shape[1] != layout.grid[0]):
            return x
        expected = rows_of(x, options).total
        if x.shape[0] != expected:
            raise TokenMergingError(
                f"{path} runs {x.shape[0]} rows where the model was given {expected}: another node regroups the batch,"
                " as HyperTile does; take it out, or put it before Negative Token Merging"
            )
        height, width = layout.grid[1:] if layout.grid else layout.size
        frames, rows, columns = grid_of(x.shape[1], height, width)
        if rows * config.max_downscale < layout.size[0] or columns * config.max_downscale < layout.size[1]:
            return x
        masks = self.patch.images.masks if self.patch.images else None
        mask = self._mask(masks, x, height, width) if masks else None
        groups = layout.groups
        reference = x[groups.start : groups.start + groups.count]
        merged, pushed = merge_tokens(
            x, reference, layout.padded(x.shape[0]), config, mask,
            strength=layout.strength, threshold=layout.threshold, frames=frames if groups.sources else 1,
        )  # fmt: skip
        self.patch.record.add(layout.images, pushed)
        self.reached.add(path)
        return merged

    def _mask(self, masks: list[Tensor], x: Tensor, height: int, width: int) -> Tensor:
        count = self.patch.layout.groups.count
        key = (x.shape[1], height, width, count, x.device)
        if key not in self._masks:
            mask = token_mask([mask.cpu() for mask in masks], x.shape[1], height, width)
            self._masks[key] = repeat(mask, "r n -> (owner r) n", owner=count // len(masks)).to(x.device)
        return self._masks[key]
