"""How membranes act, in every face."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import MembraneError
from ..schedule import Window
from .gates import GATES

__all__ = ["MODES", "MembraneConfig"]

MODES = ("auto", "fused", "folded", "cached")


@dataclass(frozen=True)
class MembraneConfig:
    """How membranes act.

    Args:
        strength: factor on every gate; 0 leaves every bit of the untouched model, 1 is the trained strength.
        gate: "auto" (a membrane's detector or a phrase of it in the prompt's words, whichever opens wider; "always"
            where the detector cannot tell, the words alone where the text encoder does not know them, "paper" where
            there is no detector), "probe" (the detector alone), "paper" (SPM's facilitated transport), "official"
            (SPM's released inference: squared gates and cross terms), "always".
        negative_rows: whether gates may also open in the negative and unconditional rows. There a membrane takes the
            concept out of what the picture is steered *away* from, so that a negative prompt that names it no longer
            works: False. True is as SPM's released code does it, and lets a membrane of negative strength act there.
        mode: "auto", "fused", "folded" or "cached"; equal to rounding, "auto" is fastest.
        start, end: the `Window` of the noise schedule in which they act, 0 pure noise, 1 the image; [0, 1] is always.
        check_base: refuse membranes whose `base_model` differs from this model's weights.

    Raises:
        MembraneError: a value outside its range.
        SemipermError: a window out of order.

    >>> MembraneConfig(strength=0.5, end=0.8).window
    Window(start=0.0, end=0.8)
    """

    strength: float = 1.0
    gate: str = "auto"
    mode: str = "auto"
    start: float = 0.0
    end: float = 1.0
    check_base: bool = True
    negative_rows: bool = False

    def __post_init__(self):
        if not math.isfinite(float(self.strength)):
            raise MembraneError(f"strength={self.strength}; expected a finite number, 0 for the untouched model")
        if self.gate not in ("auto", *GATES):
            raise MembraneError(f"gate={self.gate!r}; expected one of {('auto', *GATES)}")
        if self.mode not in MODES:
            raise MembraneError(f"mode={self.mode!r}; expected one of {MODES}")
        Window(self.start, self.end)

    @property
    def window(self) -> Window:
        return Window(self.start, self.end)
