"""When a method acts: a window of the noise schedule, with one meaning and one boundary rule in every face.

`share` runs from 0 (pure noise) to 1 (the image) along the *unshifted* schedule. For UNets it is 1 - t / (T - 1) with
the timestep t of T; for flow models 1 - u, where u is the noise level before the shift s that the sampler applies:

    sigma = s u / (1 + (s - 1) u),   u = sigma / (s - (s - 1) sigma)

(exp(mu) in the place of s where the shift is dynamic). ComfyUI's `percent_to_sigma` has the same meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .errors import SemipermError

__all__ = ["EDGE", "Window", "flow_share"]

# A step this close to an edge stands on it: float32 sigmas, shifted and back, are off by 1e-6; steps of a run of 1,000
# are 1e-3 apart.
EDGE = 1e-4


@dataclass(frozen=True)
class Window:
    """The steps whose share lies in [start, end), and the last one too where end is 1. [0, 1] is every step.

    Args:
        start, end: 0 <= start < end <= 1. Two windows that share an edge share no step.

    Raises:
        SemipermError: values out of order or out of range.

    >>> [share for share in (0.0, 0.2, 0.4, 0.6, 0.8) if Window(0.2, 0.6).contains(share)]
    [0.2, 0.4]
    """

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        if not 0.0 <= self.start < self.end <= 1.0:
            raise SemipermError(
                f"window [{self.start}, {self.end}]; expected 0 <= start < end <= 1, shares of the noise schedule from"
                " pure noise (0) to the image (1)"
            )

    @property
    def whole(self) -> bool:
        """Whether every step is inside."""
        return (self.start, self.end) == (0.0, 1.0)

    def missed(self, steps: Sequence[dict]) -> str | None:
        """What is wrong where none of a run's steps was active; None where one was.

        Args:
            steps: {"share", "active", ...} of each step, as reports have them.
        """
        if not steps or any(step["active"] for step in steps):
            return None
        shares = [step["share"] for step in steps]
        return (
            f"none of the {len(steps)} steps of this run (from {min(shares):.3g} to {max(shares):.3g} of the noise"
            f" schedule) lay inside the window [{self.start:g}, {self.end:g}], so the picture is the untouched model's:"
            " widen start and end, or take more steps"
        )

    def contains(self, share: float | Tensor) -> bool | Tensor:
        """Whether a step at this share of the schedule is inside; a number, or a tensor, for graphs."""
        return (self.start - EDGE <= share) & ((share < self.end - EDGE) | (self.end == 1.0))


def flow_share(sigma: float | Tensor, shift: float = 1.0) -> float | Tensor:
    """The share of the unshifted schedule at which a flow model's noise level is sigma.

    Args:
        sigma: 1 (pure noise) to 0, as the sampler uses it.
        shift: s > 0, what the sampler shifted the schedule by; 1 is none.

    Source: arXiv 2403.03206 (SD3), equation 23, solved for the unshifted time.
    """
    return 1.0 - sigma / (shift - (shift - 1.0) * sigma)
