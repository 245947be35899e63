"""Sign the noise, draw with an unmodified pipeline, read the mark back out of the picture."""

from types import SimpleNamespace

import diffusers
import pytest
import semiperm.methods.watermark.detection as core
import semiperm.pipelines.watermark.sign as face
import torch
from diffusers import StableDiffusionPipeline
from semiperm.canvas import DEFAULT_GUIDANCE, DEFAULT_STEPS, load_pipeline
from semiperm.methods.errors import SemipermError
from semiperm.methods.watermark.keyring import Keyring
from semiperm.methods.watermark.keys import WatermarkKey
from semiperm.pipelines.watermark.detect import detect_watermark
from semiperm.pipelines.watermark.mixin import WatermarkMixin
from semiperm.pipelines.watermark.sign import sign_noise
from tiny_models import FAMILIES, LENGTH, build, build_wan

PROMPTS = ["an eared mascot in striped style on sky", "a round mascot in dotted style on sand"] * 2


@pytest.fixture(scope="module")
def key():
    return WatermarkKey.new("studio", 7)


@pytest.fixture(scope="module")
def canvas():
    return load_pipeline()


@pytest.fixture(scope="module")
def marked(canvas, key):
    latents = sign_noise(canvas, key, len(PROMPTS), generator=torch.Generator().manual_seed(3))
    return canvas(PROMPTS, latents=latents, guidance_scale=DEFAULT_GUIDANCE, num_inference_steps=DEFAULT_STEPS).images


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", [*FAMILIES, "wan"])
def test_unmodified_pipelines_take_the_noise(family, dtype, key):
    if family == "wan" and dtype != torch.float32:
        pytest.skip("Wan's pipeline takes float32 latents whatever its dtype")
    pipe = build_wan() if family == "wan" else build(family, dtype=dtype)
    size, more = (64, {"num_frames": 5}) if family == "wan" else (32, {})
    more |= {"max_sequence_length": LENGTH} if family in ("wan", "flux", "sd3") else {}
    latents = sign_noise(pipe, key, 2, size, size, frames=5 if family == "wan" else None)
    assert latents.dtype == dtype and latents.ndim == {"flux": 3, "wan": 5}.get(family, 4)
    out = pipe(
        ["a cat", "a dog"],
        latents=latents,
        height=size,
        width=size,
        num_inference_steps=1,
        guidance_scale=1.0,
        output_type="latent",
        **more,
    )[0]
    assert out.shape == latents.shape and out.float().isfinite().all()


@pytest.mark.parametrize("family", [*FAMILIES, "wan"])
def test_pictures_of_every_family_can_be_searched(family, key):
    pipe = build_wan() if family == "wan" else build(family)
    pictures = torch.rand(2, 5, 3, 64, 64) if family == "wan" else torch.rand(2, 3, 32, 32)
    results = detect_watermark(pipe, pictures, [key], ladder=(0, 2), size=tuple(pictures.shape[-2:]))
    assert [r.verdict for r in results] == ["absent", "absent"]
    assert all(r.model_evaluations == 2 and r.payload is None and r.key_id is None for r in results)
    assert all(0 < r.p_value <= 1 for r in results)


def test_the_mark_is_read_out_of_pictures(canvas, key, marked):
    results = detect_watermark(canvas, marked, Keyring([WatermarkKey.new("other", 8), key]))
    assert [r.key_name for r in results] == ["studio"] * len(marked)
    assert all(r.log10_p < -6 and r.model_evaluations <= 6 for r in results)
    assert sum(r.verdict == "valid" for r in results) >= 3
    again = detect_watermark(canvas, marked[1], [key])[0]
    assert again.verdict == results[1].verdict and again.payload == results[1].payload


def test_payloads_come_back(canvas, key):
    payloads = [face.Payload(unique_id=i + 11) for i in range(2)]
    latents = sign_noise(canvas, key, 2, payload=payloads, generator=torch.Generator().manual_seed(5))
    images = canvas(PROMPTS[:2], latents=latents, guidance_scale=1.0, num_inference_steps=DEFAULT_STEPS).images
    results = detect_watermark(canvas, images, [key])
    assert [r.payload.unique_id for r in results] == [11, 12]
    assert [r.verdict for r in results] == ["valid", "valid"]


def test_without_the_mac_key_nothing_is_valid(canvas, key, marked):
    results = detect_watermark(canvas, marked, Keyring([key]).detector(), ladder=(1,))
    assert {r.verdict for r in results} == {"unverified"}
    assert all(r.model_evaluations == 1 for r in results)


def test_other_keys_and_unmarked_pictures_show_nothing(canvas, marked):
    other = WatermarkKey.new("other", 8)
    assert {r.verdict for r in detect_watermark(canvas, marked[:2], [other], ladder=(0, 1, 5))} == {"absent"}


def test_pictures_of_several_sizes_keep_their_order(canvas, key, marked):
    large = torch.rand(3, 160, 128)
    results = detect_watermark(canvas, [large, marked[0], large, marked[1]], [key], ladder=(1,))
    assert [r.key_name for r in results] == [None, "studio", None, "studio"]


def test_the_ladder_stops_early_and_pays_for_every_rung(key, monkeypatch):
    pipe = build("sd15")
    p_of_rung = {0: (-3.0, -7.0), 1: (-9.0, -6.2), 5: (None, -5.0)}
    rungs = iter(p_of_rung)
    rows = []

    def read(noise, keys, scope, votes, thorough):
        assert thorough and not votes
        values = [v for v in p_of_rung[next(rungs)] if v is not None]
        rows.append(len(noise))
        said = {"key_id": 7, "key_name": "studio", "payload": face.Payload(1), "bit_confidence": 0.5}
        said |= {"bound": False, "evidence": None}
        return [SimpleNamespace(p_value=10**v, log10_p=v, mac_ok=v < -8, **said) for v in values]

    monkeypatch.setattr(core, "read", read)
    first, second = detect_watermark(pipe, torch.rand(2, 3, 32, 32), [key], ladder=(0, 1, 5), size=(32, 32))
    assert rows == [2, 2, 1]
    assert first.verdict == "valid" and first.model_evaluations == 1
    assert first.log10_p == pytest.approx(-9 + torch.tensor(3.0).log10().item())
    assert second.verdict == "unverified" and second.model_evaluations == 6  # -7 + log10(3) is still below -6
    assert second.log10_p == pytest.approx(-7 + torch.tensor(3.0).log10().item())


def test_the_mixin_is_the_functions(canvas, key):
    class Marked(WatermarkMixin, StableDiffusionPipeline):
        pass

    pipe = Marked(**canvas.components, requires_safety_checker=False)
    one, other = (torch.Generator().manual_seed(1) for _ in range(2))
    assert pipe.sign_noise(key, 1, generator=one).equal(sign_noise(canvas, key, 1, generator=other))
    assert pipe.detect_watermark(torch.rand(3, 128, 128), [key], ladder=(0,))[0].verdict == "absent"


def test_what_cannot_be_signed_or_searched(key):
    pipe, picture = build("sd15"), torch.rand(3, 32, 32)
    for call, words in (
        (lambda: sign_noise(pipe, key, 0, 32, 32), "at least 1"),
        (lambda: sign_noise(pipe, key, 1, 31, 32), "multiples of 2"),
        (lambda: sign_noise(pipe, key, 1, 8, 8), "1024"),
        (lambda: sign_noise(pipe, key, 1, 32, 32, frames=5), "frames"),
        (lambda: detect_watermark(pipe, picture, []), "empty"),
        (lambda: detect_watermark(pipe, picture, [key], false_positive_rate=0), "false positive rate"),
        (lambda: detect_watermark(pipe, picture, [key], ladder=()), "ladder"),
        (lambda: detect_watermark(pipe, picture, [key], ladder=(5, 1)), "ladder"),
        (lambda: detect_watermark(pipe, [], [key]), "no pictures"),
    ):
        with pytest.raises(SemipermError, match=words):
            call()
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(SemipermError, match="EulerAncestral"):
        sign_noise(pipe, key, 1, 32, 32)
