"""Normalized attention guidance: attention over the prompt is pushed away from attention over the harm.

    Z~ = Z+ + phi (Z+ - Z-);  R = |Z~|_1 / |Z+|_1 per token, over all heads;  Z = alpha Z~ min(R, tau) / R + (1 - alpha)
    Z+

Works without classifier-free guidance and in few steps. Source: arXiv 2505.21179, equations 7 to 10 (the released
code's `nag_scale` is phi + 1; its Flux variant takes the 2-norm).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...kernels.normalized_attention_guidance import normalized_attention_guidance
from ..errors import GuidanceError
from .algorithm import Algorithm

__all__ = ["NAG"]

# preset -> (phi, alpha): table 6 of the paper
PRESETS = {"sd15": (2.0, 0.375), "sdxl": (2.0, 0.5), "sd3": (4.0, 0.125), "flux": (4.0, 0.25), "wan": (4.0, 0.25)}


@dataclass(frozen=True)
class NAG(Algorithm):
    """Normalized attention guidance.

    Args:
        preset: the paper's values for "sd15", "sdxl", "sd3", "flux" or "wan"; what is None below is taken from it.
        scale: phi, from 0.
        alpha: share of the guided attention, 0 to 1.
        tau: largest growth of a token's norm, from 1.

    Raises:
        GuidanceError: another preset, or a value outside its range.
    """

    NAME: ClassVar[str] = "nag"
    SEAMS: ClassVar[frozenset[str]] = frozenset({"outputs"})

    preset: str = "sd15"
    scale: float | None = None
    alpha: float | None = None
    tau: float = 2.5

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise GuidanceError(f"nag: preset={self.preset!r}; expected one of {', '.join(PRESETS)}")
        for name, value in zip(("scale", "alpha"), PRESETS[self.preset], strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self._check(scale=(0, 100), alpha=(0, 1), tau=(1, 100))

    def combine(self, positive: Tensor, negative: Tensor, strength: float) -> Tensor:
        """See the top of this file; strength is a factor on phi."""
        scale, alpha = float(self.scale or 0.0), float(self.alpha or 0.0)
        return normalized_attention_guidance(positive, negative, scale * strength, self.tau, alpha)
