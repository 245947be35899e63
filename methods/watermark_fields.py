"""Where a keyed mark lies in a latent: the nonce's first field, its second field, and the payload's field.

First field: L positions, order and signs from the key and the shape alone. Its signs are one of `cosets` keyed
streams times one of the 2 L signed Walsh functions over the keyed order, so that a Walsh-Hadamard transform finds the
likeliest of all nonces at once. Second field (latents of 4,096 elements or more): the same with 1,024 streams under
the first field's nonce, which makes the whole nonce 27..38 bits long. Payload: every other position, under a stream
of the whole nonce. The first field uses 2^14 patterns or more for one key; which of its elements belong together
(four by four, through the Walsh functions) is known only to the key.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .watermark_code import parity
from .watermark_keys import WatermarkError, WatermarkKey
from .watermark_statistics import LARGEST

MINIMUM = 1024  # elements
_SECOND_COSETS = 1024


@dataclass(frozen=True)
class Fields:
    """Sizes and the public order of one latent shape; see `fields_of`."""

    shape: tuple[int, ...]
    length: int  # of the first field, and of the second where there is one
    cosets: int
    second_cosets: int
    bucket: int
    public: np.ndarray  # (n,) a fixed pseudorandom order of the positions

    @property
    def first_nonces(self) -> int:
        return 2 * self.length * self.cosets

    @property
    def second_nonces(self) -> int:
        return 2 * self.length * self.second_cosets if self.second_cosets else 1

    @property
    def nonces(self) -> int:
        return self.first_nonces * self.second_nonces

    @property
    def payload_elements(self) -> int:
        return len(self.public) - self.length * (2 if self.second_cosets else 1)


@lru_cache(maxsize=16)
def fields_of(shape: tuple[int, ...]) -> Fields:
    """The fields of one image's latent shape.

    Raises:
        WatermarkError: fewer than 1,024 elements.
    """
    n = math.prod(shape)
    if n < MINIMUM:
        raise WatermarkError(
            f"a latent of shape {shape} has {n} elements for each image; expected at least {MINIMUM} to carry a nonce,"
            " a payload and its code: use a larger picture (batch first, then one image's latent)"
        )
    length = min(max(1 << ((n // 8).bit_length() - 1), 256), 8192)
    raw = hashlib.shake_256(b"semiperm watermark order " + repr(shape).encode()).digest(8 * n)
    public = np.argsort(np.frombuffer(raw, "<u8"), kind="stable")
    public.flags.writeable = False
    bucket = 1 << min(3, (n // length).bit_length() - 1)
    return Fields(shape, length, max(4, 8192 // length), _SECOND_COSETS if n >= 4096 else 0, bucket, public)


def first_field(fields: Fields, keys: list[WatermarkKey], scope: str) -> tuple[np.ndarray, np.ndarray]:
    """(K, L) positions in keyed order and (K, cosets, L) uint8 sign bits of the first field under each key."""
    order_bytes, total = 3 * fields.length, 3 * fields.length + fields.cosets * fields.length // 8
    raw = b"".join(key.keystream("first field", fields.shape, 0, total, scope=scope) for key in keys)
    raw = np.frombuffer(raw, np.uint8).reshape(len(keys), total)
    sort = np.ascontiguousarray(raw[:, : 2 * fields.length]).view("<u2")
    order = np.argsort(sort, axis=1, kind="stable").astype(np.int32)
    order *= fields.bucket
    order += raw[:, 2 * fields.length : order_bytes] & np.uint8(fields.bucket - 1)  # one position of each bucket
    signs = np.unpackbits(raw[:, order_bytes:], axis=1)
    return fields.public.astype(np.int32)[order], signs.reshape(len(keys), fields.cosets, fields.length)


def remaining(fields: Fields, first: np.ndarray) -> np.ndarray:
    """The positions outside the first field, in public order: the second field's L come first, then the payload."""
    free = np.ones(len(fields.public), bool)
    free[first] = False
    return fields.public[free[fields.public]]


def second_order(fields: Fields, key: WatermarkKey, first_nonce: int, scope: str) -> np.ndarray:
    """(L,) keyed order of the second field."""
    raw = key.keystream("second order", fields.shape, first_nonce, 2 * fields.length, scope=scope)
    return np.argsort(np.frombuffer(raw, "<u2"), kind="stable")


def second_signs(
    fields: Fields, key: WatermarkKey, first_nonce: int, scope: str, coset: int = 0, count: int = 1
) -> np.ndarray:
    """(count, L) sign bits of the second field's streams from `coset` on."""
    width = fields.length // 8  # a multiple of 64 bytes: second fields have 512 elements or more
    raw = key.keystream("second field", fields.shape, first_nonce, width * count, offset=width * coset, scope=scope)
    return np.unpackbits(np.frombuffer(raw, np.uint8)).reshape(count, fields.length)


def codeword(fields: Fields, signs: np.ndarray, number: int) -> np.ndarray:
    """(L,) bits of pattern `number` = (coset * L + walsh) * 2 + negative, given the sign bits of its coset."""
    walsh = (number // 2) % fields.length
    return signs ^ parity(np.arange(fields.length) & walsh) ^ np.uint8(number & 1)


def correlate(values: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Scores of all patterns of a field: integer butterflies, no threads, exact.

    Args:
        values: (K, L) int8 soft values in keyed order.
        signs: (K, cosets, L) uint8 sign bits.

    Returns:
        (L, K, cosets) int16 or int32: the score of Walsh function w under each stream; its negative scores -that.
    """
    keys, cosets, length = signs.shape
    dtype = np.int16 if LARGEST * length < 1 << 15 else np.int32
    scores = np.where(signs, -values[:, None], values[:, None]).reshape(keys * cosets, length)
    # Streams innermost: every butterfly then runs over contiguous memory.
    scores = np.ascontiguousarray(scores.T).astype(dtype)
    other, half = np.empty_like(scores), 1
    while half < length:
        pairs, out = scores.reshape(-1, 2, half * keys * cosets), other.reshape(-1, 2, half * keys * cosets)
        np.add(pairs[:, 0], pairs[:, 1], out=out[:, 0])
        np.subtract(pairs[:, 0], pairs[:, 1], out=out[:, 1])
        scores, other, half = other, scores, 2 * half
    return scores.reshape(length, keys, cosets)


def peaks(scores: np.ndarray) -> np.ndarray:
    """(K,) largest magnitude of each key's scores."""
    return np.maximum(scores.max(axis=0), -scores.min(axis=0)).max(axis=1)


def best_patterns(scores: np.ndarray, count: int) -> list[tuple[int, int]]:
    """(L, cosets) scores of one key -> the `count` best (score, pattern number), best first."""
    flat = scores.T.reshape(-1).astype(np.int64)
    magnitude = np.abs(flat)
    top = np.argpartition(-magnitude, count)[:count]
    return [(int(magnitude[i]), int(2 * i + (flat[i] < 0))) for i in top[np.argsort(-magnitude[top], kind="stable")]]


def second_nonce(fields: Fields, key: WatermarkKey, first_nonce: int, scope: str, values: np.ndarray) -> int:
    """The likeliest pattern of the second field, from its (L,) soft values in public order."""
    values = values[second_order(fields, key, first_nonce, scope)][None]
    signs = second_signs(fields, key, first_nonce, scope, count=fields.second_cosets)
    highest, found, block = -1, 0, max(1, (1 << 17) // fields.length)  # scores of a block stay in the cache
    for start in range(0, fields.second_cosets, block):
        scores = correlate(values, signs[None, start : start + block])
        if peaks(scores)[0] > highest:
            highest, number = best_patterns(scores[:, 0], 1)[0]
            found = number + 2 * fields.length * start
    return found
