"""Signed noise in img2img and inpainting pipelines of every family, and the mark read back out of their pictures."""

import inspect
import itertools
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting
from PIL import Image
from semiperm.canvas import DEFAULT_GUIDANCE, DEFAULT_STEPS, load_pipeline
from semiperm.methods.errors import ModelError, WatermarkError
from semiperm.methods.watermark.keys import WatermarkKey
from semiperm.pipelines.family import family_of
from semiperm.pipelines.watermark.detect import detect_watermark
from semiperm.pipelines.watermark.noise import replace_noise
from semiperm.pipelines.watermark.sign import sign_noise
from tiny_models import FAMILIES, LENGTH, build

KINDS = {"img2img": AutoPipelineForImage2Image, "inpaint": AutoPipelineForInpainting}
MASK = torch.zeros(1, 1, 32, 32)
MASK[..., :16] = 1


def make(family, kind, dtype=torch.float32, scheduler=None):
    pipe = KINDS[kind].from_pipe(build(family, dtype=dtype))
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    encode = pipe.vae.encode  # without chance: all that the generator is asked for is the noise
    pipe.vae.encode = lambda pixels: SimpleNamespace(latents=encode(pixels).latent_dist.mode())
    return pipe


def noise_of(pipe, seed=5, batch=2):
    """What the pipeline itself draws from this seed."""
    return torch.randn(batch, pipe.vae.config.latent_channels, 16, 16, generator=torch.Generator().manual_seed(seed))


def call(pipe, strength=0.6, seed=5, **kwargs):
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    options = {"image": image, "mask_image": MASK, "height": 32, "width": 32, "output_type": "latent"}
    options |= {"max_sequence_length": LENGTH} | kwargs
    accepted = inspect.signature(type(pipe).__call__).parameters
    return pipe(
        ["a cat", "a dog"],
        strength=strength,
        num_inference_steps=5,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(seed),
        **{name: value for name, value in options.items() if name in accepted},
    )[0]


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize(
    "family, kind", [*itertools.product((*FAMILIES, "euler"), KINDS), ("nine channels", "inpaint")]
)
def test_the_noise_is_added_everywhere_bit_for_bit(family, kind, strength):
    euler = diffusers.EulerDiscreteScheduler if family == "euler" else None
    pipe = make(family if family in FAMILIES else "sd15", kind, scheduler=euler)
    if family == "nine channels":
        torch.manual_seed(0)
        pipe.register_modules(unet=type(pipe.unet).from_config(pipe.unet.config, in_channels=9))
    expected, other = call(pipe, strength), call(pipe, strength, seed=6)
    assert not other.equal(expected)
    before = dict(vars(pipe)), dict(vars(pipe.scheduler)).keys()
    with replace_noise(pipe, noise_of(pipe)):
        found = call(pipe, strength, seed=6)
    assert found.equal(expected)
    assert dict(vars(pipe)) == before[0] and vars(pipe.scheduler).keys() == before[1]
    assert call(pipe, strength, seed=6).equal(other)


@pytest.mark.parametrize("kind", KINDS)
def test_flux_takes_packed_noise(kind):
    pipe, key = make("flux", kind), WatermarkKey.new("studio", 7)
    packed = sign_noise(pipe, key, 2, 32, 32)
    with replace_noise(pipe, packed):
        found = call(pipe)
    with replace_noise(pipe, family_of(pipe).unpack(pipe, packed, 32, 32)):
        assert call(pipe).equal(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_half_precision(family, kind):
    pipe = make(family, kind, torch.bfloat16)
    with replace_noise(pipe, noise_of(pipe)):
        out = call(pipe)
    assert out.dtype == torch.bfloat16 and out.float().isfinite().all()


def test_a_call_without_the_noise_is_an_error():
    pipe, other = make("sd15", "img2img"), make("sd15", "img2img")
    with pytest.raises(WatermarkError, match="was not used"), replace_noise(pipe, noise_of(pipe)):
        call(other)
    with pytest.raises(WatermarkError, match="second time"), replace_noise(pipe, noise_of(pipe)):
        call(pipe)
        call(pipe)
    refiner = make("sdxl", "img2img")
    with pytest.raises(WatermarkError, match="added no noise"), replace_noise(refiner, noise_of(refiner)):
        call(refiner, denoising_start=0.5)
    inpaint = make("sdxl", "inpaint")
    with pytest.raises(WatermarkError, match="added no noise"), replace_noise(inpaint, noise_of(inpaint)):
        call(inpaint, denoising_start=0.5)
    text = build("sd15")
    with pytest.raises(WatermarkError, match="latents="), replace_noise(text, noise_of(text)):
        text("a cat", height=32, width=32, num_inference_steps=2)


def test_everything_is_restored_after_an_error():
    pipe = make("sd15", "img2img")
    expected, methods = call(pipe), dict(vars(pipe))
    with pytest.raises(RuntimeError, match="mine"), replace_noise(pipe, noise_of(pipe)):
        raise RuntimeError("mine")
    with pytest.raises(ModelError, match="eta=0, or up to 0.3"), replace_noise(pipe, noise_of(pipe)):
        call(pipe, eta=0.5)
    assert dict(vars(pipe)) == methods and call(pipe).equal(expected)
    pipe.prepare_latents = own = pipe.prepare_latents  # somebody else's wrapper stays
    with replace_noise(pipe, noise_of(pipe)):
        assert call(pipe).equal(expected)
    assert vars(pipe)["prepare_latents"] is own


def test_what_is_refused():
    pipe = make("sd15", "img2img")
    for noise, words in (
        (noise_of(pipe, batch=3), r"\(3, 4, 16, 16\).*\(2, 4, 16, 16\)"),
        (noise_of(pipe)[..., :8], r"\(2, 4, 16, 8\)"),
        (noise_of(pipe) * torch.nan, "finite"),
        ("noise", "str"),
    ):
        with pytest.raises(WatermarkError, match=words), replace_noise(pipe, noise):
            call(pipe)
    inpaint = make("sd15", "inpaint")
    with pytest.raises(WatermarkError, match="leave latents= out"), replace_noise(inpaint, noise_of(inpaint)):
        call(inpaint, latents=noise_of(inpaint))
    picture = {"image": Image.new("RGB", (32, 32)), "mask_image": Image.new("L", (32, 32), 255)}
    with pytest.raises(WatermarkError, match="shrinks it back"), replace_noise(inpaint, noise_of(inpaint)):
        call(inpaint, padding_mask_crop=4, output_type="pil", **picture)
    ancestral = make("sd15", "img2img", scheduler=diffusers.EulerAncestralDiscreteScheduler)
    with pytest.raises(ModelError, match="EulerAncestral"), replace_noise(ancestral, noise_of(pipe)):
        call(ancestral)


@pytest.fixture(scope="module")
def canvas():
    return load_pipeline()


@pytest.fixture(scope="module")
def drawn(canvas):
    prompts = ["a red robot in striped style on sky", "a blue ghost in dotted style on sand"]
    generator = torch.Generator().manual_seed(2)
    return canvas(prompts, num_inference_steps=DEFAULT_STEPS, generator=generator, output_type="pt").images


def refined(canvas, kind, pictures, key, strength, **kwargs):
    pipe = KINDS[kind].from_pipe(canvas)
    pipe.set_progress_bar_config(disable=True)
    with replace_noise(pipe, sign_noise(pipe, key, 2, generator=torch.Generator().manual_seed(3))):
        return pipe(
            ["a green star in dotted style on sky", "a pink moon in mosaic style on sand"],
            image=pictures,
            strength=strength,
            guidance_scale=DEFAULT_GUIDANCE,
            num_inference_steps=DEFAULT_STEPS,
            generator=torch.Generator().manual_seed(4),
            output_type="pt",
            **kwargs,
        ).images


@pytest.mark.parametrize("strength", [0.3, 0.7])
def test_the_mark_is_read_after_img2img(canvas, drawn, strength):
    key = WatermarkKey("studio", 7, "2026-01-01T00:00:00+00:00", bytes(range(32)), bytes(range(32, 64)))
    pictures = refined(canvas, "img2img", drawn, key, strength)
    results = detect_watermark(canvas, [*pictures, *drawn], [key], ladder=(1, 5))
    assert [r.verdict for r in results] == ["valid", "valid", "absent", "absent"]


def test_the_mark_is_read_in_what_was_inpainted(canvas, drawn):
    key = WatermarkKey("studio", 7, "2026-01-01T00:00:00+00:00", bytes(range(32)), bytes(range(32, 64)))
    mask = torch.zeros(128, 128)
    mask[:, :64] = 1
    pictures = refined(canvas, "inpaint", drawn, key, 0.7, mask_image=mask[None, None])
    inside = detect_watermark(canvas, pictures, [key], ladder=(5,), mask=mask)
    outside = detect_watermark(canvas, pictures, [key], ladder=(5,), mask=1 - mask)
    whole = detect_watermark(canvas, pictures, [key], ladder=(5,))
    assert [r.verdict for r in outside] == ["absent", "absent"]
    for marked, everywhere in zip(inside, whole, strict=True):
        assert marked.log10_p < -6 and marked.log10_p < everywhere.log10_p


def test_another_thread_that_shares_the_scheduler_keeps_its_own_noise():
    """Only the thread of the block has its noise replaced."""
    import threading

    from semiperm.pipelines.watermark.noise import _replaced

    class Scheduler:
        def add_noise(self):
            return "its own"

    shared, found = Scheduler(), []
    with _replaced(shared, "add_noise", lambda original: "signed"):
        other = threading.Thread(target=lambda: found.append(shared.add_noise()))
        other.start()
        other.join()
        found.append(shared.add_noise())
    assert found == ["its own", "signed"] and shared.add_noise() == "its own" and not vars(shared)
