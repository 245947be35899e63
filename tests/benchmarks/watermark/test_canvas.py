"""The watermark's benchmark on the canvas: a few real pictures, and the rows that many would give."""

import json

import numpy as np
import pytest
import torch
from scipy import linalg
from semiperm.benchmarks.watermark import canvas as canvas
from semiperm.benchmarks.watermark import canvas_rows as canvas_rows
from semiperm.benchmarks.watermark import places
from semiperm.benchmarks.watermark import run as bench
from semiperm.benchmarks.watermark.marks import OURS, SHADING, SOFT
from semiperm.canvas.render import Scene, render


def pictures(mark, start=0, count=2, guidance=4.0, attacks=("none",)):
    about = dict(task="pictures", world="canvas", mark=mark, guidance=guidance, attacks=list(attacks))
    return about | dict(start=start, count=count)


def looked(p, exact=True, evaluations=6):
    return {"p": p, "exact": [exact] * len(p), "evaluations": [evaluations] * len(p)}


def drawn(found, features, right=2, **more):
    seen = {"object": right, "style": right, "background": right}
    return {"right": seen, "features": features, "found": found, **more}


def test_two_pictures_are_drawn_attacked_and_found():
    unit = pictures(OURS, attacks=("none", "brightness:0.9"))
    result = bench.compute(unit)
    assert set(result["found"]) == {"none", "brightness:0.9"}
    for text in result["found"]:
        ours, fixed = result["found"][text][OURS], result["found"][text][places.FIXED]
        assert all(p < 1e-6 for p in (*ours["p"], *fixed["p"])) and all(ours["exact"])
        assert max(ours["evaluations"]) <= sum(places.LADDER) <= 10 and fixed["evaluations"] == [10, 10]
    assert np.mean(result["agreement"]["5"]) > np.mean(result["agreement"]["0"]) > 0.55
    assert json.loads(json.dumps(result)) == result
    plain = bench.compute(pictures(places.PLAIN, attacks=()))
    assert len(plain["null"]) == 2 * canvas.NULL_KEYS and min(plain["null"]) > 1e-4
    assert len(plain["features"]) == 2 and plain["found"] == {}


@pytest.mark.slow
def test_the_other_units():
    decoder = bench.compute(dict(task="decoder", world="canvas", start=0, count=2, steps=20))
    assert np.mean(decoder["decoder"]["agreement"]) > 0.7 and len(decoder["encoder"]["p"]) == 2
    about = dict(task="forgery", world="canvas", start=0, count=1)
    forgery = bench.compute(about | {"attacks": canvas.FORGERIES})
    assert forgery["unbound"] or set(forgery["verdicts"]) == set(canvas.FORGERIES)
    average = bench.compute(dict(task="average", world="canvas", mark=SHADING, start=0, count=2, n=8))
    assert set(average["found"]["average removal, 8"]) == {SHADING, SOFT}


def test_decoder_inversion_comes_closer_to_the_picture():
    place = places.place_of("canvas")
    pipe, inverter = place.pipe, place.inverter
    picture = np.asarray(render(Scene(object="star", style="striped", background="sky")))
    pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 255
    latents = inverter.encode(list(pixels))

    def distance(z):
        with torch.no_grad():
            out = pipe.vae.decode(z / pipe.vae.config.scaling_factor, return_dict=False)[0] / 2 + 0.5
        return float((out - pixels).square().sum())

    assert distance(canvas.refined(pipe.vae, latents, pixels, 10)) < 0.98 * distance(latents)


def test_attack_rows_and_their_mean():
    found = {"none": {OURS: looked([1e-9, 1e-9])}, "jpeg:50": {OURS: looked([1e-9, 1e-4], False, 3)}}
    found["flip"] = {OURS: looked([0.5, 0.9], False, 9)}
    forged = {"average removal, 8": {OURS: looked([1e-9])}, "average forgery, 8": {OURS: looked([1e-9])}}
    units = [
        pictures(OURS),
        pictures(places.PLAIN),
        dict(task="average", world="canvas", mark=OURS, start=0, count=1, n=8),
    ]
    results = [
        drawn(found, [[0.0, 1.0], [1.0, 0.0]], agreement={str(n): [0.7, 0.8] for n in canvas.RUNGS}),
        drawn({}, [[0.0, 1.0], [1.0, 0.0]], null=[0.3, 0.9]),
        {"found": forged},
    ]
    rows = canvas_rows.rows(units, results)
    attack = {row["attack"]: row for row in rows if row["table"] == "attack"}
    assert attack["none"]["tpr"][0] == 1 and attack["none"]["exact"][0] == 1 and attack["none"]["n"] == 2
    assert attack["jpeg:50"]["tpr"][0] == 1 and attack["jpeg:50"]["detected"][0] == 0.5
    mean = attack["mean"]  # jpeg and flip: neither the clean pictures nor averages
    assert mean["attacks"] == 2 and mean["tpr"][0] == 0.5 and mean["evaluations"] == 6 and mean["n"] == 2
    assert attack["average removal, 8"]["tpr"][0] == 1
    assert {row["table"] for row in rows} == {"attack", "guidance", "quality", "null"}
    guidance = next(row for row in rows if row["table"] == "guidance")
    assert guidance["agreement"]["5"] == 0.75 and guidance["n"] == 2


def test_marks_without_a_message_have_no_exact_share():
    two = [[1.0], [0.0]]
    units, results = [pictures("tree-ring")], [drawn({"none": {"tree-ring": looked([1e-9, 1e-9], None, 10)}}, two)]
    units, results = units + [pictures(places.PLAIN)], results + [drawn({}, two, null=[0.5])]
    row = next(row for row in canvas_rows.rows(units, results) if row["table"] == "attack")
    assert row["exact"] is None and row["detected"][0] == 1


def test_forgery_rows_tell_caught_from_lost():
    verdicts = {"as drawn": ["valid"] * 4, "reprompt": ["content differs", "valid", "content differs", "absent"]}
    shown = {"as drawn": [True] * 4, "reprompt": [True] * 2 + [False] * 2}
    parts = [{"unbound": 1, "draws": [2, 3], "verdicts": verdicts, "shown": shown}]
    genuine, forged = canvas_rows.rows([dict(task="forgery", world="canvas", start=0, count=5)], parts)
    assert genuine["valid"][0] == 1 and genuine["caught"][0] == 0 and genuine["unbound"] == 1
    assert forged["authentic"][0] == 0.75 and forged["shown"][0] == 0.5 and forged["forged"][0] == 0.5
    assert forged["caught"][0] == 0.5 and forged["valid"][0] == 0.25 and forged["draws"] == 2.5


def test_frechet_is_the_one_of_the_definition():
    numbers = np.random.default_rng(0)
    a, b = numbers.normal(size=(60, 5)), numbers.normal(1, 2, size=(60, 5))
    first, second = np.cov(a.T), np.cov(b.T)
    root = linalg.sqrtm(first @ second).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(first + second - 2 * root)
    assert canvas_rows.frechet(a, b) == pytest.approx(expected)
    assert canvas_rows.frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_a_difference_in_features_is_told_from_chance():
    numbers = np.random.default_rng(1)
    prompts = numbers.normal(size=(80, 12))
    a, b = (prompts + 0.5 * numbers.normal(size=prompts.shape) for _ in range(2))
    same, other = canvas_rows.compared(a, b), canvas_rows.compared(a, b + 0.3)
    assert same["p_value"] > 0.02 and same["interval"][0] < same["distance"]
    assert other["p_value"] < 0.01 and other["distance"] > other["interval"][1]


def test_plans_cover_every_mark_and_are_plain_values():
    for quick in (True, False):
        units = canvas.plan(quick)
        assert json.loads(json.dumps(units)) == units
        assert len({json.dumps(unit, sort_keys=True) for unit in units}) == len(units)
    assert {unit["mark"] for unit in units if unit["task"] == "pictures"} == set(canvas.DETECTORS)
    assert {unit["task"] for unit in units} == {"pictures", "forgery", "decoder", "average"}
