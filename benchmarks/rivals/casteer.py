"""CASteer: what cross-attention answers loses the direction that tells a concept's pictures from others'.

    s = (m_c - m_o) / |m_c - m_o|               per layer and step, of mean tokens with the concept and without
    o' = o - beta max(0, <o, s>) s              for every image token o, beta = 2

Source: CASteer (arXiv 2503.09630), its erasure with clipping. We differ: pairs of captions are the package's general
ones (the paper's are made by hand for each kind of concept); a sampler with other steps than those it was fitted on
reads the vectors between them by linear interpolation. It acts in every row of a batch, as the paper tells none apart.
The clipped product is an image-side membrane (methods/membranes/visual.py) whose gates open at 0.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ...methods.errors import MembraneError
from ...methods.membranes.types import Membrane, Membranes
from ...methods.membranes.visual import VisualSide, VisualSite
from ...pipelines.membranes.watch import drawn, watched
from ..erasure.methods import Told, applied
from .shared import cross_attention, fitted, paired_captions

_BATCH = 16
_OPEN = 1e-6  # over which a gate goes from shut to open; a product as small as that moves nothing


def erase(
    pipe, told: Told, pairs: int = 50, steps: int = 20, beta: float = 2.0, seed: int = 0
) -> AbstractContextManager[dict]:
    """Erase by CASteer.

    Args:
        pairs: of captions for each concept, >= 1. steps: of the pictures that are drawn of them. beta: > 0.
    """
    options = {"pairs": pairs, "steps": steps, "beta": beta, "seed": seed}
    return applied(pipe, fitted(told, "casteer", options, lambda: _fit(pipe, told, **options)), "always", True)


class Means:
    """Adds up what layers answer, by share of the schedule: `take` is what `watched` calls."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[float, tuple[Tensor, int]]] = {}

    def take(self, key: str, tokens: Tensor, share: float, text: int) -> None:
        own, count = self._sums.setdefault(key, {}), tokens.shape[0] * tokens.shape[1]
        total, before = own.get(share, (0.0, 0))
        own[share] = total + tokens.double().sum(dim=(0, 1)).cpu(), before + count

    def of(self) -> tuple[tuple[float, ...], dict[str, Tensor]]:
        """(J shares), key -> (J, C) means."""
        shares = tuple(sorted(next(iter(self._sums.values()))))
        return shares, {key: torch.stack([own[s][0] / own[s][1] for s in shares]) for key, own in self._sums.items()}


@torch.no_grad()
def _fit(pipe, told: Told, pairs: int, steps: int, beta: float, seed: int) -> Membranes:
    if pairs < 1 or steps < 1 or not 0 < beta < float("inf"):
        raise MembraneError(f"pairs={pairs}, steps={steps}, beta={beta}; expected at least one of each, beta above 0")
    layers = list(cross_attention(pipe, "attn2.to_out.0", "CASteer"))
    made = []
    for name, phrases in told.words.items():
        found = []
        for captions in paired_captions(phrases, pairs):
            means = Means()
            with watched(pipe, means, layers):
                drawn(pipe, captions, steps, _BATCH, seed, lambda count: None, {})
            found.append(means.of())
        (shares, on), (_, off) = found
        sites = {key: _site(key, steering(on[key], off[key])) for key in layers}
        made.append(Membrane(name, {}, method="rival/casteer", visual=VisualSide(shares, sites, beta)))
    return Membranes(made)


def steering(concept: Tensor, other: Tensor) -> Tensor:
    """(J, C) unit vectors from mean tokens (J, C); zero where the two do not differ."""
    away = concept - other
    return away / away.norm(dim=1, keepdim=True).clamp_min(1e-12)


def _site(key: str, vectors: Tensor) -> VisualSite:
    if not bool(vectors.any()):
        raise MembraneError(f"CASteer: {key} answers the same with the concept and without; is the text read at all?")
    gates = torch.tensor([0.0, 0.0, _OPEN, 0.0, _OPEN]).expand(len(vectors), 1, 5).clone()
    return VisualSite(vectors[:, None].float(), vectors[:, None].float(), gates)
