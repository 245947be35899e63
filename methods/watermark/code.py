"""Low-rate convolutional code for watermark payloads, with maximum-likelihood soft decoding.

A payload of k bits and 12 zeros runs through a shift register of 13 bits; every step emits one parity per generator,
and the steps repeat over up to 64 generators until the channel is full: rate k / channel_bits, from 1/8 to 1/1000.
The Viterbi decoder is exact over all 2^k codewords, works for any block from 1 bit on and needs no noise estimate:
only the ratios of the soft values count. Blocks this short and rates this low are where belief propagation is weak.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from einops import reduce

from ..errors import WatermarkError

CONSTRAINT = 13  # bits of the register: each more decodes better and doubles the decoder's work; chosen by hand
MEMORY = CONSTRAINT - 1
GENERATORS = 64  # different parities before they repeat; chosen by hand


def parity(values: np.ndarray) -> np.ndarray:
    """Parity of the bits of non-negative integers below 2^16, uint8."""
    values = values ^ (values >> 8)
    values = values ^ (values >> 4)
    values = values ^ (values >> 2)
    return ((values ^ (values >> 1)) & 1).astype(np.uint8)


@lru_cache(maxsize=1)
def _generators() -> np.ndarray:
    """(GENERATORS,) register masks: fixed pseudorandom taps, first and last tap always connected."""
    raw = hashlib.shake_256(b"semiperm convolutional code 1").digest(8 * GENERATORS)
    taps = np.frombuffer(raw, "<u2").astype(np.int32) & ((1 << CONSTRAINT) - 1) | 1 | (1 << MEMORY)
    # Distinct masks only; the draw holds four times as many as are needed.
    return taps[np.sort(np.unique(taps, return_index=True)[1])][:GENERATORS]


@lru_cache(maxsize=1)
def _signs() -> np.ndarray:
    """(GENERATORS, 2^CONSTRAINT) float32: +1 where the parity of a register content is 0, -1 where it is 1."""
    registers = np.arange(1 << CONSTRAINT, dtype=np.int32)
    return 1 - 2 * parity(registers[None] & _generators()[:, None]).astype(np.float32)


@dataclass(frozen=True)
class Code:
    """A code of `payload_bits` information bits over `channel_bits` channel bits; see `code_for`."""

    payload_bits: int
    channel_bits: int

    @property
    def steps(self) -> int:
        return self.payload_bits + MEMORY

    @property
    def _rows(self) -> int:
        return -(-self.channel_bits // self.steps)

    def encode(self, bits: np.ndarray) -> np.ndarray:
        """(payload_bits,) 0/1 -> (channel_bits,) uint8.

        Raises:
            WatermarkError: another number of bits.
        """
        bits = np.asarray(bits, np.int32)
        if bits.shape != (self.payload_bits,):
            raise WatermarkError(f"bits of shape {bits.shape} were given; expected ({self.payload_bits},)")
        padded = np.concatenate([np.zeros(MEMORY, np.int32), bits, np.zeros(MEMORY, np.int32)])
        # Bit d of a register is the input d - MEMORY steps ago: the newest bit is the highest.
        register = sum(padded[d : d + self.steps] << d for d in range(CONSTRAINT))
        rows = parity(register[None] & _generators()[: min(self._rows, GENERATORS), None])
        return rows[np.arange(self._rows) % GENERATORS].reshape(-1)[: self.channel_bits]

    def decode(self, llr: np.ndarray) -> tuple[np.ndarray, float]:
        """(channel_bits,) soft values, positive for 0 and in any unit -> the likeliest payload and its confidence.

        Returns:
            (payload_bits,) uint8, and the share of the soft weight that agrees with its codeword, 0.5..1.

        Raises:
            WatermarkError: another number of soft values.
        """
        gains = self._gains(llr)
        states = 1 << MEMORY
        metric = np.full(states, -np.inf, np.float32)
        metric[0] = 0
        taken = np.empty((self.steps, states), bool)
        for step in range(self.steps):
            # Register u = 2 * next_state + e was reached from state u mod 2^MEMORY.
            paths = (np.concatenate([metric, metric]) + gains[step]).reshape(states, 2)
            taken[step] = paths[:, 1] > paths[:, 0]
            metric = np.maximum(paths[:, 0], paths[:, 1])
        bits, state = np.zeros(self.steps, np.uint8), 0
        for step in reversed(range(self.steps)):
            bits[step] = state >> (MEMORY - 1)
            state = (2 * state + int(taken[step, state])) & (states - 1)
        weight = float(np.abs(np.asarray(llr, np.float32)).sum(dtype=np.float64))
        return bits[: self.payload_bits], 0.5 + 0.5 * float(metric[0]) / weight if weight else 0.5

    def candidates(self, llr: np.ndarray) -> Iterator[np.ndarray]:
        """All payloads as of `decode`, the likeliest first, as many as are asked for.

        A search back from the closed end, best first: the forward metrics say exactly how good the best way on is
        (tree-trellis list decoding, Soong and Huang 1991).
        """
        gains, states = self._gains(llr), 1 << MEMORY
        metrics = np.full((self.steps + 1, states), -np.inf, np.float32)
        metrics[0, 0] = 0
        for step in range(self.steps):
            paths = (np.concatenate([metrics[step], metrics[step]]) + gains[step]).reshape(states, 2)
            metrics[step + 1] = paths.max(1)
        ways = itertools.count()  # of equal ones the first: ways themselves have no order
        heap = [(-float(metrics[-1, 0]), next(ways), self.steps, 0, 0.0, None)]
        while heap:
            _, _, step, state, behind, later = heapq.heappop(heap)
            while step:
                later = (state >> (MEMORY - 1), later)
                step -= 1
                both = []
                for register in (2 * state, 2 * state + 1):
                    before, after = register & (states - 1), behind + float(gains[step, register])
                    both.append((float(metrics[step, before]) + after, before, after))
                (_, state, behind), other = sorted(both, reverse=True)
                if other[0] > -math.inf:
                    heapq.heappush(heap, (-other[0], next(ways), step, other[1], other[2], later))
            bits = []
            while later is not None:
                bit, later = later
                bits.append(bit)
            yield np.array(bits[: self.payload_bits], np.uint8)

    def _gains(self, llr: np.ndarray) -> np.ndarray:
        """(steps, 2^CONSTRAINT) what every register content at every step agrees with."""
        llr = np.asarray(llr, np.float32)
        if llr.shape != (self.channel_bits,):
            raise WatermarkError(f"soft values of shape {llr.shape} were given; expected ({self.channel_bits},)")
        rows = np.zeros((-(-self._rows // GENERATORS) * GENERATORS, self.steps), np.float32)
        rows.reshape(-1)[: self.channel_bits] = llr
        rows = reduce(rows, "(round generator) step -> generator step", "sum", generator=GENERATORS)
        rows = rows[: min(self._rows, GENERATORS)]
        return rows.T @ _signs()[: len(rows)]


def code_for(payload_bits: int, channel_bits: int) -> Code:
    """The code that carries `payload_bits` over `channel_bits`.

    Raises:
        WatermarkError: fewer than 8 channel bits for each of the payload bits and the 12 that close the code.
    """
    needed = 8 * (payload_bits + MEMORY)
    if payload_bits < 1 or channel_bits < needed:
        raise WatermarkError(
            f"a payload of {payload_bits} bits over {channel_bits} channel bits was asked for; expected at least 1 bit"
            f" over {needed}: use a larger latent or a smaller payload"
        )
    return Code(payload_bits, channel_bits)
