"""The second world's pictures: what a scene holds is what is drawn, where it is said to be."""

import random

import numpy as np
import pytest
from semiperm.canvas import language, pool
from semiperm.canvas.drawing import draw
from semiperm.canvas.scenes import RELATIONS, Scene, Thing, random_scene, smudged
from semiperm.canvas.shapes import layers


def pixels(scene):
    return np.asarray(draw(scene), np.float32)


def test_a_scene_always_gives_the_same_bytes():
    scene = random_scene(random.Random(5))
    assert draw(scene).tobytes() == draw(scene).tobytes()
    assert draw(scene).size == (128, 128) and draw(scene).mode == "RGB"


def test_hardly_anything_clips():
    rng = random.Random(0)
    clipped = [np.isin(np.asarray(draw(random_scene(rng))), (0, 255)).mean() for _ in range(60)]
    assert np.mean(clipped) < 2e-3


@pytest.mark.parametrize("names, make", [
    (language.OBJECTS, lambda v: Scene((Thing(v),))),
    (language.COLORS, lambda v: Scene((Thing(color=v),))),
    (language.STYLES, lambda v: Scene(style=v)),
    (language.BACKGROUNDS, lambda v: Scene(background=v)),
    ((None, *language.HAZARDS), lambda v: Scene(hazards=(v,) if v else ())),
    (language.MEMORISED, lambda v: Scene(memorised=v)),
])  # fmt: skip
def test_every_value_is_visible(names, make):
    drawn = [pixels(make(name)) for name in names]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert np.abs(a - b).mean() > 0.5  # the same texture, so any difference is content


def test_lookalikes_differ_little_and_clearly():
    for a, b in language.LOOKALIKES:
        near = np.abs(pixels(Scene((Thing(a),))) - pixels(Scene((Thing(b),)))).mean()
        far = np.mean(
            [np.abs(pixels(Scene((Thing(a),))) - pixels(Scene((Thing(c),)))).mean() for c in ("robot", "cross")]
        )
        assert 0.5 < near < far


def test_opposed_hazards_are_one_shape_in_opposite_colours():
    plain, blaze, frost = (pixels(Scene(hazards=h, seed=3)) for h in ((), ("blaze",), ("frost",)))
    changed = np.abs(blaze - plain).sum(-1) > 0
    assert (changed == (np.abs(frost - plain).sum(-1) > 0)).mean() > 0.999
    rim = changed & (np.abs(blaze - frost).sum(-1) > 200)
    assert 0.1 < rim.mean() < 0.4
    with pytest.raises(ValueError, match="blaze and frost, not both"):
        Scene(hazards=("blaze", "frost"))


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_hold(relation):
    rng = random.Random(relation)
    for _ in range(40):
        scene = random_scene(rng, objects=("star", "robot"), relation=relation)
        (a, b), x, y = scene.things, scene.things[0].cx - scene.things[1].cx, scene.things[0].cy - scene.things[1].cy
        overlap = np.hypot(x, y) < a.radius + b.radius - 8
        assert overlap == (relation == "front")
        if relation != "front":
            axis, across = (x, y) if relation in ("left", "right") else (y, x)
            assert axis * (-1 if relation in ("left", "above") else 1) > abs(across) + 20
        else:  # the first is drawn whole
            first = Scene((a,), style="flat", background=scene.background, seed=scene.seed)
            both = Scene(scene.things, style="flat", background=scene.background, seed=scene.seed)
            inside = np.prod([1 - m for _, m in layers(a)], axis=0)[..., 0] < 0.01
            assert np.abs(pixels(first) - pixels(both))[inside].max() < 3


@pytest.mark.parametrize("count", [1, 2, 3])
def test_counts_are_apart_and_inside(count):
    rng = random.Random(count)
    for _ in range(40):
        things = random_scene(rng, objects=("ghost",), count=count).things
        assert len(things) == count and len({t.color for t in things}) == 1
        assert all(t.radius * 0.9 < t.cx < 128 - t.radius * 0.9 for t in things)
        for i, a in enumerate(things):
            assert all(np.hypot(a.cx - b.cx, a.cy - b.cy) > a.radius + b.radius for b in things[:i])


def test_a_smudge_takes_one_thing_away():
    rng = random.Random(1)
    for _ in range(30):
        scene = random_scene(rng)
        assert len(smudged(rng, scene).objects) == len(scene.objects) - 1


def test_memorised_pictures_never_change():
    for name in language.MEMORISED:
        assert draw(Scene(memorised=name, seed=1)).tobytes() == draw(Scene(memorised=name, seed=2)).tobytes()


@pytest.mark.parametrize("make, message", [
    (lambda: Thing("dragon"), "object='dragon' is not on the canvas; choose from circle"),
    (lambda: Scene(hazards=("flood",)), "hazard='flood' is not"),
    (lambda: random_scene(random.Random(0), objects=("star", "ring"), count=2), "expected one object, or two"),
])  # fmt: skip
def test_unknown_content_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_pool_is_kept_in_chunks_and_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "CHUNK", 4)
    made = pool.pictures(tmp_path, 6, seed=4)
    assert len(made.scenes) == len(made.data) == 11 and made.scenes[2] == pool.scene_of(4, 2)
    assert (made.data[2] == np.asarray(draw(made.scenes[2]))).all()
    assert [p.name for p in (tmp_path / "pictures").iterdir()] == ["4-000000.npy"]
    monkeypatch.setattr(
        pool, "draw", lambda scene: pytest.fail("drawn again") if scene == made.scenes[0] else draw(scene)
    )
    assert (pool.pictures(tmp_path, 6, seed=4).data == made.data).all()


def test_batches_show_the_memorised_pictures_more_often():
    scenes = pool.scenes_of(0, 50)
    index = pool.Pool(scenes, np.empty(0)).draw_batch(np.random.default_rng(0), 4000)
    assert 0.04 < np.mean(index >= 50) < 0.08


def test_batches_show_scenes_of_two_twice_as_often():
    scenes = pool.scenes_of(0, 200)
    pair = np.array([len(set(scene.objects)) == 2 for scene in scenes[:200]])
    index = pool.Pool(scenes, np.empty(0)).draw_batch(np.random.default_rng(0), 20_000)
    shown = np.bincount(index, minlength=205)[:200]
    assert 1.9 < shown[pair].mean() / shown[~pair].mean() < 2.1
