"""A run of a pipeline as a method sees it: what was encoded for it, and what was recorded."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .rows import Encoded

__all__ = ["Run"]


class Run:
    """One call of a pipeline: from its first `encode_prompt` to the next one's. Each thread has its own.

    Args:
        record: whatever the method keeps of a run.
    """

    def __init__(self, record: Any):
        self.record, self.thread = record, threading.get_ident()
        self.encodes = 0  # calls of encode_prompt: a run may need several before it denoises
        self.reads = 0  # calls of a text encoder by pipelines that nobody listens to
        self.began = self.over = False  # whether the denoiser has been called; whether the pipeline has returned
        self.texts: list[Encoded] = []
        self.seen = 0  # distinct texts that the denoiser was called with
        self.positive = False  # whether the denoiser was called with a row that is known to be positive
        self.pipe: Callable[[], Any] | None = None  # whose run it is, weakly; None where nobody said
        self.before: Tensor | None = None  # the schedule that was there when it began: a run makes a new one
        self.schedule: Tensor | None = None  # the one that its steps come from
        self._numbers: tuple[Tensor | None, list[float]] = (None, [])

    @property
    def images(self) -> int | None:
        """How many pictures are drawn; None where no pipeline said."""
        return max((len(text.rows) for text in self.texts if text.sure and text.negative is False), default=None)

    def timesteps(self, scheduler: Any) -> list[float]:
        """The scheduler's timesteps as numbers, brought from its device once a run."""
        steps = getattr(scheduler, "timesteps", None)
        if steps is not self._numbers[0]:
            self._numbers = steps, [] if steps is None else torch.as_tensor(steps).tolist()
        return self._numbers[1]
