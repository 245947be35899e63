"""Membranes inside a denoiser, as diffusers hooks: one on the root, one per wrapped projection. No weight is touched.

The root hook sees the text embeddings of every call and makes a plan, once per prompt; methods/membrane_runtime.py says
what each projection does with it.
"""

from __future__ import annotations

import inspect

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from ..methods.errors import MembraneError
from ..methods.membrane_runtime import Site


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
        self.state = state
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        self.positions = {name: names.index(name) for name in names}
        # Flux is called with t / 1000, the others with t itself
        self.schedule_end = 1.0 if "txt_ids" in self.positions else 1000.0

    def _argument(self, name: str, args: tuple, kwargs: dict):
        if name in kwargs:
            return kwargs[name]
        position = self.positions.get(name, len(args))
        return args[position] if position < len(args) else None

    def pre_forward(self, module: nn.Module, *args, **kwargs):
        state = self.state
        hidden = self._argument("encoder_hidden_states", args, kwargs)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden  # (text, image prompt) of IP-Adapter
        if hidden is None:
            raise MembraneError(
                "the denoiser was called without encoder_hidden_states: a membrane cannot see the prompt"
            )
        timestep = self._argument("timestep", args, kwargs)
        state.ran = True
        if torch.compiler.is_compiling():
            if state.strength != 0:
                state.gamma = state.traced_gamma(hidden, self._fraction(timestep) if state.windowed else None)
            return args, kwargs
        pooled = self._argument("pooled_projections", args, kwargs)
        state.outside = state.windowed and not state.within(float(self._fraction(timestep)))
        state.select(hidden, pooled)
        return args, kwargs

    def _fraction(self, timestep) -> Tensor:
        """How far the schedule has run: 0 at pure noise, 1 at the image."""
        t = torch.as_tensor(timestep).reshape(-1)[0]
        return 1.0 - t.to(torch.float32) / self.schedule_end

    def post_forward(self, module: nn.Module, output):
        if not torch.compiler.is_compiling():
            self.state.check_sites()
        return output
