"""Where marks are tried: units name their model, and what looks at pictures is the product's own detection."""

import pytest
import torch
from semiperm.benchmarks.watermark import canvas, everyday, linked, places, repaint
from semiperm.benchmarks.watermark import run as bench
from semiperm.benchmarks.watermark.marks import OURS
from semiperm.canvas.editions import WORLDS


@pytest.mark.parametrize("name", list(WORLDS))
def test_plans_name_the_model(name):
    for module in (canvas, repaint, everyday):
        assert {unit["world"] for unit in module.plan(True, name)} == {name}
    guidances = {unit["guidance"] for unit in canvas.plan(False, name) if unit["task"] == "pictures"}
    shapes = {tuple(unit["shape"]) for unit in linked.plan(True, name)}
    assert shapes == (set(linked.SHAPES) if name == "canvas" else {WORLDS[name].latent_shape})
    own = WORLDS[name].guidance_scale
    assert guidances == ({*canvas.GUIDANCES, own} if own > 1 else {1.0})


@pytest.mark.parametrize("name, elements, bits", [("canvas", 1024, 24), ("canvas-flow", 4096, 67)])
def test_marks_take_the_models_latents(name, elements, bits):
    place = places.Place(name)
    assert place.bits == bits
    for mark in canvas.DETECTORS:
        noise = place.noise(mark, 3, 2)
        assert noise.shape[1:].numel() == elements and noise.shape == (2, *place.shape)
        assert torch.equal(noise, place.noise(mark, 3, 2))
        for detector in canvas.DETECTORS[mark]:
            found = place.mark(detector).find(noise[:1])
            assert found.p_value < 1e-6 and found.exact in (True, None), detector
    assert [one.prompt for one in place.asked(0, 3)][1:] == [one.prompt for one in place.asked(1, 2)]


def test_a_unit_on_a_flow_model(small_flow):
    places.place_of.cache_clear()
    unit = {"task": "pictures", "world": "canvas-flow", "mark": OURS, "guidance": 4.0, "start": 0, "count": 2}
    result = bench.compute(unit | {"attacks": ["none"]})
    ours, fixed = (result["found"]["none"][name] for name in (OURS, places.FIXED))
    assert len(ours["p"]) == 2 and max(ours["evaluations"]) <= sum(places.LADDER) and fixed["evaluations"] == [10, 10]
    assert set(result["right"]) == {"object", "style", "background"} and len(result["features"]) == 2
    assert set(result["agreement"]) == {"0", "1", "5", "10"}

    # with an inversion that finds the noise, detection does the rest: the ladder, the code, the payload's seal
    place = places.place_of("canvas-flow")
    noise, pixels = place.noise(OURS, 0, 1), torch.rand(1, 3, 128, 128)
    place.inverter.invert = lambda latents, steps: noise
    found = place.look((OURS, places.FIXED), pixels)
    assert found[OURS]["exact"] == found[places.FIXED]["exact"] == [True] and found[OURS]["p"][0] < 1e-6
    places.place_of.cache_clear()


def test_parts_that_no_model_changes_are_refused_for_another():
    with pytest.raises(
        ValueError, match="latents, speed do not depend on canvas-flow; expected some of linked, canvas, repaint"
    ):
        bench.run(True, ("canvas", "latents", "speed"), world="canvas-flow")
