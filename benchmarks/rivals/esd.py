"""ESD: the denoiser is fine-tuned to predict for a concept what guidance away from it would.

    L = |e_M(x_t, c) - [e(x_t) - eta (e(x_t, c) - e(x_t))]|^2,   eta = 1

ESD-x trains cross-attention (attn2) alone, ESD-u everything else of the UNet. Pictures x_t are on their way under the
model in training, with guidance 3 towards the concept; every phrasing in its turn.

Source: ESD (arXiv 2303.07345), equations 6 to 8; 1000 steps of one picture, Adam at 5e-5 as in its later code (1e-5 in
the paper), scaled to the UNet's width. We differ: pictures go one sampler's step with each step of the optimiser, where
the paper draws each anew up to a random time: the same latents at a fiftieth of the cost.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ...methods.errors import MembraneError, ModelError
from ...methods.training.objectives import erasing_loss, erasing_target
from ...pipelines.family import denoiser_of, family_of
from ...pipelines.prediction import Predictor
from ...pipelines.text import encode_text
from ..erasure.methods import Told
from .shared import fitted, in_place
from .training import Pictures, rows_of, trained, unet_rate

_GUIDANCE = 3.0  # of the pictures that are trained on; the paper's


def erase(
    pipe, told: Told, part: str = "x", steps: int = 1000, rate: float = 5e-5, eta: float = 1.0, seed: int = 0
) -> AbstractContextManager[dict]:
    """Erase by ESD.

    Args:
        part: "x" or "u". steps: of the optimiser, >= 1. rate: its learning rate, for SD 1.x. eta: how far beyond, >= 0.
    """
    options = {"part": part, "steps": steps, "rate": rate, "eta": eta, "seed": seed}
    return in_place(pipe, fitted(told, "esd", options, lambda: _fit(pipe, told, **options)))


def _names(pipe, part: str) -> list[str]:
    if part not in ("x", "u"):
        raise MembraneError(f"part={part!r}; expected 'x' (cross-attention) or 'u' (everything else)")
    denoiser, attribute = denoiser_of(pipe)
    family = family_of(pipe, video=False)
    if not family.cross_attention:
        raise ModelError(
            f"ESD-{part} trains a UNet's cross-attention, or all but that; the {type(denoiser).__name__} of the"
            f" {family.name} family has none: leave it out here"
        )
    paths = [path for path, _ in denoiser.named_parameters()]
    return [f"{attribute}.{path}" for path in paths if (".attn2." in path) == (part == "x")]


def _fit(pipe, told: Told, part: str, steps: int, rate: float, eta: float, seed: int) -> dict[str, Tensor]:
    if steps < 1 or not 0 <= eta < float("inf"):
        raise MembraneError(f"steps={steps}, eta={eta}; expected at least one step, and eta of 0 or more")
    names, predictor = _names(pipe, part), Predictor(pipe)
    texts = encode_text(pipe, [*told.phrases, ""])
    pictures, empty = Pictures(predictor, 1, 50, seed), rows_of(texts, 1, len(told.phrases))
    with trained(pipe, names, unet_rate(pipe, rate)) as trainee:
        for step in range(steps):
            concept = rows_of(texts, 1, step % len(told.phrases))
            latents, now = pictures.now()
            with trainee.untouched():
                asked, free = (predictor(latents, now, *text) for text in (concept, empty))
            made = predictor(latents, now, *concept)
            trainee.step(erasing_loss(made, erasing_target(asked, free, eta)).mean())
            with torch.no_grad():
                plain = predictor(latents, now, *empty)
            pictures.move(plain + _GUIDANCE * (made.detach() - plain))
        return trainee.values()
