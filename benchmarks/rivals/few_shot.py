"""Few-shot unlearning: the text encoder is trained to make the denoiser worse at a few pictures of the concept.

    max  |n - e(x_t, E(c))|^2      x_t = a x + s n of a picture x of the concept, at random times

by gradient ascent on the text encoder E alone: the feed-forward layers of every block, and the last block's attention.

Source: Fuchi and Takagi (arXiv 2405.07288): four pictures, five passes, Adam at 1e-5. We differ: the pictures are drawn
by the model itself, of the concept in general captions (the paper takes real ones); the rate is scaled to the encoder's
width; the loss is that of the model's own kind of prediction. All CLIP text encoders are trained, T5 is not.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ...methods.errors import MembraneError
from ...methods.training.objectives import erasing_loss
from ...pipelines.latents import latent_shape, pixels_per_latent
from ...pipelines.membranes.watch import drawn
from ...pipelines.prediction import Predictor
from ..erasure.methods import Told
from .shared import fitted, in_place, paired_captions
from .training import clip_parameters, clip_rate, encode_open, layer_of, prediction_of, rows_of, trained


def erase(
    pipe, told: Told, pictures: int = 4, passes: int = 5, rate: float = 1e-5, steps: int = 20, seed: int = 0
) -> AbstractContextManager[dict]:
    """Erase by few-shot unlearning.

    Args:
        pictures: of each concept, >= 1. passes: over them, >= 1. rate: of the optimiser, for CLIP-L. steps: that the
            pictures are drawn with.
    """
    options = {"pictures": pictures, "passes": passes, "rate": rate, "steps": steps, "seed": seed}
    return in_place(pipe, fitted(told, "few_shot", options, lambda: _fit(pipe, told, **options)))


def few_shot_parameters(path: str, layers: int) -> bool:
    """Whether a parameter of a text encoder with so many layers is trained."""
    return ".mlp.fc" in path or (layer_of(path) == layers - 1 and ".self_attn." in path)


def _fit(pipe, told: Told, pictures: int, passes: int, rate: float, steps: int, seed: int) -> dict[str, Tensor]:
    if pictures < 1 or passes < 1 or steps < 1:
        raise MembraneError(f"pictures={pictures}, passes={passes}, steps={steps}; expected at least one of each")
    names = clip_parameters(pipe, few_shot_parameters, "few-shot unlearning")
    predictor, captions = Predictor(pipe), []
    for phrases in told.words.values():
        captions += paired_captions(phrases, pictures)[0]
    with torch.no_grad():
        images = drawn(pipe, captions, steps, pictures, seed, lambda count: None, {})
    size = [side * pixels_per_latent(pipe) for side in latent_shape(pipe)[1:]]
    images = predictor.family.unpack(pipe, images, *size).float()
    generator = torch.Generator().manual_seed(seed)
    times = predictor.times(1000, images).to(images.device)  # as fine as the models' own
    with trained(pipe, names, clip_rate(pipe, rate)) as trainee:
        for _ in range(passes):
            for number in torch.randperm(len(images), generator=generator).tolist():
                image = images[number : number + 1]
                now = times[torch.randint(1000, (1,), generator=generator)]
                noise = torch.randn(image.shape, generator=generator).to(image)
                image_level, noise_level = levels = predictor.levels(now)
                text = rows_of(encode_open(pipe, [captions[number]]), 1)
                made = predictor(image_level * image + noise_level * noise, now, *text)
                trainee.step(-erasing_loss(made, prediction_of(predictor.kind, image, noise, levels)).mean())
        return trainee.values()
