"""From pictures back to their noise, on every family."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from semiperm.methods.errors import ModelError, SemipermError, WatermarkError
from semiperm.pipelines.family import denoiser_of, family_of
from semiperm.pipelines.latents import latent_shape
from semiperm.pipelines.watermark.inversion import encode_images, invert
from semiperm.pipelines.watermark.samplers import check_scheduler
from tiny_models import FAMILIES, build, build_wan

ALL = (*FAMILIES, "wan")


def make(family):
    return build_wan() if family == "wan" else build(family)


def draw(pipe, latents, steps, size=32):
    """The pipeline's own latents (unpacked) from given ones, without guidance, for the empty prompt."""
    name = type(pipe).__name__
    family = family_of(pipe)
    kwargs = {"guidance_scale": 1.0}
    kwargs |= {"num_frames": 5} if "Wan" in name else {}
    out = pipe(
        [""] * len(latents),
        latents=family.pack(pipe, latents),
        num_inference_steps=steps,
        height=size,
        width=size,
        output_type="latent",
        **kwargs,
    )[0]
    return family.unpack(pipe, out, size, size)


@pytest.mark.parametrize("family", [*ALL, "v_prediction"])
def test_inversion_undoes_sampling(family):
    pipe = make(family if family in ALL else "sd15")
    if family not in ALL:
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=family)
    with torch.no_grad():  # a random network is no denoiser: keep what it says small, and the path smooth
        for parameter in list(denoiser_of(pipe)[0].parameters())[-2:]:
            parameter.mul_(0.3)
    torch.manual_seed(0)
    noise = torch.randn(2, *latent_shape(pipe, 32, 32, 5 if family == "wan" else None))
    found = invert(pipe, draw(pipe, noise, 50), 50)
    correlation = torch.corrcoef(torch.stack([noise.flatten(), found.flatten()]))[0, 1]
    assert correlation > 0.97


@pytest.mark.parametrize("family", ALL)
def test_a_step_is_one_evaluation(family):
    pipe = make(family)
    calls = []
    denoiser_of(pipe)[0].register_forward_pre_hook(lambda *_: calls.append(1))
    latents = torch.randn(2, *latent_shape(pipe, 32, 48, 5 if family == "wan" else None))
    assert invert(pipe, latents, 0).equal(latents) and not calls
    found = invert(pipe, latents, 3)
    assert found.shape == latents.shape and found.dtype == torch.float32 and found.isfinite().all()
    assert len(calls) == 3


@pytest.mark.parametrize("family", ALL)
def test_shapes_are_the_pipelines_own(family):
    pipe = make(family)
    frames = 5 if family == "wan" else None
    shape = latent_shape(pipe, 32, 64, frames)
    video = torch.rand(2, *((5,) if frames else ()), 3, 32, 64)
    assert encode_images(pipe, video).shape == (2, *shape)
    if family in ("sd15", "sd2", "sdxl"):
        assert latent_shape(pipe) == (4, 8, 8)
    with pytest.raises(SemipermError, match="multiples of"):
        latent_shape(pipe, 33, 32, frames)


def test_encoding_is_the_pipelines_own_scale():
    pipe = build("sd3")
    pipe.vae.register_to_config(shift_factor=0.25)
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = (pipe.vae.encode(pixels * 2 - 1).latent_dist.mode() - 0.25) * pipe.vae.config.scaling_factor
    assert torch.allclose(encode_images(pipe, pixels), expected, atol=1e-5)
    array = (pixels[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    from_pil, from_array = encode_images(pipe, Image.fromarray(array)), encode_images(pipe, array)
    assert from_pil.equal(from_array)
    cut = encode_images(pipe, np.pad(array, ((0, 1), (0, 1), (0, 0))))
    assert cut.equal(from_array)  # odd pixels on the right and below are left out


def test_things_that_are_no_pictures():
    pipe = build("sd15")
    for images, words in (
        ([], "no pictures"),
        (["a.png"], "PIL image"),
        (torch.rand(1, 32, 32), r"\(1, 32, 32\)"),
        (torch.rand(3, 32, 32) * 255, r"in 0\.\.1, none NaN"),
        (torch.full((3, 32, 32), float("nan")), r"in 0\.\.1, none NaN"),
        (torch.rand(3, 1, 1), "smaller"),
        ([torch.rand(3, 32, 32), torch.rand(3, 32, 34)], "2 sizes"),
    ):
        with pytest.raises(SemipermError, match=words):
            encode_images(pipe, images)
    with pytest.raises(WatermarkError, match="steps >= 0"):
        invert(pipe, torch.rand(1, 4, 16, 16), -1)
    pipe.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(ModelError, match="'sample'; expected"):
        invert(pipe, torch.rand(1, 4, 16, 16), 1)
    with pytest.raises(WatermarkError, match="encode_images"):
        invert(pipe, torch.rand(1, 64, 16), 1)


@pytest.mark.parametrize(
    "name", ["DDIM", "EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep", "UniPCMultistep", "PNDM", "LMSDiscrete"]
)
def test_deterministic_samplers_pass(name):
    pipe = build("sd15")
    pipe.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(pipe.scheduler.config)
    check_scheduler(pipe)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EulerAncestralDiscrete", {}),
        ("KDPM2AncestralDiscrete", {}),
        ("DDPM", {}),
        ("LCM", {}),
        ("TCD", {}),
        ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_noisy_samplers_are_refused(name, options):
    pipe = build("sd15")
    pipe.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(pipe.scheduler.config, **options)
    with pytest.raises(ModelError, match=rf"{name}Scheduler.*DDIMScheduler"):
        check_scheduler(pipe)


def test_a_stochastic_flow_is_refused():
    pipe = build("sd3")
    check_scheduler(pipe)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(ModelError, match=r"stochastic_sampling=True.*FlowMatchEuler"):
        check_scheduler(pipe)
