"""What safe guidance knows in words: the categories' embeddings, and what the prompts of a run become."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...methods.errors import GuidanceError
from ...methods.guidance.config import SafeGuidanceConfig
from ...methods.guidance.summaries import last_positions, stops_of, summaries
from ...methods.text_space import Segment, TextFeatures
from ..family import Pipeline
from ..text import encode_text, segments_of

__all__ = ["CategoryTexts", "Prompts", "encode_categories", "fitting", "in_turns", "read_prompts"]


Reading = dict[str, tuple[Tensor, Tensor | None, list[int]]]  # text -> hidden (N, d), pooled (p,), token ids


@dataclass(frozen=True, eq=False)
class CategoryTexts:
    """The categories as the denoiser sees them.

    Args:
        branches: (K, N, d), one prompt for each category; pooled_branches: (K, p) or None.
        together: (1, N, d), one prompt for all; pooled_together: (1, p) or None.
        phrases: (P, N, d), those whose values are taken away; pooled_phrases: (P, p) or None.
        positions: for each phrase its last token in each segment.
        read: what the text seam compares prompts with, by its words: all phrases, where an algorithm acts there.
    """

    branches: Tensor
    pooled_branches: Tensor | None
    together: Tensor
    pooled_together: Tensor | None
    phrases: Tensor
    pooled_phrases: Tensor | None
    positions: list[list[int]] = field(default_factory=list)
    read: Reading = field(default_factory=dict)


def in_turns(config: SafeGuidanceConfig) -> list[str]:
    """All phrases, each category's first, then each one's second, and so on."""
    longest = max(len(category.phrases) for category in config.categories)
    return [c.phrases[i] for i in range(longest) for c in config.categories if i < len(c.phrases)]


def fitting(phrases: Sequence[str], segments: Sequence[Segment], length: int) -> str:
    """As many of these phrases in one prompt as the denoiser is given of it, the first ones.

    Args:
        length: of the text axis.

    Raises:
        GuidanceError: not even one.
    """
    stops, taken, before = stops_of(segments, length), "", [0] * len(segments)
    for phrase in phrases:
        text = f"{taken}, {phrase}" if taken else phrase
        counts = [segment.prefix_tokens([text])[0] for segment in segments]
        room = [stop - segment.start for segment, stop in zip(segments, stops, strict=True)]
        # tokenizers cut what is too long: then a phrase more has no token more, or no place is left before the end
        if any(not old < new < most - 1 for old, new, most in zip(before, counts, room, strict=True)):
            break
        taken, before = text, counts
    if not taken:
        raise GuidanceError(f"the phrase {phrases[0]!r} is longer than the model's {length} text positions; shorten it")
    return taken


def encode_categories(
    pipe: Pipeline, config: SafeGuidanceConfig, max_sequence_length: int | None, length: int
) -> CategoryTexts:
    """All that the config's algorithms need of the categories.

    Args:
        length: of the text axis.

    Raises:
        GuidanceError: the pipeline has no text encoder, or a phrase is too long for it.
    """
    if getattr(pipe, "text_encoder", None) is None:
        raise GuidanceError(
            f"{type(pipe).__name__} has no text encoder, so that safe guidance cannot read its categories; apply it"
            " while the encoders are there, and call handle.prepare(max_sequence_length)"
        )
    segments = segments_of(pipe, video=True)
    branches = [fitting(category.phrases, segments, length) for category in config.categories]
    phrases = in_turns(config)[: max((one.rank for one in config.having("values")), default=0)]
    texts = [*branches, fitting(in_turns(config), segments, length), *phrases]
    compared = list(dict.fromkeys(config.phrases)) if config.having("text") else []
    found = encode_text(pipe, [*texts, *compared], max_sequence_length)
    count = len(branches)
    parts = [(0, count), (count, count + 1), (count + 1, len(texts))]
    split = [x for first, last in parts for x in (found.hidden[first:last], _cut(found.pooled, first, last))]
    read = _rows(compared, found, len(texts))
    return CategoryTexts(*split, last_positions(phrases, segments, found.hidden.shape[1]), read)


def _rows(texts: Sequence[str], found: TextFeatures, start: int = 0) -> Reading:
    rows = enumerate(texts, start)
    return {
        t: (found.hidden[i], None if found.pooled is None else found.pooled[i], found.token_ids[i]) for i, t in rows
    }


class _Reader:
    """Encodes prompts, each text once.

    Args:
        encode: what is not known yet. known: what is.
    """

    def __init__(self, encode: Callable[[Sequence[str]], TextFeatures], known: Reading):
        self.encode, self.known = encode, dict(known)

    def __call__(self, texts: Sequence[str]) -> TextFeatures:
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        if new:
            self.known |= _rows(new, self.encode(new))
        hidden, pooled, ids = zip(*(self.known[text] for text in texts), strict=True)
        return TextFeatures(torch.stack(hidden), None if pooled[0] is None else torch.stack(pooled), list(ids))


def _cut(pooled: Tensor | None, first: int, last: int) -> Tensor | None:
    return None if pooled is None else pooled[first:last]


@dataclass(eq=False)
class Prompts:
    """The prompts of a run after the text seam, one row an image.

    Args:
        hidden, pooled: as they were encoded. edited, edited_pooled: as they became. until: share of the schedule up to
            which they are used. fired: share of words that were changed. scores: (B, D) of the text detectors, by how
            far each lies above its threshold.
    """

    hidden: Tensor
    pooled: Tensor | None
    edited: Tensor
    edited_pooled: Tensor | None
    until: list[float]
    fired: list[float]
    scores: Tensor | None = None


def read_prompts(
    pipe: Pipeline,
    config: SafeGuidanceConfig,
    words: Sequence[str] | None,
    hidden: Tensor,
    pooled: Tensor | None,
    max_sequence_length: int | None,
    known: Reading,
) -> Prompts:
    """The prompts of a run, edited and judged.

    Args:
        words: of each prompt; None where embeddings were given. hidden: (B, N, d), as many rows for each prompt.
        known: what was read of the categories.

    Raises:
        GuidanceError: an algorithm or detector reads words, and there are none.
    """
    editing, judging = config.having("text"), [pair for pair in config.detectors if pair.text is not None]
    rows = len(hidden)
    found = Prompts(hidden, pooled, hidden, pooled, [0.0] * rows, [0.0] * rows)
    if not (editing or judging):
        return found
    names = [one.NAME for one in editing] + ["text detectors"] * bool(judging)
    if words is None or rows % len(words):
        raise GuidanceError(
            f"the pipeline was given embeddings instead of words, but {' and '.join(names)} read words: give prompts,"
            " or take sld, adavd or nag"
        )
    each, segments = rows // len(words), segments_of(pipe, video=True)
    if judging:
        features = summaries(hidden[::each], words, segments)
        found.scores = torch.stack([(p.text.score(features) - p.text.threshold) for p in judging], dim=1)
        found.scores = found.scores.repeat_interleave(each, dim=0)
    encode = _Reader(functools.partial(encode_text, pipe, max_sequence_length=max_sequence_length), known)
    for algorithm in editing:
        edits = {
            w: algorithm.edit_text(w, encode, segments, config.phrases, config.strength) for w in dict.fromkeys(words)
        }
        of_rows = [edits[words[row // each]] for row in range(rows)]
        found.edited = torch.stack([edit.hidden for edit in of_rows]).to(hidden)
        if pooled is not None and of_rows[0].pooled is not None:
            found.edited_pooled = torch.stack([edit.pooled for edit in of_rows]).to(pooled)
        found.until, found.fired = [edit.until for edit in of_rows], [edit.fired for edit in of_rows]
    return found
