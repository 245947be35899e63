"""The rows of a call of the denoiser: which guide towards their text, which away from it, and extra ones beside them.

What was encoded for a run of a pipeline tells which is which, so a run is at home here, too.

Extra rows are denoised with the batch, seen by every layer, and never given back. A method says which rows it adds and
where each takes its inputs from; everything that has one row an image is then extended, whatever the family calls it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..methods.errors import SemipermError
from .hooks import branch_of

__all__ = [
    "Encoded",
    "ExtraRows",
    "Run",
    "chunks_of",
    "negative_rows",
    "row_layout",
    "said",
    "same_rows",
    "with_rows",
    "without_rows",
]

# Positions of tokens, one row a token: they belong to no image, even where there are as many as rows.
_UNBATCHED = ("img_ids", "txt_ids")

_layout: ContextVar[tuple[str, ...]] = ContextVar("semiperm_row_layout", default=())


# ---- which is which --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def row_layout(*kinds: str) -> Iterator[None]:
    """Say what the rows of the denoiser's calls inside are, where it cannot be known.

    It is known of rows whose text a pipeline encoded in the same run, in whatever order they come. Say it where you
    call a denoiser yourself, or hand embeddings to a pipeline that a method was not applied to.

    Args:
        kinds: "positive" or "negative" (unconditional), one for each equal part of the batch, in order.

    Raises:
        SemipermError: another word, or none.

    >>> with row_layout("negative", "positive"):
    ...     pass
    """
    if not kinds or set(kinds) - {"positive", "negative"}:
        raise SemipermError(f"row layout {kinds}; expected 'positive' or 'negative' for each equal part of the batch")
    token = _layout.set(kinds)
    try:
        yield
    finally:
        _layout.reset(token)


@dataclass(frozen=True, eq=False)
class Encoded:
    """Text that was encoded for a run.

    Args:
        rows: (B, N, d) as the denoiser is given it, or the first columns and positions of that.
        negative: whether it is guided away from; None where that is unknown.
        prompts: () where they are unknown.
        sure: whether a pipeline said so; else it was read from its text encoder.
    """

    rows: Tensor
    negative: bool | None
    prompts: tuple[str, ...] = ()
    sure: bool = True


def said() -> tuple[str, ...]:
    """What was said of the rows of the call at hand, by `row_layout` or by the pipeline; () where nothing was."""
    branch = branch_of()
    return _layout.get() or ((branch,) if branch in ("cond", "uncond") else ())


def negative_rows(hidden: Tensor, texts: Sequence[Encoded], one_call: bool) -> tuple[bool | None, ...]:
    """Which rows of a call are guided away from, None where nothing tells.

    A layout that was said (`row_layout`) counts first, then the branch that the pipeline names (diffusers'
    `cache_context("cond")`); else each row is what its text was encoded as. Text that was
    encoded as both (a prompt that equals its negative prompt) is told by its place: the first half of twice as many
    rows as there were prompts, if guidance is one call.

    Args:
        hidden: (B, N, d), the text of the call.
        texts: what was encoded for this run.
        one_call: whether the family's guidance is one call with rows [negative, positive].

    Raises:
        SemipermError: a layout whose parts do not divide the batch.
    """
    count, layout = len(hidden), _layout.get()
    if layout:
        if count % len(layout):
            raise SemipermError(f"row_layout{layout} has {len(layout)} parts, but the call has {count} rows")
        return tuple(kind == "negative" for kind in layout for _ in range(count // len(layout)))
    if (branch := branch_of()) in ("cond", "uncond"):
        return (branch == "uncond",) * count
    known = torch.zeros(2, count, dtype=torch.bool, device=hidden.device)  # seen as positive, as negative
    for text in texts:
        if text.negative is not None:
            known[int(text.negative)] |= same_rows(hidden, text.rows)
    as_positive, as_negative = known.tolist()  # the one time that it waits for the GPU
    prompts = max((len(text.rows) for text in texts if text.negative is False), default=0)
    guided = one_call and count == 2 * prompts and any(text.negative for text in texts)
    found: list[bool | None] = []
    for row, (positive, negative) in enumerate(zip(as_positive, as_negative, strict=True)):
        if positive and negative:
            found.append(guided and row < count // 2)
        else:
            found.append(negative if positive or negative else None)
    return tuple(found)


def chunks_of(negative: Sequence[bool], images: int | None = None) -> tuple[bool, ...]:
    """The equal parts that a batch is made of, one row a picture in each: for each, whether it is conditional.

    Args:
        negative: of each row, see `negative_rows`. images: how many pictures are drawn, where that is known.

    >>> chunks_of((True, True, False, False, False, False))
    (False, True, True)
    """
    runs = [len(list(group)) for _, group in itertools.groupby(negative)]
    per = math.gcd(*runs, *([images] if images and len(negative) % images == 0 else []))
    return tuple(not negative[first] for first in range(0, len(negative), per))


def same_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """(B,): whether a row of `hidden` equals one of `rows`, as far as these go."""
    length, width = rows.shape[1:]
    if length > hidden.shape[1] or width > hidden.shape[2]:
        return torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    part, rows = hidden[:, :length, :width], rows.to(hidden)
    # row by row: never more memory than the rows have
    return torch.stack([(rows == row).flatten(1).all(1).any() for row in part])


# ---- a run -----------------------------------------------------------------------------------------------------------


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


# ---- more of them ----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class ExtraRows:
    """What is added to one call.

    Args:
        batch: rows of the call itself.
        sources: for each added row the row whose inputs it takes.
        own: (name, value) -> that input with its added rows, or None to take its sources'.
    """

    batch: int
    sources: Sequence[int]
    own: Callable[[str, Tensor], Tensor | None]


def with_rows(name: str, value, rows: ExtraRows):
    """An input with the added rows at its end; what has no row an image is as it was."""
    if isinstance(value, dict):
        return {key: with_rows(key, item, rows) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(with_rows(name, item, rows) for item in value)
    if not isinstance(value, Tensor) or name in _UNBATCHED or value.ndim == 0 or value.shape[0] != rows.batch:
        return value
    whole = rows.own(name, value)
    # slices: a list of indices would have to be copied to the device
    return torch.cat([value, *(value[s : s + 1] for s in rows.sources)]) if whole is None else whole


def without_rows(output, rows: ExtraRows):
    """A denoiser's output with the rows of the call itself alone."""
    if isinstance(output, tuple):
        return (output[0][: rows.batch], *output[1:])
    return type(output)(sample=output.sample[: rows.batch])
