"""Where a keyed mark lies in a latent: the nonce's first field, its second field, the binding, and the payload.

First field: L positions, order and signs from the key and the shape alone. Its signs are one of `cosets` keyed
streams times one of the 2 L signed Walsh functions over the keyed order, so that a Walsh-Hadamard transform finds the
likeliest of all nonces at once. Second field (latents of 4,096 elements or more): the same with 1,024 streams under
the first field's nonce, which makes the whole nonce 34..40 bits long. Binding: an eighth of small latents, 1,024 of
large ones, whose signs may say what the picture shows (content.py). Payload: every other position, under a
stream of the whole nonce. The first field uses 2^14 patterns or more for one key; which of its elements belong together
(four by four, through the Walsh functions) is known only to the key; that two latents use the same one is not hidden.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ...kernels.keyed_correlation import keyed_correlation, walsh_scores
from ..errors import WatermarkError
from .code import parity
from .keys import WatermarkKey

MINIMUM = 1024  # elements: 256 for the nonce, 128 for the binding, and 8 for each of the 61 bits of the smallest code
_SECOND_COSETS = 1024  # streams of the second field: with its Walsh functions 20 to 24 bits more of nonce


@dataclass(frozen=True)
class Fields:
    """Sizes and the public order of one latent shape; see `fields_of`."""

    shape: tuple[int, ...]
    length: int  # of the first field, and of the second where there is one
    cosets: int
    second_cosets: int
    binding: int  # elements
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
        return len(self.public) - self.length * (2 if self.second_cosets else 1) - self.binding


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
    second_cosets = _SECOND_COSETS if n >= 4096 else 0
    return Fields(shape, length, max(4, 8192 // length), second_cosets, min(n // 8, 1024), bucket, public)


def first_field_bytes(fields: Fields, keys: list[WatermarkKey], scope: str) -> tuple[np.ndarray, np.ndarray]:
    """(K, L) int32 positions in keyed order and (K, cosets, L / 8) bytes of sign bits of each key's first field."""
    order_bytes, total = 3 * fields.length, 3 * fields.length + fields.cosets * fields.length // 8
    raw = bytearray().join(key.keystream("first field", fields.shape, 0, total, scope=scope) for key in keys)
    raw = np.frombuffer(raw, np.uint8).reshape(len(keys), total)
    sort = np.ascontiguousarray(raw[:, : 2 * fields.length]).view("<u2")
    order = np.argsort(sort, axis=1, kind="stable").astype(np.int32)
    order *= fields.bucket
    order += raw[:, 2 * fields.length : order_bytes] & np.uint8(fields.bucket - 1)  # one position of each bucket
    signs = rearrange(raw[:, order_bytes:], "key (coset byte) -> key coset byte", coset=fields.cosets)
    return fields.public.astype(np.int32)[order], np.ascontiguousarray(signs)


def first_field(fields: Fields, keys: list[WatermarkKey], scope: str) -> tuple[np.ndarray, np.ndarray]:
    """(K, L) positions in keyed order and (K, cosets, L) uint8 sign bits of the first field under each key."""
    positions, signs = first_field_bytes(fields, keys, scope)
    return positions, np.unpackbits(signs, axis=2)


def split(fields: Fields, first: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The positions outside the first field, in public order: of the second field, the binding and the payload."""
    free = np.ones(len(fields.public), bool)
    free[first] = False
    start = fields.length if fields.second_cosets else 0
    second, binding, payload = np.split(fields.public[free[fields.public]], [start, start + fields.binding])
    return second, binding, payload


def second_order(fields: Fields, key: WatermarkKey, first_nonce: int, scope: str) -> np.ndarray:
    """(L,) keyed order of the second field."""
    raw = key.keystream("second order", fields.shape, first_nonce, 2 * fields.length, scope=scope)
    return np.argsort(np.frombuffer(raw, "<u2"), kind="stable")


def second_signs(fields: Fields, key: WatermarkKey, first_nonce: int, scope: str, coset: int) -> np.ndarray:
    """(L,) sign bits of one of the second field's streams."""
    width = fields.length // 8  # a multiple of 64 bytes: second fields have 512 elements or more
    raw = key.keystream("second field", fields.shape, first_nonce, width, offset=width * coset, scope=scope)
    return np.unpackbits(np.frombuffer(raw, np.uint8))


def codeword(fields: Fields, signs: np.ndarray, number: int) -> np.ndarray:
    """(L,) bits of pattern `number` = (coset * L + walsh) * 2 + negative, given the sign bits of its coset."""
    walsh = (number // 2) % fields.length
    return signs ^ parity(np.arange(fields.length) & walsh) ^ np.uint8(number & 1)


def screen(fields: Fields, keys: list[WatermarkKey], scope: str, values: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(B, K) peaks and energies of the first field: all images and keys in one call, on the values' device.

    Args:
        values: (B, n) int8 of `quantise`.
    """
    positions, signs = (torch.from_numpy(t).to(values.device) for t in first_field_bytes(fields, keys, scope))
    peak, _, energy = keyed_correlation(values, positions, signs)
    return peak.cpu().numpy(), energy.cpu().numpy()


def best_patterns(fields: Fields, key: WatermarkKey, scope: str, values: np.ndarray, count: int) -> list:
    """The `count` best (score, pattern number) of (n,) values in the key's first field, best first."""
    positions, signs = first_field_bytes(fields, [key], scope)
    scores = walsh_scores(torch.from_numpy(values[positions]), torch.from_numpy(signs)).numpy()
    flat = rearrange(scores[..., 0], "walsh coset -> (coset walsh)").astype(np.int64)
    magnitude = np.abs(flat)
    top = np.argpartition(-magnitude, count)[:count]
    return [(int(magnitude[i]), int(2 * i + (flat[i] < 0))) for i in top[np.argsort(-magnitude[top], kind="stable")]]


def second_nonce(fields: Fields, key: WatermarkKey, first_nonce: int, scope: str, values: np.ndarray) -> int:
    """The likeliest pattern of the second field, from its (L,) soft values in public order."""
    size = fields.second_cosets * fields.length // 8
    raw = bytearray(key.keystream("second field", fields.shape, first_nonce, size, scope=scope))
    signs = torch.frombuffer(raw, dtype=torch.uint8)
    signs = rearrange(signs, "(coset byte) -> 1 coset byte", coset=fields.second_cosets)
    order = torch.from_numpy(second_order(fields, key, first_nonce, scope).astype(np.int32))
    return int(keyed_correlation(torch.from_numpy(values[None]), order[None], signs)[1])
