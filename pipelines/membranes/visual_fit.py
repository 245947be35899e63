"""Image-side membranes for a loaded pipeline: from a concept's name, whose pictures it draws, and from pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...methods.errors import MembraneError
from ...methods.membranes.base_model import base_model_hash
from ...methods.membranes.config import MembraneConfig
from ...methods.membranes.types import Membrane, Membranes
from ...methods.membranes.visual import VisualSide
from ...methods.membranes.visual_drawing import LOOKED_AT, Drawing
from ...methods.membranes.visual_fit import VisualConfig, fit_side
from ...methods.membranes.visual_takers import Tokens
from ...methods.membranes.visual_words import fit_looks, wanted
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


class _Drawing(Drawing):
    """A pipeline's runs for one fit."""

    def __init__(self, pipe: Pipeline, config: VisualConfig, told: Callable[[int], None]):
        self.pipe, self.told, self.family = pipe, told, family_of(pipe)
        layers = image_layers(*denoiser_of(pipe), self.family)
        super().__init__(config, [key for key in layers if reads_text(key)], list(layers))

    @property
    def size(self) -> list[int]:
        """Height and width of the pictures that are drawn."""
        wanted = [self.config.sampling.get(name) for name in ("height", "width")]
        return [n * pixels_per_latent(self.pipe) for n in latent_shape(self.pipe, *wanted)[1:]]

    def draw(
        self, prompts: Sequence[str], seed: int, taker: Any = None, keys: Sequence[str] = (), more: int = 0
    ) -> Tensor:
        config = self.config

        def told(count: int) -> None:
            if taker is not None:
                taker.next()
            self.told(count)

        how = (config.steps + more, config.batch_size, config.seed + seed, told, dict(config.sampling))
        with nullcontext() if taker is None else watched(self.pipe, taker, keys):
            return drawn(self.pipe, prompts, *how)

    def redrawn(self, prompts: Sequence[str], seed: int, membrane: Membrane) -> Tensor:
        with apply_membranes(self.pipe, membrane, MembraneConfig(check_base=False)):
            return self.draw(prompts, seed)

    def show(self, pictures: Tensor, captions: Sequence[str], taker: Any, keys: Sequence[str]) -> None:
        latents = self.family.unpack(self.pipe, pictures, *self.size)
        with watched(self.pipe, taker, keys):
            shown(self.pipe, latents, captions, LOOKED_AT, 1, self.config.seed, lambda count: taker.next())

    def of_pictures(self, name: str, pictures: Sequence[Any], kept: Sequence[str]) -> VisualSide:
        """The side, without thresholds, of pictures of a concept, beside drawn ones."""
        config, pipe = self.config, self.pipe
        count = len(pictures) // 2 * 2
        given = encode_images(pipe, list(pictures[:count]), config.batch_size)
        others = self.draw([kept[i % len(kept)] for i in range(count + config.background)], 0)
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
