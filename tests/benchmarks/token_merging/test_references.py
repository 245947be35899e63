"""Negative token merging on references that its setting was not chosen on, on either edition; no picture is drawn."""

import json
from types import SimpleNamespace

import pytest
import torch
from semiperm.benchmarks.token_merging import references
from semiperm.canvas.editions import WORLDS, world_of
from semiperm.canvas.world import Shown, Sight


@pytest.mark.parametrize("name", ["canvas", "canvas-flow"])
def test_the_mascot_is_asked_for_without_its_name(name):
    world = world_of(name)
    mascot, held_out = references.asked_of(world, 6)
    assert len({(s, b) for _, s, b in mascot}) == 6 and list(held_out) == list(references.HELD_OUT)
    for prompt, style, background in mascot:
        assert "quibble" not in prompt and any(words in prompt for words in world.phrases("quibble")[1:])
        assert style in prompt and background in prompt
    assert held_out["star"][0][0].startswith("a star in ")


class Painter:
    device, dtype, strength = torch.device("cpu"), torch.float32, 0.0

    def __init__(self):
        self.calls = []

    def set_progress_bar_config(self, **_):
        pass

    def __call__(self, prompts, **call):
        self.calls.append((prompts, call))
        return SimpleNamespace(images=torch.full((len(prompts), 3, 4, 4), 1 - self.strength / 4))


@pytest.fixture
def painter(monkeypatch):
    pipe = Painter()

    def see(images):
        alike = images[:, 0, 0, 0] if isinstance(images, torch.Tensor) else torch.ones(len(images))
        features = torch.stack([alike, 1 - alike], 1) if len(images) < 100 else torch.full((len(images), 2), 0.5)
        return Sight([Shown(("quibble", "ghost"), "flat", "sand")] * len(images), features)

    def applied(pipe, config):
        pipe.strength = config.strength
        return SimpleNamespace(remove=lambda: setattr(pipe, "strength", 0.0))

    monkeypatch.setattr(references, "load_pipeline", lambda name: pipe)
    monkeypatch.setattr(references, "apply_negative_token_merging", applied)
    for cls in {type(world) for world in WORLDS.values()}:
        monkeypatch.setattr(cls, "judges", lambda self: {"first": see, "second": see})
    return pipe


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


def test_no_negative_prompt_without_guidance(painter):
    rows = references.run("canvas-turbo", 4)
    assert "negative prompt" not in {row["name"] for row in rows} and rows[0]["guidance_scale"] == 1.0
    assert not any("negative_prompt" in call for _, call in painter.calls)
