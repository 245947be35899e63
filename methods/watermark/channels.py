"""How much each channel of a model's latents says of the initial noise: weights that were measured beforehand.

    vote = rho / sqrt(1 - rho^2) x / s

x is an estimate of the noise (levelled), s its root mean square in this picture's channel, and rho the correlation of
x / s with the noise in that channel, measured on pictures that were drawn from known noise. For Gaussian x the vote is,
to first order, in proportion to the logarithm of the odds of the sign. Autoencoders of 16 channels keep texture in
some that hardly give the noise back: without weights these add chance to every sum.

The weights are fixed before a key's random signs are compared, and no key was used to find them: p-values stay exact
whatever they are (statistics.py), also of another model's pictures. They only help with the model that they were
measured on, whose fingerprint the file has.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import WatermarkError
from ..files import read_safetensors, save_safetensors
from .statistics import levelled

__all__ = ["ChannelWeights", "as_read", "correlation", "load_channels", "save_channels"]

_FORMAT = "semiperm-mark-channels.1"
_MOST = 0.99  # correlation: a channel that gave everything back would have all the weight there is


@dataclass(frozen=True, eq=False)
class ChannelWeights:
    """What was measured.

    Args:
        correlations: inversion steps -> (C,) correlation of each channel's estimate with the noise.
        model: fingerprint of the model, 16 hex digits.

    Raises:
        WatermarkError: nothing, shapes that differ, or no correlations.
    """

    correlations: Mapping[int, Tensor]
    model: str = ""

    def __post_init__(self):
        shapes = {tuple(one.shape) for one in self.correlations.values()}
        fits = len(shapes) == 1 and len(next(iter(shapes))) == 1
        if not fits or not all(bool((one.abs() <= 1).all()) for one in self.correlations.values()):  # NaN is not, too
            raise WatermarkError(
                f"correlations of shapes {sorted(shapes)} were given; expected (C,) values in -1..1 for each number of"
                " inversion steps"
            )
        if not all(bool((one > 0).any()) for one in self.correlations.values()):
            raise WatermarkError("no channel's estimate agrees with the noise; measure on this model's own pictures")

    def weights(self, steps: int) -> Tensor:
        """(C,) of an estimate after so many steps: of the nearest number that was measured."""
        nearest = min(self.correlations, key=lambda known: (abs(known - steps), known))
        rho = self.correlations[nearest].float().clamp(0, _MOST)
        return rho / (1 - rho.square()).sqrt()

    def votes(self, noise: Tensor, steps: int) -> Tensor:
        """(B, C, ...) levelled estimates, 0 where nothing counts -> votes of the same shape.

        Raises:
            WatermarkError: another number of channels.
        """
        weights = self.weights(steps)
        if noise.shape[1] != len(weights):
            raise WatermarkError(
                f"weights of {len(weights)} channels were given for latents of {noise.shape[1]}: they belong to another"
                " model; leave them out, or measure this one's with `semiperm canvas channels`"
            )
        rms = noise.flatten(2).square().mean(2).sqrt().clamp_min(1e-12)  # (B, C)
        scale = weights.to(noise) / rms
        return noise * scale.reshape(*scale.shape, *[1] * (noise.ndim - 2))


def correlation(noise: Tensor, estimate: Tensor) -> Tensor:
    """(C,) correlation of levelled estimates (B, C, h, w) with the noise (B, C, h, w) they are of."""
    sums = [(one * other).flatten(2).sum(2) for one, other in ((noise, estimate), (noise, noise), (estimate, estimate))]
    return (sums[0] / (sums[1] * sums[2]).sqrt().clamp_min(1e-12)).mean(0)


def as_read(noise: Tensor, inside: Tensor | None, channels: ChannelWeights | None, steps: int) -> Tensor:
    """An estimate after so many steps as `read` takes it: levelled, and as votes where weights of channels are known.

    Args:
        noise, inside: see `levelled`.
    """
    even = levelled(noise, inside)
    return even if channels is None else channels.votes(even, steps)


def save_channels(weights: ChannelWeights, path: str | os.PathLike, about: dict | None = None) -> None:
    """Write weights.

    Args:
        about: more to say of how they were measured, anything JSON can hold.
    """
    said = {"format": _FORMAT, "model": weights.model, "about": json.dumps(about or {})}
    save_safetensors({str(steps): one.float() for steps, one in weights.correlations.items()}, Path(path), said)


def load_channels(path: str | os.PathLike) -> ChannelWeights:
    """Read weights.

    Raises:
        WatermarkError: another kind of file. SemipermError: no such file, or a damaged one.
    """
    tensors, said = read_safetensors(path)
    if said.get("format") != _FORMAT:
        raise WatermarkError(f"{path} holds no weights of channels ({said.get('format')!r}); expected a {_FORMAT}")
    return ChannelWeights({int(steps): one for steps, one in tensors.items()}, said["model"])
