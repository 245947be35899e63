import copy
import dataclasses
import functools

import pytest


@functools.cache
def _parts():
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from semiperm.canvas import autoencoder, denoiser, judge, text

    torch.manual_seed(0)
    tokenizer = text.build_tokenizer(n_captions=600)
    # the canvas's own architecture, narrower
    vae = AutoencoderKL(**autoencoder.CONFIG | {"block_out_channels": (8,) * 4, "norm_num_groups": 8})
    unet = UNet2DConditionModel(**denoiser.CONFIG | {"block_out_channels": (16, 32, 24), "norm_num_groups": 8})
    return vae, unet, text.build_text_encoder(tokenizer), tokenizer, judge


@pytest.fixture
def untrained_canvas(monkeypatch):
    """MODEL `canvas` with random weights, two steps a picture, and a judge that guesses."""
    from semiperm.canvas import models, pipeline

    *modules, tokenizer, judge = _parts()
    vae, unet, text_encoder = copy.deepcopy(modules)  # what a command leaves at work is this test's alone
    pipe = pipeline.assemble(vae, unet, text_encoder, tokenizer)
    other = pipeline.load_pipeline

    def load(name, dtype, device):
        return pipe.to(device, dtype) if name == "canvas" else other(name, dtype=dtype, device=device)

    monkeypatch.setattr(pipeline, "load_pipeline", load)
    monkeypatch.setitem(models.MODELS, "canvas", dataclasses.replace(models.MODELS["canvas"], steps=2))
    monkeypatch.setattr(judge.Judge, "load", lambda *_: judge.Judge(judge.JudgeNet()))
    return pipe
