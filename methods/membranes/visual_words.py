"""Image-side membranes from concepts' names: which pictures a model draws for the fit, and in what order.

All that a model contributes is its `Drawing`, so that the diffusers and the ComfyUI face fit the same membranes.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import MembraneError
from .captions import OTHERS, PRESERVE
from .concept_fit import checked, fill, kept_captions, phrases_of
from .phrases import fold, names
from .types import Membrane, Membranes
from .visual import VisualSide
from .visual_drawing import LOOKED_AT, Drawing
from .visual_fit import VisualConfig, calibrated, fit_side, without_showing

logger = logging.getLogger(__name__)

__all__ = ["BETAS", "Wanted", "fit_looks", "wanted"]

BETAS = (1.0, 2.0, 3.0, 4.0)  # tried in this order
_DEFAULT_BETA = 2.0  # CASteer's, where nothing can be validated
_MOST_SHOWN = 1 / 8  # of the validation pictures: one of the usual eight


@dataclass(frozen=True)
class Wanted:
    """What is to be fitted.

    Args:
        phrases: concept -> its phrasings. surrogate: what it turns into. templates: captions with one "{}".
        others: words that stand in its place. kept: captions that name none of them, in random order.
    """

    phrases: dict[str, tuple[str, ...]]
    surrogate: str
    templates: list[str]
    others: list[str]
    kept: list[str]


def wanted(
    concepts: str | Sequence[str],
    surrogate: str,
    preserve: Iterable[str] | None,
    synonyms: Mapping[str, Sequence[str]] | None,
    templates: Sequence[str] | None,
    config: VisualConfig,
) -> Wanted:
    """What `erase_concepts` was asked for, with the general lists where it was given none.

    Raises:
        MembraneError: no concept, a template without "{}", a surrogate that is a concept, no other words or captions.
    """
    phrases = phrases_of(concepts, synonyms or {})
    templates = checked(phrases, surrogate, templates)
    every = [phrase for own in phrases.values() for phrase in own]
    kept = kept_captions(PRESERVE if preserve is None else preserve, every)
    others = [surrogate] if surrogate else list(config.others or OTHERS)
    others = [word for word in others if not names(word, [fold(phrase) for phrase in every])]
    if not others:
        raise MembraneError("every one of `others` names an erased concept; give words for other things")
    kept = [caption for caption in kept if caption]  # of no words a model may draw anything, the concept as well
    if not kept:
        raise MembraneError(
            "no captions to preserve that name no erased concept; give some whose pictures do not show it"
        )
    kept = random.Random(config.seed).sample(kept, len(kept))  # lists go from subject to subject
    return Wanted(phrases, surrogate, templates, others, kept)


def fit_looks(
    drawing: Drawing,
    asked: Wanted,
    config: VisualConfig,
    fitted: Mapping[str, VisualSide] | None = None,
) -> Membranes:
    """One image-side membrane per concept; the model's fingerprint is not in them yet.

    Args:
        fitted: sides, without thresholds, of concepts whose pictures are not to be drawn.
    """
    fitted = fitted or {}
    sides = [fitted[n] if n in fitted else _fitted(drawing, own, asked, config) for n, own in asked.phrases.items()]
    scores = drawing.scores(sides, _cycled(asked.kept, config.calibration + config.spare))
    for number, (name, own) in enumerate(asked.phrases.items()):
        others = scores[:, number]
        if name not in fitted and config.validation:
            on, _ = _pairs(own, asked, _spare(asked, config))
            others = without_showing(others, drawing.scores([sides[number]], on)[:, 0], config)
        sides[number] = calibrated(sides[number], others, config)
    made = []
    for (name, own), side in zip(asked.phrases.items(), sides, strict=True):
        side = replace(side, beta=_DEFAULT_BETA if config.beta is None else config.beta)
        origin = "pictures" if name in fitted else "words"
        membrane = Membrane(name, {}, phrases=own, surrogate=asked.surrogate, method=f"visual/{origin}", visual=side)
        if name not in fitted and config.validation:
            membrane = replace(membrane, visual=_validated(drawing, membrane, asked, config))
        made.append(membrane)
    return Membranes(made)


def _cycled(captions: Sequence[str], count: int) -> list[str]:
    return [captions[i % len(captions)] for i in range(count)]


def _pairs(phrases: Sequence[str], asked: Wanted, templates: Sequence[str]) -> tuple[list[str], list[str]]:
    """Captions with the concept in its phrasings, and the same with other things in its place."""
    on = [fill(text, phrases[i % len(phrases)]) for i, text in enumerate(templates)]
    # in steps that share no divisor with most lists' lengths: halves of them have as many of each
    return on, [fill(text, asked.others[(i * 5) % len(asked.others)]) for i, text in enumerate(templates)]


def _spare(asked: Wanted, config: VisualConfig) -> list[str]:
    """Templates for pictures with the concept that are kept out of the fit."""
    return _cycled([*asked.templates[config.samples :], *asked.templates], config.validation)


def _fitted(drawing: Drawing, phrases: Sequence[str], asked: Wanted, config: VisualConfig) -> VisualSide:
    on, off = _pairs(phrases, asked, _cycled(asked.templates, config.samples))
    shares, without = drawing.tokens(off, True)
    _, background = drawing.tokens(_cycled(asked.kept, config.background), True)
    _, shown = drawing.tokens(on, False)
    return fit_side(phrases[0], shown, without, background, shares, config)


def _validated(drawing: Drawing, membrane: Membrane, asked: Wanted, config: VisualConfig) -> VisualSide:
    """With the share of new pictures in which no gate opens, and the smallest beta that serves: with which pictures
    drawn again look like those of other things. No judge is needed.

    What they look like is asked under captions that do not name the concept, so that the picture alone says it; and
    directions of such looks tell it, since those of the side are of answers to the concept's own words.
    """
    side = membrane.visual
    on, off = _pairs(membrane.phrases, asked, _spare(asked, config))
    scores, pictures = drawing.validate(side, on)
    closed = float((scores <= 0).float().mean())  # thresholds are set: a count above 0 is an open gate
    side = replace(side, false_closed=closed, checked=len(scores))
    if config.beta is not None:
        return side
    without = drawing.redraw(off, None)
    others = drawing.look(without, off)
    try:
        tells = fit_side(membrane.concept, drawing.look(pictures, off), others, others, LOOKED_AT, config)
    except MembraneError:
        logger.info("no layer tells pictures of %r from others: beta stays %g", membrane.concept, side.beta)
        return side
    middle = (drawing.seen(tells, pictures, off).median() + drawing.seen(tells, without, off).median()) / 2
    best, least = side, 1.0
    for beta in BETAS:
        tried = replace(side, beta=beta)
        edited = drawing.seen(tells, drawing.redraw(on, replace(membrane, visual=tried)), off)
        share = float((edited > middle).float().mean())
        logger.info("with beta %g %.0f %% of pictures still show %r", beta, 100 * share, membrane.concept)
        if share < least:
            best, least = tried, share
        if share <= _MOST_SHOWN:
            break
    return best
