"""What the watermark's statistics are worth on latents alone, without a model: p-values, secrecy, and robustness.

    null        p-values of latents without this key's mark: uniform, and never too small
    classifier  does anything learned from the noise of one key's pictures tell it from plain noise
    channel     what z' = rho z + sqrt(1 - rho^2) n leaves: detection, exact payloads, share of right bits

All work is cut into units: dictionaries of plain values that say everything about a piece of work. A unit's result
depends on nothing else, so that units run in any process and order, and results on disk are as good as new ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from ...methods.watermark.fields import fields_of, first_field
from ...methods.watermark.mark import capacity
from ...methods.watermark.statistics import LARGEST, level_counts, quantise
from ..erasure.scores import wilson
from .classifiers import CLASSIFIERS, hits
from .marks import BASELINES, CARRIERS, CONTROLS, MARKS, OURS, RELEASED, key_of, seeded

SMALL, MEDIUM, FULL, DEEP = (4, 16, 16), (4, 32, 32), (4, 64, 64), (16, 64, 64)
ALPHAS = (1e-1, 1e-2, 1e-3, 1e-4)
DETECTED = 1e-6  # false positive rate at which the channel's latents count as detected
EACH, ONE, ODD = "normal, a key each", "normal, one key", "one odd latent, a key each"
# what latents, shape, how many in the full and in the quick form, how many are a unit
NULLS = (
    (EACH, SMALL, 100_000, 2000, 1000),
    (ONE, SMALL, 20_000, 500, 1000),
    (ODD, SMALL, 20_000, 500, 1000),
    (EACH, MEDIUM, 100_000, 400, 500),
    (EACH, FULL, 100_000, 100, 250),
)
BASELINE_NULLS = 10_000, 100, 250
RHOS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 0.9)
QUICK_RHOS = (0.2, 0.3, 0.5, 0.7)
# shape, bits (None: those that the keyed mark has there); the other marks carry as many
SIZES = ((SMALL, None), (MEDIUM, None), (FULL, 128), (FULL, None), (FULL, 256), (DEEP, None))
QUICK_SIZES = SIZES[:3]
TRIALS, BASELINE_TRIALS, QUICK_TRIALS, CHANNEL_UNIT = 400, 50, 4, 50
CLASSIFIED = {"train": 5_000, "test": 5_000}  # of each kind
QUICK_CLASSIFIED = {"train": 500, "test": 400}
TASKS = ("null", "classifier", "channel")


def plan(quick: bool) -> list[dict]:
    """All units of the three tables."""
    units = []
    nulls = [(OURS, *null) for null in NULLS]
    nulls += [(name, EACH, MEDIUM, *BASELINE_NULLS) for name in BASELINES]
    nulls.append((RELEASED, EACH, FULL, *BASELINE_NULLS))  # the size that its radius is for
    for mark, latents, shape, full, few, size in nulls:
        about = {"task": "null", "mark": mark, "latents": latents, "shape": list(shape)}
        units += _cut(about, few if quick else full, size)
    # Nonces of 14 bits, as small latents have them, repeat in 10,000 latents; longer ones do not.
    for mark, shape in ((OURS, SMALL), (OURS, MEDIUM), *((name, SMALL) for name in CONTROLS)):
        for classifier in CLASSIFIERS:
            about = {"task": "classifier", "mark": mark, "classifier": classifier, "shape": list(shape)}
            units.append(about | (QUICK_CLASSIFIED if quick else CLASSIFIED))
    for shape, bits in QUICK_SIZES if quick else SIZES:
        for mark in (OURS, *CARRIERS):
            for rho in QUICK_RHOS if quick else RHOS:
                about = {"task": "channel", "mark": mark, "shape": list(shape), "rho": rho}
                about["bits"] = bits or capacity(shape).total
                trials = QUICK_TRIALS if quick else TRIALS if mark == OURS else BASELINE_TRIALS
                trials = min(trials, 100 if mark == OURS else 20) if shape == DEEP else trials  # these take long
                units += _cut(about, trials, CHANNEL_UNIT)
    return units


def _cut(about: dict, count: int, size: int) -> list[dict]:
    return [about | {"start": start, "count": min(size, count - start)} for start in range(0, count, size)]


def compute(unit: dict) -> dict:
    """The result of one unit, of plain values."""
    return {"null": _null, "classifier": _classifier, "channel": _channel}[unit["task"]](unit)


# p-values without a mark


def null_latents(kind: str, shape: Sequence[int], start: int, count: int) -> Tensor:
    """(count, *shape) latents that carry no mark: standard normal, or all the same one that no normal model fits."""
    if kind == ODD:
        return torch.linspace(-1, 3, math.prod(shape)).pow(5).reshape(1, *shape).expand(count, *shape)
    return torch.randn(count, *shape, generator=seeded("null latents", kind, tuple(shape), start))


def _null(unit: dict) -> dict:
    kind, shape, start, mark = unit["latents"], tuple(unit["shape"]), unit["start"], unit["mark"]
    latents = null_latents(kind, shape, start, unit["count"])
    keys = [key_of("null", 0 if kind == ONE else start + i) for i in range(len(latents))]
    found = {"p": _short(MARKS[mark](key).p_value(row[None]) for row, key in zip(latents, keys, strict=True))}
    if mark == OURS:
        found["single"] = _short(_single(latents, keys, seeded("ties", kind, shape, start)))
    return found


def _single(latents: Tensor, keys: Sequence, generator: torch.Generator) -> Iterator[float]:
    """P-values of one nonce that was fixed beforehand: without correction, and exactly uniform once ties are broken.

    p = P(T > t) + u P(T = t) with u uniform: the score T lives on a lattice, the p-values in use count all of a tie.
    """
    shape = tuple(latents.shape[1:])
    fields, ties = fields_of(shape), torch.rand(len(latents), generator=generator, dtype=torch.float64)
    number = 2 * fields.length // fields.blocks + 7  # any one: stream 1, Walsh function 3, negative
    for row, key, tie in zip(quantise(latents), keys, ties.tolist(), strict=True):
        first = first_field(fields, key, "")
        field = row[first.positions].astype(np.int64)
        score = int(field @ (1 - 2 * first.bits(number).astype(np.int64)))
        mass = score_law(field)
        middle = len(mass) // 2
        yield float(mass[middle + score + 1 :].sum() + tie * mass[middle + score])


def score_law(values: np.ndarray) -> np.ndarray:
    """(size,) probabilities of T = sum_i v_i s_i under random signs, T = 0 in the middle.

    From its characteristic function prod_i cos(v_i x), which is real: another way than `log_tail` goes. The ends
    leave out what is beyond 10 standard deviations.
    """
    counts = level_counts(values)
    deviation = math.sqrt(counts @ np.arange(LARGEST + 1) ** 2)
    logs, negative = _cosines(1 << max(8, math.ceil(math.log2(20 * deviation + 1))))
    signs = 1 - 2 * ((counts % 2) @ negative % 2)
    return np.fft.fftshift(np.fft.irfft(signs * np.exp(counts @ logs)))


@lru_cache(maxsize=8)
def _cosines(size: int) -> tuple[np.ndarray, np.ndarray]:
    """(levels, size / 2 + 1) log |cos(v x)| and whether cos(v x) is negative, at x = 2 pi k / size."""
    cosines = np.cos(2 * np.pi / size * np.outer(np.arange(LARGEST + 1), np.arange(size // 2 + 1)))
    return np.log(np.abs(cosines) + 1e-300), (cosines < 0).astype(np.int64)


def _short(values) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


# Classifiers and the Gaussian channel


def _classifier(unit: dict) -> dict:
    shape, kinds = tuple(unit["shape"]), unit["train"] + unit["test"]
    marked = MARKS[unit["mark"]](key_of("classifier")).sample((kinds, *shape), seeded("marked", unit["mark"]))
    plain = torch.randn(kinds, *shape, generator=seeded("plain"))
    right, asked = hits(unit["classifier"], marked, plain, unit["train"])
    return {"right": right, "asked": asked}


def through(latents: Tensor, rho: float, generator: torch.Generator) -> Tensor:
    """z' = rho z + sqrt(1 - rho^2) n."""
    return rho * latents + math.sqrt(1 - rho**2) * torch.randn(latents.shape, generator=generator)


def _channel(unit: dict) -> dict:
    shape, total = tuple(unit["shape"]), {"trials": unit["count"], "exact": 0, "detected": 0, "right": 0.0}
    for i in range(unit["start"], unit["start"] + unit["count"]):
        mark, generator = MARKS[unit["mark"]](key_of("channel", i), unit["bits"]), seeded("channel", shape, i)
        found = mark.find(through(mark.sample((1, *shape), generator), unit["rho"], generator))
        total["exact"] += bool(found.exact)
        total["detected"] += found.p_value < DETECTED
        known = total["right"] is not None and found.right is not None
        total["right"] = total["right"] + found.right if known else None
    return total


# From units to rows


def rows(units: Sequence[dict], results: Sequence[dict]) -> list[dict]:
    """One row for each group of units that differ only in which latents they took.

    Returns:
        {"table": "null", "mark", "latents", "shape", "n", "rates": [{"alpha", "count", "interval": binomial 99 % of
        a uniform p-value}], "ks_single", "ks_tail", "ks_small": [statistic, p-value]}: of one nonce fixed beforehand
        against the uniform law; of the p-values below .01 against it, scaled; and one-sided, of all: is any share of
        them too small. {"table": "classifier", "mark", "classifier", "shape", "n", "accuracy", "interval": binomial
        99 % of a coin}. {"table": "channel", "mark", "shape", "bits", "rho", "n", "exact", "detected": [value, low,
        high] with 95 % intervals, "right": share of right bits or None}.
    """
    groups: dict[tuple, list[dict]] = {}
    for unit, result in zip(units, results, strict=True):
        about = {name: value for name, value in unit.items() if name not in ("start", "count")}
        groups.setdefault(tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in about.items()), []).append(
            result
        )
    made = {"null": null_row, "classifier": _classifier_row, "channel": _channel_row}
    return [made[dict(group)["task"]](dict(group), found) for group, found in groups.items()]


def null_row(about: dict, found: Sequence[dict], name: str = "p") -> dict:
    """The row of p-values `found[i][name]`; "single" beside them where there are some."""
    p = np.concatenate([part[name] for part in found])
    rates = []
    for alpha in ALPHAS:
        interval = [int(value) for value in stats.binom.interval(0.99, len(p), alpha)]
        rates.append({"alpha": alpha, "count": int((p < alpha).sum()), "interval": interval})
    row = {"table": "null", "mark": about["mark"], "latents": about["latents"], "shape": list(about["shape"])}
    row |= {"n": len(p), "rates": rates, "ks_small": _ks(p, alternative="greater")}
    tail = p[p < 0.01]
    row["ks_tail"] = _ks(tail / 0.01) if len(tail) >= 10 else None
    single = np.concatenate([part.get("single", []) for part in found])
    row["ks_single"] = _ks(single) if len(single) else None
    return row


def _ks(values: np.ndarray, alternative: str = "two-sided") -> list[float]:
    test = stats.kstest(values, "uniform", alternative=alternative)
    return [round(float(test.statistic), 5), round(float(test.pvalue), 4)]


def _classifier_row(about: dict, found: list[dict]) -> dict:
    right, n = (sum(part[name] for part in found) for name in ("right", "asked"))
    interval = [round(float(value) / n, 4) for value in stats.binom.interval(0.99, n, 0.5)]
    row = {"table": "classifier", "mark": about["mark"], "classifier": about["classifier"]}
    return row | {"shape": list(about["shape"]), "n": n, "accuracy": round(right / n, 4), "interval": interval}


def _channel_row(about: dict, found: list[dict]) -> dict:
    n = sum(part["trials"] for part in found)
    row = {"table": "channel", **{name: about[name] for name in ("mark", "shape", "bits", "rho")}, "n": n}
    row["shape"] = list(row["shape"])
    for name in ("exact", "detected"):
        value = sum(part[name] for part in found) / n
        row[name] = [round(figure, 4) for figure in (value, *wilson(value, n))]
    right = [part["right"] for part in found]
    return row | {"right": None if None in right else round(sum(right) / n, 4)}
