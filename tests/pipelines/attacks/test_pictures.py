"""Attacks through a model: shapes and errors on every family, what they do to a mark on the canvas."""

import copy

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from marks import seeded
from semiperm.canvas import load_pipeline
from semiperm.methods.attacks.pictures import ATTACKS, attack
from semiperm.methods.errors import SemipermError, WatermarkError
from semiperm.methods.watermark.keys import WatermarkKey
from semiperm.methods.watermark.mark import KeyedMark, read
from semiperm.methods.watermark.statistics import without_offset
from semiperm.pipelines.attacks.pictures import (
    imprint,
    model_attacks,
    regenerate,
    reprompt,
    steal_noise,
    transplant,
    vae_reencode,
)
from semiperm.pipelines.watermark.inversion import encode_images, invert
from semiperm.pipelines.watermark.mixin import WatermarkMixin
from tiny_models import FAMILIES, LENGTH, build, build_wan

PROMPT, OTHER = "an eared mascot in striped style on sky", "a robot in sketch style on sand"


def words_of(family):
    return {"max_sequence_length": LENGTH} if family in ("sd3", "flux") else {}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_attacked_and_left_as_it_was(family):
    pipe, more = build(family), words_of(family)
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    before = copy.deepcopy({name: module.state_dict() for name, module in modules.items()})
    scheduler, config = pipe.scheduler, dict(pipe.scheduler.config)
    pixels = torch.rand(2, 3, 33, 48, generator=seeded())
    found = {
        "vae": vae_reencode(pipe, pixels),
        "regenerate": regenerate(pipe, pixels, 0.5, ["a cat", "a dog"], 4, seeded(), **more),
        "reprompt": reprompt(pipe, pixels, "a cat", steps=2, inversion_steps=1, guidance_scale=2.0, **more),
        "transplant": transplant(pipe, pixels[:1], pixels, 0.5, steps=4, inversion_steps=1, **more),
        "imprint": imprint(pipe, pixels.flip(0), pixels, 2, inversion_steps=1),
    }
    for name, out in found.items():
        assert out.shape == (2, 3, 32, 48) and out.dtype == pixels.dtype, name
        assert out.isfinite().all() and 0 <= out.amin() and out.amax() <= 1 and not out.requires_grad, name
    assert regenerate(pipe, pixels, 0.5, ["a cat", "a dog"], 4, seeded(), **more).equal(found["regenerate"])
    assert all(before[n][k].equal(v) for n, module in modules.items() for k, v in module.state_dict().items())
    assert pipe.scheduler is scheduler and dict(scheduler.config) == config
    assert all(parameter.grad is None for module in modules.values() for parameter in module.parameters())


def test_decoding_is_the_pipelines_own():
    pipe = build("sd3")
    pipe.vae.register_to_config(shift_factor=0.25)
    pixels = torch.rand(1, 3, 32, 32, generator=seeded())
    latents = encode_images(pipe, pixels)
    drawn = pipe("a cat", latents=latents, num_inference_steps=1, height=32, width=32, output_type="latent").images
    with torch.no_grad():
        expected = pipe.vae.decode(latents / pipe.vae.config.scaling_factor + 0.25)[0] / 2 + 0.5
    assert drawn.shape == latents.shape and vae_reencode(pipe, pixels).allclose(expected.clamp(0, 1), atol=1e-5)


def test_attacks_by_name_and_on_a_pipeline_of_ones_own():
    class Marked(WatermarkMixin, StableDiffusionPipeline):
        pass

    base = build("sd15")
    pipe = Marked(**base.components, requires_safety_checker=False)
    pixels = torch.rand(2, 3, 32, 32, generator=seeded())
    known = ATTACKS | model_attacks(pipe, steps=4)
    assert attack(pixels, "vae-reencode", attacks=known).allclose(vae_reencode(base, pixels), atol=1e-6)
    named = attack(pixels, "flip+regenerate:0.5", seeded(3), known)
    assert named.allclose(regenerate(base, pixels.flip(3), 0.5, steps=4, generator=seeded(3)), atol=1e-6)
    with pytest.raises(WatermarkError, match="no attack 'regenerate'"):
        attack(pixels, "regenerate")


def test_stolen_noise_is_noise():
    pipe = build("sd15")
    pixels = torch.rand(3, 3, 32, 32, generator=seeded())
    noise = steal_noise(pipe, pixels, 1)
    assert noise.shape == (3, 4, 16, 16)
    assert noise.mean((2, 3)).abs().max() < 1e-5 and noise.std((1, 2, 3)).sub(1).abs().max() < 1e-5
    mean = steal_noise(pipe, pixels, 1, average=True)
    assert mean.shape == (1, 4, 16, 16) and mean.std() == pytest.approx(1, abs=1e-5)
    again = pipe("a cat", latents=noise[:1], num_inference_steps=2, guidance_scale=1.0, output_type="pt").images
    forged = reprompt(pipe, pixels[:1], "a cat", steps=2, inversion_steps=1, guidance_scale=1.0)
    assert forged.allclose(again, atol=1e-5)


def test_what_cannot_be_attacked():
    pipe, pixels = build("sd15"), torch.rand(2, 3, 32, 32)
    wide = torch.rand(2, 3, 32, 48)
    noisy = build("sd15")
    noisy.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(noisy.scheduler.config)
    wan = build_wan()
    for call, words in (
        (lambda: regenerate(pipe, pixels, 0.0), "above 0"),
        (lambda: regenerate(pipe, pixels, 1.1), "up to 1"),
        (lambda: regenerate(pipe, pixels, 0.1, steps=5), "takes 0 of them"),
        (lambda: regenerate(pipe, pixels, 0.5, ["a"] * 3), "3 prompts were given for 2"),
        (lambda: regenerate(wan, pixels, 0.5), "videos"),
        (lambda: vae_reencode(wan, pixels), "videos"),
        (lambda: vae_reencode(pipe, pixels[0]), r"\(B, 3, H, W\)"),
        (lambda: vae_reencode(pipe, torch.rand(1, 3, 1, 32)), "at least 2 x 2"),
        (lambda: vae_reencode(pipe, pixels * 9), r"leave 0\.\.1"),
        (lambda: regenerate(pipe, pixels * 9, 0.5), r"leave 0\.\.1"),
        (lambda: regenerate(pipe, "a.png", 0.5), "is str; expected"),
        (lambda: reprompt(pipe, pixels, ["a"] * 3), "3 prompts were given for 2 stolen"),
        (lambda: reprompt(pipe, pixels[:1], []), "0 prompts"),
        (lambda: transplant(pipe, wide, pixels), "one size"),
        (lambda: transplant(pipe, pixels, torch.rand(3, 3, 32, 32)), "as many as covers"),
        (lambda: transplant(noisy, pixels, pixels, inversion_steps=1), "EulerAncestral"),
        (lambda: imprint(pipe, wide, pixels), "one size"),
        (lambda: imprint(pipe, pixels, pixels, -1), "steps >= 0"),
        (lambda: imprint(pipe, pixels, pixels, inversion_steps=0), "1 inversion step"),
    ):
        with pytest.raises(SemipermError, match=words):
            call()


@pytest.fixture(scope="module")
def canvas():
    return load_pipeline()


@pytest.fixture(scope="module")
def signed(canvas):
    """(key, marked pictures, clean pictures of something else)"""
    key = WatermarkKey.new("studio", 7)
    latents = KeyedMark(key).sample((2, 4, 16, 16), generator=seeded(1))
    call = {"guidance_scale": 2.5, "num_inference_steps": 15, "output_type": "pt"}
    marked = canvas([PROMPT] * 2, latents=latents, **call).images
    return key, marked, canvas([OTHER] * 2, generator=seeded(2), **call).images


def weight(canvas, key, pixels):
    """log10 of the p-value of each picture at 1 step."""
    noise = without_offset(invert(canvas, encode_images(canvas, pixels), 1))
    return [reading.log10_p for reading in read(noise, [key])]


def distance(one, other):
    return (one - other).square().mean().sqrt().item()


def test_forgeries_carry_the_mark(canvas, signed):
    key, marked, clean = signed
    assert max(weight(canvas, key, marked)) < -6 < -3 < min(weight(canvas, key, clean))
    forged = reprompt(canvas, marked, OTHER, steps=15, guidance_scale=2.5)
    assert max(weight(canvas, key, forged)) < -6
    moved = transplant(canvas, marked, clean, 0.7, OTHER, steps=15)
    assert max(weight(canvas, key, moved)) < -6
    stamped = imprint(canvas, marked, clean, 8, rate=0.1)
    assert max(weight(canvas, key, stamped)) < -6
    for forgery in (moved, stamped):
        assert distance(forgery, clean) < distance(forgery, marked)
    assert distance(imprint(canvas, marked, clean, 0), vae_reencode(canvas, clean)) == 0


def test_regeneration_wears_the_mark_down(canvas, signed):
    key, marked, _ = signed
    little, much = (regenerate(canvas, marked, s, PROMPT, 25, seeded()) for s in (0.1, 0.9))
    through = sum(weight(canvas, key, vae_reencode(canvas, marked)))
    assert through < -12 and through <= sum(weight(canvas, key, little)) + 10
    assert sum(weight(canvas, key, much)) > -6
    assert distance(little, marked) < distance(much, marked)
