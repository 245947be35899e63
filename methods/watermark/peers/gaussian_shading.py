"""Gaussian Shading: every bit of a message is the sign of many elements of the initial noise, under one keystream.

z_i = s_i m_b(i) |n_i|,  s the keystream's signs, m the message's, b(i) the bit that element i carries, n ~ N(0, 1)

A bit is read back by the vote of its copies. The keystream is one for a key (and nonce), as released: noise is
N(0, I) for each picture by itself, but pictures of one key share their signs, which a classifier over pictures sees
and an average over pictures removes. It is a baseline here; `watermark.KeyedMark` has a fresh nonce in each latent.

Source: Yang et al., Gaussian Shading (arXiv 2404.04956). Other than in the released code, ties of
the vote are broken by a coin of the key and not always to 0, thresholds are exact, copies lie in a fixed pseudorandom
order so that any shape carries any number of bits, and magnitudes are |n| itself, not a truncated quantile.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from ...errors import WatermarkError
from ..keys import WatermarkKey
from ..statistics import level_counts, log_tail, quantise

__all__ = ["GaussianShading", "threshold"]

_COPIES = 64  # of each bit where no number of bits is given: the release's 4 x 64 x 64 / 256


def threshold(payload_bits: int, false_positives: float) -> int | None:
    """The least number of matching bits that chance reaches with at most this probability; None: not even all do.

    P(Bin(k, 1/2) >= threshold) <= false_positives, without the release's step of one.
    """
    matched = int(stats.binom.isf(false_positives, payload_bits, 0.5)) + 1
    return matched if matched <= payload_bits else None


class GaussianShading:
    """Initial noise that carries a message under one keystream.

    Args:
        key: its stream secret signs and reads.
        payload_bits: of the message, 1 .. elements of the latent; None is one for every 64 elements.
        soft: let each copy vote by its magnitude, and take the p-value from all copies at once instead of the bits.
        nonce: of the keystream, 0 .. 2^96 - 1. As in the paper, whoever reads has to know it: there is none inside.
        scope: a model or tenant name that separates marks of one key.

    Raises:
        WatermarkError: payload_bits below 1.
    """

    def __init__(
        self, key: WatermarkKey, payload_bits: int | None = None, *, soft: bool = False, nonce: int = 0, scope: str = ""
    ):
        if payload_bits is not None and payload_bits < 1:
            raise WatermarkError(f"a message of {payload_bits} bits was asked for; expected at least 1")
        self.key, self.payload_bits, self.soft, self.nonce, self.scope = key, payload_bits, soft, nonce, scope
        self.name = "gaussian-shading-soft" if soft else "gaussian-shading"

    def capacity(self, shape: Sequence[int]) -> int:
        """Bits of the message in one image's latent, given without the batch.

        Raises:
            WatermarkError: fewer elements than bits.
        """
        elements = math.prod(shape)
        bits = max(1, elements // _COPIES) if self.payload_bits is None else self.payload_bits
        if bits > elements:
            raise WatermarkError(
                f"a latent of shape {tuple(shape)} has {elements} elements; expected at least one for each of the"
                f" {bits} bits: use a larger picture or a shorter message"
            )
        return bits

    def message(self, shape: Sequence[int]) -> np.ndarray:
        """(k,) uint8: the key's own message, which is laid where no other is given."""
        return self._stream("message", tuple(shape), self.capacity(shape))

    def sample(
        self, shape: Sequence[int], generator: torch.Generator | None = None, bits: np.ndarray | None = None
    ) -> Tensor:
        """Marked latents, float32, on the generator's device.

        Args:
            shape: (B, ...), any latent layout.
            generator: of the magnitudes; without it they come from torch's global generator.
            bits: (k,) or (B, k) of 0 and 1, k = capacity(shape[1:]); None is the key's own message.

        Raises:
            WatermarkError: bits of another number or value, a latent too small.
        """
        batch, image = split_shape(shape)
        laid = self._bits(bits, batch, image)[:, _bit_of(image, self.capacity(image))]
        return with_signs((batch, *image), laid ^ self._stream("stream", image, math.prod(image)), generator)

    def votes(self, latents: Tensor) -> np.ndarray:
        """(B, k) float64: the share of the votes for 1 less that for 0, -1..1; 0 is a tie.

        Raises:
            WatermarkError: NaN or Inf, or a latent too small.
        """
        _, image = split_shape(latents.shape)
        bits, values = self.capacity(image), quantise(latents)
        values = (values if self.soft else np.sign(values)) * _signs(self._stream("stream", image, values.shape[1]))
        order = np.argsort(_bit_of(image, bits), kind="stable")
        starts = np.searchsorted(_bit_of(image, bits)[order], np.arange(bits))
        values = values[:, order].astype(np.int64)
        total = np.add.reduceat(np.abs(values), starts, axis=1)
        return np.add.reduceat(values, starts, axis=1) / np.maximum(total, 1)

    def decode(self, latents: Tensor) -> list[np.ndarray]:
        """(k,) uint8 bits of each latent, ties broken by the key's coins.

        Raises:
            WatermarkError: as `votes`.
        """
        votes = self.votes(latents)
        coins = self._stream("ties", tuple(latents.shape[1:]), votes.shape[1])
        return list(np.where(votes == 0, coins, votes > 0).astype(np.uint8))

    def p_values(self, latents: Tensor, bits: np.ndarray | None = None) -> np.ndarray:
        """(B,) chance that a latent made without the key matches the message so well, exact for every latent.

        Hard votes: under a random keystream and fair coins every bit matches with probability 1/2, so it is the tail
        of Bin(k, 1/2). Soft: the exact tail of all elements' rounded magnitudes under random signs.

        Args:
            latents: (B, ...).
            bits: as in `sample`; the message must not depend on the latents.

        Raises:
            WatermarkError: as `sample` and `votes`.
        """
        batch, image = split_shape(latents.shape)
        bits = self._bits(bits, batch, image)
        if not self.soft:
            matched = (np.stack(self.decode(latents)) == bits).sum(axis=1)
            return stats.binom.sf(matched - 1, bits.shape[1], 0.5)
        values = quantise(latents)
        laid = bits[:, _bit_of(image, bits.shape[1])] ^ self._stream("stream", image, values.shape[1])
        scores = (values.astype(np.int64) * -_signs(laid)).sum(axis=1)
        found = zip(values, scores, strict=True)
        return np.array([math.exp(log_tail(level_counts(row), int(score))) for row, score in found])

    def _stream(self, purpose: str, image: tuple[int, ...], count: int) -> np.ndarray:
        return self.key.stream(f"gaussian shading {purpose}", image, self.nonce, count, scope=self.scope)

    def _bits(self, bits, batch: int, image: tuple[int, ...]) -> np.ndarray:
        return checked_bits(self.message(image) if bits is None else bits, batch, self.capacity(image))


def _signs(bits: np.ndarray) -> np.ndarray:
    """1 for 0, -1 for 1."""
    return 1 - 2 * bits.astype(np.int64)


@lru_cache(maxsize=16)
def _bit_of(image: tuple[int, ...], bits: int) -> np.ndarray:
    """(n,) the bit that each element carries: copies spread over the whole latent, their numbers within one."""
    elements = math.prod(image)
    raw = hashlib.shake_256(b"semiperm gaussian shading order " + repr(image).encode()).digest(8 * elements)
    found = np.empty(elements, np.int64)
    found[np.argsort(np.frombuffer(raw, "<u8"), kind="stable")] = np.arange(elements) % bits
    found.flags.writeable = False
    return found


def split_shape(shape: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """(B, ...) -> B and one image's shape.

    Raises:
        WatermarkError: no batch or no elements.
    """
    shape = tuple(int(size) for size in shape)
    if len(shape) < 2 or min(shape) < 1:
        raise WatermarkError(f"latents of shape {shape} were given; expected (B, C, H, W) or another (B, ...) layout")
    return shape[0], shape[1:]


def checked_bits(bits, batch: int, count: int) -> np.ndarray:
    """(k,) or (B, k) of 0 and 1 -> (B, k) uint8.

    Raises:
        WatermarkError: another shape or other values.
    """
    given = np.asarray(bits)
    if given.shape not in ((count,), (batch, count)) or not np.isin(given, (0, 1)).all():
        raise WatermarkError(
            f"bits of shape {given.shape} were given; expected ({count},) or ({batch}, {count}) of 0 and 1"
        )
    return np.broadcast_to(given.astype(np.uint8), (batch, count))


def with_signs(shape: tuple[int, ...], ones: np.ndarray, generator: torch.Generator | None) -> Tensor:
    """Half-normal magnitudes, positive where the (B, n) bits are 1, as in the paper."""
    source = generator.device if generator is not None else "cpu"
    magnitude = torch.randn(shape, generator=generator, device=source).abs_()
    return magnitude * torch.from_numpy(2.0 * ones.reshape(shape) - 1).to(source, magnitude.dtype)
