"""What one text batch asks of token merging: who is pushed from whom, and the text with the reference rows appended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...methods.modules import stamp
from ...methods.token_merging.config import NegativeTokenMergingConfig
from ...methods.token_merging.merging import MergeRows, diversity_rows, reference_rows

__all__ = ["MergePlan", "make_plan"]


@dataclass(eq=False)
class MergePlan:
    """For the calls with one text.

    Args:
        hidden: the text (B, N, d); held, so that its identity cannot be recycled. stamped: tells whether it changed.
        chunks: for each equal part of the batch, whether it is conditional.
        rows: which rows are pushed from which, the reference rows included; None: nothing is pushed in this call.
        sources: the row that each reference row takes its other inputs from.
        labels: ("positive" or "negative", image) of each row of the batch.
        said: of the rows, see `pipelines.rows.said`.
        strength: (R,) of each row that others are pushed from, on the device.
        joined: id -> (tensor, stamp, with the reference rows): kept, so that others recognise the text by identity.
    """

    hidden: Tensor
    stamped: object
    batch: int
    chunks: tuple[bool, ...]
    rows: MergeRows | None
    sources: tuple[int, ...] = ()
    labels: tuple = ()
    strength: Tensor | None = None
    joined: dict = field(default_factory=dict)
    said: tuple = ()

    @property
    def extra(self) -> int:
        """Reference rows."""
        return len(self.sources)


def make_plan(
    hidden: Tensor, chunks: tuple[bool, ...], config: NegativeTokenMergingConfig, strength: Tensor
) -> MergePlan:
    """The plan of one text batch.

    Args:
        hidden: (B, N, d).
        chunks: as in `MergePlan`.
        strength: (reference images,), or (1,) in diversity mode, on hidden's device.

    Raises:
        TokenMergingError: diversity mode with a single image.
    """
    batch = len(hidden)
    compiling, per = torch.compiler.is_compiling(), batch // len(chunks)
    part = [chunk for chunk in chunks for _ in range(per)]  # of each row: is it conditional?
    labels = tuple(("positive" if on else "negative", b % per) for b, on in enumerate(part))
    pushed = [config.rows == "all" or on for on in part]
    plan = MergePlan(hidden, None if compiling else stamp(hidden), batch, chunks, None, labels=labels)
    if not any(pushed):
        return plan
    own = [b // per if on else -1 for b, on in enumerate(pushed)]
    if config.mode == "diversity":
        plan.rows = diversity_rows(own, config.diversity, hidden.device)
        plan.strength = strength.expand(batch)
        return plan
    if config.compat == "official":  # one reference row for each chunk
        groups = own
    elif config.reference_prompt is not None or compiling:  # one for all: a graph cannot look at the text
        groups = [0 if on else -1 for on in pushed]
    else:  # one for each text
        groups = _same_text(hidden, pushed)
    references, owners = len(strength), sorted(set(groups) - {-1})
    groups = [owners.index(group) if group >= 0 else -1 for group in groups]
    plan.sources = tuple(groups.index(group) for group in range(len(owners)) for _ in range(references))
    plan.strength = strength.repeat(len(owners))
    # the reference rows are in the batch too, and are not pushed
    plan.rows = reference_rows(groups, references, hidden.device).padded(plan.extra)
    return plan


def _same_text(hidden: Tensor, pushed: Sequence[bool]) -> list[int]:
    """The first pushed row with the same text, for each row; -1 for rows that are not pushed."""
    groups: list[int] = []
    for b, on in enumerate(pushed):
        first = next((g for g in set(groups) - {-1} if torch.equal(hidden[g], hidden[b])), b) if on else -1
        groups.append(first)
    return groups
