"""Where a keyed mark lies in a latent: the nonce's first field, its second field, the binding, and the payload.

First field: L positions, order and signs from the key and the shape alone. Its blocks (one in small latents, 16 from
16,384 elements on) each say a symbol: one of `cosets` keyed streams times one of the 2 l signed Walsh functions over
the block's l elements in keyed order, so that a Walsh-Hadamard transform scores all symbols at once. With one block the
symbol is the nonce. With 16 the nonce is (a, b), 28 bits, and block j says a + x^j b in GF(2^14): a Reed-Solomon code,
of which two words share one block at most. So two pictures that share a first field are rare, and those that share a
block agree in too few signs to stand out.
Second field (latents of 4,096 to 16,383 elements): a block with 1,024 streams under the first field's nonce, 20 bits
more. Binding: an eighth of small latents, 1,024 of large ones, whose signs may say what the picture shows (content.py).
Payload: every other position, under a stream of the whole nonce.

Older pictures (formats 1 and 2 of keys.py) have one block of 14 bits, 16 from 65,536 elements on, and a second field
from 4,096 elements on: `fields_of(shape, form)` lays them out as well.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor

from ...kernels.keyed_correlation import keyed_correlation, walsh_scores
from ..errors import WatermarkError
from .code import parity
from .keys import FORMAT, WatermarkKey

MINIMUM = 1024  # elements: 256 for the nonce, 128 for the binding, and 8 for each of the 61 bits of the smallest code
_SECOND_COSETS = 1024  # streams of the second field: with its Walsh functions 20 to 24 bits more of nonce
_ONE_BLOCK = 1 << 18  # nonces of a first field of one block: 4 ms a key, which searching many keys affords
_LARGE = 16384  # elements from which the first field is a code of
_BLOCKS = 16  # blocks: 2 standard deviations of a pair's agreement each, which no pair is told by, and
_SYMBOL_BITS = 14  # bits of symbol each
_POLYNOMIAL = 0x4443  # x^14 + x^10 + x^6 + x + 1, primitive: x has 2^14 - 1 powers


@dataclass(frozen=True)
class Fields:
    """Sizes and the public order of one latent shape; see `fields_of`."""

    shape: tuple[int, ...]
    form: int  # of pictures: see keys.py
    blocks: int
    length: int  # of the first field, all blocks together, and of the second where there is one
    cosets: int  # of a block
    second_cosets: int
    binding: int  # elements
    bucket: int
    public: np.ndarray  # (n,) a fixed pseudorandom order of the positions

    @property
    def purpose(self) -> str:
        """Of the first field's keystream."""
        return "first field 3" if self.form > 2 else "first field"

    @property
    def symbols(self) -> int:
        """Patterns of a block."""
        return 2 * self.length // self.blocks * self.cosets

    @property
    def first_nonces(self) -> int:
        return self.symbols if self.blocks == 1 else self.symbols**2

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
def fields_of(shape: tuple[int, ...], form: int = FORMAT) -> Fields:
    """The fields of one image's latent shape in a format of pictures.

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
    blocks, cosets, second_cosets = 1, max(4, 8192 // length), _SECOND_COSETS if n >= 4096 else 0
    if form > 2 and n >= _LARGE:
        length = min(2 * length, 8192)
        blocks, second_cosets = _BLOCKS, 0
        cosets = (1 << _SYMBOL_BITS) // (2 * length // blocks)
    elif form > 2:
        cosets = _ONE_BLOCK // (2 * length)
    raw = hashlib.shake_256(b"semiperm watermark order " + repr(shape).encode()).digest(8 * n)
    public = np.argsort(np.frombuffer(raw, "<u8"), kind="stable")
    public.flags.writeable = False
    bucket = 1 << min(3, (n // length).bit_length() - 1)
    return Fields(shape, form, blocks, length, cosets, second_cosets, min(n // 8, 1024), bucket, public)


def first_field_bytes(fields: Fields, keys: list[WatermarkKey], scope: str) -> tuple[np.ndarray, np.ndarray]:
    """(K blocks, l) int32 positions in keyed order and (K blocks, cosets, l / 8) bytes of sign bits, key by key."""
    order_bytes, total = 3 * fields.length, 3 * fields.length + fields.cosets * fields.length // 8
    raw = bytearray().join(key.keystream(fields.purpose, fields.shape, 0, total, scope=scope) for key in keys)
    raw = np.frombuffer(raw, np.uint8).reshape(len(keys), total)
    sort = np.ascontiguousarray(raw[:, : 2 * fields.length]).view("<u2")
    order = np.argsort(sort, axis=1, kind="stable").astype(np.int32)
    order *= fields.bucket
    order += raw[:, 2 * fields.length : order_bytes] & np.uint8(fields.bucket - 1)  # one position of each bucket
    blocks = {"block": fields.blocks, "coset": fields.cosets}
    signs = rearrange(raw[:, order_bytes:], "key (block coset byte) -> (key block) coset byte", **blocks)
    places = rearrange(fields.public.astype(np.int32)[order], "key (block l) -> (key block) l", block=fields.blocks)
    return places, np.ascontiguousarray(signs)


@dataclass(frozen=True, eq=False)
class FirstField:
    """The first field under one key: (L,) positions in keyed order, (blocks, cosets, l) uint8 sign bits."""

    fields: Fields
    positions: np.ndarray
    signs: np.ndarray

    def bits(self, nonce: int) -> np.ndarray:
        """(L,) sign bits that say a nonce of the first field."""
        fields, length = self.fields, self.fields.length // self.fields.blocks
        said = []
        for block, symbol in enumerate(symbols_of(fields, nonce)):
            said.append(codeword(length, self.signs[block, symbol // (2 * length)], symbol))
        return np.concatenate(said)


def first_field(fields: Fields, key: WatermarkKey, scope: str) -> FirstField:
    """The first field under a key."""
    positions, signs = first_field_bytes(fields, [key], scope)
    return FirstField(fields, positions.reshape(-1), np.unpackbits(signs, axis=2))


@lru_cache(maxsize=1)
def _powers() -> tuple[np.ndarray, np.ndarray]:
    """Powers of x in GF(2^14), twice over, and the logarithm of each element (of 0: nothing)."""
    order = (1 << _SYMBOL_BITS) - 1
    power, log, value = np.empty(2 * order, np.int32), np.zeros(order + 1, np.int32), 1
    for exponent in range(order):
        power[exponent] = power[exponent + order] = value
        log[value] = exponent
        value <<= 1
        if value > order:
            value ^= _POLYNOMIAL
    return power, log


def _times_power(values: np.ndarray, exponent) -> np.ndarray:
    """values x^exponent in GF(2^14); the exponent in 0..2^14 - 2."""
    power, log = _powers()
    return np.where(values == 0, 0, power[log[values] + exponent])


def symbols_of(fields: Fields, nonce: int) -> list[int]:
    """What each block says."""
    if fields.blocks == 1:
        return [nonce]
    a, b = nonce % fields.symbols, np.array(nonce // fields.symbols)
    return [a ^ int(_times_power(b, block)) for block in range(fields.blocks)]


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


def codeword(length: int, signs: np.ndarray, number: int) -> np.ndarray:
    """(l,) bits of pattern `number` = (coset * l + walsh) * 2 + negative, given the sign bits of its coset."""
    walsh = (number // 2) % length
    return signs ^ parity(np.arange(length) & walsh) ^ np.uint8(number & 1)


def screen(fields: Fields, keys: list[WatermarkKey], scope: str, values: Tensor) -> np.ndarray:
    """(B, K) how well each key's first field fits, in standard deviations: all images and keys in one call.

    Of several blocks the sum of their best symbols counts: it only says which keys to look at.

    Args:
        values: (B, n) int8 of `quantise`; the call runs on their device.
    """
    positions, signs = (torch.from_numpy(t).to(values.device) for t in first_field_bytes(fields, keys, scope))
    return fit(fields, values, positions, signs).cpu().numpy()


def fit(fields: Fields, values: Tensor, positions: Tensor, signs: Tensor) -> Tensor:
    """(B, K) of `screen`, given the keys' first fields as tensors."""
    peak, _, energy = keyed_correlation(values, positions, signs)
    peak, energy = (reduce(t.double(), "b (k block) -> b k", "sum", block=fields.blocks) for t in (peak, energy))
    return peak / energy.clamp(min=1).sqrt()


def best_patterns(fields: Fields, key: WatermarkKey, scope: str, values: np.ndarray, count: int) -> list:
    """The `count` best (score, first nonce) of (n,) values in the key's first field, best first."""
    positions, signs = first_field_bytes(fields, [key], scope)
    scores = walsh_scores(torch.from_numpy(values[positions]), torch.from_numpy(signs)).numpy()
    table = rearrange(scores, "walsh coset block -> block (coset walsh)").astype(np.int32)
    if fields.blocks > 1:
        return _best_words(table, count)
    magnitude = np.abs(table[0])
    top = np.argpartition(-magnitude, count)[:count]
    top = top[np.argsort(-magnitude[top], kind="stable")]
    return [(int(magnitude[i]), int(2 * i + (table[0, i] < 0))) for i in top]


_LIKELY = 512  # symbols of all blocks whose pairs are tried: two right ones among them say the whole word. Where a
# first field is just significant, the best two of 16 lie on average at places 28 and 180 of 262,144.


def _best_words(table: np.ndarray, count: int) -> list[tuple[int, int]]:
    """The best words of the code, among those through two likely symbols, from (blocks, symbols / 2) scores."""
    blocks, half = table.shape
    flat = table.reshape(-1)
    top = np.argpartition(-np.abs(flat), _LIKELY)[:_LIKELY]
    block, symbol = top // half, 2 * (top % half) + (flat[top] < 0)
    first, second = np.triu_indices(_LIKELY, 1)
    apart = block[first] != block[second]
    first, second = first[apart], second[apart]
    # s_i + s_j = b (x^i + x^j), and a = s_i + b x^i
    power, log = _powers()
    order = len(log) - 1
    divisor = log[power[block[first]] ^ power[block[second]]]
    b = _times_power(symbol[first] ^ symbol[second], (order - divisor) % order)
    a = symbol[first] ^ _times_power(b, block[first])
    total = np.zeros(len(a), np.int64)
    for j in range(blocks):
        said = a ^ _times_power(b, j)
        total += np.where(said & 1, -1, 1) * table[j, said >> 1]
    words = a.astype(np.int64) + (b.astype(np.int64) << _SYMBOL_BITS)
    found: dict[int, int] = {}
    for i in np.argsort(-total, kind="stable"):
        found.setdefault(int(words[i]), int(total[i]))
        if len(found) == count:
            break
    return [(score, word) for word, score in found.items()]


def second_nonce(fields: Fields, key: WatermarkKey, first_nonce: int, scope: str, values: np.ndarray) -> int:
    """The likeliest pattern of the second field, from its (L,) soft values in public order."""
    size = fields.second_cosets * fields.length // 8
    raw = bytearray(key.keystream("second field", fields.shape, first_nonce, size, scope=scope))
    signs = torch.frombuffer(raw, dtype=torch.uint8)
    signs = rearrange(signs, "(coset byte) -> 1 coset byte", coset=fields.second_cosets)
    order = torch.from_numpy(second_order(fields, key, first_nonce, scope).astype(np.int32))
    return int(keyed_correlation(torch.from_numpy(values[None]), order[None], signs)[1])
