"""Image-side membranes in closed form: from a layer's tokens of pictures with a concept and without it to directions.

Per layer and knot, with m1 and m0 the mean tokens of pictures with and without, S the covariance of those without
(pooled over knots), and lambda its shrinkage towards a multiple of the identity:

    d = m1 - m0,   read = (S + lambda tr(S) / C I)^-1 d / (d^T (...)^-1 d),   write = d,   offset = <m0, read>

so that <token, read> - offset is 0 for the mean of others and 1 for the concept's, and `write` times it leads back.
Rank 2 adds the direction in which the quarter of the tokens that show the concept most differs further; the reads of
both are biorthogonal to their writes.

A token's gate opens between the 99 % and the 99.9 % quantile of others' tokens. Whether a picture's may open at all is
conformal: a layer's strongest response is counted in the strongest one of other pictures; the highest count over all
layers and steps of a run is a picture's score, and its conformal quantile over pictures kept out of the fit is where
pictures begin to count as showing the concept. Both kinds of responses are those of halves that a fit did not see.

Source: Fisher's discriminant; CASteer (arXiv 2503.09630) takes the mean difference alone; conformal prediction (Vovk
et al. 2005).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor

from ..errors import MembraneError
from ..guidance.detectors import conformal_threshold, fewest, without_unasked
from .visual import VisualSide, VisualSite

logger = logging.getLogger(__name__)

__all__ = ["VisualConfig", "calibrated", "fit_side", "without_showing"]

_RAMP = 1.25  # thresholds high over low, so that a picture at the edge is no switch; chosen by hand
_OPEN = (0.99, 0.999)  # quantiles of others' tokens between which a token's gate opens; chosen by hand on the canvas
_SPARE = 5  # one picture more for so many; a concept that others' captions draw more often is not told from them
_USUAL = 0.95  # of other pictures: beyond may lie some that show the concept unasked
_FLOOR = 0.25  # of a layer's mean scale: below it a knot's scale is taken for chance


@dataclass(frozen=True)
class VisualConfig:
    """How image-side membranes are fitted.

    Args:
        samples: pictures drawn with the concept, and as many without; an even number of at least 4.
        background: pictures drawn of captions that do not name it.
        steps: of these runs, and the knots of what is found.
        rank: directions of one concept at one layer, 1 or 2.
        shrinkage: lambda of the discriminant; large leaves the mean difference.
        false_open: share of pictures without the concept in which a gate may open; 1 / false_open - 1 pictures set the
            thresholds, of a fifth more that are drawn.
        validation: pictures with the concept, kept out of the fit, on which `beta` is found and openings are counted; 0
            draws none.
        beta: how far beyond its own share a direction is taken out; None finds the smallest of 1, 2, 3 and 4 with which
            validation pictures, drawn again, no longer show the concept to the directions themselves.
        tokens: of one layer kept of each picture and step; memory grows with them.
        batch_size: pictures at a time.
        seed: of the first picture.
        others: words that stand in the concept's place in pictures without it; () is a general list.
        sampling: what else the pipeline's calls get, such as {"guidance_scale": 5.0}.

    Raises:
        MembraneError: a value outside its range.
    """

    samples: int = 16
    background: int = 32
    steps: int = 5
    rank: int = 1
    shrinkage: float = 0.3
    false_open: float = 0.01
    validation: int = 8
    beta: float | None = None
    tokens: int = 64
    batch_size: int = 8
    seed: int = 0
    others: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        counts = {"samples": 4, "background": 2, "steps": 2, "tokens": 1, "batch_size": 1, "validation": 0}
        for name, least in counts.items():
            if getattr(self, name) < least:
                raise MembraneError(f"{name}={getattr(self, name)}; expected at least {least}")
        if self.samples % 2 or self.rank not in (1, 2):
            raise MembraneError(f"samples={self.samples}, rank={self.rank}; expected an even number, and 1 or 2")
        if not 0 < self.false_open < 1 or not (math.isfinite(self.shrinkage) and self.shrinkage > 0):
            raise MembraneError(
                f"false_open={self.false_open}, shrinkage={self.shrinkage}; expected a share between 0 and 1, and a"
                " finite number above 0"
            )
        if self.beta is not None and not math.isfinite(self.beta):
            raise MembraneError(f"beta={self.beta}; expected a finite number, or None to find it")

    @property
    def calibration(self) -> int:
        """Pictures without the concept that set the thresholds: the fewest that can promise `false_open`."""
        return fewest(self.false_open)

    @property
    def spare(self) -> int:
        """More of them than that, since some may show the concept unasked."""
        return self.calibration // _SPARE if self.validation else 0


def fit_side(
    concept: str,
    with_: Mapping[str, Tensor],
    without: Mapping[str, Tensor],
    background: Mapping[str, Tensor],
    shares: Sequence[float],
    config: VisualConfig,
) -> VisualSide:
    """Directions of one concept, with gates that count responses in those of others: `calibrated` sets the thresholds.

    Args:
        concept: its name, for errors.
        with_, without: module key -> tokens (P, J, S, C) of pictures with the concept, and of the same ones with other
            things in its place, at J knots.
        background: (Q, J, S, C) of pictures of anything else, in random order: half is held against the other half.
        shares: the J knots.

    Raises:
        MembraneError: no layer tells the two apart.
    """
    sites, powers = {}, {}
    for key, shown in with_.items():
        given = shown.float(), without[key].float(), background[key].float()
        if (found := _directions(*given, config)) is None:
            continue
        read, write, offset = found
        low, high, scale, power = _scales(*given, config)
        gates = torch.stack([offset, low, high, torch.zeros_like(offset), scale], dim=-1)
        sites[key], powers[key] = VisualSite(read, write, gates), power
    kept = {key: site for key, site in sites.items() if powers[key] > 1}
    if not kept:
        raise MembraneError(
            f"{concept!r}: none of {len(with_)} layers tells pictures with the concept from those without (the best by"
            f" {max(powers.values(), default=0.0):.2f}, where 1 is no better than the most alike of the others): give"
            " captions or pictures that show it more plainly or more of them (VisualConfig.samples), and captions to"
            " preserve whose pictures do not show it anyway"
        )
    return VisualSide(tuple(shares), kept)


def calibrated(side: VisualSide, scores: Tensor, config: VisualConfig) -> VisualSide:
    """The side with thresholds at the conformal quantile of `scores` (n,), the highest count of each other picture.

    Raises:
        MembraneError: too few pictures for the promised rate.
    """
    if len(scores) < config.calibration:
        raise MembraneError(
            f"{len(scores)} pictures cannot promise that gates open in at most {config.false_open:.3g} of others;"
            f" expected at least {config.calibration}, or a higher false_open"
        )
    quantile = max(conformal_threshold(scores, config.false_open), 1e-3)

    def opened(site: VisualSite) -> VisualSite:
        *token, _, scale = site.gates.unbind(-1)
        # just above the quantile: the picture that sets it stays shut
        seen, sure = quantile * (1 + 1e-5) * scale, quantile * _RAMP * scale
        return replace(site, gates=torch.stack([*token, seen, sure], dim=-1))

    return replace(
        side,
        sites={key: opened(site) for key, site in side.sites.items()},
        false_open=config.false_open,
        calibrated=len(scores),
    )


def without_showing(scores: Tensor, shown: Tensor, config: VisualConfig) -> Tensor:
    """The scores of other pictures less those of pictures that show the concept although no caption says so.

    A score nearer to that of pictures with the concept than to the others' (by medians) is taken for one: where a model
    draws the concept by itself now and then, such a picture would set a threshold that no picture passes. Where these
    are more than the spare ones, the directions do not tell the concept from others, and all are kept.

    Args:
        scores: (n,) of pictures whose captions do not name it. shown: (m,) of pictures with it, out of the fit.
    """
    return without_unasked(scores, shown, config.calibration) if len(shown) else scores


def _directions(
    shown: Tensor, without: Tensor, background: Tensor, config: VisualConfig
) -> tuple[Tensor, Tensor, Tensor] | None:
    """read, write (J, R, C) and offset (J, R) from tokens (P, J, S, C) each; None where a layer shows nothing."""
    others = torch.cat([without, background])
    middle = others.mean(dim=(0, 2))
    spread = (others - middle[:, None]).reshape(-1, others.shape[-1])
    covariance = spread.T @ spread / len(spread)
    size = covariance.diagonal().mean()
    if not size > 0:
        return None
    solver = torch.linalg.cholesky(covariance + config.shrinkage * size * torch.eye(len(covariance)))
    write = (shown.mean(dim=(0, 2)) - without.mean(dim=(0, 2)))[:, None]
    read = _biorthogonal(write, solver)
    if config.rank == 2:
        tokens = shown.transpose(0, 1).flatten(1, 2)  # (J, P S, C)
        answers = ((tokens - middle[:, None]) * read).sum(dim=-1)
        most = answers.topk(max(1, answers.shape[1] // 4), dim=1).indices
        top = torch.stack([rows[where].mean(dim=0) for rows, where in zip(tokens, most, strict=True)]) - middle
        further = top[:, None] - (top[:, None] * read).sum(dim=-1, keepdim=True) * write
        write = torch.cat([write, further], dim=1)
        read = _biorthogonal(write, solver)
    offset = (middle[:, None] * read).sum(dim=-1)
    return read, write, offset


def _biorthogonal(write: Tensor, solver: Tensor) -> Tensor:
    """read (J, R, C) with <read_i, write_j> = 1 where i = j, else 0, in the metric of a Cholesky factor."""
    whitened = torch.cholesky_solve(write.flatten(0, 1).T, solver).T.reshape(write.shape)
    gram = whitened @ write.transpose(1, 2)
    gram = gram + 1e-6 * gram.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None] * torch.eye(gram.shape[-1])
    return torch.linalg.solve(gram, whitened)


def _scales(
    shown: Tensor, without: Tensor, background: Tensor, config: VisualConfig
) -> tuple[Tensor, Tensor, Tensor, float]:
    """(J, R) low and high of others' tokens, the strongest response of most other pictures, and how many times that
    the concept's pictures reach: in halves of the pictures that the directions were not made from."""
    tops: list[Tensor] = []
    reached: list[Tensor] = []
    answered: list[Tensor] = []
    halves = [
        [part[0::2] for part in (shown, without, background)],
        [part[1::2] for part in (shown, without, background)],
    ]
    for own, other in (halves, halves[::-1]):
        if (found := _directions(own[0], own[1], own[2], config)) is None:
            flat = torch.ones(shown.shape[1], config.rank)
            return flat, flat * 2, flat, 0.0
        read, _, offset = found
        for tokens, into in ((torch.cat(other[1:]), tops), (other[0], reached)):
            answers = einsum(tokens, read, "p j s c, j r c -> p j s r") - offset[:, None]
            into.append(answers.amax(dim=2))
            if into is tops:
                answered.append(rearrange(answers, "p j s r -> (p s) j r"))
    top, most = torch.cat(tops), torch.cat(reached)  # (P, J, R)
    scale = top.mean(dim=0)
    scale = scale.clamp_min(_FLOOR * float(scale.mean().clamp_min(1e-6)))
    scale = scale * (top / scale).amax(dim=(1, 2)).quantile(_USUAL)
    low, high = torch.cat(answered).quantile(torch.tensor(_OPEN), dim=0).clamp_min(0.0)
    return low, torch.maximum(high, low + 1e-3 * scale), scale, float((most / scale).amax(dim=(1, 2)).median())
