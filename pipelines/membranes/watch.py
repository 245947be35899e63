"""What a denoiser's layers answer for the image tokens of positive rows, along runs of a pipeline and for pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...methods.errors import MembraneError
from ...methods.membranes.config import MembraneConfig
from ..family import Pipeline, denoiser_of, device_of, family_of
from ..handle import Handle, RootHook
from ..hooks import parameters_of
from ..rows import row_layout
from ..scheduler import alphas_of, image_tokens, noise_levels, on_host, share_of, timestep_at
from ..text import encode_text
from ..watermark.inversion import predictor
from .visual import image_layers

__all__ = ["Noised", "Watch", "drawn", "shown", "watched"]


@dataclass(frozen=True, eq=False)
class _Look:
    """One call of the denoiser: at which share, which rows are positive, and how many tokens of text come first."""

    share: float
    rows: list[int]
    text: int


class Watch(Handle):
    """Changes nothing; hands what each layer answers for the positive rows to `taker`.

    Args:
        taker: `take(key, tokens (P, N, C), share, text)` gets tokens as the layer gives them, text first where
            `after_text` says so.
    """

    NAME = "_semiperm_image_watch"
    ERROR = MembraneError

    def __init__(self, pipe: Pipeline, taker: Any, keys: Sequence[str] | None = None):
        super().__init__(pipe, MembraneConfig())
        self.taker = taker
        layers = image_layers(self.denoiser, self.attribute, self.family)
        keys = list(layers) if keys is None else keys
        self.hooks = [(layers[key][0], _Eye(self, key, layers[key][1])) for key in keys]
        self.hooks.append((self.denoiser, RootHook(self)))
        self.sample_name = parameters_of(type(self.denoiser))[0]

    def begin(self, inputs: dict) -> _Look:
        run, hidden = self.called(), inputs["encoder_hidden_states"]
        rows = [row for row, negative in enumerate(self.negative_rows(hidden)) if not negative]
        tokens = image_tokens(self.family, self.denoiser, inputs[self.sample_name])
        timestep, known = on_host(inputs["timestep"]), run.timesteps(self.scheduler)
        share = float(share_of(self.scheduler, self.family, timestep, tokens, known))
        return _Look(round(min(max(share, 0.0), 1.0), 6), rows, hidden.shape[1])

    def report(self) -> dict:
        return {}

    def steps(self) -> list[dict]:
        return []


class _Eye:
    def __init__(self, watch: Watch, key: str, after_text: bool):
        self.watch, self.key, self.after_text = watch, key, after_text

    def __call__(self, original: Callable, module: nn.Module, x: Tensor, *args, **kwargs) -> Tensor:
        y, look = original(x, *args, **kwargs), self.watch.call
        if look is not None and look.rows:
            self.watch.taker.take(self.key, y[look.rows].detach(), look.share, look.text if self.after_text else 0)
        return y


def drawn(
    pipe: Pipeline, prompts: Sequence[str], steps: int, batch_size: int, seed: int, told: Callable, sampling: dict
) -> Tensor:
    """The latents of runs of the pipeline, as its call returns them: picture i starts from the noise of seed + i.

    Args:
        told: called after each batch with the number of its pictures.
    """
    found = []
    for first in range(0, len(prompts), batch_size):
        part = list(prompts[first : first + batch_size])
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(part))]
        made = pipe(part, num_inference_steps=steps, generator=generators, output_type="latent", **sampling)
        found.append(made[0])
        told(len(part))
    return torch.cat(found)


@contextlib.contextmanager
def watched(pipe: Pipeline, taker: Any, keys: Sequence[str] | None = None) -> Iterator[Watch]:
    """Inside, a taker sees what these layers answer; None: all."""
    watch = Watch(pipe, taker, keys)
    watch.replace(pipe)
    try:
        yield watch
    finally:
        watch.remove()


class Noised:
    """Pictures, noised to a share of the schedule, denoised once under a caption: `noised(share)` is the prediction.

    Args:
        latents: (B, C, H, W) as `encode_pixels` gives them.
        seed: of the noise, the same at every share.
    """

    def __init__(self, pipe: Pipeline, latents: Tensor, caption: str, seed: int):
        self.pipe, self.family, device = pipe, family_of(pipe), device_of(pipe)
        self.latents = latents.to(device).float()
        self.noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(device)
        text = encode_text(pipe, [caption])
        self.predict = predictor(pipe, self.family, self.latents, text.hidden, text.pooled)
        self.tokens = image_tokens(self.family, denoiser_of(pipe)[0], self.family.pack(pipe, self.latents))
        self.alphas = None if self.family.flow else alphas_of(pipe).to(device)

    @torch.no_grad()
    def __call__(self, share: float) -> Tensor:
        at = timestep_at(self.pipe.scheduler, self.family, share, self.tokens)
        image, noise = noise_levels(self.family, torch.tensor([at], device=self.latents.device), self.alphas)
        with row_layout("positive"):
            return self.predict(image * self.latents + noise * self.noise, at / self.family.noise_timestep)


def shown(
    pipe: Pipeline,
    latents: Tensor,
    captions: Sequence[str],
    shares: Sequence[float],
    batch_size: int,
    seed: int,
    told: Callable,
) -> None:
    """Show pictures to a denoiser under watch: noised to each share, denoised once, under captions in turn."""
    for number, part in enumerate(latents.split(batch_size)):
        noised = Noised(pipe, part, captions[number % len(captions)], seed + number)
        for share in shares:
            noised(share)
        told(len(part))
