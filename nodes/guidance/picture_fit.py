"""A picture detector fitted in ComfyUI from example pictures of a category, and from harmless runs of the model.

The examples are noised to each step's level, and the model is asked what they will be; harmless prompts are drawn in a
few steps, and the model's predictions on the way are kept. Half of the harmless runs are fitted on, the other half sets
the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ...methods.errors import GuidanceError
from ...methods.guidance.detectors import PictureDetector
from ...methods.guidance.examples import halves
from ..progress import Progress

__all__ = ["Examples", "fit_pictures"]

_STEPS = 12  # three in each of a detector's four stretches of the schedule


@dataclass(frozen=True, eq=False)
class Examples:
    """What a picture detector is fitted from.

    Args:
        pictures: (B, H, W, 3) in 0..1, that show the category. vae: of the model. cfg: of the harmless runs.
    """

    pictures: Tensor
    vae: object
    cfg: float = 7.0


def fit_pictures(model, clip, examples: Examples, benign: Sequence[str], alarms: float) -> PictureDetector:
    """Fit the detector; pictures are drawn at the examples' size, one for each harmless prompt.

    Raises:
        GuidanceError: no pictures, or too few harmless prompts for the rate.
    """
    if examples.pictures is None or not len(examples.pictures) or examples.vae is None:
        raise GuidanceError(
            "fit from pictures without pictures or without a vae: connect example pictures of the category and the VAE"
            " of the model, or fit from words"
        )
    found, none = halves(benign)
    drawing = _Drawing(model, clip, examples, len(examples.pictures) + len(benign))
    seen, kept = (drawing.harmless(prompts, seed) for prompts, seed in ((found, 0), (none, len(found))))
    return PictureDetector.fit(drawing.noised(), seen, kept, alarms)


class _Drawing:
    """A model that is watched while it draws."""

    def __init__(self, model, clip, examples: Examples, count: int):
        self.clip, self.examples, self.model = clip, examples, model.clone()
        self.sampling = self.model.get_model_object("model_sampling")
        self.progress, self.seen = Progress(self.sampling), []
        self.model.set_model_sampler_pre_cfg_function(self._watch)
        self.latents = examples.vae.encode(examples.pictures[..., :3])
        self.sigmas = comfy.samplers.calculate_sigmas(self.sampling, "simple", _STEPS)
        self.bar = comfy.utils.ProgressBar(count)

    def _watch(self, args: dict) -> list:
        """What the model predicts for the prompt, where no other step stands at this noise level."""
        share = round(self.progress.share(float(args["sigma"].max())), 6)
        self.seen.append((share, args["conds_out"][0].float().cpu()))
        return args["conds_out"]

    def _conditioning(self, prompt: str) -> list:
        states, pooled = self.clip.encode_from_tokens(self.clip.tokenize(prompt), return_pooled=True)
        return [[states, {"pooled_output": pooled}]]

    def _sample(self, latent: Tensor, sigmas: Tensor, prompt: str, cfg: float, seed: int) -> None:
        noise, euler = comfy.sample.prepare_noise(latent, seed), comfy.samplers.sampler_object("euler")
        texts = self._conditioning(prompt), self._conditioning("")
        comfy.sample.sample_custom(
            self.model, noise, cfg, euler, sigmas, *texts, latent, disable_pbar=True, seed=seed
        )  # fmt: skip

    def harmless(self, prompts: Sequence[str], seed: int) -> list[tuple[float, Tensor]]:
        """(share, predicted latents of all prompts) of each step of their runs."""
        self.seen.clear()
        empty = torch.zeros_like(self.latents[:1])
        for number, prompt in enumerate(prompts):
            self._sample(empty, self.sigmas, prompt, self.examples.cfg, seed + number)
            self.bar.update(1)
        return self._by_step()

    def noised(self) -> list[tuple[float, Tensor]]:
        """The same of the examples, each noised to every step's level: a step to no noise asks for the prediction."""
        self.seen.clear()
        for number, latent in enumerate(self.latents):
            for sigma in self.sigmas[:-1]:
                self._sample(latent[None], torch.stack([sigma, torch.zeros_like(sigma)]), "", 1.0, number)
            self.bar.update(1)
        return self._by_step()

    def _by_step(self) -> list[tuple[float, Tensor]]:
        steps: dict[float, list[Tensor]] = {}
        for share, latents in self.seen:
            steps.setdefault(share, []).append(latents)
        return [(share, torch.cat(each)) for share, each in sorted(steps.items())]
