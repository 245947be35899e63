"""The attention seam on ComfyUI's UNets: values that text gives, and outputs over the prompt and over the harm.

Projections of cross-attention (`attn2.to_q`, `to_v`, `to_out`) are reached by object patches of their forward, around
whatever other nodes put there, so that none of ComfyUI's single slots (attn2_replace) is taken.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from einops import rearrange
from torch import Tensor

from ...methods.errors import GuidanceError
from ..root_patch import add_around

__all__ = ["Layers"]

_ROOT = "diffusion_model"


class Layers:
    """The cross-attention layers of one model, for one `GuidancePatch`.

    Args:
        together: (1, N, d), all categories. states: (P, d), their phrases' last tokens.
    """

    def __init__(self, patch, together: Tensor | None, states: Tensor | None):
        self.patch, self.config = patch, patch.config
        self.together, self.states = together, states
        self.begin_run()

    def begin_run(self) -> None:
        self.kept: dict[str, Tensor] = {}  # values and keys of the categories, by layer
        self.queries: dict[str, Tensor] = {}
        self.shares: list[Tensor] = []
        self.acted = 0

    def extra(self, x: Tensor, args, kwargs: dict) -> None:
        """The rows that a call gets besides: none."""

    def install(self, patched) -> None:
        """Put a patch on each layer of this ModelPatcher.

        Raises:
            GuidanceError: no UNet with cross-attention.
        """
        unet = patched.get_model_object(_ROOT)
        paths = [p for p, _ in unet.named_modules() if p.endswith("attn2")] if isinstance(unet, UNetModel) else []
        if not paths:
            raise GuidanceError(
                f"a {type(unet).__name__} has no cross-attention that safe guidance knows in ComfyUI; expected SD1.x,"
                " SD2, SDXL, SD3 or Flux: for other models use Safe Guidance (sld), or Prompt Filter"
            )
        for path in paths:
            module = patched.get_model_object(f"{_ROOT}.{path}")
            if self.config.having("values"):
                self._around(patched, f"{path}.to_v", lambda original, p=path, m=module: self._values(original, p, m))
            if self.config.having("outputs"):
                self._around(patched, f"{path}.to_q", lambda original, p=path: self._query(original, p))
                self._around(
                    patched, f"{path}.to_out", lambda original, p=path, m=module: self._combine(original, p, m)
                )

    @staticmethod
    def _around(patched, path: str, make: Callable) -> None:
        add_around(patched, f"{_ROOT}.{path}.forward", make, outermost=True)

    def _values(self, original: Callable, path: str, module) -> Callable:
        def forward(x, *args, **kwargs):
            values = original(x, *args, **kwargs)
            rows = self.patch.positive
            if not rows:
                return values
            if path not in self.kept:  # by the class's forward: other nodes' patches count rows
                states = self.states.to(values)
                self.kept[path] = type(module.to_v).forward(module.to_v, states).detach()
            part, share = values[rows], torch.zeros(len(rows), device=values.device)
            for algorithm in self.config.having("values"):
                edited, taken = algorithm.edit_values(part, self.kept[path], module.heads, self.config.strength)
                edited[:, 0] = part[:, 0]  # the begin-of-text token is no word
                part, share = edited, share + taken
            values = values.clone()
            values[rows] = part
            self._acted(share)
            return values

        return forward

    def _query(self, original: Callable, path: str) -> Callable:
        def forward(x, *args, **kwargs):
            query = original(x, *args, **kwargs)
            if self.patch.positive:
                self.queries[path] = query
            return query

        return forward

    def _combine(self, original: Callable, path: str, module) -> Callable:
        def forward(x, *args, **kwargs):
            query, rows = self.queries.pop(path, None), self.patch.positive
            if query is None or not rows:
                return original(x, *args, **kwargs)
            combined, share = self.config.combine(x[rows], self._over_harm(path, module, query[rows]))
            self._acted(share)
            x = x.clone()
            x[rows] = combined
            return original(x, *args, **kwargs)

        return forward

    def _over_harm(self, path: str, module, query: Tensor) -> Tensor:
        if f"{path}.k" not in self.kept:
            text = self.together.to(query)
            for name in ("k", "v"):
                layer = getattr(module, f"to_{name}")
                self.kept[f"{path}.{name}"] = type(layer).forward(layer, text).detach()
        q, k, v = (
            rearrange(t, "b n (h c) -> b h n c", h=module.heads)
            for t in (query, self.kept[f"{path}.k"], self.kept[f"{path}.v"])
        )
        k, v = (t.expand(len(q), -1, -1, -1) for t in (k, v))
        return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n c -> b n (h c)")

    def _acted(self, share: Tensor) -> None:
        self.shares.append(share.detach())
        self.acted += 1
