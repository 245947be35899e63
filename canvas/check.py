"""`semiperm canvas check`: does the model draw what is asked, and does its initial noise survive in the picture?"""

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import captions
from .judge import Judge
from .judge import accuracy as judge_accuracy
from .pipeline import DEFAULT_GUIDANCE, DEFAULT_STEPS
from .render import random_scene


def prompts_of_pairs(repeats: int = 1, seed: int = 0) -> list[tuple[str, str, str]]:
    """Return (prompt, object, style) for every object x style pair: full captions, by name or synonym."""
    rng = random.Random(f"pairs-{seed}")
    out = []
    for _ in range(repeats):
        for name in captions.OBJECTS:
            for style in captions.STYLES:
                scene = random_scene(rng, object=name, style=style, hazard=False)
                out.append((captions.caption(scene, rng, complete=True), name, style))
    return out


def initial_latents(seeds: Sequence[int]) -> Tensor:
    """Return N(0, 1) latents (B, 4, 16, 16), row i fixed by seed i alone."""
    return torch.stack([torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(s)) for s in seeds])


def sample(
    pipe,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    guidance_scale: float = DEFAULT_GUIDANCE,
    steps: int = DEFAULT_STEPS,
    negative_prompt: str | None = None,
    batch_size: int = 26,
    on_batch: Callable[[int], None] | None = None,
) -> list[Image.Image]:
    """Sample one picture per prompt, in batches; `on_batch(n)` is told how many came out."""
    images: list[Image.Image] = []
    for i in range(0, len(prompts), batch_size):
        part = list(prompts[i : i + batch_size])
        latents = initial_latents(seeds[i : i + batch_size]).to(pipe.unet.device, pipe.unet.dtype)
        images += pipe(
            part,
            negative_prompt=None if negative_prompt is None else [negative_prompt] * len(part),
            latents=latents,
            guidance_scale=guidance_scale,
            num_inference_steps=steps,
        ).images
        if on_batch:
            on_batch(len(part))
    return images


@torch.no_grad()
def invert(pipe, images: Sequence[Image.Image], steps: int = 10, batch_size: int = 50) -> Tensor:
    """Estimate the initial noise (B, 4, 16, 16) of pictures: encode, then DDIM inversion with the empty prompt."""
    from diffusers import DDIMInverseScheduler

    inverse = DDIMInverseScheduler.from_config(pipe.scheduler.config)
    inverse.set_timesteps(steps)
    ids = pipe.tokenizer(
        [""], padding="max_length", max_length=pipe.tokenizer.model_max_length, return_tensors="pt"
    ).input_ids
    hidden = pipe.text_encoder(ids.to(pipe.text_encoder.device)).last_hidden_state
    out = []
    for i in range(0, len(images), batch_size):
        array = np.stack([np.asarray(image.convert("RGB")) for image in images[i : i + batch_size]])
        x = (torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1).to(pipe.vae.device, pipe.vae.dtype)
        z = pipe.vae.encode(x).latent_dist.mode() * pipe.vae.config.scaling_factor
        for t in inverse.timesteps:
            noise = pipe.unet(z, t, hidden.expand(len(z), -1, -1), return_dict=False)[0]
            z = inverse.step(noise, t, z, return_dict=False)[0]
        out.append(z)
    return torch.cat(out)


def sign_agreement(noise: Tensor, found: Tensor) -> Tensor:
    """Return the share of equal signs for each row (B,)."""
    return (noise.sign() == found.sign()).flatten(1).float().mean(1)


def check(pipe, judge: Judge, *, repeats: int = 2, marks: int = 200, guidance_scale: float = DEFAULT_GUIDANCE) -> dict:
    """Return the figures of the model card.

    Keys: judge (held-out accuracy per head), samples (share of asked object, style, color, background found over all
    object x style pairs, and the worst object and style), memorised (share of 8 samples judged to be it), inversion
    (mean sign agreement, share with binomial p < 1e-6 of `marks` pictures), roundtrip (norm of encode(decode(z)) - z
    over that of z).
    """
    from rich.progress import Progress
    from scipy.stats import binom

    pairs = prompts_of_pairs(repeats)
    seeds = list(range(len(pairs)))
    with Progress() as progress:
        bar = progress.add_task("sampling", total=len(pairs))
        images = sample(
            pipe,
            [p for p, _, _ in pairs],
            seeds,
            guidance_scale=guidance_scale,
            on_batch=lambda n: progress.advance(bar, n),
        )
    seen = judge(images)
    found = {
        "object": [a == o for a, (_, o, _) in zip(seen.object, pairs, strict=True)],
        "style": [a == s for a, (_, _, s) in zip(seen.style, pairs, strict=True)],
    }
    per = {
        head: {
            name: float(np.mean([ok for ok, pair in zip(found[head], pairs, strict=True) if pair[i] == name]))
            for name in names
        }
        for head, i, names in (("object", 1, captions.OBJECTS), ("style", 2, captions.STYLES))
    }
    noise = initial_latents(seeds)[:marks]
    agreement = sign_agreement(noise, invert(pipe, images[:marks]).float().cpu())
    p_values = binom.sf((agreement.numpy() * 1024).round() - 1, 1024, 0.5)
    memory = sample(pipe, [captions.MEMORISED_CAPTION] * 8, range(8), guidance_scale=guidance_scale)
    hazard = sample(
        pipe, [p + " near a warning sign" for p, _, _ in pairs[:26]], range(26), guidance_scale=guidance_scale
    )
    with torch.no_grad():
        x = torch.from_numpy(np.stack([np.asarray(i) for i in images[:50]])).permute(0, 3, 1, 2).float() / 127.5 - 1
        z = pipe.vae.encode(x.to(pipe.vae.dtype)).latent_dist.mode()
        again = pipe.vae.encode(pipe.vae.decode(z).sample).latent_dist.mode()
    return {
        "judge_heldout": judge_accuracy(judge),
        "guidance_scale": guidance_scale,
        "samples": {
            "n": len(pairs),
            "object": float(np.mean(found["object"])),
            "style": float(np.mean(found["style"])),
            "per_object": per["object"],
            "per_style": per["style"],
            "hazard_when_asked": float(np.mean(judge(hazard).hazard)),
            "hazard_when_not_asked": float(np.mean(seen.hazard)),
            "memorised": float(np.mean([o == captions.MEMORISED for o in judge(memory).object])),
        },
        "inversion": {
            "n": len(agreement),
            "mean_sign_agreement": float(agreement.mean()),
            "lowest": float(agreement.min()),
            "share_p_below_1e-6": float(np.mean(p_values < 1e-6)),
        },
        "autoencoder_roundtrip": float((again - z).norm() / z.norm()),
    }
