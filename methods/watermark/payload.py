"""The payload of a mark: its fields, how many bits of each a latent carries, its seal, and how all of it is laid."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import WatermarkError
from .code import Code, code_for
from .fields import Fields, FirstField, codeword, fields_of, second_order, second_signs, split
from .keys import FORMAT, WatermarkKey

_FIELDS = ("bound", "version", "key_id", "time", "model", "unique_id")  # of a payload, in this order


@dataclass(frozen=True)
class Payload:
    """What an image says of itself; small latents carry only some fields (`capacity`), the others read as default.

    Args:
        unique_id: below 2^64 (2^32 or 2^24 in small latents).
        time: seconds since 1970, below 2^32.
        model: 32-bit hash of the model.
        version: 0..7.

    Raises:
        WatermarkError: a value out of range.
    """

    unique_id: int
    time: int = 0
    model: int = 0
    version: int = 1

    def __post_init__(self):
        for name, bits in (("unique_id", 64), ("time", 32), ("model", 32), ("version", 3)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << bits:
                raise WatermarkError(f"the payload has {name}={value!r}; expected a whole number in 0..2^{bits} - 1")


@dataclass(frozen=True)
class Layout:
    """Bits of each payload field that a latent carries, in this order, and of its authentication code."""

    version: int
    key_id: int
    time: int
    model: int
    unique_id: int
    mac: int
    bound: int = 1  # whether the picture's content is bound, see content.py

    @property
    def payload(self) -> int:
        return self.bound + self.version + self.key_id + self.time + self.model + self.unique_id

    @property
    def total(self) -> int:
        return self.payload + self.mac


# Each bit takes eight elements or more (code.py), so small latents leave out what says least: see `capacity`.
_FULL = Layout(version=3, key_id=12, time=32, model=32, unique_id=64, mac=48)
_MEDIUM = Layout(version=3, key_id=0, time=32, model=0, unique_id=32, mac=32)
_SMALL = Layout(version=0, key_id=0, time=0, model=0, unique_id=24, mac=24)


def capacity(shape: Sequence[int]) -> Layout:
    """The payload that one image's latent carries: 192 bits from 16,384 elements on, 100 from 4,096, 49 from 1,024.

    Args:
        shape: (C, H, W), (C, F, H, W) or packed (N, C): without the batch.

    Raises:
        WatermarkError: fewer than 1,024 elements.
    """
    n = len(fields_of(tuple(int(size) for size in shape)).public)
    return _FULL if n >= 16384 else _MEDIUM if n >= 4096 else _SMALL


def image_shape(shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(int(size) for size in shape)
    if len(shape) not in (3, 4, 5) or min(shape) < 1:
        raise WatermarkError(
            f"latents of shape {shape} were given; expected (B, C, H, W), (B, C, F, H, W) or packed (B, N, C)"
        )
    return shape[1:]


def _bits(value: int, count: int) -> list[int]:
    return [value >> (count - 1 - i) & 1 for i in range(count)]


_MESSAGES = {1: "payload", 2: "payload 2", 3: "payload 3"}  # by format


def seal(fields: Fields, layout: Layout, key: WatermarkKey, scope: str, nonce: int, body: Sequence[int], form=FORMAT):
    message = json.dumps([_MESSAGES[form], scope, *fields.shape, key.key_id, nonce, "".join(map(str, body))])
    return _bits(key.mac(message.encode(), layout.mac), layout.mac)


def body_of(payload: Payload, key: WatermarkKey, layout: Layout, bound: bool) -> list[int]:
    if payload.unique_id >= 1 << layout.unique_id or (not layout.version and payload.version != 1):
        raise WatermarkError(
            f"the payload has unique_id {payload.unique_id} and version {payload.version}, but a latent of this size"
            f" carries {layout.unique_id} bits of unique_id and {layout.version} of version (1 where none): use a"
            " smaller number or a larger picture"
        )
    values = vars(payload) | {"bound": int(bound), "key_id": key.key_id}
    return [bit for name in _FIELDS for bit in _bits(values[name], getattr(layout, name))]


def payload_of(body: np.ndarray, layout: Layout) -> Payload:
    values, position = {}, 0
    for name in _FIELDS:
        width = getattr(layout, name)
        if width and name not in ("bound", "key_id"):
            values[name] = int("".join(map(str, body[position : position + width])), 2)
        position += width
    return Payload(**values)


def code_of(fields: Fields, layout: Layout) -> Code:
    return code_for(layout.total, fields.payload_elements)


def lay(
    flips: np.ndarray,
    fields: Fields,
    key: WatermarkKey,
    scope: str,
    nonce: int,
    code_bits: np.ndarray,
    first: FirstField,
) -> None:
    """Writes the sign bits of all fields into (n,) `flips`."""
    first_nonce, second = nonce % fields.first_nonces, nonce // fields.first_nonces
    flips[first.positions] = first.bits(first_nonce)
    rest, binding, payload = split(fields, first.positions)
    if fields.second_cosets:
        order = second_order(fields, key, first_nonce, scope)
        coset = second_signs(fields, key, first_nonce, scope, second // (2 * fields.length))
        flips[rest[order]] = codeword(fields.length, coset, second)
    flips[binding] = key.stream("binding", fields.shape, nonce, len(binding), scope=scope)
    flips[payload] = code_bits ^ key.stream("payload", fields.shape, nonce, len(payload), scope=scope)
