"""PRC: a pseudorandom error-correcting code in the signs of the initial noise, without a nonce and without a database.

x = G (test | random | message) + pad + e (mod 2), permuted;  z_i = (-1)^x_i |n_i|,  n ~ N(0, 1),  e ~ Bernoulli(eta)

Each row of G past the first is the sum of two rows before it, so three bits of every codeword have even parity, once
for each of the r secret triples. Who does not know the triples would have to guess one; who does, counts them:

T = sum_j s_j w_j,  s_j the product of a triple's signs (pad removed), w_j a product of its three reliabilities

Each triple ends in an element that no triple before it holds, so under a random pad the s_j of any given latent are
independent and uniform: the tail of T is exact. Where the latent decodes, Chernoff's bound of its score against the
codeword, times the number of codewords, is a second statistic that shares the error.

Some 30 bits of secrecy, 2^g = C(n, 3) guesses, are a heuristic and no cryptographic level. And it needs far more
agreement than a vote: rho .5 at 16,384 elements, .65 at 1,024. A baseline.

Source: Gunn, Zhao, Song, An undetectable watermark for generative image models (arXiv 2410.07369);
Christ, Gunn, Pseudorandom error-correcting codes (arXiv 2402.09370). Other than in the released code, all of the key
comes from the keystream, p-values are exact in place of a Hoeffding bound, and no two triples share two elements:
that would tie two signs of all pictures together, some four times in a code of 1,024 elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.special import erf
from torch import Tensor

from ...errors import WatermarkError
from ..code import parity
from ..keys import WatermarkKey
from ..statistics import LARGEST, level_counts, log_chernoff, log_tail, quantise
from .gaussian_shading import checked_bits, split_shape, with_signs

__all__ = ["PseudorandomCode"]

MINIMUM = 1024  # elements
_TEST_BITS = 20  # known to the reader: a wrong decoding passes with probability 1e-6
_DECODED = 1e-3  # share of the error that a decoded codeword may spend; it is so steep that little is enough
_SETTLED, _HOPELESS = math.log(1e-15), math.log(0.1)  # of the triples alone: decoding would change nothing
_RATIO = 1.5**-0.5  # rho / sqrt(1 - rho^2) of the channel that is assumed, the paper's sigma^2 = 1.5
_PER_BIT = 32  # elements for each bit of the message where no number is given,
_MESSAGE = 512  # and the most bits of it: the paper's message in 16,384


@dataclass(frozen=True)
class _Code:
    """One key's code over n elements; its repr hides all of it."""

    key: WatermarkKey
    image: tuple[int, ...]
    message_bits: int
    scope: str

    @property
    def elements(self) -> int:
        return math.prod(self.image)

    @property
    def secrecy(self) -> int:
        """log2 of the guesses at a triple; also the number of random bits in each codeword."""
        return int(math.log2(math.comb(self.elements, 3)))

    @property
    def noise(self) -> float:
        """Share of flipped signs that hides sparse relations which the triples imply."""
        return 1 - 2 ** (-1 / self.secrecy)

    @property
    def width(self) -> int:
        return _TEST_BITS + self.secrecy + self.message_bits

    def _bytes(self, purpose: str, count: int) -> bytes:
        return self.key.keystream(f"pseudorandom code {purpose}", self.image, 0, count, scope=self.scope)

    @cached_property
    def pad(self) -> np.ndarray:
        """(n,) uint8 one-time pad of the signs."""
        return np.unpackbits(np.frombuffer(self._bytes("pad", -(-self.elements // 8)), np.uint8))[: self.elements]

    @cached_property
    def test(self) -> np.ndarray:
        return np.unpackbits(np.frombuffer(self._bytes("test", -(-_TEST_BITS // 8)), np.uint8))[:_TEST_BITS]

    @cached_property
    def parents(self) -> np.ndarray:
        """(r, 3) before the permutation: two different rows, drawn from all before the third.

        No two triples share two elements: their third ones would be equal in every picture.
        """
        third = np.arange(self.width + self.secrecy, self.elements, dtype=np.uint64)
        words = np.frombuffer(self._bytes("triples", 8 * len(third)), "<u4").reshape(-1, 2).astype(np.uint64)
        drawn = np.stack([words[:, 0] * third >> np.uint64(32), words[:, 1] * third >> np.uint64(32)], axis=1)
        found, pairs, n = [], set(), self.elements
        for own, (first, second) in enumerate(drawn.tolist(), int(third[0])):
            while first == second or (first * n + second if first < second else second * n + first) in pairs:
                second = (second + 1) % own
            pairs.update((min(first, second) * n + max(first, second), first * n + own, second * n + own))
            found.append((first, second, own))
        return np.array(found)

    @cached_property
    def place(self) -> np.ndarray:
        """(n,) the permutation: where each row of the code stands in the latent."""
        words = np.frombuffer(self._bytes("order", 8 * self.elements), "<u8")
        return np.argsort(words, kind="stable")

    @cached_property
    def triples(self) -> np.ndarray:
        """(r, 3) elements of even parity."""
        return self.place[self.parents]

    @cached_property
    def generator(self) -> np.ndarray:
        """(n, ceil(width / 8)) bytes of bits, the rows of G."""
        size, free = -(-self.width // 8), self.width + self.secrecy
        raw = self._bytes("generator", size * free)
        rows = [int.from_bytes(raw[i : i + size], "big") for i in range(0, len(raw), size)]
        for first, second, _ in self.parents.tolist():
            rows.append(rows[first] ^ rows[second])
        octets = np.empty((self.elements, size), np.uint8)
        octets[self.place] = np.frombuffer(b"".join(row.to_bytes(size, "big") for row in rows), np.uint8).reshape(
            -1, size
        )
        return octets

    def encode(self, payload: np.ndarray) -> np.ndarray:
        """(width,) -> (n,) uint8 codeword under the pad."""
        return parity(np.bitwise_xor.reduce(self.generator & np.packbits(payload), axis=1).astype(np.int32)) ^ self.pad

    def reliability(self, latent: np.ndarray) -> np.ndarray:
        """(n,) expected sign of the codeword's elements, pad removed, -1..1."""
        size = np.median(np.abs(latent)) / 0.6745 or np.abs(latent).mean() or 1.0
        expected = erf(latent * (_RATIO / size / math.sqrt(2))) * (1 - 2 * self.noise)
        return expected * (1 - 2 * self.pad.astype(np.float64))

    def p_value(self, latent: np.ndarray) -> float:
        products = self.reliability(latent)[self.triples].prod(axis=1)
        # Levels of the lattice: the few products beyond the top one are cut to it.
        top = np.quantile(np.abs(products), 0.99) or np.abs(products).max() or 1.0
        weights = np.rint(np.clip(products / top, -1, 1) * LARGEST).astype(np.int64)
        log_p = log_tail(level_counts(weights), int(weights.sum())) - math.log1p(-_DECODED)
        if not _SETTLED < log_p < _HOPELESS:
            return min(1.0, math.exp(log_p))
        payload = self.decode(latent)
        if payload is not None:
            values = quantise(torch.from_numpy(latent)[None])[0].astype(np.int64)
            score = int(values @ (1 - 2 * self.encode(payload).astype(np.int64)))
            words = (self.width - _TEST_BITS) * math.log(2)
            log_p = min(log_p, words + log_chernoff(level_counts(values), score) - math.log(_DECODED))
        return min(1.0, math.exp(log_p))

    def decode(self, latent: np.ndarray) -> np.ndarray | None:
        """(width,) payload, or None where the test bits do not come out."""
        payload = self._solve(belief_propagation(self.reliability(latent), self.triples))
        return payload if payload is not None and (payload[:_TEST_BITS] == self.test).all() else None

    def _solve(self, beliefs: np.ndarray) -> np.ndarray | None:
        """The payload that agrees with the most reliable elements which determine it."""
        order = np.argsort(-np.abs(beliefs), kind="stable")
        for count in (2 * self.width + 256, self.elements):
            chosen = order[:count]
            basis, inverse = first_basis(np.unpackbits(self.generator[chosen], axis=1)[:, : self.width])
            if len(basis) == self.width:
                ones = beliefs[chosen[basis]] < 0
                return np.bitwise_xor.reduce(inverse[ones], axis=0, initial=0)
        return None


def belief_propagation(expected: np.ndarray, triples: np.ndarray) -> np.ndarray:
    """Sum-product over checks of three: (n,) expected signs -> (n,) log-likelihood ratios, positive for 0."""
    n, flat = len(expected), triples.ravel()
    channel = 2 * np.arctanh(np.clip(expected, -0.999999, 0.999999))
    total, message = channel, np.zeros(triples.shape)
    for _ in range(int(math.log(n, 3))):  # past that many rounds most triples have met in cycles
        known = np.tanh((total[triples] - message) / 2)
        message = known[:, [1, 2, 0]] * known[:, [2, 0, 1]]
        message = 2 * np.arctanh(np.clip(message, -0.999999, 0.999999))
        total = channel + np.bincount(flat, message.ravel(), n)
    return total


def first_basis(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the first linearly independent of (m, k) 0/1 rows, and, if there are k, the inverse of these (k, k).

    Gauss and Jordan on the transpose with the identity beside it, 8 columns a byte.
    """
    count, width = rows.shape
    work = np.concatenate([np.packbits(rows.T, axis=1), np.packbits(np.eye(width, dtype=np.uint8), axis=1)], axis=1)
    words = -(-work.shape[1] // 8)
    padded = np.zeros((width, 8 * words), np.uint8)
    padded[:, : work.shape[1]] = work
    wide, basis = padded.view(np.uint64), []
    for column in range(count):
        if len(basis) == width:
            break
        has = (padded[:, column // 8] >> np.uint8(7 - column % 8)) & 1
        pivot = len(basis) + int(has[len(basis) :].argmax())
        if not has[pivot]:
            continue
        has[pivot] = has[len(basis)]
        wide[[len(basis), pivot]] = wide[[pivot, len(basis)]]
        has[len(basis)] = 0
        wide[has.astype(bool)] ^= wide[len(basis)]
        basis.append(column)
    start = -(-count // 8)
    inverse = np.unpackbits(padded[:, start : start + -(-width // 8)], axis=1)[:, :width]
    return np.array(basis, np.int64), inverse


class PseudorandomCode:
    """Initial noise whose signs are a pseudorandom codeword.

    Args:
        key: its stream secret makes the code.
        payload_bits: of the message, at least 1; None is one for every 32 elements, 512 at most.
        scope: a model or tenant name that separates marks of one key.

    Raises:
        WatermarkError: payload_bits below 1.
    """

    name = "prc"

    def __init__(self, key: WatermarkKey, payload_bits: int | None = None, *, scope: str = ""):
        if payload_bits is not None and payload_bits < 1:
            raise WatermarkError(f"a message of {payload_bits} bits was asked for; expected at least 1")
        self.key, self.payload_bits, self.scope = key, payload_bits, scope
        self._codes: dict[tuple[int, ...], _Code] = {}

    def capacity(self, shape: Sequence[int]) -> int:
        """Bits of the message in one image's latent, given without the batch.

        Raises:
            WatermarkError: fewer than 1,024 elements, or a message too long for them.
        """
        return self.code(tuple(shape)).message_bits

    def sample(
        self, shape: Sequence[int], generator: torch.Generator | None = None, bits: np.ndarray | None = None
    ) -> Tensor:
        """Marked latents, float32, on the generator's device; each with random bits and flips of its own.

        Args:
            shape: (B, ...), any latent layout.
            generator: of magnitudes, random bits and flips; without it they come from torch's global generator.
            bits: (k,) or (B, k) of 0 and 1, k = capacity(shape[1:]); None is zeros.

        Raises:
            WatermarkError: bits of another number or value, a latent too small.
        """
        batch, image = split_shape(shape)
        code = self.code(image)
        bits = checked_bits(np.zeros(code.message_bits) if bits is None else bits, batch, code.message_bits)
        source = generator.device if generator is not None else "cpu"
        drawn = torch.randint(0, 2, (batch, code.secrecy), generator=generator, device=source).cpu().numpy()
        flips = torch.rand((batch, code.elements), generator=generator, device=source).cpu().numpy() < code.noise
        payload = np.concatenate([np.broadcast_to(code.test, (batch, _TEST_BITS)), drawn, bits], axis=1)
        laid = np.stack([code.encode(row.astype(np.uint8)) for row in payload]) ^ flips
        return with_signs((batch, *image), 1 - laid, generator)

    def p_values(self, latents: Tensor) -> np.ndarray:
        """(B,) chance that a latent made without the key fits the code so well, never too small, for every latent.

        Exact but for the thousandth of the error that decoding may spend.

        Raises:
            WatermarkError: NaN or Inf, or a latent too small.
        """
        code, rows = self._read(latents)
        return np.array([code.p_value(row) for row in rows])

    def decode(self, latents: Tensor) -> list[np.ndarray | None]:
        """(k,) uint8 message of each latent, or None where no codeword is near (a wrong one passes once in 10^6).

        Raises:
            WatermarkError: as `p_values`.
        """
        code, rows = self._read(latents)
        payloads = [code.decode(row) for row in rows]
        return [None if payload is None else payload[-code.message_bits :] for payload in payloads]

    def _read(self, latents: Tensor) -> tuple[_Code, np.ndarray]:
        _, image = split_shape(latents.shape)
        rows = latents.detach().to("cpu", torch.float64).flatten(1).numpy()
        if not np.isfinite(rows).all():
            raise WatermarkError(
                "the latents hold NaN or Inf; check the VAE's precision (fp32 or bf16 instead of fp16)"
            )
        return self.code(image), rows

    def code(self, image: tuple[int, ...]) -> _Code:
        if image in self._codes:
            return self._codes[image]
        n = math.prod(image)
        bits = min(max(1, n // _PER_BIT), _MESSAGE) if self.payload_bits is None else self.payload_bits
        code = _Code(self.key, image, bits, self.scope)
        if n < MINIMUM or 2 * (code.width + code.secrecy) > n:
            raise WatermarkError(
                f"a message of {code.message_bits} bits in a latent of shape {image}, {n} elements, was asked for;"
                f" expected at least {MINIMUM} elements and twice the message and its secret bits: use a larger"
                " picture or a shorter message"
            )
        self._codes[image] = code
        return code
