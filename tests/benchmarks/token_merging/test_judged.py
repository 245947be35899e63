"""What negative token merging does to the canvas's pictures: a short form of `semiperm bench token-merging`."""

import json

import pytest
from semiperm.benchmarks.token_merging import judged as bench


@pytest.fixture(scope="module")
def world():
    return bench._World(lambda n: None, 1)


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setitem(bench._SAMPLING, "num_inference_steps", 8)


def test_the_mascot_is_avoided_and_the_look_kept(world, few_steps, monkeypatch):
    looks = [("striped", "sky"), ("flat", "mint"), ("dotted", "sand"), ("checkered", "lilac")]
    monkeypatch.setattr(bench, "looks", lambda: looks * 2)  # a few; the shares of all are in benchmarks/results
    bare = world.reference("untouched", None)
    pushed = world.reference("ours", bench.REFERENCE | {"reference_prompt": f"a {bench.MASCOT}"})
    assert bare["mascot"][0] >= 0.8 and bare["images"] == pushed["images"] == 8
    assert pushed["similarity"] < 0.7 * bare["similarity"]
    assert pushed["style_kept"][0] >= 0.7 and pushed["background_kept"][0] >= 0.7
    assert json.loads(json.dumps(bare)) == bare


def test_a_batch_is_spread_and_the_object_kept(world, few_steps, monkeypatch):
    monkeypatch.setattr(bench, "OBJECTS", ("star", "ring"))
    bare, pushed = world.diversity("untouched", None), world.diversity("ours", bench.DIVERSITY)
    assert pushed["pixel_distance"] > 1.15 * bare["pixel_distance"]
    assert pushed["object_kept"][0] >= 0.85


@pytest.mark.slow
def test_every_row_of_the_long_form(tmp_path):
    done = []
    rows = bench.run(done.append, seeds=1)
    assert sum(done) == bench.batches(1)
    assert [(row["mode"], row["name"]) for row in rows][:2] == [
        ("reference", "untouched"),
        ("reference", "negative prompt"),
    ]
    assert json.loads(json.dumps(rows)) == rows
