"""How far a picture is inverted, and where inversion asks the denoiser; the same for diffusers and ComfyUI."""

from __future__ import annotations

__all__ = ["FIRST", "LADDER", "inversion_times"]

LADDER = (0, 1, 5, 10, 25)  # inversion steps; each rung costs more than all before it together
# Where inversion asks the denoiser, as a share of the noise schedule. Told t = 0 it says nothing of the noise that a
# picture still carries; on the canvas signs agree best when it is told .05 to .1 at first (one step: .785 of signs at
# .05, .740 at 0, .631 at .96, the end of the step). 5 steps so find .793, diffusers' DDIMInverseScheduler .721.
FIRST = 0.05
_LAST = 0.961  # where DDIM's first step of 25 stands; the signs hardly depend on it
# Of a step's number, so that steps lie closer together near the picture. It matters little: with 5 steps .7994 of signs
# agree on the canvas at 1 (even steps), .8014 at 1.5, .8015 at 2 (24 pictures).
_POWER = 1.5


def inversion_times(steps: int) -> list[float]:
    """steps + 1 shares of the noise schedule, from 0 (the picture) towards the noise, closer together at first.

    Inverters ask the denoiser at each of them, but at `FIRST` or later.
    """
    return [_LAST * (i / steps) ** _POWER for i in range(steps + 1)]
