"""A text in one vector of each tokenizer's stretch: what SAFREE compares, and text detectors read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..text_space import Segment

__all__ = ["last_positions", "stops_of", "summaries", "summary"]


def stops_of(segments: Sequence[Segment], length: int) -> list[int]:
    """Where each segment of an axis of this length ends."""
    return [*(segment.start for segment in segments[1:]), length]


def summary(hidden: Tensor, texts: Sequence[str], segment: Segment, stop: int) -> Tensor:
    """Texts in a segment: their end's state where later positions see earlier ones, else the mean of their positions.

    Args:
        hidden: (R, N, d) of R texts.

    Returns:
        (R, d) float32.
    """
    rows = []
    for row, length in zip(hidden.float(), segment.prefix_tokens(texts), strict=True):
        end = min(segment.start + length, stop - 1)
        rows.append(row[end] if segment.causal else row[segment.start : end + 1].mean(dim=0))
    return torch.stack(rows)


def summaries(hidden: Tensor, texts: Sequence[str], segments: Sequence[Segment]) -> Tensor:
    """Texts in all segments: (R, F), side by side."""
    stops = stops_of(segments, hidden.shape[1])
    return torch.cat([summary(hidden, texts, s, stop) for s, stop in zip(segments, stops, strict=True)], dim=-1)


def last_positions(texts: Sequence[str], segments: Sequence[Segment], length: int) -> list[list[int]]:
    """For each text the position of its last token in each segment."""
    found: list[list[int]] = [[] for _ in texts]
    if not texts:
        return found
    for segment, stop in zip(segments, stops_of(segments, length), strict=True):
        for positions, count in zip(found, segment.prefix_tokens(texts), strict=True):
            positions.append(min(segment.start + max(count - 1, 0), stop - 1))
    return found
