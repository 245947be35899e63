"""Image-side membranes for a loaded pipeline: from a concept's name, whose pictures it draws, and from pictures."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...methods.errors import MembraneError
from ...methods.membranes.base_model import base_model_hash
from ...methods.membranes.captions import OTHERS, PRESERVE
from ...methods.membranes.concept_fit import checked, fill, kept_captions, phrases_of
from ...methods.membranes.config import MembraneConfig
from ...methods.membranes.phrases import fold, names
from ...methods.membranes.types import Membrane, Membranes
from ...methods.membranes.visual import VisualSide
from ...methods.membranes.visual_fit import VisualConfig, calibrated, fit_side
from ..family import Pipeline, denoiser_of, device_of, family_of
from ..latents import latent_shape, pixels_per_latent
from ..watermark.inversion import encode_images
from ..weights import weights_of
from .apply import apply_membranes
from .state import MembraneHandle
from .visual import image_layers
from .watch import Scores, Tokens, Watch, drawn, shown

__all__ = ["fit_visual"]

_BETAS = (1.0, 2.0, 3.0)  # tried in this order
_DEFAULT_BETA = 2.0  # CASteer's, where nothing can be validated
_AWAY = 1_000_000  # between the seeds of the fit, the thresholds and the validation


@torch.no_grad()
def fit_visual(
    pipe: Pipeline,
    concepts: str | Sequence[str],
    surrogate: str = "",
    preserve: Iterable[str] | None = None,
    *,
    synonyms: Mapping[str, Sequence[str]] | None = None,
    templates: Sequence[str] | None = None,
    pictures: Mapping[str, Sequence[Any]] | None = None,
    config: VisualConfig | None = None,
    progress: Callable[[int], None] | None = None,
) -> Membranes:
    """Fit one image-side membrane per concept; see `erase_concepts`, whose arguments these are.

    Runs of the pipeline draw each concept in captions, and the same captions with other things in its place; more runs
    of captions that name no concept set the thresholds. Of a concept with `pictures`, those are noised and denoised
    once at each knot, beside as many that the pipeline drew of other captions; its name then needs no meaning.

    Args:
        pictures: concept -> pictures of it, at least 4.
        progress: called with the number of pictures that were drawn.
    """
    config = config or VisualConfig()
    phrases, told = phrases_of(concepts, synonyms or {}), progress or (lambda count: None)
    templates, pictures = checked(phrases, surrogate, templates), dict(pictures or {})
    _check(pipe, phrases, pictures)
    erased = [fold(p) for own in phrases.values() for p in own]
    kept = kept_captions(PRESERVE if preserve is None else preserve, [p for own in phrases.values() for p in own])
    kept = random.Random(config.seed).sample(kept, len(kept))  # lists go from subject to subject
    others = [surrogate] if surrogate else [word for word in config.others or OTHERS if not names(word, erased)]
    if not others:
        raise MembraneError("every one of `others` names an erased concept; give words for other things")
    fit = _Fit(pipe, config, told, kept)
    sides, origins = [], []
    for name, own in phrases.items():
        if name in pictures:
            sides.append(fit.from_pictures(pictures[name]))
        else:
            sides.append(fit.from_words(own, templates, others))
        origins.append("pictures" if name in pictures else "words")
    sides = fit.thresholds(sides)
    spare = [*templates[config.samples :], *templates]
    made = []
    base = _hashes(pipe, sides)
    for (name, own), side, origin, fingerprint in zip(phrases.items(), sides, origins, base, strict=True):
        fields = {"phrases": own, "surrogate": surrogate, "method": f"visual/{origin}", "base_model": fingerprint}
        membrane = Membrane(name, {}, visual=replace(side, beta=_DEFAULT_BETA), **fields)
        if origin == "words" and config.validation:
            captions = [fill(spare[i % len(spare)], own[i % len(own)]) for i in range(config.validation)]
            membrane = fit.validated(membrane, captions)
        if config.beta is not None:
            membrane = replace(membrane, visual=replace(membrane.visual, beta=config.beta))
        made.append(membrane)
    return Membranes(made)


def _check(pipe: Pipeline, phrases: Mapping, pictures: Mapping) -> None:
    family_of(pipe, video=False)
    if MembraneHandle.on(pipe) is not None:
        raise MembraneError(
            "membranes are at work on this pipeline, whose pictures the fit would draw with them; expected none:"
            " remove_membranes(pipe) first, and apply the old ones together with the new ones afterwards"
        )
    if unknown := [name for name in pictures if name not in phrases]:
        raise MembraneError(f"pictures of {unknown[0]!r}, which is none of the concepts {', '.join(phrases)}")
    for name, own in pictures.items():
        if len(own) < 4:
            raise MembraneError(f"{len(own)} pictures of {name!r}; expected at least 4, better 16")


def _hashes(pipe: Pipeline, sides: Sequence[VisualSide]) -> list[str]:
    denoiser, attribute = denoiser_of(pipe)
    layers = image_layers(denoiser, attribute, family_of(pipe))
    weights = weights_of(pipe, {key: layers[key][0] for key in dict.fromkeys(k for side in sides for k in side.sites)})
    return [base_model_hash({key: weights[key] for key in side.sites}) for side in sides]


class _Fit:
    """The runs of one fit.

    Args:
        kept: captions that name no concept, in random order.
    """

    def __init__(self, pipe: Pipeline, config: VisualConfig, told: Callable[[int], None], kept: Sequence[str]):
        self.pipe, self.config, self.told, self.kept = pipe, config, told, kept
        self.family = family_of(pipe)
        self._known: dict[tuple, tuple] = {}

    def _drawn(self, prompts: Sequence[str], seed: int) -> Tensor:
        config = self.config
        return drawn(
            self.pipe, prompts, config.steps, config.batch_size, config.seed + seed, self.told, config.sampling
        )

    def _tokens(self, prompts: Sequence[str]) -> tuple[list[float], dict[str, Tensor]]:
        """(shares, tokens) of runs; each list of prompts is drawn once, whatever the concept."""
        if tuple(prompts) not in self._known:
            taker = Tokens(self.config.tokens)
            with _watched(self.pipe, taker):
                self._drawn(prompts, 0)
            self._known = {tuple(prompts): taker.of()} if len(self._known) > 1 else self._known
            self._known[tuple(prompts)] = taker.of()
        return self._known[tuple(prompts)]

    def from_words(self, phrases: Sequence[str], templates: Sequence[str], others: Sequence[str]) -> VisualSide:
        count = self.config.samples
        captions = [templates[i % len(templates)] for i in range(count)]
        # others in steps that share no divisor with most lists' lengths, so that halves have as many of each
        without = [fill(t, others[(i * 5) % len(others)]) for i, t in enumerate(captions)]
        shares, off = self._tokens(without)
        _, on = self._tokens([fill(t, phrases[i % len(phrases)]) for i, t in enumerate(captions)])
        return fit_side(on, off, shares, self.config)

    def from_pictures(self, pictures: Sequence[Any]) -> VisualSide:
        config, pipe = self.config, self.pipe
        count = len(pictures) // 2 * 2
        shown_latents = encode_images(pipe, list(pictures[:count]), config.batch_size)
        others = self._drawn([self.kept[i % len(self.kept)] for i in range(count)], 0)
        size = [config.sampling.get(name) for name in ("height", "width")]
        height, width = (n * pixels_per_latent(pipe) for n in latent_shape(pipe, *size)[1:])
        others = self.family.unpack(pipe, others, height, width)
        if others.shape != shown_latents.shape:
            raise MembraneError(
                f"the pictures' latents are {tuple(shown_latents.shape[1:])}, those that the pipeline draws"
                f" {tuple(others.shape[1:])}; give pictures of the size that it draws, or height and width in"
                " VisualConfig.sampling"
            )
        shares = [(j + 0.5) / config.steps for j in range(config.steps)]
        found = []
        for latents in (shown_latents, others):
            taker = Tokens(config.tokens)
            with _watched(pipe, taker):
                shown(pipe, latents, self.kept, shares, config.batch_size, config.seed, self.told)
            found.append(taker.of())
        (shares, on), (_, off) = found
        return fit_side(on, off, shares, config)

    def thresholds(self, sides: Sequence[VisualSide]) -> list[VisualSide]:
        """All concepts' thresholds, by the same pictures, in runs of one step more: knots and steps then differ."""
        config = self.config
        prompts = [self.kept[i % len(self.kept)] for i in range(config.calibration)]
        scores = self._scores(sides, prompts, _AWAY)
        return [calibrated(side, own, config) for side, own in zip(sides, scores.T, strict=True)]

    def _scores(self, sides: Sequence[VisualSide], prompts: Sequence[str], seed: int) -> Tensor:
        """(pictures, K): the highest count of each run."""
        config, taker = self.config, Scores(sides, device_of(self.pipe))

        def told(count: int) -> None:
            taker.next()
            self.told(count)

        with _watched(self.pipe, taker, list(taker.sites)):
            steps = config.steps + 1
            drawn(self.pipe, prompts, steps, config.batch_size, config.seed + seed, told, config.sampling)
        return taker.of()

    def validated(self, membrane: Membrane, captions: Sequence[str]) -> Membrane:
        """With the share of new pictures in which no gate opens, and the smallest beta that closes them."""
        side, opened = membrane.visual, []
        betas = _BETAS if self.config.beta is None else (self.config.beta,)
        for beta in betas:
            side = replace(side, beta=beta)
            with apply_membranes(self.pipe, replace(membrane, visual=side), MembraneConfig(check_base=False)) as handle:
                latents = self._drawn(captions, 2 * _AWAY)
                opened.append(handle)
            del latents
        return replace(membrane, visual=side)


class _watched:
    """A context in which a taker sees what layers answer."""

    def __init__(self, pipe: Pipeline, taker: Any, keys: Sequence[str] | None = None):
        self.pipe, self.watch = pipe, Watch(pipe, taker, keys)

    def __enter__(self) -> Watch:
        self.watch.replace(self.pipe)
        return self.watch

    def __exit__(self, *_: object) -> None:
        self.watch.remove()
