"""Safe latent diffusion: the prediction is steered away from a category where the prompt comes near it.

    d = t - s;  mu = 0 where d >= lambda, else min(|d| S, 1);  gamma = (s - u) mu + s_m m
    m <- beta m + (1 - beta) gamma;  t' = t - [share >= warmup] gamma

with u, t, s the predictions for the negative prompt, the prompt and the category, all in units of noise: thresholds
then mean the same whatever the model predicts. The pipeline's guidance u + w (t' - u) is the paper's.

Source: arXiv 2211.05105, equations 3 to 8, in the signs of diffusers' StableDiffusionPipelineSafe. We differ: each
category has a branch of its own and one of them acts in a step, the best aligned (together they cancel, arXiv
2602.20880); the momentum is float32 and updated once a step; v and flow predictions are taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange, reduce
from torch import Tensor

from ...kernels.safe_guidance_step import safe_guidance_step
from ..errors import GuidanceError
from .algorithm import Algorithm, Guided, Momentum

__all__ = ["PRESETS", "SLD", "alignment", "best_aligned"]

# name -> warmup (the paper's delta, steps of 50), S, lambda, s_m, beta: table 1 of the paper as diffusers has it
PRESETS = {
    "weak": (15 / 50, 20.0, 0.0, 0.0, 0.0),
    "medium": (10 / 50, 1000.0, 0.01, 0.3, 0.4),
    "strong": (7 / 50, 2000.0, 0.025, 0.5, 0.7),
    "max": (0.0, 5000.0, 1.0, 0.5, 0.7),
}
# Below this much noise in a unit of prediction (a flow model at pure noise) predictions say nothing about noise.
_NO_UNIT = 1e-3


@dataclass(frozen=True)
class SLD(Algorithm):
    """Safe latent diffusion.

    Args:
        preset: "weak", "medium", "strong" or "max"; what is None below is taken from it.
        warmup: share of the schedule before which only the momentum builds.
        safety_scale: S, from 0.
        threshold: lambda, in units of noise.
        momentum_scale: s_m, 0 to 1.
        momentum_beta: beta, 0 to below 1.
        patience: dynamic mode: steps for which a category must be silent on an image until its branch is left out
            there, and acts where it is not silent alone; None evaluates every branch in every step, as the paper.
        probe: every so many steps a branch that was left out is evaluated again.
        silent: cosine of t - u and s - u up to which a branch counts as silent, -1 to 1. The default was chosen on the
            canvas, where harmless prompts stay below it at first; the record's "alignment" shows it for your model.

    Raises:
        GuidanceError: another preset, or a value outside its range.

    >>> SLD("strong").momentum_beta
    0.7
    """

    NAME: ClassVar[str] = "sld"
    SEAMS: ClassVar[frozenset[str]] = frozenset({"prediction"})
    GUIDED: ClassVar[bool] = True
    BRANCHES: ClassVar[bool] = True

    preset: str = "medium"
    warmup: float | None = None
    safety_scale: float | None = None
    threshold: float | None = None
    momentum_scale: float | None = None
    momentum_beta: float | None = None
    patience: int | None = None
    probe: int = 8
    silent: float = 0.2  # canvas, first step: harmless prompts -0.1 to 0.14, prompts with the hazard 0.1 to 0.5

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise GuidanceError(f"sld: preset={self.preset!r}; expected one of {', '.join(PRESETS)}")
        names = ("warmup", "safety_scale", "threshold", "momentum_scale", "momentum_beta")
        for name, value in zip(names, PRESETS[self.preset], strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        # lambda above 1 is more than noise itself ever differs by; beta 1 would never learn
        self._check(warmup=(0, 1), safety_scale=(0, 1e6), threshold=(-10, 10), momentum_scale=(0, 1))
        self._check(momentum_beta=(0, 0.9999), probe=(1, 1000), silent=(-1, 1))
        if self.patience is not None:
            self._check(patience=(1, 1000))

    def window(self) -> float:
        return float(self.warmup or 0.0)

    def guide(
        self,
        uncond: Tensor,
        text: Tensor,
        safety: Tensor,
        momentum: Momentum,
        *,
        unit: float,
        active: Tensor,
        level: float,
        update: bool,
        strength: float,
        evaluated: Tensor | None = None,
    ) -> Guided:
        rows = len(text)
        none = torch.zeros(rows, dtype=torch.int64, device=text.device)
        cosines = alignment(uncond, text, safety) if len(safety) and self.patience is not None else None
        loud = evaluated
        if cosines is not None:
            loud = cosines > self.silent if evaluated is None else (cosines > self.silent) & evaluated
        m = momentum.at(level, update)
        if abs(unit) < _NO_UNIT or (not len(safety) and m is None):
            return Guided(text, torch.zeros(rows, device=text.device), none, cosines, loud)
        # without a branch the rest of the momentum acts: s = u has no part of its own
        branches = safety if len(safety) else uncond[None]
        if loud is not None and len(safety):
            branches = torch.where(loud.view(*loud.shape, *[1] * (text.ndim - 1)), safety, uncond)
        options: dict[str, Any] = {
            "guidance_scale": 1.0,  # u + 1 (t - u - gamma) = t - gamma: guidance itself is the pipeline's
            "safety_guidance_scale": self.safety_scale,
            "safety_threshold": self.threshold,
            "momentum_scale": self.momentum_scale,
            "momentum_beta": self.momentum_beta,
            "active": active,
        }
        u, t = (uncond, text) if unit == 1.0 else (uncond * unit, text * unit)
        found = [safe_guidance_step(u, t, s if unit == 1.0 else s * unit, m, **options) for s in branches]
        pick = none if len(found) == 1 else best_aligned(uncond, text, safety, loud)
        guided, new_momentum, scale = (_picked(torch.stack(part), pick) for part in zip(*found, strict=True))
        momentum.keep(new_momentum, update)
        if unit != 1.0:
            guided = guided / unit
        if strength != 1.0:
            guided = torch.lerp(text.float(), guided.float(), strength).to(text.dtype)
        if not len(safety):
            scale = torch.zeros_like(scale)
        elif loud is not None:
            scale = scale * _picked(loud, pick)
        return Guided(guided, scale, pick, cosines, loud)


def alignment(uncond: Tensor, text: Tensor, safety: Tensor) -> Tensor:
    """(K, B) float32: the cosine of the prompt's direction t - u and each category's s - u; 0 where there is none.

    Args:
        uncond, text: (B, ...). safety: (K, B, ...).
    """
    prompt = rearrange((text - uncond).float(), "b ... -> b (...)")
    harm = rearrange((safety - uncond).float(), "k b ... -> k b (...)")
    along = reduce(prompt * harm, "k b m -> k b", "sum")
    return along / (harm.norm(dim=-1) * prompt.norm(dim=-1)).clamp_min(1e-12)


def best_aligned(uncond: Tensor, text: Tensor, safety: Tensor, among: Tensor | None = None) -> Tensor:
    """(B,): the category whose direction s - u the prompt's t - u follows most closely (cosine).

    Args:
        uncond, text: (B, ...). safety: (K, B, ...). among: (K, B) bool, those that may be chosen; None: all.
    """
    cosines = alignment(uncond, text, safety)
    return (cosines if among is None else cosines.masked_fill(~among, -2.0)).argmax(dim=0)


def _picked(values: Tensor, pick: Tensor) -> Tensor:
    """values (K, B, ...), pick (B,) -> (B, ...)."""
    return values[0] if len(values) == 1 else values[pick, torch.arange(len(pick), device=pick.device)]
