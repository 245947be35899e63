"""Pictures of the canvas whose mark knows what they show, and forgeries with their noise."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from semiperm.canvas import DEFAULT_GUIDANCE, DEFAULT_STEPS, load_pipeline
from semiperm.methods.errors import ModelError, WatermarkError
from semiperm.methods.watermark.keys import WatermarkKey
from semiperm.pipelines.watermark import content
from semiperm.pipelines.watermark.content import generate_bound
from semiperm.pipelines.watermark.detect import detect_watermark
from tiny_models import FAMILIES, LENGTH, build, build_wan

PROMPTS = [
    "a blue star in flat style on sand",
    "a robot in striped style on night",
    "a red heart in neon style on mint",
]
OTHERS = [
    "a pink moon in dotted style on night",
    "a green cross in flat style on sand",
    "a ghost in mosaic style on sky",
]
SETTINGS = {"guidance_scale": DEFAULT_GUIDANCE, "num_inference_steps": DEFAULT_STEPS}


def test_a_reprompted_picture_shows_something_else():
    pipe, key = load_pipeline(), WatermarkKey.new("studio", 1)
    bound = generate_bound(pipe, key, PROMPTS, generator=torch.Generator().manual_seed(0), **SETTINGS)
    assert len(bound.images) == 3 and min(bound.content_agreement) > 0.75 and min(bound.draws) >= 2
    genuine = detect_watermark(pipe, bound.images, [key])
    assert sum(r.verdict == "valid" for r in genuine) >= 2 and all(r.content_p_value is not None for r in genuine)
    forged = detect_watermark(pipe, pipe(OTHERS, latents=bound.latents, **SETTINGS).images, [key])
    assert all(r.log10_p < -6 for r in forged)  # the mark is there ...
    assert sum(r.verdict == "content differs" for r in forged) >= 2  # ... and the picture is not the signed one


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_bound(family, monkeypatch):
    """Up to the detector: in pictures of random weights there is no mark to find, so it is told that there is."""
    asked = []

    def detect_in(pixels, inverter, keys, config):
        asked.append([tuple(one.shape) for one in pixels])
        assert inverter.encode(pixels).shape[0] == 2 and keys == [key]
        return [SimpleNamespace(verdict="valid", content_p_value=1e-5)] * len(pixels)

    monkeypatch.setattr(content, "detect_in", detect_in)
    pipe, key = build(family), WatermarkKey.new("studio", 1)
    more = {"max_sequence_length": LENGTH} if family in ("flux", "sd3") else {}
    shapes = []

    def embedding(pixels):
        shapes.append(pixels.shape)
        return torch.arange(1.0, 17).expand(len(pixels), -1)

    found = generate_bound(
        pipe,
        key,
        ["a cat", "a dog"],
        height=32,
        width=32,
        embedding=embedding,
        num_inference_steps=1,
        guidance_scale=1.0,
        **more,
    )
    assert found.draws == [2, 2] and found.content_agreement == pytest.approx([1, 1], abs=1e-3)
    assert shapes == [(2, 3, 32, 32)] * 2 and len(found.latents) == 2 and asked == [[(3, 32, 32)] * 2]


def test_a_picture_in_which_the_detector_finds_nothing_is_not_given_away():
    """Tiny random models keep nothing of their noise, whatever the embedding says of the content."""
    call = {"height": 32, "width": 32, "rounds": 1, "num_inference_steps": 1, "guidance_scale": 1.0}
    with pytest.raises(
        WatermarkError, match="1 of 1 pictures .* the detector did not find their mark valid in 2 draws"
    ):
        generate_bound(
            build("sd15"),
            WatermarkKey.new("studio", 1),
            "a cat",
            embedding=lambda pixels: torch.arange(1.0, 17).expand(len(pixels), -1),
            **call,
        )


@pytest.mark.parametrize("verdict, p, kept", [("valid", 1e-3, 0), ("valid", 1e-4, 1), ("unverified", 1e-4, 0)])
def test_the_detector_has_to_find_content_with_a_margin(verdict, p, kept, monkeypatch):
    found = SimpleNamespace(verdict=verdict, content_p_value=p)
    monkeypatch.setattr(content, "detect_in", lambda pixels, *_: [found] * len(pixels))
    call = {"height": 32, "width": 32, "rounds": 1, "num_inference_steps": 1, "guidance_scale": 1.0}
    call |= {"embedding": lambda pixels: torch.arange(1.0, 17).expand(len(pixels), -1)}
    with nullcontext() if kept else pytest.raises(WatermarkError, match="did not find"):
        assert len(generate_bound(build("sd15"), WatermarkKey.new("studio", 1), "a cat", **call).images) == kept


def test_a_picture_that_never_stays_the_same_is_refused():
    pipe, key = build("sd15"), WatermarkKey.new("studio", 1)
    turns = iter(range(100))

    def embedding(pixels):
        return torch.eye(100)[next(turns)].expand(len(pixels), -1)

    with pytest.raises(WatermarkError, match="changed whenever"):
        generate_bound(
            pipe,
            key,
            "a cat",
            height=32,
            width=32,
            embedding=embedding,
            rounds=2,
            num_inference_steps=1,
            guidance_scale=1.0,
        )
    assert next(turns) == 3
    with pytest.raises(WatermarkError, match="0 prompts"):
        generate_bound(pipe, key, [])
    with pytest.raises(ModelError, match="WanPipeline .* is not supported"):
        generate_bound(build_wan(), key, "a cat")
