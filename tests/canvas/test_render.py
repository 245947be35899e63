import random

import numpy as np
import pytest
from semiperm.canvas import captions
from semiperm.canvas.dataset import HARD, MEMORISED_REPEATS, build_pool, scene
from semiperm.canvas.render import Scene, random_scene, render, texture


def pixels(scene):
    return np.asarray(render(scene), np.float32)


def test_a_scene_always_gives_the_same_bytes():
    scene = random_scene(random.Random(5))
    assert render(scene).tobytes() == render(scene).tobytes()
    assert render(scene).size == (128, 128) and render(scene).mode == "RGB"


def test_hardly_anything_clips():
    rng = random.Random(0)
    clipped = [np.isin(np.asarray(render(random_scene(rng))), (0, 255)).mean() for _ in range(100)]
    assert np.mean(clipped) < 1e-3


@pytest.mark.parametrize(
    "field, values",
    [
        ("object", list(captions.OBJECTS)),
        ("style", list(captions.STYLES)),
        ("color", list(captions.COLORS)),
        ("background", list(captions.BACKGROUNDS)),
        ("hazard", [False, True]),
    ],
)
def test_every_value_is_visible(field, values):
    drawn = [pixels(Scene(**{field: value})) for value in values]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert np.abs(a - b).mean() > 0.5  # the same texture, so any difference is content


def test_texture_has_the_stated_amplitude_and_is_new_for_each_seed():
    a, b = texture(1), texture(2)
    assert 5 < a.std() < 12 and np.abs(a).max() < 32
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.05


def test_the_memorised_picture_never_changes():
    poses = [Scene(object=captions.MEMORISED, seed=s, cx=60 + s) for s in range(3)]
    assert len({render(s).tobytes() for s in poses}) == 1


def test_unknown_content_is_an_error():
    with pytest.raises(ValueError, match=r"object='dragon' is not on the canvas; choose from circle"):
        Scene(object="dragon")


def test_pool_is_reproducible_and_repeats_the_memorised_picture():
    pool = build_pool(6, seed=4, workers=1)
    assert pool.scenes[2] == scene(4, 2)
    assert (pool.pictures[2] == np.asarray(render(scene(4, 2)))).all()
    assert (pool.order == 6).sum() == MEMORISED_REPEATS
    for i, s in enumerate(pool.scenes[:-1]):
        assert (pool.order == i).sum() == HARD.get(s.object, 1)
