"""What safe guidance keeps of one run of a pipeline, and of one call of its denoiser."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...methods.guidance.algorithm import Momentum
from ...methods.guidance.branches import Branches
from ...methods.guidance.config import SafeGuidanceConfig
from ...methods.guidance.record import GuidanceRecord
from ..rows import ExtraRows

__all__ = ["Extra", "GuidanceCall", "GuidanceRun"]


class GuidanceRun:
    """One run.

    Args:
        config: what it was set to.
    """

    def __init__(self, config: SafeGuidanceConfig):
        self.record = GuidanceRecord()
        self.momentum = Momentum()
        self.prompts: Any = None  # `Prompts`, once encoded
        self.negative: tuple[Tensor, Tensor | None] | None = None  # hidden and pooled, where guidance is two calls
        self.texts_key: tuple = ()  # which of the categories' texts belong to this run
        self.fired: Any = None  # (B, K) bool on the CPU, categories that were detected; None: no detectors
        self.branches = Branches.of(config)
        self.calls = 0  # calls with the prompt
        self.values: dict[str, Tensor] = {}  # of the categories, for each layer: (R, C)
        self.edited: dict[str, tuple] = {}  # of each layer: its text, what it depends on, and the edited values
        self.layers: set[str] = set()  # that acted
        self.stash: tuple[Tensor, Tensor, Any] | None = None  # sample, negative text, its prediction: for the next call
        self.answered = True  # whether the stash of the last call was asked for
        self.broken: Tensor | None = None  # () bool, whether a prediction was NaN or infinite
        self.refused: Tensor | None = None  # (B,) bool
        self.output_type: type | None = None  # of the denoiser, where it is no tuple
        self.layouts: list[tuple[Tensor, Tensor | int, tuple[bool, ...]]] = []
        self.made: dict[tuple, Tensor] = {}  # texts with their added rows


@dataclass(frozen=True, eq=False)
class Extra:
    """Rows of one kind beside the batch.

    Args:
        kind: "uncond", "branch", "outputs" or "values". sources: the row that each takes its inputs from.
        hidden: (S, N, d), pooled: (S, p) or None.
    """

    kind: str
    sources: tuple[int, ...]
    hidden: Tensor
    pooled: Tensor | None


@dataclass(eq=False)
class GuidanceCall:
    """One call of the denoiser.

    Args:
        active: whether it lies inside the window. share, sigma: of the schedule. level: the timestep. update: whether a
            step begins with it.
        positive, negative: the rows for the prompts, and for the negative prompts.
        sample, timestep: the denoiser's own.
        extras: rows that were added, in order. rows: the same for `pipelines.rows`.
        branches: the categories whose branches are among them; pairs: (category, image) of each of their rows.
        text: how many positions the text has, for layers that see text and image at once.
        answer: what is returned without a call of the denoiser, where that is known.
    """

    active: bool
    share: float
    sigma: float | None
    level: float
    update: bool
    positive: tuple[int, ...]
    negative: tuple[int, ...]
    sample: Tensor
    timestep: Tensor
    batch: int
    text: int
    extras: list[Extra] = field(default_factory=list)
    rows: ExtraRows | None = None
    branches: tuple[int, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()
    wanted: Any = None  # (K, B) bool on the CPU, the pairs that may act: of all categories
    answer: Any = None
    outputs: int = 0  # layers whose outputs were combined
    edited: int = 0  # layers whose values were edited
    queries: dict[str, Tensor] = field(default_factory=dict)  # of the attention layer at hand
    shares: list[tuple[list[int], Tensor]] = field(default_factory=list)  # rows, and how far each layer changed them

    def rows_of(self, kind: str) -> list[int]:
        """Where the added rows of a kind are in the batch."""
        start = self.batch
        for extra in self.extras:
            if extra.kind == kind:
                return list(range(start, start + len(extra.sources)))
            start += len(extra.sources)
        return []

    def layout(self) -> tuple[str, ...]:
        """What each row is for other methods: those of the categories are nobody's prompt."""
        kinds = ["negative"] * self.batch
        for row in self.positive:
            kinds[row] = "positive"
        return (*kinds, *("negative" for extra in self.extras for _ in extra.sources))
