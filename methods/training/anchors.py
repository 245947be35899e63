"""Anchors: what a membrane must leave alone, drawn away from its concept by rejection.

    P(a) ~ (1 - |cos(a - mu, c - mu)|)^alpha

over two proposals: the captions of a pool, and points of text space with the pool's own mean mu and covariance,

    a = mu + sum_j w_j (h_j - mu),   w_j ~ N(0, 1 / n)   over n captions h_j drawn anew for each.

SPM draws isotropic Gaussian points and keeps them by their cosine with the concept, which in 59,136 dimensions is 0 for
every one of them: nothing is ever rejected. The pool's covariance has a few dozen strong directions, and without its
mean (the begin-of-text token, mostly) a cosine tells: both proposals come near a concept, and are then turned down.

Source: SPM (arXiv 2312.16145), equation 6; we centre, and draw where text is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import MembraneError

__all__ = ["AnchorPool", "acceptance"]

_MIXED = 24  # captions in a latent anchor: enough that none of them shows through, few enough to be read at once
_ROUNDS = 1000  # of proposals before a pool is given up: it holds nothing but the concept


def acceptance(candidates: Tensor, concepts: Tensor, centre: Tensor, power: float) -> Tensor:
    """(n,): (1 - max_p |cos(a - mu, c_p - mu)|)^alpha of each candidate.

    Args:
        candidates: (n, ...) text embeddings. concepts: (P, ...) the concept's phrasings. centre: (...), mu.
        power: alpha; 0 accepts everything.
    """
    a, c = ((x.float() - centre.float()).flatten(1) for x in (candidates, concepts))
    a, c = (torch.nn.functional.normalize(x, dim=1) for x in (a, c))
    return (1 - (a @ c.T).abs().amax(1).clamp(max=1.0)) ** power


@dataclass(frozen=True, eq=False)
class AnchorPool:
    """Where the anchors of one concept come from.

    Args:
        hidden: (n, N, d) embeddings of captions. pooled: (n, p) or None.
        concepts: (P, N, d) of the concept's phrasings.
        power: alpha. source: "captions", "latent" or "both".
        allowed: which of the n captions this concept may draw, where several concepts share them; None is all.

    Raises:
        MembraneError: fewer than two captions.
    """

    hidden: Tensor
    pooled: Tensor | None
    concepts: Tensor
    power: float
    source: str
    allowed: tuple[int, ...] | None = None

    def __post_init__(self):
        allowed = range(len(self.hidden)) if self.allowed is None else self.allowed
        object.__setattr__(self, "_indexes", torch.tensor(list(allowed), dtype=torch.long))
        if len(self._indexes) < 2:
            raise MembraneError(
                f"{len(self._indexes)} captions are left to draw anchors from; expected at least 2 that do not name"
                " what is erased, and better 50: give more with preserve=... (--preserve)"
            )
        object.__setattr__(self, "_centre", self.hidden.float().mean(0))
        accepted = acceptance(self.hidden, self.concepts, self._centre, self.power)
        object.__setattr__(self, "_accepted", accepted.cpu())

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """(count, N, d) and (count, p) or None: anchors, "both" taking turns, captions first.

        Args:
            generator: on the CPU.

        Raises:
            MembraneError: everything that was proposed lies on the concept.
        """
        hidden, pooled = [], []
        for number in range(count):
            latent = self.source == "latent" or (self.source == "both" and number % 2 == 1)
            row, more = self._latent(generator) if latent else self._caption(generator)
            hidden.append(row)
            pooled.append(more)
        return torch.stack(hidden), None if self.pooled is None else torch.stack(pooled)

    def _caption(self, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        for _ in range(_ROUNDS):
            index = int(self._indexes[torch.randint(len(self._indexes), (1,), generator=generator)])
            if float(torch.rand(1, generator=generator)) < float(self._accepted[index]):
                return self.hidden[index], None if self.pooled is None else self.pooled[index]
        raise self._nothing()

    def _latent(self, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        for _ in range(_ROUNDS):
            chosen = self._indexes[torch.randperm(len(self._indexes), generator=generator)[:_MIXED]]
            weights = torch.randn(len(chosen), generator=generator) / len(chosen) ** 0.5
            threshold = float(torch.rand(1, generator=generator))
            row = self._mixed(self.hidden, chosen, weights, self._centre)
            if threshold < float(acceptance(row[None], self.concepts, self._centre, self.power)):
                if self.pooled is None:
                    return row, None
                return row, self._mixed(self.pooled, chosen, weights, self.pooled.float().mean(0))
        raise self._nothing()

    @staticmethod
    def _mixed(pool: Tensor, chosen: Tensor, weights: Tensor, centre: Tensor) -> Tensor:
        chosen, weights = chosen.to(pool.device), weights.to(pool.device)
        away = pool[chosen].float() - centre
        return (centre + torch.tensordot(weights, away, dims=1)).to(pool.dtype)

    def _nothing(self) -> MembraneError:
        return MembraneError(
            f"none of {_ROUNDS} proposals lay away from the concept at anchor_power={self.power:g}; expected a smaller"
            " power, or captions to preserve that have nothing to do with it"
        )
