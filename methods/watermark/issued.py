"""Informed detection: whoever signed knows which marks there are, and need not guess nonces and payloads.

A provider keeps of each picture what was signed: key id, nonce, payload. A latent's score against one of N issued marks
is one sum of magnitudes under signs that are uniform because the key is random, so

    p = N P(T >= score)

is exact up to the union bound, where an uninformed detector pays for 2^43 nonces and payloads in the smallest latents.
That is what Gaussian Shading (arXiv 2404.04956) needs a database for; here it only finds more.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from ..errors import WatermarkError
from .fields import fields_of, first_field, split
from .keys import FORMAT, WatermarkKey, layout_of
from .payload import Payload, body_of, capacity, code_of, image_shape, lay, seal
from .reading import Reading, read
from .statistics import corrected, level_counts, log_tail, quantise

__all__ = ["Issued", "issued_in", "load_issued", "read_issued", "save_issued"]

_BLOCK = 1 << 24  # elements of issued marks' signs in memory


@dataclass(frozen=True)
class Issued:
    """One picture's mark as it was signed. It is no secret of the key's, but says what was made.

    Args:
        key_id, nonce, payload, bound, form: as signed.
        shape: of one image's latent.
        scope: as at signing.
    """

    key_id: int
    nonce: int
    payload: Payload
    shape: tuple[int, ...]
    bound: bool = False
    form: int = FORMAT
    scope: str = ""


def issued_in(latents: Tensor, key: WatermarkKey, scope: str = "") -> list[Issued]:
    """What was signed in noise fresh from `KeyedMark.sample` or `sign_noise`, one entry an image.

    Raises:
        WatermarkError: noise that does not carry an authentic mark of the key.
    """
    found = []
    for number, reading in enumerate(read(latents, [key], scope=scope)):
        if not reading.mac_ok or reading.payload is None or reading.bound is None or reading.format is None:
            raise WatermarkError(
                f"noise number {number} carries no authentic mark of key {key.name!r}; give noise as it was signed,"
                " unpacked, and the full key"
            )
        said = reading.payload, image_shape(latents.shape), reading.bound, reading.format
        found.append(Issued(key.key_id, reading.nonce, *said, scope))
    return found


def save_issued(issued: Iterable[Issued], path: str | os.PathLike) -> None:
    """Add entries to a file, one JSON line each; it is made where there is none."""
    lines = "".join(json.dumps(asdict(one)) + "\n" for one in issued)
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(lines)


def load_issued(path: str | os.PathLike) -> list[Issued]:
    """Read such a file.

    Raises:
        WatermarkError: not a plain file, or a line that is none of ours, named by its number.
    """
    path, found = Path(path), []
    if not path.is_file():
        raise WatermarkError(f"the list of issued marks {path} is no file; `generate --issued FILE` writes one")
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
            payload, shape = Payload(**record.pop("payload")), tuple(map(int, record.pop("shape")))
            found.append(Issued(payload=payload, shape=shape, **record))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise WatermarkError(f"line {number} of {path} is no issued mark; expected lines as written here") from None
    return found


def signs_of(one: Issued, key: WatermarkKey) -> np.ndarray:
    """(n,) int8 signs that the mark lays, 0 where they depend on what the picture shows.

    Raises:
        WatermarkError: a detector's copy of the key, which cannot make the seal.
    """
    fields, layout = fields_of(one.shape, layout_of(one.form)), capacity(one.shape)
    body = body_of(one.payload, key, layout, one.bound)
    bits = body + seal(fields, layout, key, one.scope, one.nonce, body, one.form)
    flips, first = np.empty(len(fields.public), np.uint8), first_field(fields, key, one.scope)
    lay(flips, fields, key, one.scope, one.nonce, code_of(fields, layout).encode(np.array(bits)), first)
    signs = 1 - 2 * flips.astype(np.int8)
    if one.bound:
        signs[split(fields, first.positions)[1]] = 0
    return signs


def read_issued(
    latents: Tensor,
    issued: Sequence[Issued],
    keys: Iterable[WatermarkKey],
    *,
    scope: str = "",
    votes: bool = False,
) -> list[Reading | None]:
    """Of each latent the issued mark that it fits best; None where none was issued for its shape, scope and keys.

    Args:
        latents, scope, votes: as for `read`.
        issued: what was signed; entries of other shapes, scopes and keys count no tries.
        keys: full ones; a detector's copies are passed over.

    Returns:
        Readings whose p-value counts the entries that were compared.
    """
    shape = image_shape(latents.shape)
    by_id = {key.key_id: key for key in keys if key.mac_key is not None}
    fitting = [one for one in issued if one.shape == shape and one.scope == scope and one.key_id in by_id]
    values = quantise(latents, votes=votes)
    if not fitting:
        return [None] * len(values)
    rows, wide = values.astype(np.float32), np.square(values.astype(np.float32))
    best: list[tuple[float, int, np.ndarray] | None] = [None] * len(rows)
    step = max(1, _BLOCK // rows.shape[1])
    for start in range(0, len(fitting), step):
        signs = np.stack([signs_of(one, by_id[one.key_id]) for one in fitting[start : start + step]])
        laid = signs.astype(np.float32)
        deviations = rows @ laid.T / np.sqrt(np.maximum(wide @ np.abs(laid).T, 1))
        for i, row in enumerate(deviations):
            top = int(row.argmax())
            if best[i] is None or row[top] > best[i][0]:
                best[i] = float(row[top]), start + top, signs[top]
    return [
        _reading(row, fitting[number], by_id[fitting[number].key_id], signs, len(fitting))
        for row, (_, number, signs) in zip(values, best, strict=True)
    ]


def _reading(row: np.ndarray, one: Issued, key: WatermarkKey, signs: np.ndarray, tries: int) -> Reading:
    evidence = row * signs
    score, weight = int(evidence.sum(dtype=np.int64)), float(np.abs(evidence.astype(np.int64)).sum())
    p_value, log10_p = corrected(log_tail(level_counts(evidence), score) + math.log(tries), 1)
    return Reading(
        p_value,
        log10_p,
        key.key_id,
        key.name,
        one.payload,
        mac_ok=True,
        bit_confidence=0.5 + 0.5 * score / weight if weight else 0.5,
        nonce=one.nonce,
        bound=one.bound,
        format=one.form,
        evidence=evidence.reshape(one.shape).astype(np.float32),
    )
