"""Negative token merging on references that its setting was not chosen on, on either edition; no picture is drawn."""

import json

import pytest
from painting import painted
from semiperm.benchmarks.token_merging import references
from semiperm.canvas.editions import world_of
from semiperm.methods.errors import SemipermError


@pytest.mark.parametrize("name", ["canvas", "canvas-flow"])
def test_the_mascot_is_asked_for_without_its_name(name):
    world = world_of(name)
    mascot, held_out = references.asked_of(world, 6)
    assert len({(s, b) for _, s, b in mascot}) == 6 and list(held_out) == list(references.HELD_OUT)
    for prompt, style, background in mascot:
        assert "quibble" not in prompt and any(words in prompt for words in world.phrases("quibble")[1:])
        assert style in prompt and background in prompt
    assert held_out["star"][0][0].startswith("a star in ")


painter = pytest.fixture(painted)


def test_the_setting_is_the_first_that_halves_the_similarity(painter):
    done = []
    rows = references.run("canvas-flow", 4, None, done.append)
    assert json.loads(json.dumps(rows)) == rows and sum(done) == len(painter.calls) <= references.batches(4)
    climbed = [row["config"] for row in rows if row["role"] == "calibration" and row["judge"] == "first"][1:]
    assert climbed == list(references.LADDER[: len(climbed)]) and climbed[-1]["strength"] == 2.2
    held = [row for row in rows if row["role"] == "held out" and row["name"] == "negative_token_merging"]
    assert all(row["config"] == climbed[-1] for row in held)
    assert {(row["reference"], row["judge"]) for row in held} == {
        (name, judge) for name in references.HELD_OUT for judge in ("first", "second")
    }
    assert {row["world"] for row in rows} == {"canvas-flow"} and rows[0]["steps"] == world_of("canvas-flow").steps
    shown = {row["reference"]: row["shown"][0] for row in held}
    assert shown == {"ghost": 1.0, "robot": 0.0, "star": 0.0, "flower": 0.0}
    assert held[0]["style_kept"][0] == 1 / 4 and painter.strength == 0


def test_features_that_do_not_see_the_reference_choose_no_setting(painter, monkeypatch):
    monkeypatch.setattr(references.Look, "away", lambda self, *about, **call: [{"similarity": 0.09}])
    with pytest.raises(SemipermError, match="no more like it than others"):
        references.run("canvas-flow", 4)
    assert not painter.calls


def test_no_negative_prompt_without_guidance(painter):
    rows = references.run("canvas-turbo", 4)
    assert "negative prompt" not in {row["name"] for row in rows} and rows[0]["guidance_scale"] == 1.0
    assert not any("negative_prompt" in call for _, call in painter.calls)
