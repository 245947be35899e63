"""GLoCE: a gate for every image token, and a low-rank map of the gated ones to what other pictures look like there.

    g(o) = sigmoid(slope (|V^T (o - mu_o)|^2 / |o - mu_o|^2 - centre))                        gate, rank 1
    o'   = (1 - g) o + g [mu_o + U_o U_o^T (I - U_c U_c^T) (o - mu_c)]                        per layer

mu_c, mu_o are mean answers of cross-attention for pictures with the concept and for the same captions with other
things in its place; V and U_c the first one and two principal directions of the concept's tokens about mu_o and mu_c,
U_o the first sixteen of the others' about mu_o. The gate is 1 % at the others' 99 % quantile and 1/2 half-way from
there to the concept's 95 % quantile. Of several concepts the one with the widest gate acts on a token.

Source: GLoCE (arXiv 2503.12356): gate, ranks 1, 2 and 16, three to eight pictures of each concept, tokens of its steps
10 to 20 of 50. We differ: the paper finds centre and slope by its own rule, and composes its map of two adapters with
biases; this is our reading of the same parts. It acts in every row of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...methods.errors import MembraneError
from ...methods.membranes.visual_takers import Tokens
from ...pipelines.hooks import install, uninstall
from ...pipelines.membranes.watch import drawn, watched
from ..erasure.methods import Told
from .shared import cross_attention, fitted, paired_captions

_NAME = "_semiperm_gloce"
_FIRST, _LAST = 0.2, 0.4  # of the schedule: the paper's steps 10 to 20 of 50
_TOKENS = 256  # of one answer of a layer that are kept, evenly drawn: sixteen directions need no more


@dataclass(frozen=True, eq=False)
class Replacement:
    """One concept at one layer: V (1, C), U_c (2, C), U_o (16, C), mu_c and mu_o (C,), centre and slope."""

    gate: Tensor
    degenerate: Tensor
    other: Tensor
    concept_mean: Tensor
    other_mean: Tensor
    centre: float
    slope: float

    def opening(self, o: Tensor) -> Tensor:
        """(..., 1): g of tokens (..., C)."""
        return torch.sigmoid(self.slope * (along(o - self.other_mean.to(o), self.gate.to(o)) - self.centre))[..., None]

    def mapped(self, o: Tensor) -> Tensor:
        """What a token becomes under an open gate."""
        x = o - self.concept_mean.to(o)
        degenerate, other = self.degenerate.to(o), self.other.to(o)
        x = x - x @ degenerate.T @ degenerate
        return self.other_mean.to(o) + x @ other.T @ other


def along(x: Tensor, rows: Tensor) -> Tensor:
    """(...,): the share of |x|^2 that lies in the span of orthonormal rows (R, C)."""
    return (x @ rows.T).square().sum(-1) / x.square().sum(-1).clamp_min(1e-20)


def replacement(concept: Tensor, other: Tensor, ranks: tuple[int, int, int] = (1, 2, 16)) -> Replacement:
    """Fit from tokens (n, C) and (m, C).

    Raises:
        MembraneError: no tokens, or both are the same.
    """
    if not len(concept) or not len(other) or torch.equal(concept, other):
        raise MembraneError(
            f"GLoCE: {len(concept)} and {len(other)} tokens that do not differ; expected pictures of both"
        )
    concept, other = concept.double(), other.double()
    concept_mean, other_mean = concept.mean(0), other.mean(0)
    gate, degenerate, rest = (
        torch.linalg.svd(x, full_matrices=False)[2][:rank]
        for x, rank in zip((concept - other_mean, concept - concept_mean, other - other_mean), ranks, strict=True)
    )
    usual = float(along(other - other_mean, gate).quantile(0.99))
    # pictures of a concept are mostly of other things: its strongest tokens tell where it is
    strong = float(along(concept - other_mean, gate).quantile(0.95))
    half = max(strong - usual, 0.01) / 2  # where it does not stand out, the gate is for the few that lie beyond
    parts = (t.float() for t in (gate, degenerate, rest, concept_mean, other_mean))
    return Replacement(*parts, centre=usual + half, slope=math.log(99) / half)


class _Hook:
    """Around a layer of cross-attention."""

    def __init__(self, parts: Sequence[Replacement]):
        self.parts = parts

    def __call__(self, original: Callable, module: nn.Module, x: Tensor, *args, **kwargs) -> Tensor:
        return replaced(original(x, *args, **kwargs), self.parts)


def replaced(o: Tensor, parts: Sequence[Replacement]) -> Tensor:
    """o' of tokens (..., C): each by the concept whose gate is widest for it; squares want float32."""
    wide = o.to(torch.promote_types(o.dtype, torch.float32))
    gates = torch.stack([part.opening(wide) for part in parts])
    widest, chosen = gates.max(dim=0)
    mapped = torch.stack([part.mapped(wide) for part in parts])
    mapped = mapped.gather(0, chosen.expand(o.shape)[None])[0]
    return torch.lerp(wide, mapped, widest).to(o.dtype)


@contextmanager
def erase(pipe, told: Told, pictures: int = 8, steps: int = 50, seed: int = 0) -> Iterator[dict]:
    """Erase by GLoCE.

    Args:
        pictures: of each concept, >= 1. steps: of their sampler, of which those between .2 and .4 are looked at.
    """
    options = {"pictures": pictures, "steps": steps, "seed": seed}
    layers = cross_attention(pipe, "attn2.to_out.0", "GLoCE")
    parts = fitted(told, "gloce", options, lambda: _fit(pipe, told, list(layers), **options))
    placed = []
    try:
        for key, module in layers.items():
            install(module, _Hook(parts[key]), _NAME)
            placed.append(module)
        yield {}
    finally:
        for module in placed:
            uninstall(module, _NAME)


@torch.no_grad()
def _fit(pipe, told: Told, layers: list[str], pictures: int, steps: int, seed: int) -> dict[str, list[Replacement]]:
    if pictures < 1 or steps < 1:
        raise MembraneError(f"pictures={pictures}, steps={steps}; expected at least one of each")
    found: dict[str, list[Replacement]] = {key: [] for key in layers}
    for phrases in told.words.values():
        on, off = (_tokens(pipe, captions, layers, steps, seed) for captions in paired_captions(phrases, pictures))
        for key in layers:
            found[key].append(replacement(on[key], off[key]))
    return found


class _Early:
    """Hands on what is answered in a part of the schedule."""

    def __init__(self, taker: Tokens):
        self.taker = taker

    def take(self, key: str, tokens: Tensor, share: float, text: int) -> None:
        if _FIRST <= share <= _LAST:
            self.taker.take(key, tokens, share, text)


def _tokens(pipe, captions: Sequence[str], layers: list[str], steps: int, seed: int) -> dict[str, Tensor]:
    taker = Tokens(_TOKENS)
    with watched(pipe, _Early(taker), layers):
        drawn(pipe, captions, steps, len(captions), seed, lambda count: None, {})
    try:
        kept = taker.of()[1]
    except StopIteration:
        raise MembraneError(
            f"GLoCE: none of {steps} steps lies between {_FIRST} and {_LAST} of the schedule; expected 10 or more"
        ) from None
    return {key: tokens.flatten(0, -2) for key, tokens in kept.items()}
