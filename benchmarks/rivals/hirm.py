"""HiRM-like: the first layer of CLIP's text encoders is trained until a concept's tokens come out as something else.

    L = mean over the phrase's tokens of |h(c) - |h_0(c)| r|^2 / |h_0(c)|^2

with h what the denoiser is given (the last layer that is read), h_0 the same before, r a random direction: the
misdirection of its variant HiRM-R. Where the denoiser reads a pooled embedding, that is misdirected, too.

Source: HiRM (arXiv 2602.19631), read from descriptions of it: layer 1 is updated, the last one supervised, random or
semantic direction, about a second. We differ where those say nothing: the whole of layer 1, 100 steps of Adam at 1e-4
for CLIP-L, scaled to the encoder's width, and the norm of the direction. T5 (SD 3, Flux) is left as it is.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ...methods.errors import MembraneError
from ...pipelines.text import encode_text, segments_of
from ..erasure.methods import Told
from .shared import fitted, in_place
from .training import clip_parameters, clip_rate, encode_open, layer_of, trained


def erase(pipe, told: Told, steps: int = 100, rate: float = 1e-4, seed: int = 0) -> AbstractContextManager[dict]:
    """Erase by HiRM.

    Args:
        steps: of the optimiser, >= 1. rate: its learning rate, for CLIP-L. seed: of the direction.
    """
    options = {"steps": steps, "rate": rate, "seed": seed}
    return in_place(pipe, fitted(told, "hirm", options, lambda: _fit(pipe, told, **options)))


def _fit(pipe, told: Told, steps: int, rate: float, seed: int) -> dict[str, Tensor]:
    if steps < 1:
        raise MembraneError(f"steps={steps}; expected at least one")
    phrases = told.phrases
    names = clip_parameters(pipe, lambda path, layers: layer_of(path) == 0, "HiRM")
    segment, before = segments_of(pipe)[0], encode_text(pipe, phrases)
    ends = segment.prefix_tokens(phrases) if segment.causal else [0] * len(phrases)  # T5 is not trained
    places = [(row, segment.start + n) for row, end in enumerate(ends) for n in range(1, end)]
    generator = torch.Generator().manual_seed(seed)

    def read(features) -> list[Tensor]:
        hidden = [features.hidden[[row for row, _ in places], [n for _, n in places]]] if places else []
        return hidden + ([features.pooled] if features.pooled is not None else [])

    with torch.no_grad():
        targets = [misdirected(old, generator) for old in read(before)]
    if not targets:
        raise MembraneError(f"HiRM: {phrases} have no token that a trained encoder reads; expected words")
    with trained(pipe, names, clip_rate(pipe, rate)) as trainee:
        for _ in range(steps):
            made = read(encode_open(pipe, phrases))
            trainee.step(sum(misdirection_loss(new, aim) for new, aim in zip(made, targets, strict=True)))
        return trainee.values()


def misdirected(states: Tensor, generator: torch.Generator) -> Tensor:
    """|h_0| r of states (n, d): one random direction for all of them."""
    direction = torch.nn.functional.normalize(torch.randn(states.shape[-1], generator=generator), dim=0).to(states)
    return states.norm(dim=-1, keepdim=True) * direction


def misdirection_loss(states: Tensor, targets: Tensor) -> Tensor:
    """Mean over states of |h - t|^2 / |t|^2."""
    return ((states - targets).square().sum(-1) / targets.square().sum(-1)).mean()
