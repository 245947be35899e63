"""Does a model's noise survive in its picture? Encode, then run the schedule backwards with the empty prompt."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import autoencoders, turbo
from .models import MODELS
from .pool import to_tensor

INVERSION_STEPS = {"canvas-scenes": 10, "canvas-flow": 10, "canvas-turbo": turbo.STEPS}


def initial_noise(pipe, seeds: Sequence[int]) -> Tensor:
    """Return N(0, 1) latents (B, C, 16, 16), row i fixed by seed i alone."""
    channels = pipe.vae.config.latent_channels
    return torch.stack([torch.randn(channels, 16, 16, generator=torch.Generator().manual_seed(s)) for s in seeds])


def sample_from(pipe, prompts: Sequence[str], noise: Tensor, batch_size: int = 32) -> list[Image.Image]:
    """Sample a picture per prompt from given initial noise, with the model's own steps and guidance."""
    model, images = MODELS[pipe.semiperm_canvas], []
    for i in range(0, len(prompts), batch_size):
        images += pipe(
            list(prompts[i : i + batch_size]),
            latents=noise[i : i + batch_size].to(pipe.vae.device, pipe.vae.dtype),
            num_inference_steps=model.steps,
            guidance_scale=model.guidance_scale,
        ).images
    return images


@torch.no_grad()
def invert(pipe, images: Sequence[Image.Image], steps: int | None = None, batch_size: int = 50) -> Tensor:
    """Estimate the initial noise (B, C, 16, 16) of pictures: DDIM inversion, or Euler's for a flow model."""
    name = pipe.semiperm_canvas
    steps = INVERSION_STEPS[name] if steps is None else steps
    world = MODELS[name].autoencoder
    x = to_tensor(np.stack([np.asarray(image.convert("RGB")) for image in images]))
    found = []
    for part in x.split(batch_size):
        z = autoencoders.encode(pipe.vae, world, part.to(pipe.vae.device, pipe.vae.dtype))
        found.append((_ddim if world == "canvas" else _euler)(pipe, z, steps).float().cpu())
    return torch.cat(found)


def _ddim(pipe, z: Tensor, steps: int) -> Tensor:
    from diffusers import DDIMInverseScheduler

    inverse = DDIMInverseScheduler.from_config(pipe.scheduler.config)
    inverse.set_timesteps(steps)
    hidden = pipe.encode_prompt("", z.device, 1, False)[0].expand(len(z), -1, -1)
    for t in inverse.timesteps:
        z = inverse.step(pipe.unet(z, t, hidden, return_dict=False)[0], t, z, return_dict=False)[0]
    return z


def _euler(pipe, z: Tensor, steps: int) -> Tensor:
    """From the picture to noise; each step takes the velocity at its noisier end's level, where sampling took it."""
    levels = turbo.sigmas(steps).flip(0).to(z)
    states, _, pooled, _ = pipe.encode_prompt("", "", "", device=z.device, do_classifier_free_guidance=False)
    states, pooled = states.expand(len(z), -1, -1), pooled.expand(len(z), -1)
    for now, then in zip(levels[:-1], levels[1:], strict=True):
        velocity = pipe.transformer(z, states, pooled, then.expand(len(z)) * 1000, return_dict=False)[0]
        z = z + (then - now) * velocity
    return z


def sign_agreement(noise: Tensor, found: Tensor) -> Tensor:
    """Return the share of equal signs for each row (B,)."""
    return (noise.sign() == found.sign()).flatten(1).float().mean(1)


@torch.no_grad()
def roundtrip(pipe, images: Sequence[Image.Image]) -> float:
    """Return the norm of encode(decode(z)) - z over that of z, for the latents of pictures."""
    world = MODELS[pipe.semiperm_canvas].autoencoder
    x = to_tensor(np.stack([np.asarray(image.convert("RGB")) for image in images])).to(pipe.vae.device, pipe.vae.dtype)
    z = autoencoders.encode(pipe.vae, world, x)
    again = autoencoders.encode(pipe.vae, world, autoencoders.decode(pipe.vae, world, z))
    return float((again - z).norm() / z.norm())


def recover(pipe, prompts: Sequence[str]) -> dict[str, float]:
    """Return the mark's figures over pictures of some prompts: mean and lowest sign agreement, the share with a
    binomial p < 1e-6, and the round trip of the latents."""
    from scipy.stats import binom

    noise = initial_noise(pipe, range(len(prompts)))
    images = sample_from(pipe, prompts, noise)
    agreement = sign_agreement(noise, invert(pipe, images))
    elements = noise[0].numel()
    p_values = binom.sf((agreement.numpy() * elements).round() - 1, elements, 0.5)
    return {
        "n": len(prompts),
        "mean_sign_agreement": float(agreement.mean()),
        "lowest": float(agreement.min()),
        "share_p_below_1e-6": float(np.mean(p_values < 1e-6)),
        "autoencoder_roundtrip": roundtrip(pipe, images[:50]),
    }
