"""Membranes at work on the projections of a denoiser, whatever framework calls them. No weight is touched.

For every text batch there is a plan: Gamma (B, K), and whether all rows agree. Each projection then runs in one of
three ways, equal to rounding:

    cached   its input *is* the text embedding: the output is computed once per prompt and reused, even W x is saved
    folded   all rows share Gamma: W' = W + U^T diag(Gamma) D once per prompt, then F.linear(x, W')
    fused    y = W x + ((x D^T) * Gamma[:, owner]) U

While torch.compile traces, only the fused form is used, with Gamma as a tensor: no Python state decides, so nothing
recompiles from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from ...kernels.gated_low_rank import gated_low_rank
from ..errors import MembraneError
from ..modules import checksum, is_own_forward, ordinary, same_bits
from .image_site import Openings
from .packing import fold


@dataclass(eq=False)
class Plan:
    """What one text batch asks for. Its tensors are held, so their identity cannot be recycled."""

    hidden: Tensor  # (B, N, d)
    pooled: Tensor | None  # (B, p)
    stamps: tuple  # of hidden and pooled: whether they were changed in place since
    gates: Tensor  # (B, K)
    gamma: Tensor  # (B, K), gates times strength
    mode: str
    neutral: bool  # no gate is open: every bit of the untouched model stays
    uniform: bool  # all rows have the same gates, so that weights can be folded
    grad: bool  # whether gradients were wanted when it was made
    negative: tuple[bool, ...] | None = None  # which rows guide away from their text; None where nobody said
    said: tuple = ()  # what the caller said of its rows: a plan is for calls of which the same is said
    ran: set = field(default_factory=set)  # sites that ran, but for those in compiled graphs
    outputs: dict = field(default_factory=dict)  # site -> cached projection of the text
    fused: dict = field(default_factory=dict)  # site -> (down, up, gamma per row and rank)
    folded: dict | None = None  # site -> folded weight, shared by plans of the same gates; None: not folded
    claimed: bool = False  # whether it asked for folded weights
    modes: set = field(default_factory=set)  # how it was computed: "cached", "folded", "fused"
    openings: Openings = field(default_factory=Openings)  # of image-side membranes

    def fits(self, hidden: Tensor, pooled: Tensor | None) -> bool:
        if self.hidden is not hidden or self.pooled is not pooled or self.grad is not torch.is_grad_enabled():
            return False
        return all(same_bits(t, s) for t, s in zip((hidden, pooled), self.stamps, strict=True) if t is not None)

    def forget(self) -> None:
        """Drop what is kept for speed alone: other plans took its place."""
        self.outputs, self.fused, self.folded = {}, {}, None


class Folds:
    """Folded weights of one set of gates at a time, by site.

    A plan that comes back after another took its place (guidance by separate calls) stays fused: folding at every step
    would cost more than it saves.
    """

    def __init__(self):
        self.gates: tuple | None = None
        self.weights: dict = {}

    def claim(self, plan: Plan) -> None:
        """Called where a plan becomes the current one."""
        gates = tuple(plan.gamma[0].tolist())
        if gates == self.gates:
            plan.folded = self.weights
        elif not plan.claimed:
            # a dictionary of its own: another thread may be using the old one
            self.gates, self.weights = gates, {}
            plan.folded = self.weights
        else:
            plan.folded = None
        plan.claimed = True

    def verify(self) -> None:
        """Forget folds whose weight was changed behind its version, as PEFT does when it fuses a LoRA (`weight.data`).

        Reads every folded weight once, and waits for its device once.
        """
        kept = list(self.weights.items())
        if kept:
            same = [checksum(hit[0]) == hit[-1] for _, hit in kept]
            same = torch.stack([one.to(same[0].device) for one in same]).tolist()
            for (site, _), known in zip(kept, same, strict=True):
                if not known:
                    del self.weights[site]


def modes_of(plans: Sequence[Plan]) -> list[str]:
    """How the plans of a run were computed: "cached", "folded", "fused", "neutral"; none where there was no plan."""
    return sorted(set().union(*(plan.modes for plan in plans))) or ["neutral"][: len(plans)]


class Site:
    """One wrapped projection of one stack of membranes.

    Args:
        state: what all sites share: `strength`, the `plan` of the current call, `outside` (of the window), `gamma` (for
            compiled graphs), `weights_fixed` (the caller knows that no weight changes in place while a plan lives:
            inference tensors keep no version that would tell).
        pair: D, U, owner from `pack`.
        cacheable: whether the output may be kept; None: for plain layers only.
    """

    def __init__(
        self, state, key: str, module: nn.Module, pair: tuple[Tensor, Tensor, Tensor], cacheable: bool | None = None
    ):
        self.state, self.key = state, key
        self.ran = self.graphed = False  # whether it ran at all; whether in a compiled graph
        self.master = pair[:2]  # fp32: what a fold starts from
        self.down, self.up, self.owner = pair
        self.cacheable = cacheable

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        if self.down.device != device or self.down.dtype != dtype:
            self.down, self.up = (t.to(device, dtype) for t in self.master)
            self.owner = self.owner.to(device)

    def __call__(self, original: Callable, module: nn.Module, x: Tensor, *args, **kwargs) -> Tensor:
        """What the module answers for `x`, given its own forward."""
        state = self.state
        self.ran = True
        if torch.compiler.is_compiling():
            self.graphed = True
            if state.strength == 0:
                return original(x, *args, **kwargs)
            return self._add(original(x, *args, **kwargs), x, self.down, self.up, state.gamma[:, self.owner])
        plan = state.plan  # of the call of the denoiser at hand: None where its hook did not run
        if plan is None:
            raise MembraneError(
                f"{self.key} was called before its denoiser; membranes see prompts at the denoiser's forward, call that"
            )
        plan.ran.add(self)
        if plan.neutral or state.outside:
            return original(x, *args, **kwargs)
        if plan.grad:
            return self._fused(original(x, *args, **kwargs), x, plan)
        plain = _plain(module)
        cacheable = plain if self.cacheable is None else self.cacheable
        if cacheable and plan.mode in ("auto", "cached") and (x is plan.hidden or x is plan.pooled):
            if state.weights_fixed or not (x.is_inference() or module.weight.is_inference()):
                return self._cached(module, x, plan, original)
        if plain and plan.mode in ("auto", "folded") and plan.uniform and plan.folded is not None:
            return self._folded(module, x, plan)
        return self._fused(original(x, *args, **kwargs), x, plan)

    def _cached(self, module: nn.Module, x: Tensor, plan: Plan, original) -> Tensor:
        plan.modes.add("cached")
        weight, hit = module.weight, plan.outputs.get(self)
        version = None if weight.is_inference() else weight._version
        if hit is not None and hit[0] is weight and hit[1] == version:
            if hit[3] is None:
                return hit[2].clone()  # inference mode: nothing would tell if the caller changed the kept one
            if hit[2]._version == hit[3]:
                return hit[2]
        y = self._with_pair(original(x), x, plan)
        plan.outputs[self] = (
            (weight, version, y.clone(), None) if y.is_inference() else (weight, version, y, y._version)
        )
        return y

    def _folded(self, module: nn.Module, x: Tensor, plan: Plan) -> Tensor:
        plan.modes.add("folded")
        weight, kept = module.weight, plan.folded
        state = None if weight.is_inference() else weight._version, weight.dtype, weight.device
        hit = kept.get(self)
        if hit is None or hit[0] is not weight or hit[1] != state:
            gamma = plan.gamma[0, self.owner.to(plan.gamma.device)].to(weight.device)
            down, up = (t.to(weight.device) for t in self.master)
            kept[self] = hit = weight, state, fold(weight.detach(), down, up, gamma), checksum(weight)
        folded = hit[2]
        return F.linear(x, folded, module.bias) if folded.ndim == 2 else module._conv_forward(x, folded, module.bias)

    def _fused(self, y: Tensor, x: Tensor, plan: Plan) -> Tensor:
        plan.modes.add("fused")
        return self._with_pair(y, x, plan)

    def _with_pair(self, y: Tensor, x: Tensor, plan: Plan) -> Tensor:
        payload = plan.fused.get(self)
        if payload is None or payload[0].device != y.device or payload[0].dtype != y.dtype:
            gamma = plan.gamma[:, self.owner.to(plan.gamma.device)].to(y.device)
            active = gamma.ne(0).any(dim=0).nonzero().flatten() if not plan.grad else torch.arange(gamma.shape[1])
            down, up = (t.to(y.device)[active.to(y.device)].to(y.dtype) for t in self.master)
            payload = down, up, gamma[:, active.to(y.device)].to(y.dtype)
            if not plan.grad:
                plan.fused[self] = payload
        if not payload[0].shape[0]:
            return y
        down, up, gamma = payload
        return self._add(y, x, down, up, _perturbed(gamma, plan.negative, len(x)) if len(x) < len(gamma) else gamma)

    def _add(self, y: Tensor, x: Tensor, down: Tensor, up: Tensor, gamma_rows: Tensor) -> Tensor:
        return add_low_rank(y, x, down, up, gamma_rows, self.key)


def add_low_rank(y: Tensor, x: Tensor, down: Tensor, up: Tensor, gamma_rows: Tensor, key: str) -> Tensor:
    """y + ((x D^T) * gamma) U, for a linear layer (B, ..., C) or a 1x1 convolution (B, C, H, W).

    Args:
        down, up: (R, in), (R, out). gamma_rows: (rows, R), of which B is a multiple.
        key: of the module, for errors.

    Raises:
        MembraneError: another number of rows.
    """
    if x.shape[0] != gamma_rows.shape[0]:
        if x.shape[0] % gamma_rows.shape[0]:
            raise MembraneError(
                f"{key} got a batch of {x.shape[0]}, but the prompts are {gamma_rows.shape[0]}; expected a"
                " multiple (frames of one prompt side by side)"
            )
        gamma_rows = repeat(gamma_rows, "b r -> (b frames) r", frames=x.shape[0] // gamma_rows.shape[0])
    x = x.to(y.dtype)  # autocast hands over another
    if x.ndim == 4:  # a 1x1 convolution: channels first
        y, x = (rearrange(t, "b c h w -> b h w c") for t in (y, x))
        return rearrange(gated_low_rank(y, x, down, up, gamma_rows), "b h w c -> b c h w")
    return gated_low_rank(y, x, down, up, gamma_rows)


def _plain(module: nn.Module) -> bool:
    """Whether it computes W x with its own weight and nothing else, so that another weight can take its place.

    Everything else (quantised, offloaded, cast or adapted layers) computes W x in its own way: that is left to it.
    """
    if type(module).forward not in (nn.Linear.forward, nn.Conv2d.forward) or not is_own_forward(module):
        return False
    return ordinary(module.weight)


def _perturbed(gamma: Tensor, negative: Sequence[bool] | None, count: int) -> Tensor:
    """The rows that perturbed attention (PAG) hands to a projection: all but the perturbed ones, or these alone.

    They are the last third of [negative, positive, perturbed], or the last half of [positive, perturbed]; anything else
    is given back whole, and refused.

    Source: diffusers' PAGCFGIdentitySelfAttnProcessor2_0 and PAGIdentitySelfAttnProcessor2_0.
    """
    rows = len(gamma)
    if negative is None or len(negative) != rows:
        return gamma
    third, half = rows // 3, rows // 2
    if 3 * third == rows and tuple(negative) == (True,) * third + (False,) * (2 * third):
        return gamma[:count] if count == 2 * third else gamma[-count:] if count == third else gamma
    if 2 * half == rows and not any(negative) and count == half and torch.equal(gamma[:half], gamma[half:]):
        return gamma[:half]
    return gamma
