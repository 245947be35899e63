"""Which categories' branches are worth a row of the denoiser: for each category and image, in each step.

A branch that stays silent for `patience` evaluations is left out, and looked at again every `probe` steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Branches"]


class Branches:
    """Of one run; on the CPU, image by image, so that an image fares the same in every batch.

    Args:
        categories: how many.
        patience: silent evaluations after which a branch is left out; None leaves none out.
        probe: every so many steps a branch that was left out is evaluated again.
    """

    def __init__(self, categories: int, patience: int | None, probe: int):
        self.categories, self.patience, self.probe = categories, patience, probe
        self.silent: Tensor | None = None  # (K, B) steps since each branch was loud

    @classmethod
    def of(cls, config: Any) -> Branches:
        """As the first algorithm of a `SafeGuidanceConfig` with a `patience` says."""
        dynamic = next((one for one in config.acting if getattr(one, "patience", None) is not None), None)
        return cls(len(config.chosen), getattr(dynamic, "patience", None), getattr(dynamic, "probe", 1))

    def wanted(self, images: int) -> Tensor:
        """(K, B) bool: what is to be evaluated in the step that begins; those left out wait on."""
        if self.silent is None or self.silent.shape[1] != images:
            self.silent = torch.zeros(self.categories, images, dtype=torch.int64)
        if self.patience is None:
            return torch.ones(self.categories, images, dtype=torch.bool)
        waited = self.silent - self.patience
        waiting = (waited >= 0) & (waited % self.probe != self.probe - 1)
        self.silent += waiting
        return ~waiting

    def heard(self, evaluated: Tensor, loud: Tensor) -> None:
        """What came of it: both (K, B) bool; a branch that was not evaluated keeps waiting."""
        if self.silent is not None:
            evaluated, loud = evaluated.cpu(), loud.cpu()
            self.silent = torch.where(loud, 0, self.silent + (evaluated & ~loud).long())
