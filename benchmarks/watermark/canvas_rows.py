"""The rows of canvas.py: detection under attack, agreement, picture quality, forgery."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..erasure.scores import wilson
from .canvas import CLEAN, OURS, PLAIN, RUNGS, SEARCHING
from .places import place_of
from .statistics import null_row

FALSE = 1e-3  # false positive rate of the attack table
SURE = 1e-6  # and of what counts as detected without attack
_SWAPS = 300


def rows(units: Sequence[dict], results: Sequence[dict]) -> list[dict]:
    """Rows of the finished units; shares are [value, low, high] with 95 % intervals.

    Returns:
        {"table": "attack", "mark", "attack", "n", "tpr": at p < 1e-3, "detected": at p < 1e-6, "exact", "evaluations":
        mean, of the denoiser for each picture}, and with "attack": "mean" the mean over all attacks but averaging;
        {"table": "guidance", "guidance", "n", "agreement": {steps: share of right signs}, "detected", "exact",
        "evaluations"}; {"table": "quality", "mark", "n", "object", "style", "background": as the judge sees them,
        "distance": Frechet's between the judge's features with and without the mark, "interval": 95 % of it if the
        mark changes nothing, "p_value"}; {"table": "decoder", "latents", "n", "agreement", "detected", "exact"};
        {"table": "forgery", "attack", "n", "authentic": the mark was found and its MAC is right, "shown": the judge
        sees the object that is asked for, the forger's in a forgery, "forged": both, "caught": of these, content
        differs, "valid": of all, "unbound": pictures whose content could not be bound, "draws": of each at signing};
        "null" rows as of statistics.py.
    """
    found = []
    pictures = _grouped(units, results, "pictures", ("mark", "guidance"))
    averages = _grouped(units, results, "average", ("mark",))
    default = next((guidance for mark, guidance in pictures if mark == PLAIN), None)
    for (mark, guidance), parts in pictures.items():
        if guidance == default and mark != PLAIN:
            found += _attack_rows(parts, averages.get((mark,), []))
        if mark == OURS:
            found.append(_guidance_row(guidance, parts))
    plain = pictures.get((PLAIN, default), [])
    for (mark, guidance), parts in pictures.items():
        if guidance == default and mark != SEARCHING:
            found.append(_quality_row(mark, parts, plain))
    for parts in _grouped(units, results, "decoder", ()).values():
        found += [_decoder_row(name, [part[name] for part in parts]) for name in ("encoder", "decoder")]
    for parts in _grouped(units, results, "forgery", ()).values():
        found += _forgery_rows(parts)
    if plain:
        about = {"mark": OURS, "latents": f"{units[0]['world']} pictures, a key each"}
        about["shape"] = place_of(units[0]["world"]).shape
        found.append(null_row(about, plain, "null"))
    return found


def _grouped(units, results, task: str, names: tuple[str, ...]) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for unit, result in zip(units, results, strict=True):
        if unit["task"] == task:
            groups.setdefault(tuple(unit[name] for name in names), []).append(result)
    return groups


def share(hits: Sequence[bool]) -> list[float]:
    """[value, low, high] of the share that is true."""
    value = float(np.mean(hits))
    return [round(figure, 4) for figure in (value, *wilson(value, len(hits)))]


def _joined(parts: Sequence[dict], name: str) -> list:
    return [value for part in parts for value in part[name]]


def _shares(parts: Sequence[dict]) -> dict:
    p, exact = np.array(_joined(parts, "p")), _joined(parts, "exact")
    return {"detected": share(p < SURE), "exact": None if None in exact else share(exact)}


def _attack_rows(parts: Sequence[dict], averages: Sequence[dict]) -> list[dict]:
    made: dict[str, list[dict]] = {}
    for texts, group in ((list(parts[0]["found"]), parts), (list(averages[0]["found"]) if averages else [], averages)):
        for text in texts:
            for mark in group[0]["found"][text]:
                looked = [part["found"][text][mark] for part in group if text in part["found"]]
                p = np.array(_joined(looked, "p"))
                row = {"table": "attack", "mark": mark, "attack": text, "n": len(p), "tpr": share(p < FALSE)}
                row |= _shares(looked)
                row["evaluations"] = round(float(np.mean(_joined(looked, "evaluations"))), 2)
                made.setdefault(mark, []).append(row)
    for mark, own in made.items():
        real = [row for row in own if row["attack"] != CLEAN and not row["attack"].startswith("average")]
        if real:  # pictures are the same under all attacks: their number is that of one
            n = real[0]["n"]
            mean = {"table": "attack", "mark": mark, "attack": "mean", "n": n, "attacks": len(real)}
            for name in ("tpr", "detected", "exact"):
                known = [row[name][0] for row in real if row[name] is not None]
                value = float(np.mean(known)) if known else None
                mean[name] = None if value is None else [round(v, 4) for v in (value, *wilson(value, n))]
            own.append(mean | {"evaluations": round(float(np.mean([row["evaluations"] for row in real])), 2)})
    return [row for own in made.values() for row in own]


def _guidance_row(guidance: float, parts: Sequence[dict]) -> dict:
    looked = [part["found"][CLEAN][OURS] for part in parts]
    agreement = {str(steps): _mean([v for part in parts for v in part["agreement"][str(steps)]]) for steps in RUNGS}
    row = {"table": "guidance", "guidance": guidance, "n": len(_joined(looked, "p")), "agreement": agreement}
    return row | _shares(looked) | {"evaluations": _mean(_joined(looked, "evaluations"))}


def _decoder_row(name: str, parts: Sequence[dict]) -> dict:
    agreement = _joined(parts, "agreement")
    return {"table": "decoder", "latents": name, "n": len(agreement), "agreement": _mean(agreement)} | _shares(parts)


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4)


def _quality_row(mark: str, parts: Sequence[dict], plain: Sequence[dict]) -> dict:
    features = np.array(_joined(parts, "features"))
    row = {"table": "quality", "mark": mark, "n": len(features)}
    for name in parts[0]["right"]:
        hits = sum(part["right"][name] for part in parts)
        row[name] = share([True] * hits + [False] * (len(features) - hits))
    if mark == PLAIN or not plain:
        return row | {"distance": None, "interval": None, "p_value": None}
    return row | compared(features, np.array(_joined(plain, "features"))[: len(features)])  # the same prompts


def compared(features: np.ndarray, others: np.ndarray, distance: Callable | None = None) -> dict:
    """How far two sets of (n, D) features of the same prompts are apart, and how far chance alone puts them.

    Each prompt's two pictures trade places or do not, by a coin: under such swaps the distance of two sets that differ
    in nothing else has the law of the real one.
    """
    distance = distance or frechet
    coins = np.random.default_rng(0)
    measured, swapped = distance(features, others), []
    for _ in range(_SWAPS):
        stay = coins.random(len(features))[:, None] < 0.5
        swapped.append(distance(np.where(stay, features, others), np.where(stay, others, features)))
    low, high = np.quantile(swapped, (0.025, 0.975))
    p_value = (1 + sum(value >= measured for value in swapped)) / (1 + _SWAPS)
    return {
        "distance": round(measured, 4),
        "interval": [round(float(low), 4), round(float(high), 4)],
        "p_value": round(p_value, 4),
    }


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of (n, D) features."""
    first, second = (x - x.mean(0) for x in (a, b))
    # The singular values of one centred set against the other are the roots of the eigenvalues of S_a S_b.
    cross = np.linalg.svd(first @ second.T, compute_uv=False).sum() / ((len(a) - 1) * (len(b) - 1)) ** 0.5
    spread = sum(np.square(x).sum() / (len(x) - 1) for x in (first, second))
    return float(np.square(a.mean(0) - b.mean(0)).sum() + spread - 2 * cross)


def _forgery_rows(parts: Sequence[dict]) -> list[dict]:
    made = []
    for text in next((part["verdicts"] for part in parts if part["verdicts"]), {}):
        verdicts = [v for part in parts for v in part["verdicts"].get(text, [])]
        shown = [s for part in parts for s in part["shown"].get(text, [])]
        authentic = [v in ("valid", "content differs") for v in verdicts]
        forged = [v for v, real, seen in zip(verdicts, authentic, shown, strict=True) if real and seen]
        row = {"table": "forgery", "attack": text, "n": len(verdicts), "authentic": share(authentic)}
        row["forged"] = share([real and seen for real, seen in zip(authentic, shown, strict=True)])
        row["caught"] = share([v == "content differs" for v in forged]) if forged else None
        row |= {"valid": share([v == "valid" for v in verdicts]), "shown": share(shown)}
        row |= {"unbound": sum(part["unbound"] for part in parts), "draws": _mean(_joined(parts, "draws"))}
        made.append(row)
    return made
