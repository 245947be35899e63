"""What negative token merging does to an embedded world's pictures: a short form of `semiperm bench token-merging`."""

import json

import pytest
from painting import painted
from semiperm.benchmarks.token_merging import judged as bench
from semiperm.benchmarks.token_merging.look import BATCH, MASCOT, Look
from semiperm.canvas.editions import WORLDS, world_of

painter = pytest.fixture(painted)


@pytest.fixture(scope="module")
def look():
    return Look(world_of("canvas"), 8, lambda n: None)


LOOKS = [("striped", "sky"), ("flat", "mint"), ("dotted", "sand"), ("checkered", "lilac")]


def test_the_mascot_is_avoided_and_the_look_kept(look):
    few = [one for one in bench.asked_of(look.world) if one[1:] in LOOKS] * 2  # the shares of all are in results
    (bare,) = look.away("untouched", MASCOT, few, None)
    (pushed,) = look.away("ours", MASCOT, few, bench.REFERENCE | {"reference_prompt": f"a {MASCOT}"})
    assert bare["shown"][0] >= 0.8 and bare["images"] == pushed["images"] == 8
    assert pushed["similarity"] < 0.7 * bare["similarity"]
    assert pushed["style_kept"][0] >= 0.7 and pushed["background_kept"][0] >= 0.7
    assert json.loads(json.dumps(bare)) == bare


def test_a_batch_is_spread_and_the_object_kept(look):
    things = ("star", "ring")
    (bare,) = bench.apart(look, "untouched", things, 1, None)
    (pushed,) = bench.apart(look, "ours", things, 1, bench.DIVERSITY)
    assert pushed["pixel_distance"] > 1.15 * bare["pixel_distance"]
    assert pushed["object_kept"][0] >= 0.85 and bare["images"] == 16


@pytest.mark.parametrize("name", list(WORLDS))
def test_every_world_is_asked_for_what_it_has(name):
    world = world_of(name)
    asked, things = bench.asked_of(world), bench.things_of(world)
    assert len({one[1:] for one in asked}) == len(asked) == 48
    assert all(MASCOT not in text and style in text and ground in text for text, style, ground in asked)
    assert set(sum(things.values(), ())) <= set(world.names("object")) and things["characters"] == ("robot", "ghost")
    assert ("arrow" in things["objects"]) == (name == "canvas")


@pytest.mark.parametrize("name", ["canvas", "canvas-flow"])
def test_a_row_for_each_judge_and_domain(painter, name):
    done = []
    rows = bench.run(name, 1, 3, done.append)
    assert json.loads(json.dumps(rows)) == rows
    assert sum(done) == len(painter.calls) == bench.batches(name, 1) and painter.strength == 0
    assert {(row["mode"], row["domain"], row["judge"]) for row in rows} == {
        (*one, judge)
        for one in (("reference", "characters"), ("diversity", "objects"), ("diversity", "characters"))
        for judge in ("first", "second")
    }
    assert {(row["world"], row["steps"]) for row in rows} == {(name, 3)}
    away = {row["name"]: row for row in rows if row["mode"] == "reference" and row["judge"] == "first"}
    assert away["untouched"]["shown"][0] == 1.0 and away["untouched"]["images"] == 48
    assert away["negative_token_merging"]["similarity"] < away["untouched"]["similarity"]
    assert away["released"]["config"] == bench.REFERENCE | bench.OFFICIAL
    spread = [row for row in rows if row["mode"] == "diversity" and row["domain"] == "characters"]
    assert {row["images"] for row in spread} == {2 * 2 * BATCH} and spread[0]["object_kept"][0] == 0.5  # ghosts alone
    asked = [call for _, call in painter.calls if "negative_prompt" in call]
    assert asked and all(call["negative_prompt"] == [f"a {MASCOT}"] * BATCH for call in asked)


def test_no_negative_prompt_without_guidance(painter):
    rows = bench.run("canvas-turbo", 1)
    assert "negative prompt" not in {row["name"] for row in rows}
    assert not any("negative_prompt" in call for _, call in painter.calls)


@pytest.mark.slow
def test_every_row_of_the_long_form():
    done = []
    rows = bench.run(seeds=1, progress=done.append)
    assert sum(done) == bench.batches(seeds=1)
    assert [(row["mode"], row["name"]) for row in rows][:2] == [
        ("reference", "untouched"),
        ("reference", "negative prompt"),
    ]
    assert json.loads(json.dumps(rows)) == rows
