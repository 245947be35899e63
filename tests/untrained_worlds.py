"""The second edition's weights at their true sizes, untrained: to load, to run and to compare, not to look at."""

import copy
from pathlib import Path

import torch
from semiperm.canvas import autoencoders, embedded, flow, judges, turbo, unet, vocabulary
from semiperm.canvas.loop import save_tensors
from semiperm.canvas.models import MODELS, WEIGHTS, weights_of

SECOND = tuple(name for name, model in MODELS.items() if model.edition == 2)


def has_weights(name: str) -> bool:
    """Whether the shipped folder has a model's weights."""
    try:
        return bool(weights_of(name))
    except FileNotFoundError:
        return False


def write_untrained_worlds(work: Path, folder: Path) -> Path:
    """Write `folder` as `semiperm canvas worlds export` does, from what a training would have left in `work`.

    The autoencoders are the first edition's and what grows from it, so that noise survives in pictures; the change of
    four steps is random, so that both flow models differ.
    """
    tokenizer = vocabulary.build_tokenizer(n_captions=400)
    trunk = autoencoders.build("canvas")
    trunk.load_state_dict(embedded.load_file(str(WEIGHTS / "vae.safetensors")))
    transformer = flow.build_transformer(2 * vocabulary.WIDTH)
    student = turbo.add_low_rank(copy.deepcopy(transformer))
    change = {k: v + 0.02 * torch.randn_like(v) * k.endswith(".up") for k, v in turbo.low_rank_state(student).items()}
    for part, module in {
        "text-first": vocabulary.build_encoder("first", len(tokenizer)),
        "text-second": vocabulary.build_encoder("second", len(tokenizer)),
        "vae-canvas.final": trunk,
        "vae-canvas-flow.final": autoencoders.grow(trunk),
        "unet.ema": unet.build_unet(),
        "transformer.ema": transformer,
        "judge-first.ema": judges.HeatmapJudge(),
        "judge-second.ema": judges.QueryJudge(),
    }.items():
        save_tensors(module.state_dict(), work / f"{part}.safetensors")
    save_tensors(change, work / "turbo.ema.safetensors")
    tokenizer.save_pretrained(str(work / "tokenizer"))
    assert len(embedded.write_weights(work, folder)) == 9
    return folder


def small_flow(name: str = "canvas-flow"):
    """A pipeline of that model's classes and latents that takes no time: it paints noise of 128x128 pixels."""
    from diffusers import AutoencoderKL
    from semiperm.canvas import autoencoder
    from tiny_models import build

    tiny = build("sd3")
    narrow = {"block_out_channels": (8,) * 4, "norm_num_groups": 8, "latent_channels": 16}
    vae = AutoencoderKL(**autoencoder.CONFIG | narrow | {"scaling_factor": 1.5305, "shift_factor": 0.0609})
    encoders = tiny.text_encoder, tiny.text_encoder_2
    pipe = embedded.assemble_flow(vae.eval(), tiny.transformer, *encoders, tiny.tokenizer, name)
    pipe.semiperm_canvas = name
    pipe.set_progress_bar_config(disable=True)
    return pipe
