"""The detector of each concept of a stack: fitted on captions and on free word order, tried on prompts kept out of it.

What it is tried on shares no template with what it was fitted on: list-like prompts, capitals, plurals, possessives,
weights, long prompts with the concept at either end, several things at once. How many of those that name the concept
find it closed, and how many others find it open, is kept with the detector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..text_space import TextFeatures
from .captions import FREE, FREE_KEPT_OUT, OTHERS, OTHERS_KEPT_OUT, filled
from .gates import fit_probe, probe_gate
from .phrases import fold, names, plural
from .types import GateProbe

__all__ = ["fit_detectors"]

_KEPT_OUT = 4  # every fourth preserved caption is kept out of the fit, for the false-open rate
_TRIED = 3  # prompts kept out per template: its own words, and beside two other things
_ALIKE = 0.5  # of a phrase's own way, that its plural must go to mean the same
_RIVALS = 120  # captions of all other erased concepts together that a detector must stay closed for


def fit_detectors(
    encode: Callable[[Sequence[str]], TextFeatures],
    ends: Callable[[Sequence[str], Sequence[str]], Tensor],
    phrases: Sequence[Sequence[str]],
    captions: Sequence[tuple[Sequence[tuple[str, str]], Sequence[str]]],
    preserve: Sequence[str],
    surrogate: str,
    *,
    pooled: bool = False,
) -> list[GateProbe]:
    """Fit one detector per concept.

    Args:
        encode: captions -> features.
        ends: (captions, phrases in them) -> (n, s) positions of the phrases' last tokens, -1 where they are cut off.
        phrases: of each concept, its name first.
        captions: of each concept, (caption, phrase) of those that name it, and those with the surrogate in its place.
        preserve: captions that name none of them.
        surrogate: what stands in its place; "" is nothing.
        pooled: whether the model reads pooled embeddings, too; then a second detector judges these.
    """
    folded = [[fold(phrase) for phrase in own] for own in phrases]
    every = [phrase for own in folded for phrase in own]
    kept_out = [*preserve[1::_KEPT_OUT], *_without(FREE_KEPT_OUT, OTHERS_KEPT_OUT, surrogate, every)]
    background = [*(c for i, c in enumerate(preserve) if i % _KEPT_OUT != 1)]
    background += _without(FREE, OTHERS, surrogate, every)
    probes = []
    for k, own in enumerate(phrases):
        named, unnamed = captions[k]
        said = {phrase: _forms(encode, phrase) for phrase in own}
        free = [(template, own[i % len(own)]) for i, template in enumerate(FREE)]
        on = [*named, *((filled(text, phrase), phrase) for text, phrase in free if text in said[phrase])]
        on, positions = _whole(on, ends)
        tried, _ = _whole(_kept_out(own, said), ends)
        rivals = _rivals([[c for c, _ in named] for j, (named, _) in enumerate(captions) if j != k], folded[k])
        off = [*dict.fromkeys([*unnamed, *background, *rivals])]
        parts = [encode(part) for part in (on, off, tried, kept_out)]
        probe = _measured(*(part.hidden for part in parts), positions)
        if pooled and parts[0].pooled is not None:
            probe = replace(probe, pooled=_measured(*(part.pooled[:, None] for part in parts)))
        probes.append(probe)
    return probes


def _whole(pairs: Sequence[tuple[str, str]], ends) -> tuple[list[str], Tensor]:
    """The captions whose phrase no text encoder cuts off, and where its last tokens stand; all, if there are none."""
    positions = ends([caption for caption, _ in pairs], [phrase for _, phrase in pairs])
    kept = (positions >= 0).all(dim=1)
    kept = kept if kept.any() else torch.ones_like(kept)
    return [caption for (caption, _), keep in zip(pairs, kept, strict=True) if keep], positions[kept].clamp_min(0)


def _measured(on: Tensor, off: Tensor, tried: Tensor, kept_out: Tensor, positions: Tensor | None = None) -> GateProbe:
    probe = fit_probe(on, off, positions)
    opened, shut = probe_gate(tried, probe), probe_gate(kept_out, probe)
    return replace(
        probe,
        false_closed=(opened < 1).float().mean().item(),
        false_open=(shut > 0).float().mean().item(),
        checked=(len(tried), len(kept_out)),
    )


def _forms(encode, phrase: str) -> set[str]:
    """The templates of free word order that the encoder understands with a phrase: less those with its plural, where
    that moves it elsewhere ("dotteds"). A gate opens for these words anyway, and a model draws nothing for them."""
    alone, many, nothing = encode([phrase, plural(phrase), ""]).hidden.double()
    way = alone - nothing
    alike = ((many - nothing) * way).sum() / way.square().sum().clamp_min(1e-30)
    return {text for text in (*FREE, *FREE_KEPT_OUT) if "{s}" not in text or alike >= _ALIKE}


def _kept_out(phrases: Sequence[str], said: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """(prompt, phrase) that name the concept by each of its phrases in turn, alone and beside other things."""
    found = []
    for i, template in enumerate(FREE_KEPT_OUT):
        for j in range(_TRIED):
            phrase = phrases[(i + j) % len(phrases)]
            if template not in said[phrase]:
                continue
            text = filled(template, phrase)
            one, other = (OTHERS_KEPT_OUT[(i * 5 + j * 7 + shift) % len(OTHERS_KEPT_OUT)] for shift in (0, 3))
            found.append((text if j == 0 else f"{one}, {text}" if j == 1 else f"{text} and a {other}", phrase))
    return found


def _without(templates: Sequence[str], others: Sequence[str], surrogate: str, every) -> list[str]:
    """The same prompts with other things in the concept's place, and with the surrogate."""
    texts = [filled(t, others[(i * 7 + j * 5) % len(others)]) for i, t in enumerate(templates) for j in range(_TRIED)]
    texts += [filled(template, surrogate) for template in templates]
    return [text for text in dict.fromkeys(texts) if not names(text, every)]


def _rivals(captions: Sequence[Sequence[str]], own) -> list[str]:
    """Captions of the other concepts, as many of each; not those that name this one, too ("cat" and "black cat")."""
    each = -(-_RIVALS // max(1, len(captions)))
    return [c for those in captions for c in those[:: max(1, len(those) // each)][:each] if not names(c, own)]
