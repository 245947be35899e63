"""What is accepted, warned of and refused is what was measured, in both faces."""

import json
from pathlib import Path

import pytest
from semiperm.benchmarks.watermark.samplers import FUNCTIONS, adds_noise, decided
from semiperm.methods.watermark import samplers

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "watermark_samplers.json"
FACES = ("comfyui", "diffusers")


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def test_the_table_in_the_code_is_the_measured_one(rows):
    fewest, half, eta = decided(rows)
    assert fewest == samplers.FEWEST and half == samplers.LOSES_HALF and eta == samplers.MOST_ETA


def test_what_was_measured_to_lose_is_not_accepted(rows):
    for row in rows:
        if row["found"] * 2 <= row["n"] and not adds_noise(row["options"]):
            name = FUNCTIONS.get(row["sampler"], row["sampler"])
            assert samplers.refusal(row["face"], name, row["steps"]), row


@pytest.mark.parametrize("face", FACES)
def test_errors_recommend_only_what_lost_nothing(face, rows):
    names = samplers.recommended(face).split(", ")
    assert len(names) >= 3
    for name in names:
        own = [r for r in rows if r["face"] == face and r["sampler"] in (name, f"{name}Scheduler") and not r["options"]]
        assert own and all(row["found"] == row["n"] for row in own), name
    assert all(name in samplers.refusal(face, "unheard_of") for name in names)


@pytest.mark.parametrize("face", FACES)
def test_too_few_steps_are_warned_of(face):
    for name, fewest in samplers.FEWEST[face].items():
        assert samplers.refusal(face, name) is None
        if fewest == samplers.SOME_LOST:
            assert "even in 25 steps" in samplers.warning(face, name)
            continue
        assert samplers.warning(face, name) is None and samplers.warning(face, name, fewest) is None
        said = samplers.warning(face, name, fewest - 1)
        assert ("fewer than 8 steps, this run has 7" if fewest == 8 else "this run has 24") in said
    assert set(samplers.FEWEST[face].values()) > {8}, "some need more steps than others"


def row(found: int, steps: int, guidance: float = 4.0, sampler: str = "a", n: int = 4, **options) -> dict:
    about = {"face": "comfyui", "sampler": sampler, "options": options, "steps": steps, "guidance": guidance}
    return about | {"found": found, "n": n}


def test_the_rule():
    def rule(*rows):
        fewest, half, eta = decided(rows)
        return fewest["comfyui"], half["comfyui"], eta

    kept = [row(4, 8), row(4, 25)]
    assert rule(*kept) == ({"a": 8}, set(), 0.0)
    assert rule(*kept, row(3, 8, 7.5)) == ({"a": 25}, set(), 0.0)
    assert rule(*kept, row(2, 8, 7.5)) == ({"a": 25}, {"a"}, 0.0)
    assert rule(*kept, row(3, 25, 7.5)) == ({"a": 0}, set(), 0.0)
    assert rule(row(4, 8), row(2, 25)) == ({}, set(), 0.0)
    assert rule(row(4, 25)) == ({}, set(), 0.0), "noise of its own: one setting alone"
    assert rule(row(4, 8, sampler="ddim"), row(4, 25, sampler="euler")) == ({"euler": 8}, set(), 0.0)
    assert rule(*kept, row(0, 25, algorithm_type="sde-dpmsolver++")) == ({"a": 8}, set(), 0.0)
    etas = [row(found, 25, eta=eta) for eta, found in ((0.1, 4), (0.2, 4), (0.5, 3), (1.0, 4))]
    assert rule(*kept, *etas) == ({"a": 8}, set(), 0.2)


def test_few_steps_of_what_loses_half_are_refused():
    for face, names in samplers.LOSES_HALF.items():
        for name in names:
            assert "half of the pictures" in samplers.refusal(face, name, 8) and "25 steps" in samplers.refusal(
                face, name, 8
            )
            assert samplers.refusal(face, name, 9) is None and samplers.refusal(face, name) is None
