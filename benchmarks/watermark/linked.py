"""Who can link pictures of one key: pairs of latents whose signs agree, and what hiding them costs; units as in
statistics.py."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence

import torch

from ...canvas.editions import world_of
from ...methods.watermark.fields import fields_of
from ...methods.watermark.keys import FORMAT
from ...methods.watermark.mark import KeyedMark, read
from .classifiers import hits
from .marks import key_of, seeded

SHAPES = ((4, 16, 16), (4, 32, 32), (4, 64, 64))
NEAREST = 4096  # elements up to which a nearest neighbour among known latents is asked: more take minutes
FORMS = (2, FORMAT)  # the baseline is what older releases signed
LATENTS, QUICK_LATENTS = 2_000, 200
KNOWN, QUICK_KNOWN = 5_000, 500  # latents of the key that a stranger knows; as many others are asked, and plain ones
STANDS_OUT = 6.0  # standard deviations: chance reaches 5.2 in as many pairs, and 6 once in 250 times
ROUNDS = 20


def plan(quick: bool, name: str = "canvas") -> list[dict]:
    """All units: of usual shapes, or of the latents of another embedded model."""
    shapes = SHAPES if name == "canvas" else (world_of(name).latent_shape,)
    about = {"task": "linked", "count": QUICK_LATENTS if quick else LATENTS}
    about["known"] = QUICK_KNOWN if quick else KNOWN
    return [about | {"shape": list(shape), "form": form} for shape in shapes for form in FORMS]


def compute(unit: dict) -> dict:
    """The largest agreement of any pair, either way round, and how many stand out; what reading one latent costs."""
    shape, form = tuple(unit["shape"]), unit["form"]
    key = key_of("linked", since=form)
    latents = KeyedMark(key, form=form).sample((unit["count"], *shape), generator=seeded("linked", shape))
    signs = latents.flatten(1).sign()
    largest, above = 0.0, 0
    for start in range(0, len(signs), 500):
        agreement = (signs[start : start + 500] @ signs.T).abs() / math.sqrt(signs.shape[1])
        agreement[torch.arange(len(agreement)), torch.arange(len(agreement)) + start] = 0
        largest, above = max(largest, float(agreement.max())), above + int((agreement > STANDS_OUT).sum())
    plain = torch.randn(ROUNDS + 1, 1, *shape, generator=seeded("plain"))
    taken = []
    for row in plain:
        before = time.process_time()
        read(row, [key])
        taken.append(time.process_time() - before)
    found = {"largest": round(largest, 2), "pairs": above // 2, "ms": round(statistics.median(taken[1:]) * 1e3, 1)}
    if math.prod(shape) <= NEAREST:
        known = unit["known"]
        marked = KeyedMark(key, form=form).sample((2 * known, *shape), generator=seeded("nearest", shape))
        plain = torch.randn(2 * known, *shape, generator=seeded("nearest plain"))
        right, asked = hits("nearest", marked, plain, known)
        found |= {"known": known, "nearest": round(right / asked, 4), "asked": asked}
    return found


def rows(units: Sequence[dict], results: Sequence[dict]) -> list[dict]:
    """Rows of the finished units.

    Returns:
        {"table": "linked", "shape", "format", "n", "nonce_bits": of the first field, "largest": agreement of any two
        latents in standard deviations, "pairs": that stand out by 6 or more, "decades": of the first field's p-value
        that its nonces cost, "ms": of one core, to read one latent without a mark under one key}; of small latents
        "known", "nearest", "asked": how often the largest agreement with a known one tells whose another is.
    """
    found = []
    for unit, result in zip(units, results, strict=True):
        bits = math.log2(fields_of(tuple(unit["shape"]), unit["form"]).first_nonces)
        row = {"table": "linked", "shape": unit["shape"], "format": unit["form"], "n": unit["count"]}
        found.append(row | {"nonce_bits": round(bits), "decades": round(bits * math.log10(2), 2)} | result)
    return found
