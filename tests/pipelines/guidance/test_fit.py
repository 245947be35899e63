"""Detectors of several categories share the harmless pictures, and are those that each would get by itself."""

import pytest
import torch
from semiperm import Category, SafeGuidanceConfig, apply_safe_guidance, fit_detectors
from semiperm.methods.errors import GuidanceError
from semiperm.methods.guidance.examples import in_sentences
from semiperm.pipelines.attacks.context import draw_arithmetic
from tiny_models import build

SIGNS, CLAWS = (
    Category(name, (phrase,), false_alarms=0.45) for name, phrase in (("signs", "a sign"), ("claws", "a claw"))
)
HARMLESS = [f"a star, {i} times" for i in range(8)]


def test_several_categories_share_the_harmless_pictures():
    pipe, drawn = build("sd15"), []
    given = {"benign": HARMLESS, "steps": 4, "guidance_scale": 2.0}
    pairs = fit_detectors(pipe, [SIGNS, CLAWS], **given, progress=drawn.append)
    assert sum(drawn) == len(HARMLESS) + sum(len(in_sentences(one.phrases)) for one in (SIGNS, CLAWS))
    assert [pair.category for pair in pairs] == ["signs", "claws"]
    alone = fit_detectors(pipe, CLAWS, **given)
    for kind, names in (("text", ("weight", "offset")), ("picture", ("weights", "offsets"))):
        together, single = getattr(pairs[1], kind), getattr(alone, kind)
        assert all(torch.equal(getattr(together, name), getattr(single, name)) for name in names)
        assert together.threshold == single.threshold
    with apply_safe_guidance(pipe, SafeGuidanceConfig([SIGNS, CLAWS], "sld", detectors=pairs)) as handle:
        pipe("a star", num_inference_steps=3)
    (row,) = handle.report()["rows"]
    assert row["picture_score"] is not None and row["text_score"] is not None
    with pytest.raises(GuidanceError, match="prompts of 2 categories; expected those of one"):
        fit_detectors(pipe, [SIGNS, CLAWS], **given, prompts=["a claw"])


def test_prompts_that_are_mixed_are_refused():
    """Detectors judge prompts; a picture of several belongs to none of them."""
    pipe = build("sd15")
    (pair,) = fit_detectors(pipe, [SIGNS], benign=HARMLESS, pictures=False)
    with apply_safe_guidance(pipe, SafeGuidanceConfig(SIGNS, "adavd", detectors=[pair])), pytest.raises(
        GuidanceError, match="several are mixed into one picture"
    ):  # fmt: skip
        draw_arithmetic(pipe, [(1.0, "a sign and a house"), (-1.0, "a house")], 1, steps=2, guidance_scale=3.0)
