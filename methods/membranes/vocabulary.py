"""Captions of a model's own vocabulary: they name what the general ones do not.

General captions are written for encoders that know English. An encoder that knows other words takes most of them for
noise, so that a detector fitted against them alone learns "a word that means something". So what the vocabulary holds
is asked for: the words of a sample that move a caption most, less those that move it as the concept does.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from ..text_space import TextSpace
from .captions import filled

__all__ = ["other_words"]

_SAMPLED = 1000  # of the vocabulary: a minute of CLIP-L on two cores
_KEPT = 128  # half as many as there are general captions
_ALIKE = 0.8  # cosine of two words' ways; synonyms that an encoder knows as such lie above .9, other words below .7
_CHUNK = 64
_CAPTION = "a photo of a {}"


def other_words(space: TextSpace, phrases: Sequence[str]) -> list[str]:
    """Words that mean most to the text encoder, none of which means what one of the phrases does; [] without any."""
    sample = random.Random(0).sample(space.vocabulary, min(_SAMPLED, len(space.vocabulary)))
    if not sample:
        return []
    ways = _ways(space, [*phrases, *sample])
    own, others = ways[: len(phrases)], ways[len(phrases) :]
    alike = (torch.nn.functional.normalize(others) @ torch.nn.functional.normalize(own).T).amax(dim=1)
    most = others.norm(dim=1).argsort(descending=True).tolist()
    return [sample[i] for i in most if alike[i] < _ALIKE][:_KEPT]


def _ways(space: TextSpace, words: Sequence[str]) -> Tensor:
    """(n, d): how far each word moves a caption, on average over its positions."""
    texts = [filled(_CAPTION, word) for word in ("", *words)]
    parts = [space.encode(texts[i : i + _CHUNK]).hidden.float().mean(dim=1).cpu() for i in range(0, len(texts), _CHUNK)]
    found = torch.cat(parts)
    return found[1:] - found[0]
