"""The captions of a training run, encoded: the concept in many phrasings, the surrogate in its place, and anchors."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import MembraneError
from ..membranes.captions import FREE, FREE_KEPT_OUT, OTHERS, OTHERS_KEPT_OUT, PRESERVE, TEMPLATES, filled
from ..membranes.phrases import fold, names
from .anchors import AnchorPool
from .config import TrainingConfig
from .model import Embedding
from .packed import seed_of

__all__ = ["Words"]

_POOL = 256  # captions that anchors are drawn from: of T5 with 512 positions they take 2 GB in half precision


@dataclass(frozen=True)
class Words:
    """What is said in a run.

    Args:
        encoder: caption -> its embedding, see `TrainedModel.encode`.
        phrases: concept -> its phrasings.
        surrogate: what they turn into; "" leaves the phrase out.
        preserve: captions that must not change; None is a general list.
        templates: captions with one "{}" each; None is a general list.
    """

    encoder: Callable[[str], Embedding]
    phrases: Mapping[str, Sequence[str]]
    surrogate: str
    preserve: Iterable[str] | None
    templates: Sequence[str] | None
    config: TrainingConfig

    def __post_init__(self):
        object.__setattr__(self, "_known", {})
        given = self.templates
        if given is not None and (not given or any(template.count("{}") != 1 for template in given)):
            raise MembraneError(f"templates {list(given)[:3]}; expected captions with exactly one '{{}}' each")
        object.__setattr__(self, "_forms", TEMPLATES + FREE if given is None else tuple(given))

    def encode(self, captions: Sequence[str]) -> Embedding:
        """Each caption is encoded once, alone, and kept.

        In a batch its last bits would depend on the others, and a resumed run has others.
        """
        for caption in captions:
            if caption not in self._known:
                self._known[caption] = self.encoder(caption)
        hidden, pooled = zip(*(self._known[c] for c in captions), strict=True)
        return torch.stack(hidden), None if pooled[0] is None else torch.stack(pooled)

    def pairs(self, concept: str, count: int, step: int) -> tuple[list[str], list[str]]:
        """Captions that name the concept, in any of its phrasings, and the same with the surrogate in its place.

        The phrasings take turns, so that each is trained as often as the others.
        """
        phrases, found = self.phrases[concept], []
        for number in range(count):
            chance = random.Random(seed_of(self.config.seed, "caption", concept, number, step))
            found.append((chance.choice(self._forms), phrases[(step * count + number) % len(phrases)]))
        return [filled(form, phrase) for form, phrase in found], [filled(form, self.surrogate) for form, _ in found]

    def held_out(self, concept: str, count: int) -> tuple[list[str], list[str], list[str]]:
        """Captions of wordings that are never trained on: of the concept, with the surrogate, and of other things."""
        phrases = self.phrases[concept]
        forms = [FREE_KEPT_OUT[(7 * i) % len(FREE_KEPT_OUT)] for i in range(count)]  # 7 and their number are coprime
        others = [word for word in OTHERS_KEPT_OUT if not self._named(word)]
        return (
            [filled(form, phrases[i % len(phrases)]) for i, form in enumerate(forms)],
            [filled(form, self.surrogate) for form in forms],
            [filled(form, others[(5 * i) % len(others)]) for i, form in enumerate(forms)],
        )

    def anchors(self, concept: str) -> AnchorPool:
        """What is kept while this concept is erased: the captions to preserve, and the other concepts."""
        hidden, pooled, captions = self._pool
        own = [fold(phrase) for phrase in self.phrases[concept]]
        allowed = tuple(i for i, caption in enumerate(captions) if not names(caption, own))
        about, _ = self.encode(self.phrases[concept])
        return AnchorPool(hidden, pooled, about, self.config.anchor_power, self.config.anchor_source, allowed)

    @functools.cached_property
    def _pool(self) -> tuple[Tensor, Tensor | None, list[str]]:
        if self.preserve is None:
            free = [filled(form, OTHERS[(5 * i) % len(OTHERS)]) for i, form in enumerate(FREE)]
            captions = [*PRESERVE, *free]
        else:
            captions = ["", *self.preserve]
        captions = [c for c in dict.fromkeys(captions) if not self._named(c)]
        if len(captions) > _POOL:  # the empty one first, and the rest evenly
            captions = captions[:1] + [captions[1 + i * (len(captions) - 1) // (_POOL - 1)] for i in range(_POOL - 1)]
        others = [filled(form, p) for own in self.phrases.values() for p in own for form in ("{}", "a photo of {}")]
        captions = list(dict.fromkeys([*captions, *(others if len(self.phrases) > 1 else ())]))
        return *self.encode(captions), captions

    def _named(self, caption: str) -> bool:
        return names(caption, [fold(phrase) for own in self.phrases.values() for phrase in own])
