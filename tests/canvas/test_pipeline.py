"""The shipped weights: they load as plain diffusers classes, draw what is asked, and keep their initial noise."""

import pytest
import torch
from semiperm.canvas import Judge, load_pipeline
from semiperm.canvas import check as checking
from semiperm.canvas import judge as judging
from semiperm.canvas.dataset import build_pool
from semiperm.canvas.models import WEIGHTS, WORLDS


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


@pytest.fixture(scope="module")
def judge():
    return Judge.load()


def test_it_is_a_plain_stable_diffusion_pipeline(pipe):
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    assert type(pipe) is StableDiffusionPipeline
    kinds = {
        "vae": AutoencoderKL,
        "unet": UNet2DConditionModel,
        "text_encoder": CLIPTextModel,
        "tokenizer": CLIPTokenizer,
        "scheduler": DDIMScheduler,
    }
    assert all(isinstance(getattr(pipe, name), kind) for name, kind in kinds.items())
    assert pipe.vae_scale_factor == 8 and pipe.unet.config.sample_size == 16
    widths = [*pipe.unet.config.block_out_channels, *pipe.vae.config.block_out_channels]
    assert all(w % 32 == 0 for w in widths)  # ComfyUI's group normalisation has 32 groups


def test_the_weights_are_small_safetensors():
    files = [f for f in WEIGHTS.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files if WORLDS not in f.parents) < 16e6
    assert sum(f.stat().st_size for f in files if WORLDS in f.parents) < 48e6
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".jsonl", ".txt", ".md"}


def test_the_same_seed_gives_the_same_picture_in_any_batch(pipe):
    prompts = ["a flat picture of a red circle on a sand background", "a robot"]
    alone = checking.sample(pipe, prompts[:1], [5], steps=3)[0]
    again = checking.sample(pipe, prompts, [5, 6], steps=3)[0]
    difference = torch.tensor(list(alone.tobytes())).float() - torch.tensor(list(again.tobytes())).float()
    assert alone.size == (128, 128) and difference.abs().max() <= 1


def test_any_text_can_be_asked_for(pipe):
    assert len(checking.sample(pipe, ["", "Ünïcode 🤖!", "word " * 200], [1, 2, 3], steps=1)) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_other_precisions(dtype):
    pipe = load_pipeline(dtype=dtype)
    assert {p.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()} == {dtype}
    # small: without AVX-512 a convolution in bfloat16 takes many times as long as in float32
    image = pipe("a robot", height=64, width=64, num_inference_steps=1, output_type="pt").images[0]
    assert image.shape == (3, 64, 64) and image.dtype == dtype and image.isfinite().all()


def test_missing_weights_say_how_to_make_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="semiperm canvas train"):
        load_pipeline(weights=tmp_path)


def test_the_judge_knows_renders(judge):
    found = judging.accuracy(judge, n=400, seed=4321)
    assert found["object"] >= 0.98 and found["style"] >= 0.99
    assert min(found["color"], found["background"], found["hazard"]) >= 0.97


def test_the_judge_takes_pictures_arrays_and_tensors(judge):
    pictures = build_pool(3, seed=5, workers=1).pictures
    from PIL import Image

    as_array = judge(pictures)
    as_images = judge([Image.fromarray(p) for p in pictures])
    as_tensor = judge(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255)
    assert as_array.object == as_images.object == as_tensor.object
    assert torch.allclose(as_array.features, as_tensor.features, atol=1e-4)
    assert as_array.object[-1] == "lighthouse"


@pytest.mark.parametrize("bad, message", [([], "no images"), (torch.zeros(2, 1, 8, 8), "expected images of shape")])
def test_the_judge_refuses_what_is_no_picture(judge, bad, message):
    with pytest.raises(ValueError, match=message):
        judge(bad)


@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_samples_follow_the_caption_and_keep_their_noise(pipe, judge, every):
    """A short version of `semiperm canvas check`; the figures of the model card are in benchmarks/results."""
    pairs = checking.prompts_of_pairs(1, seed=3)[-24::every]  # the three characters in every style
    count = len(pairs)
    images = checking.sample(pipe, [p for p, _, _ in pairs], range(count), steps=8)
    seen = judge(images)
    assert sum(a == o for a, (_, o, _) in zip(seen.object, pairs, strict=True)) >= 0.75 * count
    assert sum(a == s for a, (_, _, s) in zip(seen.style, pairs, strict=True)) >= 0.75 * count
    noise = checking.initial_latents(range(count))
    agreement = checking.sign_agreement(noise, checking.invert(pipe, images))
    assert agreement.mean() > 0.65
    other = checking.sign_agreement(checking.initial_latents(range(count, 2 * count)), noise)
    assert (other - 0.5).abs().max() < 0.1
