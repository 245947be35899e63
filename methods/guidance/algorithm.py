"""What an algorithm of safe guidance is: settings, mathematics on tensors, and the seams at which it acts.

    text        what a prompt's embeddings are, before any projection          `edit_text`
    values      what text gives to attention: its values                       `edit_values`
    outputs     what attention over the prompt and over the harm gives         `combine`
    prediction  what the denoiser predicts for prompt, negative prompt, harm   `guide`

"values" and "outputs" are the two sides of the attention seam. Each face carries each seam once (`pipelines/guidance/`,
`nodes/guidance/`), and knows an algorithm by what it declares alone: a new one is one file here, and a line in
`config.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import GuidanceError
from ..text_space import Segment, TextFeatures

__all__ = ["SEAMS", "Algorithm", "Guided", "Momentum", "TextEdit"]

SEAMS = ("text", "values", "outputs", "prediction")


@dataclass(frozen=True, eq=False)
class TextEdit:
    """A prompt's embeddings after the text seam.

    Args:
        hidden: (N, d) in the place of the prompt's own. pooled: (p,), or None where the model has none.
        until: share of the schedule up to which they are used; after it the prompt's own are. 0 changes nothing.
        fired: share of the prompt's words that were changed.
    """

    hidden: Tensor
    pooled: Tensor | None
    until: float
    fired: float


@dataclass(frozen=True, eq=False)
class Guided:
    """Predictions after the prediction seam.

    Args:
        prediction: (B, ...) in the place of that for the prompt; guidance by the pipeline follows.
        scale: (B,) float32, mean scale of the change, 0 where nothing was unsafe. category: (B,) int64, whose branch.
        alignment: (K, B) float32, how far the prompt's direction is each category's, -1 to 1; None where nobody asked.
        loud: (K, B) bool, the branches that acted; None: all.
    """

    prediction: Tensor
    scale: Tensor
    category: Tensor
    alignment: Tensor | None = None
    loud: Tensor | None = None


class Momentum:
    """A momentum that is updated once a step, however often a sampler calls the denoiser in it.

    A noise level that is called again (Heun's) starts from what was there before its first call.
    """

    def __init__(self) -> None:
        self.level: float | None = None
        self.before: Tensor | None = None
        self.after: Tensor | None = None

    def at(self, level: float, update: bool) -> Tensor | None:
        """The momentum that a call at this noise level works with."""
        if update and level != self.level:
            self.level, self.before = level, self.after
        return self.before if update else self.after

    def keep(self, momentum: Tensor, update: bool) -> None:
        """What a call made of it; a call between two steps (`update` False) leaves none."""
        if update:
            self.after = momentum


@dataclass(frozen=True)
class Algorithm:
    """Base of all: a frozen dataclass of settings, with a method for each seam that it declares."""

    NAME: ClassVar[str]
    SEAMS: ClassVar[frozenset[str]]
    # whether it works on predictions for the prompt and for the negative prompt, so that guidance must be on
    GUIDED: ClassVar[bool] = False
    # whether the denoiser must be called with the categories' texts, too, in each step
    BRANCHES: ClassVar[bool] = False

    def settings(self) -> dict[str, Any]:
        """All settings by name, for records and their hash."""
        return {"algorithm": self.NAME} | {f.name: getattr(self, f.name) for f in fields(self)}

    def with_settings(self, **settings: Any) -> Algorithm:
        """A copy with other settings."""
        return replace(self, **settings)

    def window(self) -> float:
        """The share of the schedule from which it changes anything; before it, it may only look on."""
        return 0.0

    # ---- the seams ----

    def edit_text(
        self,
        prompt: str,
        encode: Callable[[Sequence[str]], TextFeatures],
        segments: Sequence[Segment],
        phrases: Sequence[str],
        strength: float,
    ) -> TextEdit:
        """Text seam: a prompt's embeddings, changed.

        Args:
            prompt: its words. encode: prompts -> features. segments: who fills the token axis. phrases: of all
                categories. strength: 0 changes nothing, 1 is the paper's.
        """
        raise self._undeclared("text")

    def edit_values(self, values: Tensor, harm: Tensor, heads: int, strength: float) -> tuple[Tensor, Tensor]:
        """Attention seam, values.

        Args:
            values: (B, N, C), what the text's tokens give. harm: (K, C), what the categories' phrases give.
            heads: of the attention; strength: 0 changes nothing, 1 is the paper's.

        Returns:
            values as changed, and (B,) the mean share of them that was taken away.
        """
        raise self._undeclared("values")

    def combine(self, positive: Tensor, negative: Tensor, strength: float) -> Tensor:
        """Attention seam, outputs: (B, N, C) over the prompt and over the harm, before the output projection."""
        raise self._undeclared("outputs")

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
        """Prediction seam.

        Args:
            uncond, text: (B, ...) predictions for the negative prompt and for the prompt. safety: (K, B, ...), for K
                categories; K = 0 where all branches are silent.
            momentum: of the run.
            unit: how much noise one unit of the prediction is: 1 where noise is predicted.
            active: (B,) bool, where the prediction may be changed.
            level: the noise level; update: whether a step begins with this call.
            strength: 0 changes nothing, 1 is the paper's.
            evaluated: (K, B) bool, which of `safety` is there; what is not has the numbers of `uncond`. None: all.
        """
        raise self._undeclared("prediction")

    def _undeclared(self, seam: str) -> GuidanceError:
        return GuidanceError(f"{self.NAME} has no {seam} seam; it declares {', '.join(sorted(self.SEAMS))}")

    def _check(self, **ranges: tuple[float, float]) -> None:
        """Numbers within their ranges, both ends included.

        Raises:
            GuidanceError: one is not.
        """
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and low <= value <= high):
                bound = f"a number from {low:g}" + ("" if high == math.inf else f" to {high:g}")
                raise GuidanceError(f"{self.NAME}: {name}={value!r}; expected {bound}")


def orthonormal(vectors: Tensor, most: int | None = None) -> Tensor:
    """Orthonormal rows that span the given ones: (..., K, C) -> (..., R, C), null rows where they depend on others.

    Args:
        most: keep only the strongest directions.
    """
    _, strengths, rows = torch.linalg.svd(vectors, full_matrices=False)
    # what float32 cannot tell from a combination of the others
    null = strengths <= strengths[..., :1] * max(vectors.shape[-2:]) * torch.finfo(vectors.dtype).eps
    rows = rows.masked_fill(null[..., None], 0.0)
    return rows if most is None else rows[..., :most, :]
