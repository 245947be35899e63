"""Keyed payload mark in the initial noise, with exact statistics and no database.

sign(z_i) = keystream_i XOR codeword_i and |z_i| half-normal: under a random key the noise of each image is exactly
N(0, I). The nonce, fresh for each image, lies in the latent itself (fields.py), the payload under an error-correcting
code (code.py).

Who can do what: a holder of the stream secret can read marks, forge their presence and copy a payload; only a holder
of the MAC secret can make a payload that verifies. The MAC binds payload, key, nonce, shape and format (keys.py), not
the picture: who inverts a marked picture can carry its whole noise over to another (transplant), and content binding,
which takes the content secret, has to catch that.

Images of one key can be linked without it where two share a nonce's first field, and who compares their noise sees it:
it has 18 bits, and 28 from 16,384 elements on, so by the birthday's law two of some 600 images do, of 20,000 in large
latents. Where there is no second field such a pair shares all signs up to the difference of its payloads.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ..errors import WatermarkError
from .code import Code, code_for
from .fields import (
    Fields,
    FirstField,
    best_patterns,
    codeword,
    fields_of,
    first_field,
    screen,
    second_nonce,
    second_order,
    second_signs,
    split,
)
from .keys import FORMAT, WatermarkKey, layout_of
from .statistics import corrected, level_counts, log_chernoff, log_tail, quantise

_SCREENED = 1 << 20  # elements of first fields, of all keys in one call: some 20 MB
_CANDIDATES = 4  # nonces of all keys that are decoded: a union bound covers any choice; more only costs time
_KEYS_READ = 16  # keys whose nonces are looked at, where a first field of blocks does not tell the likeliest key so well
_JOINT = 1e-3  # share of the error that the joint statistic may spend; it is so steep that little is enough
_HOPELESS = math.log(5)  # first fields whose Chernoff bound is above it are not read on (their p is about .5 or more)
_FIELDS = ("bound", "version", "key_id", "time", "model", "unique_id")  # of a payload, in this order
_DECODED = math.log(1e-6)  # a payload is reported where chance gives one this good less often,
# and, unless its MAC verifies, above this signal-to-noise power ratio for each bit of the code; chosen by hand
_CLEAR = 2.3


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


@dataclass(frozen=True)
class Reading:
    """What one latent says under the best of the keys that were searched.

    Args:
        p_value: chance that a latent without this key's mark looks as marked as this one under any of the keys
            searched; valid for every latent, because the keys are random. Corrected for nonces, payloads and keys.
        log10_p: its logarithm, which does not underflow.
        key_id, key_name: of the best key.
        payload: where it was decoded beyond chance (1e-6) and clearly, else None; unauthenticated unless `mac_ok`.
        mac_ok: None without a mark beyond chance or without the key's MAC secret; False also where the mark is there
            but too weak to decode (then `payload` is None).
        bit_confidence: share of the payload field's soft weight that agrees with the decoded codeword; about .5 plus
            the fit of chance without a mark, 1 for untouched noise.
        nonce: the likeliest nonce.
        bound: whether the payload says that content is bound; None without a payload.
        format: of the picture (`keys.FORMAT`), told by the MAC; None unless `mac_ok`.
        evidence: one image's latent of soft values times the signs that the mark says, float32: positive where the
            mark agrees, 0 where content is bound; None without a mark beyond chance.
    """

    p_value: float
    log10_p: float
    key_id: int
    key_name: str
    payload: Payload | None
    mac_ok: bool | None
    bit_confidence: float
    nonce: int
    bound: bool | None = None
    format: int | None = None
    evidence: np.ndarray | None = field(default=None, repr=False, compare=False)


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


def _image_shape(shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(int(size) for size in shape)
    if len(shape) not in (3, 4, 5) or min(shape) < 1:
        raise WatermarkError(
            f"latents of shape {shape} were given; expected (B, C, H, W), (B, C, F, H, W) or packed (B, N, C)"
        )
    return shape[1:]


def _bits(value: int, count: int) -> list[int]:
    return [value >> (count - 1 - i) & 1 for i in range(count)]


_MESSAGES = {1: "payload", 2: "payload 2", 3: "payload 3"}  # by format


def _mac(fields: Fields, layout: Layout, key: WatermarkKey, scope: str, nonce: int, body: Sequence[int], form=FORMAT):
    message = json.dumps([_MESSAGES[form], scope, *fields.shape, key.key_id, nonce, "".join(map(str, body))])
    return _bits(key.mac(message.encode(), layout.mac), layout.mac)


def _body(payload: Payload, key: WatermarkKey, layout: Layout, bound: bool) -> list[int]:
    if payload.unique_id >= 1 << layout.unique_id or (not layout.version and payload.version != 1):
        raise WatermarkError(
            f"the payload has unique_id {payload.unique_id} and version {payload.version}, but a latent of this size"
            f" carries {layout.unique_id} bits of unique_id and {layout.version} of version (1 where none): use a"
            " smaller number or a larger picture"
        )
    values = vars(payload) | {"bound": int(bound), "key_id": key.key_id}
    return [bit for name in _FIELDS for bit in _bits(values[name], getattr(layout, name))]


def _payload(body: np.ndarray, layout: Layout) -> Payload:
    values, position = {}, 0
    for name in _FIELDS:
        width = getattr(layout, name)
        if width and name not in ("bound", "key_id"):
            values[name] = int("".join(map(str, body[position : position + width])), 2)
        position += width
    return Payload(**values)


def _code(fields: Fields, layout: Layout) -> Code:
    return code_for(layout.total, fields.payload_elements)


class KeyedMark:
    """Initial noise that carries a payload under one key.

    Args:
        key: a full key to sign; a detector's copy can only read.
        scope: a model or tenant name that separates its marks from others of the key; "" for none.
        form: of the pictures, see keys.py; 2 signs as older releases did, for comparison.
    """

    def __init__(self, key: WatermarkKey, scope: str = "", form: int = FORMAT):
        self.key, self.scope, self.form = key, scope, form

    def sample(
        self,
        shape: Sequence[int],
        payload: Payload | Sequence[Payload] | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        bound: bool = False,
    ) -> Tensor:
        """Marked latents: each image exactly N(0, I), under a nonce of its own.

        Args:
            shape: (B, C, H, W), (B, C, F, H, W) or packed (B, N, C); the image is read in the shape it was signed in.
            payload: one for all images, or one for each; None draws a unique id for each and takes the time now.
            generator: makes magnitudes, nonces and drawn ids reproducible; without it they come from torch's global
                generator and the operating system. Images signed with the same generator state share their nonce.
            dtype, device: of the result.
            bound: say that the content of each picture is bound; `content.bind` then has to do it.

        Raises:
            WatermarkError: a shape that cannot carry a mark, a payload that does not fit, a key without MAC secret.
        """
        shape = tuple(int(size) for size in shape)
        image, batch = _image_shape(shape), shape[0]
        fields, layout = fields_of(image, self.form), capacity(image)
        if not (payload is None or isinstance(payload, Payload)) and len(payload) != batch:
            raise WatermarkError(f"{len(payload)} payloads were given for {batch} images; give one, or one for each")
        source = generator.device if generator is not None else "cpu"
        magnitude = torch.randn(shape, generator=generator, device=source)
        flips = np.empty((batch, len(fields.public)), np.uint8)
        first = first_field(fields, self.key, self.scope)
        for index in range(batch):
            if generator is None:
                drawn = secrets.token_bytes(16)
            else:
                drawn = bytes(torch.randint(0, 256, (16,), generator=generator, device=source).tolist())
            nonce = int.from_bytes(drawn[:8], "big") % fields.nonces  # a power of two: uniform
            if payload is None:
                fresh = int.from_bytes(drawn[8:], "big") % (1 << layout.unique_id)
                entry = Payload(fresh, time=int(time.time()) % (1 << 32))
            else:
                entry = payload if isinstance(payload, Payload) else payload[index]
            body = _body(entry, self.key, layout, bound)
            sealed = body + _mac(fields, layout, self.key, self.scope, nonce, body, self.form)
            _lay(flips[index], fields, self.key, self.scope, nonce, _code(fields, layout).encode(sealed), first)
        signs = torch.from_numpy(1 - 2 * flips.astype(np.int8)).reshape(shape)
        return (magnitude.abs_() * signs.to(source)).to(device=device, dtype=dtype)

    def read(self, latents: Tensor, keys: Iterable[WatermarkKey] | None = None) -> list[Reading]:
        """`read` in this mark's scope, under its own key unless others are given."""
        return read(latents, [self.key] if keys is None else keys, scope=self.scope)


def _lay(
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


def read(latents: Tensor, keys: Iterable[WatermarkKey], *, scope: str = "") -> list[Reading]:
    """Reads each latent under the best of the keys.

    Two statistics share the error of each key, both of them sums of the latent's rounded magnitudes under signs that
    are uniform because the key is random. First field: exact tail of the likeliest nonce's score times the number of
    nonces. Joint: Chernoff's bound of the whole latent's score against the decoded nonce and codeword, times the
    number of nonces and codewords. Both are union bounds, so the p-value is never too small, whatever the latent; the
    keys searched enter by Sidak's correction, those that may have signed in an older format twice.

    Args:
        latents: (B, ...) in the shape they were signed in, any float dtype; neither centre nor scale matter much.
        keys: searched in blocks; 10^4 keys take about a second for each image.
        scope: as given at signing.

    Raises:
        WatermarkError: no keys, a shape that carries no mark, NaN or Inf.
    """
    keys = list(keys)
    if not keys:
        raise WatermarkError("no keys were given to read with; load a keyring that holds at least one")
    image = _image_shape(latents.shape)
    values, layout = quantise(latents), capacity(image)
    by_form = {form: [key for key in keys if form in key.layouts] for form in (FORMAT, 2)}
    tries, readings = sum(map(len, by_form.values())), []
    for form, some in by_form.items():
        if some:
            fields = fields_of(image, form)
            chosen = _likely_keys(fields, some, scope, torch.from_numpy(values).to(latents.device))
            given = [_Latent(fields, layout, row, scope, tries) for row in values]
            readings.append([_best_reading(one, some, which) for one, which in zip(given, chosen, strict=True)])
    return [min(row, key=_rank) for row in zip(*readings, strict=True)]


def _likely_keys(fields: Fields, keys: list[WatermarkKey], scope: str, rows: Tensor) -> np.ndarray:
    """(B, few) which keys may have signed each latent."""
    kept = _CANDIDATES if fields.blocks == 1 else _KEYS_READ  # no other key has one of the best patterns
    if len(keys) <= kept:
        return np.tile(np.arange(len(keys)), (len(rows), 1))
    count = max(1, _SCREENED // (fields.length * max(1, fields.cosets // 32)))
    screened = [screen(fields, keys[start : start + count], scope, rows) for start in range(0, len(keys), count)]
    return np.argsort(-np.concatenate(screened, axis=1))[:, :kept]


def _rank(reading: Reading) -> tuple[bool, float]:
    """A verified payload first, then the least p-value."""
    return not reading.mac_ok, reading.log10_p


@dataclass(frozen=True, order=True)
class _Candidate:
    """A nonce that a latent may have under one of the keys; the likeliest is the largest."""

    deviations: float  # the score in standard deviations of chance
    index: int  # of the key
    score: int
    number: int  # of the first field's pattern: the first part of the nonce


@dataclass(frozen=True, eq=False)
class _Latent:
    """One image's latent as it is read."""

    fields: Fields
    layout: Layout
    row: np.ndarray  # (n,) int8 of `quantise`
    scope: str
    tries: int  # keys that are searched, each in every layout that it may have used


def _best_reading(latent: _Latent, keys: list[WatermarkKey], which: np.ndarray) -> Reading:
    """The best nonces of these keys: the one with a verified payload, else the one of least p-value."""
    candidates = []
    for index in which:
        laid = first_field(latent.fields, keys[index], latent.scope)
        energy = np.square(latent.row[laid.positions].astype(np.int64)).sum()
        for score, number in best_patterns(latent.fields, keys[index], latent.scope, latent.row, _CANDIDATES):
            candidates.append(_Candidate(score / math.sqrt(max(energy, 1)), int(index), score, number))
    readings: list[Reading] = []
    for candidate in sorted(candidates, reverse=True)[:_CANDIDATES]:
        reading = _reading(latent, keys[candidate.index], candidate, needed=not readings)
        if reading is None:
            continue
        readings.append(reading)
        if reading.payload is not None and reading.mac_ok is not False:
            break
    return min(readings, key=_rank)


def _reading(latent: _Latent, key: WatermarkKey, candidate: _Candidate, *, needed: bool) -> Reading | None:
    """What one candidate says; None for a hopeless one, unless nothing else was said so far (`needed`)."""
    fields, layout, row, scope, tries = latent.fields, latent.layout, latent.row, latent.scope, latent.tries
    laid = first_field(fields, key, scope)
    positions = laid.positions
    counts, nonces = level_counts(row[positions]), math.log(fields.first_nonces)
    hopeless = nonces + log_chernoff(counts, candidate.score) > _HOPELESS
    if hopeless and not needed:
        return None
    log_first = nonces + log_tail(counts, candidate.score) - math.log1p(-_JOINT)
    nothing = Reading(
        *corrected(log_first, tries), key.key_id, key.name, None, None, bit_confidence=0.5, nonce=candidate.number
    )
    if hopeless:
        return nothing
    rest, binding, places = split(fields, positions)
    second = second_nonce(fields, key, candidate.number, scope, row[rest]) if fields.second_cosets else 0
    nonce = candidate.number + fields.first_nonces * second
    stream = key.stream("payload", fields.shape, nonce, len(places), scope=scope)
    code = _code(fields, layout)
    decoded, confidence = code.decode(row[places] * (1 - 2 * stream.astype(np.float32)))
    flips = np.empty(len(row), np.uint8)
    _lay(flips, fields, key, scope, nonce, code.encode(decoded), laid)
    evidence = row * (1 - 2 * flips.astype(np.int8))
    if bound := bool(decoded[0]):  # what these signs say depends on the picture
        evidence[binding] = 0
    log_joint = (math.log2(fields.nonces) + layout.total) * math.log(2)
    log_joint += log_chernoff(level_counts(evidence), int(evidence.sum(dtype=np.int64)))
    p_value, log10_p = corrected(min(log_first, log_joint - math.log(_JOINT)), tries)
    undecoded = replace(nothing, p_value=p_value, log10_p=log10_p, bit_confidence=confidence, nonce=nonce)
    if log_joint + math.log(tries) >= _DECODED:
        return undecoded
    body, payload, mac_ok, form = decoded[: layout.payload], None, None, None
    if key.mac_key is not None:
        seal, about = decoded[layout.payload :].tolist(), (fields, layout, key, scope, nonce, body.tolist())
        form = next((n for n in key.formats if layout_of(n) == fields.form and _mac(*about, n) == seal), None)
        mac_ok = form is not None
    # A weak mark is decoded to a neighbour of its codeword, which is just as far beyond chance.
    soft = row[places].astype(np.float64)
    fit = (2 * confidence - 1) * np.abs(soft).sum()
    if mac_ok or fit**2 > _CLEAR * code.steps * (soft @ soft):
        payload = _payload(body, layout)
    said = replace(undecoded, payload=payload, mac_ok=mac_ok, bound=bound if payload else None, format=form)
    return replace(said, evidence=evidence.reshape(fields.shape).astype(np.float32))
