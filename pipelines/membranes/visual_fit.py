"""Image-side membranes for a loaded pipeline: from a concept's name, whose pictures it draws, and from pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...methods.errors import MembraneError
from ...methods.membranes.base_model import base_model_hash
from ...methods.membranes.config import MembraneConfig
from ...methods.membranes.types import Membrane, Membranes
from ...methods.membranes.visual import VisualSide
from ...methods.membranes.visual_fit import VisualConfig, fit_side
from ...methods.membranes.visual_takers import Scores, Tokens
from ...methods.membranes.visual_words import AWAY, LOOKED_AT, fit_looks, wanted
from ..family import Pipeline, denoiser_of, family_of
from ..latents import latent_shape, pixels_per_latent
from ..watermark.inversion import encode_images
from ..weights import weights_of
from .apply import apply_membranes
from .state import MembraneHandle
from .visual import image_layers, reads_text
from .watch import drawn, shown, watched

__all__ = ["fit_visual"]


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
    config, pictures = config or VisualConfig(), dict(pictures or {})
    asked = wanted(concepts, surrogate, preserve, synonyms, templates, config)
    _check(pipe, asked.phrases, pictures)
    drawing = _Drawing(pipe, config, progress or (lambda count: None))
    fitted = {name: drawing.of_pictures(name, own, asked.kept) for name, own in pictures.items()}
    made = fit_looks(drawing, asked, config, fitted)
    layers = image_layers(*denoiser_of(pipe), family_of(pipe))
    weights = weights_of(pipe, {key: layers[key][0] for key in made.image_keys})
    return Membranes(replace(m, base_model=base_model_hash({key: weights[key] for key in m.keys})) for m in made)


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


class _Drawing:
    """A pipeline's runs for one fit: `methods.membranes.visual_words.Drawing`."""

    def __init__(self, pipe: Pipeline, config: VisualConfig, told: Callable[[int], None]):
        self.pipe, self.config, self.told = pipe, config, told
        self.family = family_of(pipe)
        self.layers = [key for key in image_layers(*denoiser_of(pipe), self.family) if reads_text(key)]
        self._known: dict[tuple, tuple] = {}

    @property
    def size(self) -> list[int]:
        """Height and width of the pictures that are drawn."""
        wanted = [self.config.sampling.get(name) for name in ("height", "width")]
        return [n * pixels_per_latent(self.pipe) for n in latent_shape(self.pipe, *wanted)[1:]]

    def _drawn(self, prompts: Sequence[str], seed: int, then: Callable[[], None] = lambda: None, more: int = 0):
        """Latents of runs; `then` is called after each batch."""
        config = self.config

        def told(count: int) -> None:
            then()
            self.told(count)

        steps = config.steps + more
        return drawn(self.pipe, prompts, steps, config.batch_size, config.seed + seed, told, config.sampling)

    def tokens(self, prompts: Sequence[str], keep: bool) -> tuple[list[float], dict[str, Tensor]]:
        key = tuple(prompts)
        if key in self._known:
            return self._known[key]
        taker = Tokens(self.config.tokens)
        with watched(self.pipe, taker, self.layers):
            self._drawn(prompts, 0)
        found = taker.of()
        self._known |= {key: found} if keep else {}
        return found

    def scores(self, sides: Sequence[VisualSide], prompts: Sequence[str]) -> Tensor:
        return self._scored(sides, prompts, AWAY, more=1)[0]

    def _scored(self, sides: Sequence[VisualSide], prompts: Sequence[str], seed: int, more: int = 0):
        """(P, K) counts, and latents."""
        taker = Scores(sides)
        with watched(self.pipe, taker, list(taker.sites)):
            latents = self._drawn(prompts, seed, taker.next, more)
        return taker.of(), latents

    def validate(self, side: VisualSide, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        scores, latents = self._scored([side], prompts, 2 * AWAY)
        return scores[:, 0], latents

    def redraw(self, prompts: Sequence[str], membrane: Membrane | None) -> Tensor:
        if membrane is None:
            return self._drawn(prompts, 2 * AWAY)
        with apply_membranes(self.pipe, membrane, MembraneConfig(check_base=False)):
            return self._drawn(prompts, 2 * AWAY)

    def look(self, pictures: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        taker = Tokens(self.config.tokens)
        self._show(taker, None, pictures, captions, lambda count: None)
        return taker.of()[1]

    def seen(self, side: VisualSide, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        taker = Scores([side])
        self._show(taker, list(taker.sites), pictures, captions, lambda count: taker.next())
        return taker.of()[:, 0]

    def _show(self, taker, keys: Sequence[str] | None, pictures: Tensor, captions: Sequence[str], then: Callable):
        latents = self.family.unpack(self.pipe, pictures, *self.size)
        with watched(self.pipe, taker, keys):
            shown(self.pipe, latents, captions, LOOKED_AT, 1, self.config.seed, then)

    def of_pictures(self, name: str, pictures: Sequence[Any], kept: Sequence[str]) -> VisualSide:
        """The side, without thresholds, of pictures of a concept, beside drawn ones."""
        config, pipe = self.config, self.pipe
        count = len(pictures) // 2 * 2
        given = encode_images(pipe, list(pictures[:count]), config.batch_size)
        others = self._drawn([kept[i % len(kept)] for i in range(count + config.background)], 0)
        others = self.family.unpack(pipe, others, *self.size)
        if others.shape[1:] != given.shape[1:]:
            raise MembraneError(
                f"the pictures' latents are {tuple(given.shape[1:])}, those that the pipeline draws"
                f" {tuple(others.shape[1:])}; give pictures of the size that it draws, or height and width in"
                " VisualConfig.sampling"
            )
        shares, found = [(j + 0.5) / config.steps for j in range(config.steps)], []
        for latents in (given, others[:count], others[count:]):
            taker = Tokens(config.tokens)
            with watched(pipe, taker):
                shown(pipe, latents, kept, shares, config.batch_size, config.seed, self.told)
            found.append(taker.of())
        (shares, on), (_, off), (_, background) = found
        return fit_side(name, on, off, background, shares, config)
