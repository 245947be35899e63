"""Membranes inside a denoiser, as diffusers hooks: one on the root, one per wrapped projection. No weight is touched.

The root hook sees the text embeddings of every call and makes a plan, once per prompt; methods/membranes/sites.py says
what each projection does with it.
"""

from __future__ import annotations

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from ...methods.membranes.sites import Site
from ..hooks import parameters_of


class SiteHook(ModelHook):
    """One wrapped projection."""

    def __init__(self, site: Site):
        super().__init__()
        self.site = site

    def new_forward(self, module: nn.Module, x: Tensor, *args, **kwargs) -> Tensor:
        return self.site(self.fn_ref.original_forward, module, x, *args, **kwargs)


class RootHook(ModelHook):
    """On the denoiser: reads text and timestep of every call, decides the plan."""

    def __init__(self, state, module: nn.Module):
        super().__init__()
        self.state, self.names = state, parameters_of(module)

    def pre_forward(self, module: nn.Module, *args, **kwargs):
        self.state.begin(dict(zip(self.names, args, strict=False)) | kwargs)
        return args, kwargs

    def post_forward(self, module: nn.Module, output):
        if not torch.compiler.is_compiling():
            self.state.check_sites()
        return output
