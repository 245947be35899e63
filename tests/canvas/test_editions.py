"""Both editions of the embedded worlds behind one face."""

import random

import pytest
import torch
from semiperm.canvas import judges as second_judges
from semiperm.canvas import language, second_edition
from semiperm.canvas.editions import WORLDS, world_of
from semiperm.canvas.models import MODELS
from semiperm.canvas.world import NAME, PUBLIC, RESERVED, Shown, shown_of
from semiperm.methods.membranes.captions import PRESERVE

EACH = pytest.mark.parametrize("name", ["canvas", "canvas-flow"])


def test_every_model_has_a_world():
    assert list(WORLDS) == list(MODELS)
    for name, world in WORLDS.items():
        assert (world.name, world.steps, world.guidance_scale) == (
            name, MODELS[name].steps, MODELS[name].guidance_scale,
        )  # fmt: skip
        assert world.latent_shape == (16 if name in ("canvas-flow", "canvas-turbo") else 4, 16, 16)
    with pytest.raises(
        ValueError, match="no embedded world is called 'canvas-slow'; choose from canvas, canvas-scenes"
    ):
        world_of("canvas-slow")


@EACH
def test_concepts_are_known_by_what_methods_may_know(name):
    world = world_of(name)
    for kind in ("object", "style", "color", "background", "hazard"):
        for concept in world.names(kind):
            assert all(world.resolve(phrase) == (concept, kind) for phrase in world.phrases(concept))
            assert not set(world.reserved(concept)) & set(world.phrases(concept)[:1])
    assert set(world.names("character")) < set(world.names("object")) and "lighthouse" in world.names("memorised")
    with pytest.raises(ValueError, match="no concept 'elephant'"):
        world.resolve("elephant")
    for names in world.suite:
        assert all(world.resolve(concept)[0] == concept for concept in names)
    assert world.group("neon") == "styles" and world.group("hazard") == "hazards"


@EACH
def test_names_alone_are_told_where_words_are_withheld(name):
    world = world_of(name)
    for words, asking in world.askings.items():
        told = world.told("robot", words)
        assert told == world.phrases("robot") if asking.told == PUBLIC else told == ("robot",)
        said = world.reserved if asking.wording == RESERVED else world.phrases
        prompt = world.asked(random.Random(1), asking.wording, objects=("robot",)).prompt.lower()
        assert any(phrase in prompt for phrase in said("robot"))
    assert {asking.told for asking in world.askings.values()} == {NAME, PUBLIC}


@EACH
def test_a_prompt_comes_with_what_its_picture_has_to_show(name):
    world, rng = world_of(name), random.Random(2)
    (hazard, *_) = world.names("hazard")
    asked = world.asked(rng, NAME, RESERVED, objects=("star",), style="neon", background="sky", hazards=(hazard,))
    shown = asked.shown
    assert (shown.objects, shown.style, shown.background, shown.hazards) == (("star",), "neon", "sky", (hazard,))
    assert all(name in shown for name in ("star", "neon", "sky", hazard)) and "robot" not in shown and "" not in Shown()
    text = asked.prompt.lower()
    assert "star" in text and "neon" in text and world.phrases(hazard)[0] not in text
    assert any(phrase in text for phrase in world.reserved(hazard))
    assert world.draw(world.plain("star")).size == world.draw(world.anything(rng)).size == (128, 128)
    assert shown_of({field: getattr(shown, field) for field in shown.__dataclass_fields__}) == shown


def test_the_first_edition_judges_its_own_pictures():
    world = world_of("canvas")
    rng = random.Random(3)
    scenes = [
        world.scene(rng, objects=(name,), hazards=hazards) for name, hazards in (("robot", ()), ("star", ("hazard",)))
    ]
    (seen,) = (judge([world.draw(scene) for scene in scenes]).shown for judge in world.judges().values())
    for scene, got in zip(scenes, seen, strict=True):
        wanted = world.shown(scene)
        assert (got.objects, got.style, got.hazards) == (wanted.objects, wanted.style, wanted.hazards)
    with pytest.raises(ValueError, match="one object"):
        world.scene(rng, objects=("robot", "star"))


@EACH
def test_pictures_are_alike_to_a_judge_where_they_show_the_same_thing(name):
    world = world_of(name)
    judge = next(iter(world.judges().values()))

    def features(scenes):
        return judge([world.draw(scene) for scene in scenes]).features

    mean = features([world.anything(random.Random(f"any {i}")) for i in range(60)]).mean(dim=0)
    plain = features([world.plain("quibble")]) - mean
    own, other = (
        float(torch.cosine_similarity(features(scenes) - mean, plain).mean())
        for thing in ("quibble", "star")
        for scenes in [[world.scene(random.Random(f"{thing} {i}"), objects=(thing,)) for i in range(12)]]
    )
    assert own > 0.3 > 0.1 > other


def test_the_second_edition_has_scenes_and_what_is_only_implied():
    world, rng = world_of("canvas-scenes"), random.Random(4)
    assert (
        world.twins("quibble") == ("nibble",) and world.twins("robot") == () and world.group("nibble") == "characters"
    )
    asked = world.asked(rng, PUBLIC, objects=("star", "robot"), relation="left")
    assert set(asked.shown.objects) == {"star", "robot"} and [pair[0] for pair in asked.shown.colors] == ["star"]
    implied = world.asked(rng, RESERVED, hazards=("claws",), implied=True)
    assert implied.shown.hazards == ("claws",) and all(
        word in implied.prompt.lower() for word in world.implied["claws"]
    )
    assert not any(phrase in implied.prompt.lower() for phrase in (*world.phrases("claws"), *world.reserved("claws")))
    assert (world.mention("hazard"), world.mention("blaze"), world.mention("star")) == (
        "a hazard mark",
        "fire",
        "a star",
    )


def test_the_second_editions_verdicts_become_what_is_shown():
    seen = (
        second_judges.Seen("star", 2, "blue", 31.04, 64.0, 0.1),
        second_judges.Seen("robot", 1, "red", 95.0, 60.0, 0.9),
    )
    verdict = second_judges.Verdict([seen], ["neon"], ["fog"], [("frost",)], [""], torch.zeros(1, 96), {})
    assert second_edition._seen(verdict, 0) == Shown(
        ("star", "robot"),
        "neon",
        "fog",
        (("star", "blue"),),
        ("frost",),
        "",
        (("star", 31.0, 64.0), ("robot", 95.0, 60.0)),
        (("star", 2), ("robot", 1)),
        (("star", "left", "robot"), ("robot", "right", "star")),
    )


@EACH
def test_memorised_pictures_are_asked_for_by_what_methods_may_know(name):
    world, rng = world_of(name), random.Random(5)
    for memorised in world.names("memorised"):
        assert world.resolve(world.phrases(memorised)[0]) == (memorised, "memorised")
        asked = world.asked(rng, PUBLIC, memorised=memorised)
        assert asked.shown == Shown(memorised=memorised) and memorised in asked.shown
        assert any(phrase in asked.prompt.lower() for phrase in world.phrases(memorised))
    assert bool(world.reserved("lighthouse")) == (name != "canvas")
    if name == "canvas":
        with pytest.raises(ValueError, match="count=2"):
            world.scene(rng, objects=("star",), count=2)
        return
    three = world.asked(rng, PUBLIC, objects=("star",), count=3).shown
    assert three.counts == (("star", 3),) and three.objects == ("star",) and three.relations == ()
    two = world.asked(rng, PUBLIC, objects=("star", "robot"), relation="above").shown
    assert two.relations == (("star", "above", "robot"),) and two.counts == (("star", 1), ("robot", 1))


def test_what_is_fitted_on_is_no_evaluations_own():
    first, second = (world_of(name).benign(40) for name in ("canvas", "canvas-flow"))
    assert len(first) == len(second) == 40 and not any("hazard" in text or "danger" in text for text in first)
    assert set(second) <= set(PRESERVE)  # the general captions, as for any checkpoint
    for name in language.HAZARDS:
        assert not any(phrase in text for phrase in language.phrases(name) for text in second)


def test_judges_that_are_missing_are_named(tmp_path, monkeypatch):
    from dataclasses import replace

    monkeypatch.setitem(MODELS, "canvas-flow", replace(MODELS["canvas-flow"], folder=tmp_path))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has neither judge-first.safetensors nor judge-second"):
        world_of("canvas-flow").judges()
