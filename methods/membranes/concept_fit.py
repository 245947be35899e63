"""From concept names to membranes: captions with and without the concept, encoded, paired and regressed.

Everything a text-to-image model contributes is its `TextSpace`, so that the diffusers and the ComfyUI face compute the
same membranes from the same words.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import MembraneError
from ..text_space import TextFeatures, TextSpace
from .base_model import base_model_hash
from .captions import PRESERVE, TEMPLATES
from .closed_form import ClosedFormConfig, Edit, aligned_pairs, closed_form_edits, closed_form_membrane, moved_share
from .detector import fit_detectors
from .phrases import fold, names
from .types import LEAST_MEANING, Membranes
from .vocabulary import other_words

logger = logging.getLogger(__name__)

T5_POSITIONS = 64  # kept of a sequence that may be 512 long; all captions here are shorter
_CAPTIONS = 80  # concept captions per concept, over all phrases and templates; chosen by hand on the canvas
_FEW = 50  # preserved captions below which a warning is given: fewer than an embedding's typical effective rank
_SAYS = 1 / 3  # of a concept's own way: what is moved as far although it is held says the concept in other words
_ROUNDS = 2  # of leaving such captions out: what others held back the first time moves the second time
_T5_PADDING = 4  # positions after the end of a T5 sentence that still count; chosen by hand


@dataclass(frozen=True, eq=False)
class _Fit:
    """What one concept contributes: training pairs, and captions with and without it."""

    rows: Tensor  # (n, d)
    targets: Tensor
    captions: list[tuple[str, str]]  # that name it, with the phrase in each
    surrogates: list[str]  # the same with the surrogate, each once
    concept: TextFeatures  # of `captions`
    surrogate: TextFeatures  # hidden of `surrogates`, pooled of each caption's own


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
) -> Membranes:
    """Compute one membrane per concept in closed form.

    Args:
        concepts: names; "robot|android|droid" names synonyms too.
        surrogate: what they turn into; "" leaves the phrase out of the caption.
        preserve: captions that must not change; None is a general list. Captions that name an erased concept are left
            out.
        synonyms: name -> further phrasings.
        templates: captions with one "{}" each; None is a general list. Of the general lists, where both are taken, what
            says a concept in other words is left out ("a pencil drawing of a car", where sketches are erased).
        config: how to solve.

    Raises:
        MembraneError: no concept, a template without "{}", a surrogate that is a concept to be erased.
    """
    phrases = phrases_of(concepts, synonyms or {})
    general = preserve is None and templates is None
    templates = checked(phrases, surrogate, templates)
    every = [phrase for own in phrases.values() for phrase in own]
    captions = PRESERVE if preserve is None else preserve
    if general:
        words = enumerate(other_words(space, every))
        captions = (*captions, *(fill(templates[i % len(templates)], word) for i, word in words))
    kept = kept_captions(captions, every)
    if len(kept) < _FEW:
        logger.warning(
            "only %d captions are left to preserve%s: much else will change with what is erased; give more with"
            " preserve=... (--preserve), at least %d that name none of it",
            len(kept),
            "" if preserve is None else " of those given",
            _FEW,
        )
    space = replace(space, encode=_once(space.encode))
    config = config or ClosedFormConfig()
    return _joint_membranes(space, phrases, templates, kept, surrogate, config, _ROUNDS if general else 0)


def checked(phrases: Mapping[str, Sequence[str]], surrogate: str, templates: Sequence[str] | None) -> list[str]:
    """The templates, or a general list; an error for ones without a place, and for a surrogate that is a concept."""
    templates = list(TEMPLATES if templates is None else templates)
    wrong = [t for t in templates if t.count("{}") != 1]
    if wrong or not templates:
        raise MembraneError(f"templates {wrong[:2] or 'none'}; expected captions with exactly one '{{}}'")
    for name, own in phrases.items():
        if names(surrogate, [fold(phrase) for phrase in own]):
            raise MembraneError(
                f"surrogate {surrogate!r} is {name!r} itself, which is to be erased; expected another concept, or ''"
                " for none"
            )
    return templates


def _once(encode: Callable[[Sequence[str]], TextFeatures]) -> Callable[[Sequence[str]], TextFeatures]:
    """The same encoder, asked for each caption once: what stands in for the concepts is the same for all of them."""
    known: dict[str, tuple] = {}

    def cached(captions: Sequence[str]) -> TextFeatures:
        fresh = [caption for caption in dict.fromkeys(captions) if caption not in known]
        if fresh:
            made = encode(fresh)
            pooled = made.pooled if made.pooled is not None else [None] * len(fresh)
            known.update(zip(fresh, zip(made.hidden, pooled, made.token_ids, strict=True), strict=True))
        hidden, pooled, ids = zip(*(known[caption] for caption in captions), strict=True)
        length = min(h.shape[0] for h in hidden)  # ComfyUI's T5 lets longer texts grow
        return TextFeatures(
            torch.stack([h[:length] for h in hidden]),
            None if pooled[0] is None else torch.stack(pooled),
            list(ids),
        )

    return cached


def phrases_of(
    concepts: str | Sequence[str], synonyms: Mapping[str, Sequence[str]] | None = None
) -> dict[str, tuple[str, ...]]:
    """Name -> all phrasings of each concept, its name first; "robot|android" names a synonym."""
    phrases = {}
    for concept in [concepts] if isinstance(concepts, str) else concepts:
        own = [part.strip() for part in concept.split("|") if part.strip()]
        if not own:
            raise MembraneError(f"concept {concept!r} is empty; expected a name such as 'robot' or 'robot|android'")
        phrases[own[0]] = tuple(dict.fromkeys((*own, *(synonyms or {}).get(own[0], ()))))
    if not phrases:
        raise MembraneError("no concepts to erase were given; expected at least one name")
    return phrases


def _joint_membranes(
    space: TextSpace,
    phrases: Mapping,
    templates: list[str],
    kept: list[str],
    surrogate: str,
    config: ClosedFormConfig,
    rounds: int,
) -> Membranes:
    """One joint solution for all concepts: each membrane stays silent on the others.

    Args:
        rounds: at most so many times captions are left out that say a concept in other words, and the rest is solved
            again.
    """
    tokens, pooled, own_templates = space.tokens, space.pooled, [templates] * len(phrases)
    while True:
        pairs = zip(phrases.values(), own_templates, strict=True)
        fits, others = [_fit(space, own, each, surrogate) for own, each in pairs], space.encode(kept)
        rows, targets = [fit.rows for fit in fits], [fit.targets for fit in fits]
        edits = closed_form_edits(rows, targets, others.hidden.flatten(0, 1), config, _gram(tokens, config))
        screened = (kept, own_templates)
        if rounds:
            screened = _screened(space, fits, edits, kept, own_templates, len(templates) // 2, surrogate, config)
        if screened == (kept, own_templates):
            break
        (kept, own_templates), rounds = screened, rounds - 1
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
    captions = [(fit.captions, fit.surrogates) for fit in fits]
    ends = functools.partial(_ends, space, others.hidden.shape[1])
    probes = fit_detectors(space.encode, ends, list(phrases.values()), captions, kept, surrogate, pooled=bool(pooled))
    membranes = []
    for (name, own), fit, edit, pooled_edit, probe in zip(
        phrases.items(), fits, edits, pooled_edits, probes, strict=True
    ):
        probe = replace(probe, meaning=_meaning(fit, others.hidden))
        fields = {"phrases": own, "surrogate": surrogate, "probe": probe, "base_model": base}
        method = f"closed_form/{config.method}"
        membrane = closed_form_membrane(tokens, edit, name, method=method, **fields)
        if pooled_edit is not None:
            extra = closed_form_membrane(pooled, pooled_edit, name, method=method, base_model=base)
            membrane = replace(membrane, modules=membrane.modules | extra.modules)
        membranes.append(membrane)
    return Membranes(membranes)


def _screened(
    space: TextSpace,
    fits: Sequence[_Fit],
    edits: Sequence[Edit],
    kept: list[str],
    templates: Sequence[list[str]],
    fewest: int,
    surrogate: str,
    config: ClosedFormConfig,
) -> tuple[list[str], list[list[str]]]:
    """The captions to preserve and each concept's templates, less those that say a concept in other words.

    Such a caption cannot be held while the concept moves: it would hold the concept as well. So one is left out that a
    solution moves far although it held it, and a template whose caption with the surrogate is moved as far.

    Args:
        fewest: templates that must be left of a concept's.
    """
    hidden, moved, left = space.encode(kept).hidden, torch.zeros(len(kept)), []
    for edit, fit, own in zip(edits, fits, templates, strict=True):
        if _meaning(fit, hidden) >= LEAST_MEANING:  # the rest says nothing that another caption could say, too
            without = space.encode([fill(template, surrogate) for template in own]).hidden
            share, of_templates = (
                moved_share(edit, fit.rows, fit.targets, each) / (1 + config.push) for each in (hidden, without)
            )
            moved, own = torch.maximum(moved, share), _less(own, of_templates, fewest)
        left.append(own)
    return _less(kept, moved, _FEW), left


def _less(captions: list[str], moved: Tensor, fewest: int) -> list[str]:
    """The captions that are not moved far; all of them, if fewer than `fewest` would be left."""
    left = [caption for caption, share in zip(captions, moved.tolist(), strict=True) if share < _SAYS or not caption]
    if len(left) == len(captions) or len(left) < fewest:
        return captions
    said = [caption for caption in captions if caption not in left]
    logger.info("left out, since it says what is erased in other words: %s", "; ".join(said))
    return left


def _meaning(fit: _Fit, others: Tensor) -> float:
    """`GateProbe.meaning` of a concept, beside captions (m, N, d) that do not name it."""
    spread = float((others - others.mean(dim=0)).norm(dim=2).mean())
    return float((fit.rows - fit.targets).mean(dim=0).norm()) / max(spread, 1e-30)


def _ends(space: TextSpace, length: int, captions: Sequence[str], phrases: Sequence[str]) -> Tensor:
    """(n, s): where the last token of each caption's phrase, in each encoder's stretch; -1 where it is cut off."""
    ends = [*(segment.start for segment in space.segments[1:]), length]
    until = []
    for caption, phrase in zip(captions, phrases, strict=True):
        found = re.search(rf"{re.escape(phrase)}", caption, re.IGNORECASE)
        until.append(caption[: found.end()] if found else caption)  # a plural that changes the word: at its end
    columns = []
    for segment, end in zip(space.segments, ends, strict=True):
        filled = torch.tensor(segment.prefix_tokens(until))
        columns.append(torch.where(filled < end - segment.start - 1, segment.start + filled - 1, -1))
    return torch.stack(columns, dim=1)


def _gram(weights: dict[str, Tensor], config: ClosedFormConfig) -> Tensor | None:
    if config.method != "rece":
        return None
    return sum(w.double().T @ w.double() for w in weights.values()).cpu()


def kept_captions(preserve: Iterable[str], phrases: Sequence[str]) -> list[str]:
    """The captions that name none of the phrases, and always the unconditional prompt."""
    folded = [fold(phrase) for phrase in phrases]
    return list(dict.fromkeys(("", *(caption for caption in preserve if not names(caption, folded)))))


def _fit(space: TextSpace, phrases: Sequence[str], templates: Sequence[str], surrogate: str) -> _Fit:
    """Pair every caption with its surrogate caption, position by position, in each tokenizer's stretch."""
    count = max(_CAPTIONS, len(phrases))
    pairs = [(templates[i % len(templates)], phrase) for i, phrase in _spread(phrases, len(templates), count)]
    captions = [fill(template, phrase) for template, phrase in pairs]
    concept = space.encode(captions)
    surrogates = list(dict.fromkeys(fill(template, surrogate) for template, _ in pairs))
    without = space.encode(surrogates)
    segments = space.segments
    ends = [*(segment.start for segment in segments[1:]), concept.hidden.shape[1]]
    others = [surrogates.index(fill(template, surrogate)) for template, _ in pairs]
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
    without = TextFeatures(without.hidden, pooled, [])
    named = [(caption, phrase) for caption, (_, phrase) in zip(captions, pairs, strict=True)]
    return _Fit(torch.cat(rows), torch.cat(targets), named, surrogates, concept, without)


def _spread(phrases: Sequence[str], templates: int, count: int) -> list[tuple[int, str]]:
    """(template index, phrase) pairs: every phrase equally often, over as many templates as fit, none twice."""
    per_phrase = min(templates, -(-count // len(phrases)))
    return [((k + j * len(phrases)) % templates if templates > per_phrase else j, phrase)
            for k, phrase in enumerate(phrases) for j in range(per_phrase)]  # fmt: skip


def fill(template: str, word: str) -> str:
    """A caption with a word in its place; "" leaves the place out."""
    return re.sub(r"\s+", " ", template.replace("{}", word)).strip()


def _spans(
    prefix_tokens: Callable, pairs: Sequence[tuple[str, str]], surrogate: str
) -> list[tuple[tuple[int, int, int], ...]]:
    """Per caption, token positions (start, end, end of the text) of the phrase, and of the surrogate in its place."""
    before = [template.split("{}")[0] for template, _ in pairs]
    starts = prefix_tokens([fill(text, "") for text in before])
    found = []
    for words in ([phrase for _, phrase in pairs], [surrogate] * len(pairs)):
        ends = prefix_tokens([fill(text + "{}", word) for text, word in zip(before, words, strict=True)])
        stops = prefix_tokens([fill(template, word) for (template, _), word in zip(pairs, words, strict=True)])
        found.append([(s, e if w else s, stop) for s, e, w, stop in zip(starts, ends, words, stops, strict=True)])
    return list(zip(*found, strict=True))
