"""Image-side membranes for a loaded pipeline: from a concept's name, whose pictures it draws, and from pictures."""

from __future__ import annotations

import logging
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
from .visual import image_layers, reads_text
from .watch import Noised, Scores, Tokens, Watch, drawn, shown

logger = logging.getLogger(__name__)

__all__ = ["fit_visual"]

_BETAS = (1.0, 2.0, 3.0)  # tried in this order
_DEFAULT_BETA = 2.0  # CASteer's, where nothing can be validated
_NEARER = 0.5  # of the way: nearer to there than to here
_LOOKED_AT = (0.1, 0.3, 0.5)  # shares: what a picture shows is decided in the first half of its run
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
    beta = _DEFAULT_BETA if config.beta is None else config.beta
    made = []
    base = _hashes(pipe, sides)
    for (name, own), side, origin, fingerprint in zip(phrases.items(), sides, origins, base, strict=True):
        fields = {"phrases": own, "surrogate": surrogate, "method": f"visual/{origin}", "base_model": fingerprint}
        membrane = Membrane(name, {}, visual=replace(side, beta=beta), **fields)
        if origin == "words" and config.validation:
            captions = [spare[i % len(spare)] for i in range(config.validation)]
            on = [fill(text, own[i % len(own)]) for i, text in enumerate(captions)]
            off = [fill(text, others[(i * 5) % len(others)]) for i, text in enumerate(captions)]
            membrane = fit.validated(membrane, on, off)
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
        every = image_layers(*denoiser_of(pipe), self.family)
        self.layers = [key for key in every if reads_text(key)]
        self._known: dict[tuple, tuple] = {}

    @property
    def size(self) -> list[int]:
        """Height and width of the pictures that are drawn."""
        wanted = [self.config.sampling.get(name) for name in ("height", "width")]
        return [n * pixels_per_latent(self.pipe) for n in latent_shape(self.pipe, *wanted)[1:]]

    def _drawn(
        self, prompts: Sequence[str], seed: int, then: Callable[[], None] = lambda: None, more: int = 0
    ) -> Tensor:
        """Latents of runs; `then` is called after each batch."""
        config = self.config

        def told(count: int) -> None:
            then()
            self.told(count)

        steps = config.steps + more
        return drawn(self.pipe, prompts, steps, config.batch_size, config.seed + seed, told, config.sampling)

    def _tokens(self, prompts: Sequence[str], keep: bool = True) -> tuple[list[float], dict[str, Tensor]]:
        """(shares, tokens) of runs; `keep`: for the next concept, of pictures that show none."""
        key = tuple(prompts)
        if key in self._known:
            return self._known[key]
        taker = Tokens(self.config.tokens)
        with _watched(self.pipe, taker, self.layers):
            self._drawn(prompts, 0)
        found = taker.of()
        self._known |= {key: found} if keep else {}
        return found

    def from_words(self, phrases: Sequence[str], templates: Sequence[str], others: Sequence[str]) -> VisualSide:
        count = self.config.samples
        captions = [templates[i % len(templates)] for i in range(count)]
        # others in steps that share no divisor with most lists' lengths, so that halves have as many of each
        without = [fill(t, others[(i * 5) % len(others)]) for i, t in enumerate(captions)]
        shares, off = self._tokens(without)
        _, on = self._tokens([fill(t, phrases[i % len(phrases)]) for i, t in enumerate(captions)], keep=False)
        _, background = self._tokens([self.kept[i % len(self.kept)] for i in range(self.config.background)])
        return fit_side(on, off, background, shares, self.config)

    def from_pictures(self, pictures: Sequence[Any]) -> VisualSide:
        config, pipe = self.config, self.pipe
        count = len(pictures) // 2 * 2
        shown_latents = encode_images(pipe, list(pictures[:count]), config.batch_size)
        others = self._drawn([self.kept[i % len(self.kept)] for i in range(count + config.background)], 0)
        others = self.family.unpack(pipe, others, *self.size)
        if others.shape[1:] != shown_latents.shape[1:]:
            raise MembraneError(
                f"the pictures' latents are {tuple(shown_latents.shape[1:])}, those that the pipeline draws"
                f" {tuple(others.shape[1:])}; give pictures of the size that it draws, or height and width in"
                " VisualConfig.sampling"
            )
        shares = [(j + 0.5) / config.steps for j in range(config.steps)]
        found = []
        for latents in (shown_latents, others[:count], others[count:]):
            taker = Tokens(config.tokens)
            with _watched(pipe, taker):
                shown(pipe, latents, self.kept, shares, config.batch_size, config.seed, self.told)
            found.append(taker.of())
        (shares, on), (_, off), (_, background) = found
        return fit_side(on, off, background, shares, config)

    def thresholds(self, sides: Sequence[VisualSide]) -> list[VisualSide]:
        """All concepts' thresholds, by the same pictures, in runs of one step more: knots and steps then differ."""
        config = self.config
        prompts = [self.kept[i % len(self.kept)] for i in range(config.calibration)]
        taker = Scores(sides, device_of(self.pipe))
        with _watched(self.pipe, taker, list(taker.sites)):
            self._drawn(prompts, _AWAY, taker.next, more=1)
        return [calibrated(side, own, config) for side, own in zip(sides, taker.of().T, strict=True)]

    def validated(self, membrane: Membrane, captions: Sequence[str], without: Sequence[str]) -> Membrane:
        """With the share of new pictures of these captions in which no gate opens, and the smallest beta that serves.

        Of the untouched pictures, noised again: beta serves when the edited prediction under the concept's caption lies
        nearer to the untouched one under the same caption with another thing in its place than to its own,

            <e_beta - e_on, e_off - e_on> / |e_off - e_on|^2 >= 1/2 on average,

        which no judge is needed for.
        """
        config, pipe, side = self.config, self.pipe, membrane.visual
        taker = Scores([side], device_of(pipe))
        with _watched(pipe, taker, list(side.sites)):
            latents = self._drawn(captions, 2 * _AWAY, taker.next)
        opened = int((taker.of() > 0).sum())  # thresholds are set: a count above 0 is an open gate
        side = replace(side, false_closed=1.0 - opened / len(captions), checked=len(captions))
        if config.beta is not None:
            return replace(membrane, visual=replace(side, beta=config.beta))
        latents = self.family.unpack(pipe, latents, *self.size)
        on, off = (self._predictions(latents, texts) for texts in (captions, without))
        for beta in _BETAS:
            side = replace(side, beta=beta)
            with apply_membranes(pipe, replace(membrane, visual=side), MembraneConfig(check_base=False)):
                edited = self._predictions(latents, captions)
            way = (off - on).flatten(1)
            gone = ((edited - on).flatten(1) * way).sum(dim=1) / way.square().sum(dim=1).clamp_min(1e-12)
            logger.info("beta %g takes %r %.2f of the way to other things", beta, membrane.concept, float(gone.mean()))
            if gone.mean() >= _NEARER:
                break
        return replace(membrane, visual=side)

    def _predictions(self, latents: Tensor, captions: Sequence[str]) -> Tensor:
        """(B, J, ...): what the denoiser predicts of each picture, noised to each share of `_LOOKED_AT`."""
        found = []
        for number, (picture, caption) in enumerate(zip(latents, captions, strict=True)):
            predict = Noised(self.pipe, picture[None], caption, self.config.seed + number)
            found.append(torch.cat([predict(share) for share in _LOOKED_AT]))
        return torch.stack(found)


class _watched:
    """A context in which a taker sees what layers answer."""

    def __init__(self, pipe: Pipeline, taker: Any, keys: Sequence[str] | None = None):
        self.pipe, self.watch = pipe, Watch(pipe, taker, keys)

    def __enter__(self) -> Watch:
        self.watch.replace(self.pipe)
        return self.watch

    def __exit__(self, *_: object) -> None:
        self.watch.remove()
