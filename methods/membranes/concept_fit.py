"""From concept names to membranes: captions with and without the concept, encoded, paired and regressed.

Everything a text-to-image model contributes is its `TextSpace`, so that the diffusers and the ComfyUI face compute the
same membranes from the same words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import MembraneError
from ..text_space import TextFeatures, TextSpace
from .base_model import base_model_hash
from .captions import PRESERVE, TEMPLATES
from .closed_form import ClosedFormConfig, aligned_pairs, closed_form_edits, closed_form_membrane
from .gates import fit_probe
from .types import Membranes

T5_POSITIONS = 64  # kept of a sequence that may be 512 long; all captions here are shorter
_CAPTIONS = 80  # concept captions per concept, over all phrases and templates; chosen by hand on the canvas
_PRESERVED = 300  # of the canvas's captions; chosen by hand there
_DRAWN = 4 * _PRESERVED  # of which those that name what is erased are dropped: enough where three in four do
_T5_PADDING = 4  # positions after the end of a T5 sentence that still count; chosen by hand


@dataclass(frozen=True, eq=False)
class _Fit:
    """What one concept contributes: training pairs, and captions with and without it."""

    rows: Tensor  # (n, d)
    targets: Tensor
    concept: TextFeatures
    surrogate: TextFeatures


@torch.no_grad()
def fit_concepts(
    space: TextSpace,
    concepts: str | Sequence[str],
    surrogate: str = "",
    preserve: Iterable[str] | None = None,
    *,
    synonyms: Mapping[str, Sequence[str]] | None = None,
    templates: Sequence[str] | None = None,
    config: ClosedFormConfig | None = None,
    world=None,
) -> Membranes:
    """Compute one membrane per concept in closed form.

    Args:
        concepts: names; "robot|android|droid" names synonyms too.
        surrogate: what they turn into; "" leaves the phrase out of the caption.
        preserve: captions that must not change; None is a general list. Captions that name an erased concept are left
            out.
        synonyms: name -> further phrasings.
        templates: captions with one "{}" each; None is a general list.
        config: how to solve.
        world: `semiperm.canvas.captions` for the embedded model, whose own captions then replace the general lists.

    Raises:
        MembraneError: no concept, a template without "{}", a surrogate equal to the concept.
    """
    phrases = _phrases(concepts, synonyms or {})
    if world is not None and templates is None:
        phrases, by_concept, preserve = _captions_of(world, phrases, preserve)
    else:
        by_concept = dict.fromkeys(phrases, list(TEMPLATES if templates is None else templates))
    for name, own in phrases.items():
        wrong = [t for t in by_concept[name] if t.count("{}") != 1]
        if wrong or not by_concept[name]:
            raise MembraneError(
                f"templates for {name!r}: {wrong[:2] or 'none'}; expected captions with exactly one '{{}}'"
            )
        if surrogate.strip().lower() in (phrase.lower() for phrase in own):
            raise MembraneError(f"surrogate {surrogate!r} is {name!r} itself; expected another concept, or '' for none")
    kept = _kept(PRESERVE if preserve is None else preserve, [p for own in phrases.values() for p in own])
    fits = [_fit(space, own, by_concept[name], surrogate) for name, own in phrases.items()]
    return _joint_membranes(space, phrases, fits, space.encode(kept), surrogate, config or ClosedFormConfig())


def _captions_of(captions, phrases: Mapping[str, tuple[str, ...]], preserve: Iterable[str] | None):
    """On the embedded model: its own synonyms, templates of the concept's domain, and captions to preserve."""
    phrases, templates = dict(phrases), {}
    for name, own in list(phrases.items()):
        try:
            templates[name] = captions.templates(captions.domain(name))
        except ValueError:  # not a concept of the canvas
            templates[name] = list(TEMPLATES)
        else:
            phrases[name] = tuple(dict.fromkeys((*own, *captions.phrases(name))))
    named = [phrase for own in phrases.values() for phrase in own]
    return phrases, templates, [*_kept(captions.preserve(n=_DRAWN), named)[:_PRESERVED], *(preserve or ())]


def _phrases(concepts: str | Sequence[str], synonyms: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    phrases = {}
    for concept in [concepts] if isinstance(concepts, str) else concepts:
        own = [part.strip() for part in concept.split("|") if part.strip()]
        if not own:
            raise MembraneError(f"concept {concept!r} is empty; expected a name such as 'robot' or 'robot|android'")
        phrases[own[0]] = tuple(dict.fromkeys((*own, *synonyms.get(own[0], ()))))
    if not phrases:
        raise MembraneError("no concepts to erase were given; expected at least one name")
    return phrases


def _joint_membranes(
    space: TextSpace, phrases, fits: Sequence[_Fit], others: TextFeatures, surrogate: str, config: ClosedFormConfig
) -> Membranes:
    """One joint solution for all concepts: each membrane stays silent on the others."""
    tokens, pooled = space.tokens, space.pooled
    rows, targets = [fit.rows for fit in fits], [fit.targets for fit in fits]
    edits = closed_form_edits(rows, targets, others.hidden.flatten(0, 1), config, _gram(tokens, config))
    pooled_edits = [None] * len(fits)
    if pooled:
        pooled_edits = closed_form_edits(
            [fit.concept.pooled for fit in fits],
            [fit.surrogate.pooled for fit in fits],
            others.pooled,
            config,
            _gram(pooled, config),
        )
    base = base_model_hash(tokens | pooled)
    membranes = []
    for (name, own), fit, edit, pooled_edit in zip(phrases.items(), fits, edits, pooled_edits, strict=True):
        probe = fit_probe(fit.concept.hidden, torch.cat((fit.surrogate.hidden, others.hidden)))
        fields = {"phrases": own, "surrogate": surrogate, "probe": probe, "base_model": base}
        method = f"closed_form/{config.method}"
        membrane = closed_form_membrane(tokens, edit, name, method=method, **fields)
        if pooled_edit is not None:
            extra = closed_form_membrane(pooled, pooled_edit, name, method=method, base_model=base)
            membrane = replace(membrane, modules=membrane.modules | extra.modules)
        membranes.append(membrane)
    return Membranes(membranes)


def _gram(weights: dict[str, Tensor], config: ClosedFormConfig) -> Tensor | None:
    if config.method != "rece":
        return None
    return sum(w.double().T @ w.double() for w in weights.values()).cpu()


def _kept(preserve: Iterable[str], phrases: Sequence[str]) -> list[str]:
    """The captions that name none of the phrases, and always the unconditional prompt."""
    named = re.compile("|".join(rf"\b{re.escape(phrase)}\b" for phrase in phrases), re.IGNORECASE)
    return list(dict.fromkeys(("", *(caption for caption in preserve if not named.search(caption)))))


def _fit(space: TextSpace, phrases: Sequence[str], templates: Sequence[str], surrogate: str) -> _Fit:
    """Pair every caption with its surrogate caption, position by position, in each tokenizer's stretch."""
    count = max(_CAPTIONS, len(phrases))
    pairs = [(templates[i % len(templates)], phrase) for i, phrase in _spread(phrases, len(templates), count)]
    concept = space.encode([_fill(template, phrase) for template, phrase in pairs])
    surrogates = list(dict.fromkeys(_fill(template, surrogate) for template, _ in pairs))
    without = space.encode(surrogates)
    segments = space.segments
    ends = [*(segment.start for segment in segments[1:]), concept.hidden.shape[1]]
    others = [surrogates.index(_fill(template, surrogate)) for template, _ in pairs]
    rows, targets = [], []
    for segment, end in zip(segments, ends, strict=True):
        for i, (span, other_span) in enumerate(_spans(segment.prefix_tokens, pairs, surrogate)):
            length = other_length = end - segment.start
            if not segment.causal:  # T5 fills the rest with padding, which says little
                length, other_length = (min(length, stop + 1 + _T5_PADDING) for stop in (span[2], other_span[2]))
            if not span[0] < span[1] <= length:
                continue  # cut off by the encoder's length
            row, target = aligned_pairs(
                concept.hidden[i, segment.start : segment.start + length],
                without.hidden[others[i], segment.start : segment.start + other_length],
                span[:2],
                (min(other_span[0], other_length), min(other_span[1], other_length)),
            )
            rows.append(row.float().cpu())
            targets.append(target.float().cpu())
    if not rows:
        raise MembraneError(f"no caption has room for {phrases[0]!r}: all templates exceed the text encoder's length")
    pooled = None if without.pooled is None else without.pooled[torch.tensor(others, device=without.pooled.device)]
    return _Fit(torch.cat(rows), torch.cat(targets), concept, TextFeatures(without.hidden, pooled, []))


def _spread(phrases: Sequence[str], templates: int, count: int) -> list[tuple[int, str]]:
    """(template index, phrase) pairs: every phrase equally often, over as many templates as fit, none twice."""
    per_phrase = min(templates, -(-count // len(phrases)))
    return [((k + j * len(phrases)) % templates if templates > per_phrase else j, phrase)
            for k, phrase in enumerate(phrases) for j in range(per_phrase)]  # fmt: skip


def _fill(template: str, word: str) -> str:
    return re.sub(r"\s+", " ", template.replace("{}", word)).strip()


def _spans(
    prefix_tokens: Callable, pairs: Sequence[tuple[str, str]], surrogate: str
) -> list[tuple[tuple[int, int, int], ...]]:
    """Per caption, token positions (start, end, end of the text) of the phrase, and of the surrogate in its place."""
    before = [template.split("{}")[0] for template, _ in pairs]
    starts = prefix_tokens([_fill(text, "") for text in before])
    found = []
    for words in ([phrase for _, phrase in pairs], [surrogate] * len(pairs)):
        ends = prefix_tokens([_fill(text + "{}", word) for text, word in zip(before, words, strict=True)])
        stops = prefix_tokens([_fill(template, word) for (template, _), word in zip(pairs, words, strict=True)])
        found.append([(s, e if w else s, stop) for s, e, w, stop in zip(starts, ends, words, stops, strict=True)])
    return list(zip(*found, strict=True))
