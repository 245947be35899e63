"""The training code in miniature: it learns, stops, resumes to the same weights, and what it writes loads."""

import contextlib
import functools
import json

import numpy as np
import pytest
import torch
from semiperm.canvas import Judge, autoencoder, dataset, denoiser, judge, load_pipeline, loop, text, training
from torch import nn


def test_the_untrained_autoencoder_passes_colour():
    """The linear start: latents are the 8x8 averages, and the decoder gives them back."""
    pool = dataset.build_pool(4, seed=1, workers=1)
    x = autoencoder.to_tensor(pool.pictures)
    vae = autoencoder.build_autoencoder()
    with torch.no_grad():
        z = autoencoder.encode_mean(vae, x)
        y = vae.decode(z).sample
    pooled = nn.functional.avg_pool2d(x, 8)
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    assert torch.corrcoef(torch.stack([z[:, :3][inner].flatten(), pooled[inner].flatten()]))[0, 1] > 0.98
    again = nn.functional.avg_pool2d(y, 8)
    assert torch.corrcoef(torch.stack([again[inner].flatten(), pooled[inner].flatten()]))[0, 1] > 0.95


def test_whitening_gives_unit_latents_and_changes_no_picture():
    pool = dataset.build_pool(4, seed=2, workers=1)
    vae = autoencoder.build_autoencoder()
    x = autoencoder.to_tensor(pool.pictures[:4])
    with torch.no_grad():
        before = vae.decode(vae.encode(x).latent_dist.mode()).sample
        autoencoder.whiten(vae, pool, n=4)
        latents = vae.encode(x).latent_dist
        after = vae.decode(latents.mode()).sample
        z = latents.mode() * autoencoder.SCALING_FACTOR
    flat = z.permute(0, 2, 3, 1).reshape(-1, 4)
    assert torch.allclose(flat.mean(0), torch.zeros(4), atol=1e-3)
    assert torch.allclose(flat.T @ flat / len(flat), torch.eye(4), atol=1e-3)
    assert (latents.std.max() * autoencoder.SCALING_FACTOR) < 1e-4
    assert torch.allclose(before, after, atol=2e-3)


def tiny_problem(seed=0):
    torch.manual_seed(seed)
    model = nn.Linear(4, 1)
    truth = torch.tensor([[1.0, -2.0, 3.0, 0.5]])

    def loss_of(step):
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(step))
        return {"loss": (model(x) - x @ truth.T).pow(2).mean()}

    return model, loss_of


def test_a_resumed_run_equals_an_unbroken_one(tmp_path):
    model, loss_of = tiny_problem()
    whole = loop.train("part", model, loss_of, steps=250, lr=0.1, workdir=tmp_path / "a")
    model, loss_of = tiny_problem()
    loop.train("part", model, loss_of, steps=250, lr=0.1, workdir=tmp_path / "b", stop_after=120)
    model, loss_of = tiny_problem(seed=9)  # other weights: they must come from the checkpoint
    resumed = loop.train("part", model, loss_of, steps=250, lr=0.1, workdir=tmp_path / "b")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    rows = [json.loads(line) for line in (tmp_path / "a" / "part.log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 250 and rows[-1]["loss"] < 5
    assert not list(tmp_path.glob("**/*.partial"))


@pytest.fixture
def corners(monkeypatch):
    """Autoencoder and judge learn from corners of 32 x 32, the denoiser from two pictures a step.

    Training runs in bfloat16, which takes minutes at full size on a CPU without AVX-512.
    """
    to_tensor, augment = autoencoder.to_tensor, judge._augment
    monkeypatch.setattr(autoencoder, "to_tensor", lambda pictures: to_tensor(pictures)[..., :32, :32])
    monkeypatch.setattr(judge, "_augment", lambda x, generator: augment(x[..., :32, :32], generator))
    monkeypatch.setattr(denoiser, "train_denoiser", functools.partial(denoiser.train_denoiser, batch=2))


def test_training_in_miniature_gives_weights_that_load_and_can_be_trained_on(corners, tmp_path):
    steps = {"autoencoder_steps": 1, "judge_steps": 1, "denoiser_steps": 1, "pictures": 3, "compile": False}
    training.train_canvas(tmp_path / "out", tmp_path / "work", **steps)
    pipe = load_pipeline(weights=tmp_path / "out")
    assert pipe(["a robot"], num_inference_steps=1).images[0].size == (128, 128)
    assert Judge.load(tmp_path / "out" / "judge.safetensors")(np.zeros((1, 128, 128, 3), np.uint8)).object
    on = tmp_path / "on"
    training.train_canvas(on, tmp_path / "w2", parts=("denoiser",), start_from=tmp_path / "out", **steps)
    again = load_pipeline(weights=on)
    kept = again.vae.state_dict()
    assert all(torch.equal(v, kept[k]) for k, v in pipe.vae.state_dict().items())
    assert {f.name for f in on.iterdir()} >= {"unet.safetensors", "training.json", "denoiser.log.jsonl"}

    assert json.loads((on / "training.json").read_text())["denoiser_steps"] == 2
    assert not list(tmp_path.glob("**/*.partial"))


def test_latents_are_encoded_once_and_again_for_another_autoencoder_or_pool(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_: contextlib.nullcontext())  # bfloat16: see `corners`
    made = []

    def pool():
        made.append(dataset.build_pool(2, seed=4, workers=1))
        return made[-1]

    tokenizer, cache = text.build_tokenizer(n_captions=100), tmp_path / "latents.safetensors"
    vae, other = autoencoder.build_autoencoder(0), autoencoder.build_autoencoder(1)
    first = denoiser.encode_pool(vae, tokenizer, pool, 4, cache, "a")
    again = denoiser.encode_pool(vae, tokenizer, pool, 4, cache, "a")
    assert len(made) == 1 and (first.order == again.order).all()
    assert torch.equal(first.latents, again.latents) and torch.equal(first.ids, again.ids)
    denoiser.encode_pool(vae, tokenizer, pool, 4, cache, "b")
    changed = denoiser.encode_pool(other, tokenizer, pool, 4, cache, "b")
    assert len(made) == 3 and not torch.equal(first.latents, changed.latents)


def test_an_unknown_part_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="unknown parts ..vea..; choose from autoencoder"):
        training.train_canvas(tmp_path, tmp_path, parts=("vea",))


@pytest.mark.slow
def test_the_denoiser_learns(tmp_path):
    pool = dataset.build_pool(24, seed=3, workers=1)
    tokenizer = text.build_tokenizer(n_captions=500)
    data = denoiser.encode_pool(autoencoder.build_autoencoder(), tokenizer, lambda: pool, 3)
    assert data.latents.shape == (25, 4, 16, 16) and data.ids.shape == (25, denoiser.PHRASINGS, text.MAX_LENGTH)
    encoder = text.build_text_encoder(tokenizer)
    denoiser.train_denoiser(
        data, tokenizer, denoiser.build_unet(), encoder, tmp_path, steps=200, batch=8, compile=False
    )
    rows = [json.loads(line) for line in (tmp_path / "denoiser.log.jsonl").read_text().splitlines()]
    assert rows[-1]["epsilon_mse"] < 0.8 * rows[0]["epsilon_mse"] and np.isfinite(rows[-1]["loss"])


@pytest.mark.parametrize("words", ["a red circle", "Ünïcode 🤖 xyzzy!?", "", "w" * 400, "a " * 100])
def test_the_tokenizer_takes_any_text(words):
    tokenizer = text.build_tokenizer(n_captions=300)
    ids = text.tokenize(tokenizer, [words])
    assert ids.shape == (1, text.MAX_LENGTH) and ids.max() < len(tokenizer)
    assert ids[0, 0] == tokenizer.bos_token_id


def test_common_words_are_one_token_each():
    tokenizer = text.build_tokenizer()
    for phrase in ("robot", "mosaic", "lighthouse", "background"):
        assert len(tokenizer(phrase).input_ids) == 3
