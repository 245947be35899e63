"""What each way to read brings where a model has repainted the picture, and where its colours are gone.

All read the same pictures. Those named by one look have the whole error to themselves; the ladders share it as
detection does. Units as in statistics.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from ...methods.watermark.channels import as_read
from ...methods.watermark.config import DetectionConfig
from ...methods.watermark.detection import detect_in
from ...methods.watermark.issued import Issued, issued_in, read_issued
from ...methods.watermark.mark import Payload, read
from ...methods.watermark.reader import STEPS
from ...methods.watermark.statistics import levelled
from .canvas_rows import FALSE, SURE, share
from .marks import MARKS, OURS, SOFT, key_of, seeded
from .places import LADDER, SIZE, place_of

ATTACKS = ("regenerate:0.14", "regenerate:0.3", "grey")
PICTURES, QUICK_PICTURES, UNIT = 48, 4, 4
FIRST = 1_000  # picture: how far lists are read was chosen on the 48 from 0 on
DATABASE = 1_000  # marks that were issued, the picture's own among them
LOOK = 5  # inversion steps of the single looks
SINGLE, LISTS, READ, LADDERS, WITH_READER = (
    "one look",
    "one look, lists of codewords",
    "reader, lists of codewords",
    "ladder",
    "ladder with the reader",
)
INFORMED, INFORMED_READ, SHADED = "informed", "informed, reader", "gaussian shading, soft, message known"


def plan(quick: bool, name: str = "canvas") -> list[dict]:
    """All units."""
    count = QUICK_PICTURES if quick else PICTURES
    return [
        {"task": "repaint", "world": name, "start": FIRST + i, "count": min(UNIT, count - i)}
        for i in range(0, count, UNIT)
    ]


@lru_cache(maxsize=1)
def _others(shape: tuple[int, ...]) -> list[Issued]:
    """Marks that were issued to others."""
    chance, key = np.random.default_rng(0), key_of("canvas")
    drawn = chance.integers(0, 1 << 18, DATABASE - 1), chance.integers(0, 1 << 24, DATABASE - 1)
    return [Issued(key.key_id, int(nonce), Payload(int(ident)), shape) for nonce, ident in zip(*drawn, strict=True)]


def compute(unit: dict) -> dict:
    """log10 p of each way and attack."""
    start, count, place = unit["start"], unit["count"], place_of(unit["world"])
    key, reader, inverter = place.mark(OURS).key, place.aids.get("reader"), place.inverter
    weights = place.channels.get("channels")
    texts, noise, found = [one.prompt for one in place.asked(start, count)], place.noise(OURS, start, count), {}
    pixels = place.draw(texts, noise)
    issued = [*_others(place.shape), *issued_in(noise, key)]
    shading = MARKS[SOFT](key, place.bits)
    shaded = place.draw(texts, shading.sample((count, *place.shape), seeded("shaded", start)))
    for text in ATTACKS:
        worse = place.attacked(pixels, text, start)
        latents = inverter.encode(list(worse))
        looked, votes = as_read(inverter.invert(latents, LOOK), None, weights, LOOK), weights is not None
        said = {name: read(looked, [key], votes=votes, thorough=name == LISTS) for name in (SINGLE, LISTS)}
        said[INFORMED] = read_issued(looked, issued, [key], votes=votes)
        config = DetectionConfig(ladder=LADDER, size=SIZE, **place.channels)
        said[LADDERS] = detect_in(list(worse), inverter, [key], config)
        if reader is not None:
            with torch.no_grad():
                learned = reader([inverter.invert(latents, steps) for steps in STEPS])
            said[READ] = read(learned, [key], votes=True, thorough=True)
            said[INFORMED_READ] = read_issued(learned, issued, [key], votes=True)
            config = DetectionConfig(ladder=LADDER, size=SIZE, **place.aids)
            said[WITH_READER] = detect_in(list(worse), inverter, [key], config)
        found[text] = {name: [round(one.log10_p, 3) for one in many] for name, many in said.items()}
        other = inverter.invert(inverter.encode(list(place.attacked(shaded, text, start))), LOOK)
        p = [max(shading.p_value(row[None]), 1e-300) for row in levelled(other)]
        found[text][SHADED] = [round(float(np.log10(value)), 3) for value in p]
    return found


def rows(units: Sequence[dict], results: Sequence[dict]) -> list[dict]:
    """{"table": "repaint", "attack", "way", "n", "tpr": share at p < 1e-3, "detected": at p < 1e-6}."""
    made = []
    for text in ATTACKS:
        for name in (SINGLE, LISTS, READ, LADDERS, WITH_READER, INFORMED, INFORMED_READ, SHADED):
            log10_p = np.array([value for result in results for value in result[text].get(name, [])])
            if len(log10_p):
                row = {"table": "repaint", "attack": text, "way": name, "n": len(log10_p)}
                made.append(
                    row | {"tpr": share(log10_p < np.log10(FALSE)), "detected": share(log10_p < np.log10(SURE))}
                )
    return made
