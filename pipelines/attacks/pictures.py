"""Attacks that need a model: through its autoencoder, through its sampler, and marks stolen for pictures of one's own.

Pictures are (B, 3, H, W) in 0..1 as in `methods.attacks.pictures`; sides that are no whole latents are cut. The
attacker may have the signer's own model or another one: give the pipeline that he has.

worse = regenerate(pipe, pixels, 0.3)
forged = reprompt(pipe, marked, ["an eared mascot in striped style on sky"])
forged = transplant(pipe, marked, cover, 0.7)  # or imprint(pipe, marked, cover)
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from ...methods.attacks.pictures import Attack, average_forgery, average_removal
from ...methods.errors import WatermarkError
from ...methods.pictures import check_pixels
from ...methods.watermark.statistics import without_offset
from ..family import denoiser_of, device_of, family_of
from ..guidance.apply import SafeGuidanceHandle, apply_safe_guidance
from ..latents import decode_latents, multiple_of, pixels_per_latent
from ..watermark.inversion import encode_images, invert
from ..watermark.noise import replace_noise

__all__ = [
    "average_forgery",
    "average_removal",
    "imprint",
    "model_attacks",
    "regenerate",
    "reprompt",
    "steal_noise",
    "transplant",
    "vae_reencode",
    "with_parts",
]


def model_attacks(pipe, steps: int = 50) -> dict[str, Attack]:
    """The attacks of single pictures through a model, for `attack(..., attacks=ATTACKS | model_attacks(pipe))`.

    Args:
        pipe: None where only their names are wanted.
        steps: of "regenerate", as in `regenerate`.
    """
    both = (
        Attack("vae-reencode", None, lambda x, s, g: vae_reencode(pipe, x), "through a model's autoencoder"),
        Attack(
            "regenerate",
            0.3,
            lambda x, s, g: regenerate(pipe, x, s, steps=steps, generator=g),
            "img2img without a prompt: share of the noise",
            0.02,
            1,
        ),
    )
    return {one.name: one for one in both}


def vae_reencode(pipe, pixels: Tensor) -> Tensor:
    """Encode pictures and decode them again: what every latent model's editor does to them.

    Raises:
        SemipermError: a model of videos, or things that are no pictures.
    """
    return decode_latents(pipe, _encode(pipe, pixels)).to(pixels)


def regenerate(
    pipe,
    pixels: Tensor,
    strength: float,
    prompt: str | Sequence[str] = "",
    steps: int = 50,
    generator: torch.Generator | None = None,
    **kwargs,
) -> Tensor:
    """Add noise to the latents of pictures and draw them anew from there: img2img.

    Args:
        pipe: text-to-image pipeline of the SD1.x, SD2, SDXL, SD3 or Flux family; nothing in it changes.
        pixels: (B, 3, H, W) in 0..1.
        strength: above 0 (a little noise) to 1 (another picture); .06, .14 and .24 are W-Bench's 60, 140 and 240.
        prompt: for all pictures, or one each.
        steps: of the whole way; the share `strength` of them is taken.
        kwargs: further arguments of diffusers' img2img call; guidance_scale is 1 unless given.

    Returns:
        (B, 3, H', W'), sides cut to whole latents.

    Raises:
        SemipermError: a strength out of range or without a step, a model of videos, things that are no pictures.

    Source: Zhao et al. (arXiv 2306.01953), regeneration; strengths as VINE's W-Bench (arXiv 2410.18775).
    """
    return _img2img(pipe, pixels, strength, prompt, steps, {"generator": generator} | kwargs)


def transplant(
    pipe,
    marked: Tensor,
    cover: Tensor,
    strength: float = 0.7,
    prompt: str | Sequence[str] = "",
    steps: int = 50,
    generator: torch.Generator | None = None,
    *,
    inversion_steps: int = 10,
    **kwargs,
) -> Tensor:
    """Forge: redraw cover pictures from the noise of marked ones, so that the mark is found in what was never signed.

    img2img as in `regenerate`, but the noise that is added is the one stolen from `marked`.

    Args:
        marked: (1 or B, 3, H, W) whose mark is taken. cover: (B, 3, H, W) that it is put into.
        strength: more carries more of the mark and less of the cover.
        inversion_steps: evaluations of the denoiser to find the marked noise.
        kwargs: as in `regenerate`.

    Raises:
        SemipermError: as `regenerate`; pictures of two sizes; a sampler that adds noise of its own.

    Source: Müller et al. (arXiv 2412.03283), with the noise put in by img2img.
    """
    noise, scale = steal_noise(pipe, marked, inversion_steps), pixels_per_latent(pipe)
    height, width = _whole(pipe, cover).shape[2:]
    noise = _matching(noise, torch.empty(len(cover), noise.shape[1], height // scale, width // scale, device="meta"))
    return _img2img(pipe, cover, strength, prompt, steps, {"generator": generator} | kwargs, noise)


def imprint(
    pipe, marked: Tensor, cover: Tensor, steps: int = 20, *, rate: float = 0.05, inversion_steps: int = 2
) -> Tensor:
    """Forge: change the latents of cover pictures until they invert to the noise of marked ones.

    z <- z - rate Adam(grad_z |I(z) - I(E(marked))|^2) from z = E(cover), with I the inversion; then decode.

    Args:
        marked: (1 or B, 3, H, W) whose mark is taken. cover: (B, 3, H, W) that it is put into.
        steps: of Adam; 0 only re-encodes the cover. More find more of the mark and show more traces.
        rate: of Adam, in latent units.
        inversion_steps: of I; each is one evaluation of the denoiser, kept for its gradient.

    Raises:
        SemipermError: steps below 0 or inversion steps below 1, pictures of two sizes, a model of videos.

    Source: Müller et al. (arXiv 2412.03283), imprinting.
    """
    if steps < 0 or inversion_steps < 1 or not rate > 0:
        raise WatermarkError(
            f"imprinting in {steps} steps at rate {rate} with {inversion_steps} inversion steps was asked for; expected"
            " steps >= 0, a rate above 0 and at least 1 inversion step"
        )
    target = without_offset(invert(pipe, _encode(pipe, marked), inversion_steps))
    latents = _encode(pipe, cover)
    target = _matching(target, latents)
    differentiable = inspect.unwrap(invert)  # the same without its no_grad
    optimizer = torch.optim.Adam([latents], rate)
    for _ in range(steps):
        with torch.enable_grad():
            latents.requires_grad_()
            distance = (without_offset(differentiable(pipe, latents, inversion_steps)) - target).square().sum()
            (latents.grad,) = torch.autograd.grad(distance, latents)
        optimizer.step()
    return decode_latents(pipe, latents.detach()).to(cover)


def reprompt(
    pipe,
    marked: Tensor,
    prompt: str | Sequence[str],
    *,
    steps: int = 50,
    inversion_steps: int = 10,
    average: bool = False,
    **kwargs,
) -> Tensor:
    """Forge: draw prompts of one's own from the noise of marked pictures.

    Args:
        pipe: text-to-image pipeline of the SD1.x, SD2, SDXL, SD3 or Flux family with a deterministic sampler.
        marked: (1 or B, 3, H, W) whose mark is taken.
        prompt: for all pictures, or B of them.
        steps: of the sampler. inversion_steps: to find the marked noise.
        average: take the mean noise of all marked pictures for every prompt: it finds a pattern that they share.
        kwargs: of the pipeline's call: guidance_scale, ...

    Returns:
        (B, 3, H', W') in 0..1.

    Raises:
        SemipermError: as many prompts as do not fit, a model of videos, or things that are no pictures.

    Source: Müller et al. (arXiv 2412.03283), reprompting; averages as Yang et al. (arXiv 2406.09026) in the noise.
    """
    noise = steal_noise(pipe, marked, inversion_steps, average=average)
    prompts = [prompt] * len(noise) if isinstance(prompt, str) else list(prompt)
    if len(noise) == 1:
        noise = repeat(noise, "1 c h w -> b c h w", b=len(prompts))
    if len(prompts) != len(noise) or not prompts:
        raise WatermarkError(
            f"{len(prompts)} prompts were given for {len(noise)} stolen noises; expected one, or as many"
        )
    noise = noise.to(device_of(pipe), denoiser_of(pipe)[0].dtype)
    scale = pixels_per_latent(pipe)
    size = {"height": noise.shape[2] * scale, "width": noise.shape[3] * scale}
    given = family_of(pipe).pack(pipe, noise)
    call = {"num_inference_steps": steps, **size, **kwargs, "output_type": "pt"}
    return pipe(prompts, latents=given, **call).images.to(marked)


def steal_noise(pipe, marked: Tensor, steps: int = 10, *, average: bool = False) -> Tensor:
    """What a thief takes: the initial noise of marked pictures, without their color, at the scale of noise.

    Args:
        steps: inversion steps, each one evaluation of the denoiser. average: the mean over all pictures.

    Returns:
        (B or 1, C, h, w) float32, mean 0 in each channel and standard deviation 1 in each picture.
    """
    noise = without_offset(invert(pipe, _encode(pipe, marked), steps))
    noise = noise / noise.std((1, 2, 3), keepdim=True)
    if average:
        noise = noise.mean(0, keepdim=True)
    return noise / noise.std((1, 2, 3), keepdim=True)


def _whole(pipe, pixels: Tensor) -> Tensor:
    """Pictures cut to what the model encodes."""
    if family_of(pipe).video:
        raise WatermarkError(f"{type(pipe).__name__} draws videos; these attacks expect a model of pictures")
    check_pixels(pixels)
    step = multiple_of(pipe)
    height, width = (side - side % step for side in pixels.shape[2:])
    if not height or not width:
        raise WatermarkError(
            f"pictures of {pixels.shape[2]} x {pixels.shape[3]} pixels are smaller than what {type(pipe).__name__}"
            f" encodes; expected at least {step} x {step}"
        )
    return pixels[..., :height, :width].float()


def _encode(pipe, pixels: Tensor) -> Tensor:
    return encode_images(pipe, _whole(pipe, pixels))


def _matching(noise: Tensor, latents: Tensor) -> Tensor:
    if noise.shape[1:] != latents.shape[1:] or len(noise) not in (1, len(latents)):
        raise WatermarkError(
            f"marked pictures with latents {tuple(noise.shape)} and covers with {tuple(latents.shape)} were given;"
            " expected one size, and one marked picture or as many as covers"
        )
    return noise.expand_as(latents)


def _img2img(
    pipe,
    pixels: Tensor,
    strength: float,
    prompt: str | Sequence[str],
    steps: int,
    more: dict,
    noise: Tensor | None = None,
) -> Tensor:
    """diffusers' img2img with the parts of this pipeline.

    Args:
        more: further arguments of its call.
        noise: to add in place of what it draws.
    """
    import diffusers

    image = _whole(pipe, pixels)
    if not 0 < strength <= 1 or int(steps * strength) < 1:
        raise WatermarkError(
            f"redrawing at strength {strength} in {steps} steps takes {max(0, int(steps * strength))} of them; expected"
            " a strength above 0, up to 1, and steps x strength of at least 1"
        )
    prompts = [prompt] * len(pixels) if isinstance(prompt, str) else list(prompt)
    if len(prompts) != len(pixels):
        raise WatermarkError(f"{len(prompts)} prompts were given for {len(pixels)} pictures; expected one, or as many")
    kind = getattr(pipe, "semiperm_img2img", None) or getattr(diffusers, family_of(pipe).img2img)
    call = {"strength": strength, "num_inference_steps": steps, "guidance_scale": 1.0, **more}
    if "height" in inspect.signature(kind.__call__).parameters:
        call |= {"height": image.shape[2], "width": image.shape[3]}
    with with_parts(pipe, kind) as redraw, nullcontext() if noise is None else replace_noise(redraw, noise):
        drawn = redraw(prompt=prompts, image=image, output_type="pt", **call).images
    return drawn.to(pixels)


@contextmanager
def with_parts(pipe, kind: type) -> Iterator[Any]:
    """A pipeline of another class with the parts of this one, what is at work on them included."""
    accepted = inspect.signature(kind.__init__).parameters
    parts = {name: part for name, part in pipe.components.items() if name in accepted}
    parts["scheduler"] = type(pipe.scheduler).from_config(pipe.scheduler.config)  # calls leave traces in a scheduler
    removed = {name: value for name, value in family_of(pipe).removed.items() if name in accepted}
    made = kind(**parts | removed)
    made.set_progress_bar_config(disable=True)
    guarding = SafeGuidanceHandle.on(pipe)
    if guarding is None:
        yield made
        return
    guarding.remove()  # it hears the runs of its own pipeline alone
    try:
        with apply_safe_guidance(made, guarding.config):
            yield made
    finally:
        guarding.install()
