"""Reading a keyed mark: from latents to p-values and payloads."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ..errors import WatermarkError
from .fields import Fields, best_patterns, fields_of, first_field, screen, second_nonce, split
from .keys import FORMAT, WatermarkKey, layout_of
from .payload import Layout, Payload, capacity, code_of, first_sealed, image_shape, lay, payload_of
from .statistics import corrected, level_counts, log_chernoff, log_tail, quantise

__all__ = ["Reading", "read"]

_SCREENED = 1 << 20  # elements of first fields, of all keys in one call: some 20 MB
_CANDIDATES = 4  # nonces of all keys that are decoded: a union bound covers any choice
_KEYS_READ = 16  # keys whose nonces are looked at where a first field has blocks, which tells keys apart less well
_JOINT = 1e-3  # share of the error that the joint statistic may spend: so steep that little is enough;
_SEALED = 0.1  # and the one of sealed codewords, which is as steep, but decides where marks are weakest
_HOPELESS = math.log(5)  # first fields whose Chernoff bound is above it are not read on (their p is about .5 or more)
# Where a picture is looked at thoroughly: so many nonces, however hopeless up to here, and this many codewords of each
# until a seal is right. At half the latent's signal gone the right nonce is among the first ten, and the right codeword
# among the first hundred, about as often as not; twice as many of both take twice as long and find a little more. Small
# latents, which hold least and are read fastest, are worth four times as many: 2 of 48 more repainted pictures, .05 s.
_THOROUGH, _HOPELESS_THEN, _LISTED = 12, math.log(200), 128
_DEEPER = 4
_DECODED = math.log(1e-6)  # a payload is reported where chance gives one this good less often,
# and, unless its MAC verifies, above this signal-to-noise power ratio for each bit of the code; chosen by hand
_CLEAR = 2.3


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


def read(
    latents: Tensor, keys: Iterable[WatermarkKey], *, scope: str = "", votes: bool = False, thorough: bool = False
) -> list[Reading]:
    """Reads each latent under the best of the keys.

    Three statistics share the error of each key, all of them sums of the latent's rounded magnitudes under signs that
    are uniform because the key is random. First field: exact tail of the likeliest nonce's score times the number of
    nonces. Joint: Chernoff's bound of the whole latent's score against the decoded nonce and codeword, times the
    number of nonces and codewords. Sealed: the same against a codeword whose seal is right, of which there are as many
    as payloads, times their number; of the likeliest codewords the first such one is taken. All are union bounds, so
    the p-value is never too small, whatever the latent; the keys searched enter by Sidak's correction, those that may
    have signed in an older format twice.

    Args:
        latents: (B, ...) in the shape they were signed in, any float dtype; neither centre nor scale matter much.
        keys: searched in blocks; 10^4 of them take a core about 7 seconds for the smallest latents, and 30 from 16,384
            elements on.
        scope: as given at signing.
        votes: the latents are a reader's votes (reader.py).
        thorough: look further down the lists of nonces and codewords: a fifth of a second for each latent.

    Raises:
        WatermarkError: no keys, a shape that carries no mark, NaN or Inf.
    """
    keys = list(keys)
    if not keys:
        raise WatermarkError("no keys were given to read with; load a keyring that holds at least one")
    image = image_shape(latents.shape)
    values, layout = quantise(latents, votes=votes), capacity(image)
    by_form = {form: [key for key in keys if form in key.layouts] for form in (FORMAT, 2)}
    tries, readings = sum(map(len, by_form.values())), []
    for form, some in by_form.items():
        if some:
            fields = fields_of(image, form)
            chosen = _likely_keys(fields, some, scope, torch.from_numpy(values).to(latents.device))
            given = [_Latent(fields, layout, row, scope, tries, thorough) for row in values]
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
    thorough: bool = False

    @property
    def depth(self) -> int:
        """How many times as far as the lists' usual ends it is read."""
        return 1 if self.fields.second_cosets or self.fields.blocks > 1 else _DEEPER


def _best_reading(latent: _Latent, keys: list[WatermarkKey], which: np.ndarray) -> Reading:
    """The best nonces of these keys: the one with a verified payload, else the one of least p-value."""
    candidates, count = [], _THOROUGH * latent.depth if latent.thorough else _CANDIDATES
    for index in which:
        laid = first_field(latent.fields, keys[index], latent.scope)
        energy = np.square(latent.row[laid.positions].astype(np.int64)).sum()
        for score, number in best_patterns(latent.fields, keys[index], latent.scope, latent.row, count):
            candidates.append(_Candidate(score / math.sqrt(max(energy, 1)), int(index), score, number))
    readings: list[Reading] = []
    for candidate in sorted(candidates, reverse=True)[:count]:
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
    hopeless = nonces + log_chernoff(counts, candidate.score) > (_HOPELESS_THEN if latent.thorough else _HOPELESS)
    if hopeless and not needed:
        return None
    log_first = nonces + log_tail(counts, candidate.score) - math.log1p(-_JOINT - _SEALED)
    nothing = Reading(
        *corrected(log_first, tries), key.key_id, key.name, None, None, bit_confidence=0.5, nonce=candidate.number
    )
    if hopeless:
        return nothing
    rest, binding, places = split(fields, positions)
    second = second_nonce(fields, key, candidate.number, scope, row[rest]) if fields.second_cosets else 0
    nonce = candidate.number + fields.first_nonces * second
    stream = key.stream("payload", fields.shape, nonce, len(places), scope=scope)
    code = code_of(fields, layout)
    values = row[places] * (1 - 2 * stream.astype(np.float32))
    forms = [form for form in key.formats if layout_of(form) == fields.form] if key.mac_key is not None else []
    words, confidence = code.likeliest(values, _LISTED * latent.depth if forms and latent.thorough else 1)
    number, form = first_sealed(words, fields, layout, key, scope, nonce, forms) or (0, None)
    decoded = words[number]
    flips = np.empty(len(row), np.uint8)
    lay(flips, fields, key, scope, nonce, code.encode(decoded), laid)
    evidence = row * (1 - 2 * flips.astype(np.int8))
    if bound := bool(decoded[0]):  # what these signs say depends on the picture
        evidence[binding] = 0
    log_one = math.log(fields.nonces) + log_chernoff(level_counts(evidence), int(evidence.sum(dtype=np.int64)))
    log_joint, log_sealed = log_one + layout.total * math.log(2), math.inf
    if form is not None:
        log_sealed = log_one + layout.payload * math.log(2) + math.log(len(forms))
    log_p = min(log_first, log_joint - math.log(_JOINT), log_sealed - math.log(_SEALED))
    p_value, log10_p = corrected(log_p, tries)
    undecoded = replace(nothing, p_value=p_value, log10_p=log10_p, bit_confidence=confidence, nonce=nonce)
    if min(log_joint, log_sealed) + math.log(tries) >= _DECODED:
        return undecoded
    payload, mac_ok = None, None if key.mac_key is None else form is not None
    # A weak mark is decoded to a neighbour of its codeword, which is just as far beyond chance.
    soft = row[places].astype(np.float64)
    fit = (2 * confidence - 1) * np.abs(soft).sum()
    if mac_ok or fit**2 > _CLEAR * code.steps * (soft @ soft):
        payload = payload_of(decoded[: layout.payload], layout)
    said = replace(undecoded, payload=payload, mac_ok=mac_ok, bound=bound if payload else None, format=form)
    return replace(said, evidence=evidence.reshape(fields.shape).astype(np.float32))
