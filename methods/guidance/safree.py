"""SAFREE: words that point at a category are projected away from it, within what the prompt itself spans.

    P_C = C (C^T C)^-1 C^T of the categories' phrases;  P_I of the prompt without each of its words in turn
    a word fires where |(I - P_C) p_without| > (1 + alpha) mean of the other words'
    its tokens:  p <- P_I (I - P_C) p;   used in the first reach sigmoid(1 - cos(p, p_projected)) of the schedule

Text is taken as the denoiser is given it: of SDXL both encoders in one space, of SD3 and Flux each stretch in its own,
the pooled embedding in another. Source: arXiv 2410.12761, equations 1 to 5. We differ: words are left out and projected
whole (a word of several tokens would pass for harmless in parts, and encoders differ in tokens); phrases are no
negative prompt, as in the released code; the order of projections is the paper's. Latent re-attention, the paper's
third part, needs a third branch in every step and does nothing in the released code; it is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import GuidanceError
from ..text_space import Segment, TextFeatures
from .algorithm import Algorithm, TextEdit, orthonormal
from .summaries import stops_of, summary

__all__ = ["SAFREE", "projected", "triggers"]


@dataclass(frozen=True)
class SAFREE(Algorithm):
    """Safe and adaptive text filtering.

    Args:
        alpha: how far above the others' mean a word must lie to fire, from 0.
        reach: share of the schedule that the filter may take at most (the paper's 10 steps of 50); the rest of it is
            decided by how far the prompt was moved.
        adaptive: False uses the projected text in every step.

    Raises:
        GuidanceError: a value outside its range.
    """

    NAME: ClassVar[str] = "safree"
    SEAMS: ClassVar[frozenset[str]] = frozenset({"text"})

    alpha: float = 0.01
    reach: float = 0.2
    adaptive: bool = True

    def __post_init__(self) -> None:
        self._check(alpha=(0, 10), reach=(0, 1))

    def edit_text(
        self,
        prompt: str,
        encode: Callable[[Sequence[str]], TextFeatures],
        segments: Sequence[Segment],
        phrases: Sequence[str],
        strength: float,
    ) -> TextEdit:
        if not phrases:
            raise GuidanceError("safree: no phrases; expected those of at least one category")
        words = prompt.split()
        without = [" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))]
        if len(words) < 2:  # one word has no others to stand out from, nothing has none
            features = encode([prompt])
            return TextEdit(features.hidden[0], _first(features.pooled), 0.0, 0.0)
        features = encode([prompt, *without, *phrases])
        with torch.autocast(features.hidden.device.type, enabled=False):  # projections want all digits
            return self._edit(words, without, features, segments, phrases, strength)

    def _edit(
        self,
        words: Sequence[str],
        without: Sequence[str],
        features: TextFeatures,
        segments: Sequence[Segment],
        phrases: Sequence[str],
        strength: float,
    ) -> TextEdit:
        count, hidden = len(words), features.hidden.float()
        whole, rest, concepts = hidden[0], hidden[1 : 1 + count], hidden[1 + count :]
        edited, fired, similar = whole.clone(), torch.zeros(count, dtype=torch.bool, device=hidden.device), []
        for segment, stop in zip(segments, stops_of(segments, whole.shape[0]), strict=True):
            masked, harm = summary(rest, without, segment, stop), summary(concepts, phrases, segment, stop)
            found = triggers(masked, harm, self.alpha)
            moved = projected(whole[segment.start : stop], masked, harm)
            similar.append(torch.cosine_similarity(whole[segment.start : stop].flatten(), moved.flatten(), dim=0))
            ends = [segment.start + n for n in segment.prefix_tokens(["", *_prefixes(words)])]
            for word in found.nonzero()[:, 0].tolist():
                first, last = min(ends[word], stop), min(ends[word + 1], stop)
                edited[first:last] = moved[first - segment.start : last - segment.start]
            fired |= found
        until = self.reach if not self.adaptive else self.reach * _sigmoid(1 - float(torch.stack(similar).mean()))
        pooled = _first(features.pooled)
        if features.pooled is not None and pooled is not None and bool(fired.any()):
            others = features.pooled[1:].float()
            moved = projected(pooled.float()[None], others[:count], others[count:])[0]
            pooled = torch.lerp(pooled.float(), moved, strength).to(pooled.dtype)
        edited = torch.lerp(whole, edited, strength).to(features.hidden.dtype)
        share = float(fired.float().mean())
        return TextEdit(edited, pooled, (1.0 if not self.adaptive else until) if share else 0.0, share)


def triggers(masked: Tensor, concepts: Tensor, alpha: float) -> Tensor:
    """(W,) bool: words without which the prompt is farther from the categories than without others.

    Args:
        masked: (W, d), the prompt without each word. concepts: (K, d).
    """
    distance = (masked - _onto(masked, concepts)).norm(dim=-1)
    others = (distance.sum() - distance) / (len(distance) - 1)
    return distance > (1 + alpha) * others


def projected(tokens: Tensor, masked: Tensor, concepts: Tensor) -> Tensor:
    """P_I (I - P_C) p of each token p (N, d)."""
    return _onto(tokens - _onto(tokens, concepts), masked)


def _onto(vectors: Tensor, span: Tensor) -> Tensor:
    rows = orthonormal(span)
    return (vectors @ rows.mT) @ rows


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def _first(pooled: Tensor | None) -> Tensor | None:
    return None if pooled is None else pooled[0]


def _prefixes(words: Sequence[str]) -> list[str]:
    return [" ".join(words[: i + 1]) for i in range(len(words))]
