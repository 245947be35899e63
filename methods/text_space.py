"""What a text-to-image model contributes to a fit: its text encoder, and the weights that read text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Segment", "TextFeatures", "TextSpace", "Wording", "live_columns", "whole_words"]


@dataclass(frozen=True)
class TextFeatures:
    """Prompts as the denoiser sees them.

    Args:
        hidden: (B, N, d) token embeddings, exactly what the denoiser is given.
        pooled: (B, p) pooled embedding (SDXL, SD3, Flux), or None.
        token_ids: per prompt, the first tokenizer's ids without special tokens.
    """

    hidden: Tensor
    pooled: Tensor | None
    token_ids: list[list[int]]


@dataclass(frozen=True)
class Wording:
    """One prompt as the text encoders were given it; a pipeline with several prompts for one picture has several texts.

    Args:
        prompt: as it was written, for reports; None where it is unknown.
        token_ids: the first tokenizer's ids of each text, without special tokens.
        texts: what the ids of each text stand for, by the tokenizer of the encoder that read it.
    """

    prompt: str | None
    token_ids: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Segment:
    """A stretch of the token axis that one tokenizer fills, from position `start` on.

    Args:
        prefix_tokens: texts -> how many positions each fills at the start, the begin-of-text token included.
        causal: later positions see earlier ones only (CLIP), or all see all (T5).
    """

    prefix_tokens: Callable[[Sequence[str]], list[int]]
    start: int
    causal: bool


@dataclass(frozen=True, eq=False)
class TextSpace:
    """What a model contributes: its text encoder, and the weights that read text.

    Args:
        encode: prompts -> features; "" is the unconditional prompt.
        segments: who fills the token axis, in order.
        tokens, pooled: module key -> weight of the projections of token embeddings, of the pooled embedding.
        vocabulary: words that are one token each to the first tokenizer; () where they are unknown.
    """

    encode: Callable[[Sequence[str]], TextFeatures]
    segments: Sequence[Segment]
    tokens: dict[str, Tensor]
    pooled: dict[str, Tensor]
    vocabulary: Sequence[str] = ()


def whole_words(tokens: Iterable[str]) -> list[str]:
    """The words among a tokenizer's tokens, sorted: CLIP's end in "</w>", T5's begin with a bar.

    >>> whole_words(["robot</w>", "rob", "of</w>", "2nd</w>", "\u2581ghost"])
    ['ghost', 'robot']
    """
    found = {t.removesuffix("</w>").removeprefix("\u2581") for t in tokens if t.endswith("</w>") or t[:1] == "\u2581"}
    return sorted(word for word in found if len(word) > 2 and word.isascii() and word.isalpha() and word.islower())


def live_columns(*rows: Tensor) -> Tensor:
    """(n,) indices of the columns (last axis) that are not zero everywhere; all of them if none is.

    SD3 pads CLIP's embeddings with zeros to the width of T5, and no fit needs to solve for these.
    """
    live = torch.stack([(r != 0).flatten(0, -2).any(dim=0).cpu() for r in rows if r.numel()]).any(dim=0)
    return (live if live.any() else torch.ones_like(live)).nonzero()[:, 0]
