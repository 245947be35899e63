"""Pictures that ask for a concept in place of words: inverted latents, image-to-image, inpainting; and arithmetic.

These need no gradient: an eraser that reads the prompt alone sees an innocent one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...methods.attacks.arithmetic import combined
from ...methods.errors import ModelError, SemipermError
from ..family import Pipeline, denoiser_of, device_of, family_of
from ..latents import decode_latents, latent_shape, pixels_per_latent
from ..prediction import Predictor
from ..rows import row_layout
from ..text import encode_text
from ..watermark.inversion import encode_images, invert
from .pictures import regenerate, with_parts

__all__ = ["draw_arithmetic", "inpaint", "redraw_inverted", "regenerate"]


def redraw_inverted(
    pipe: Pipeline,
    pictures: Tensor,
    prompt: str | Sequence[str] = "",
    *,
    inverter: Pipeline | None = None,
    inversion_prompt: str = "",
    inversion_steps: int = 20,
    **call,
) -> Tensor:
    """Draw from the noise that pictures of the concept were drawn from, as a model's inversion finds it.

    Args:
        pipe: the protected pipeline, SD1.x, SD2, SDXL, SD3 or Flux, with a deterministic sampler.
        pictures: (B, 3, H, W) in 0..1 that show the concept.
        prompt: for all pictures or one each; "" asks for nothing.
        inverter: the attacker's own model; None is `pipe` itself.
        inversion_prompt: what the inversion is told; the concept's name makes it more exact.
        inversion_steps: >= 1.
        call: of the pipeline's call: num_inference_steps, guidance_scale, ...

    Returns:
        (B, 3, H', W') in 0..1.

    Raises:
        SemipermError: no inversion step, as many prompts as do not fit, or a model of videos.

    Source: M-ErasureBench (arXiv 2512.22877), inverted latents.
    """
    family, own = family_of(pipe, video=False), pipe if inverter is None else inverter
    prompts = [prompt] * len(pictures) if isinstance(prompt, str) else list(prompt)
    if inversion_steps < 1 or len(prompts) != len(pictures):
        raise SemipermError(
            f"{inversion_steps} inversion steps, and {len(prompts)} prompts for {len(pictures)} pictures; expected at"
            " least one step, and one prompt or as many as pictures"
        )
    noise = invert(own, encode_images(own, pictures), inversion_steps, inversion_prompt)
    noise = noise.to(device_of(pipe), denoiser_of(pipe)[0].dtype)
    scale = pixels_per_latent(pipe)
    size = {"height": noise.shape[2] * scale, "width": noise.shape[3] * scale}
    return pipe(prompts, latents=family.pack(pipe, noise), **size, **call, output_type="pt").images.float()


def inpaint(
    pipe: Pipeline,
    pictures: Tensor,
    mask: Tensor,
    prompt: str | Sequence[str] = "",
    *,
    strength: float = 1.0,
    **call,
) -> Tensor:
    """Let the protected model finish pictures of the concept, of which a part is left standing.

    Args:
        pipe: the protected pipeline; its parts go into diffusers' inpainting class of the same family.
        pictures: (B, 3, H, W) in 0..1 that show the concept.
        mask: (1 or B, 1, H, W), 1 where the model draws.
        prompt: for all pictures or one each.
        strength: share of the noise, above 0 up to 1.
        call: of the pipeline's call: num_inference_steps, guidance_scale, generator, ...

    Returns:
        (B, 3, H, W) in 0..1.

    Raises:
        ModelError: diffusers has no inpainting class of the family.
        SemipermError: a mask of another size, or of nothing, or as many prompts as do not fit.

    Source: "When are concepts erased" (arXiv 2505.17013), in-context pictures.
    """
    import diffusers

    family = family_of(pipe, video=False)
    kind = getattr(pipe, "semiperm_inpaint", None)
    kind = kind or getattr(diffusers, (family.img2img or "").replace("Img2Img", "Inpaint"), None)
    if kind is None:
        raise ModelError(f"diffusers has no inpainting pipeline of the {family.name} family")
    prompts = [prompt] * len(pictures) if isinstance(prompt, str) else list(prompt)
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2:] != pictures.shape[2:] or not mask.any():
        raise SemipermError(
            f"a mask {tuple(mask.shape)} for pictures {tuple(pictures.shape)}; expected (1 or B, 1, H, W) of the"
            " pictures' size that is 1 somewhere"
        )
    if len(prompts) != len(pictures) or not 0 < strength <= 1:
        raise SemipermError(
            f"{len(prompts)} prompts for {len(pictures)} pictures at strength {strength}; expected one or as many, and"
            " a strength above 0, up to 1"
        )
    size = {"height": pictures.shape[2], "width": pictures.shape[3]}
    mask = mask.expand(len(pictures), -1, -1, -1)
    given = {"image": pictures, "mask_image": mask.float(), "strength": strength, **size}
    with with_parts(pipe, kind) as draw:
        return draw(prompt=prompts, **given, **call, output_type="pt").images.float()


@torch.no_grad()
def draw_arithmetic(
    pipe: Pipeline,
    terms: Sequence[tuple[float, str]],
    count: int = 1,
    *,
    height: int | None = None,
    width: int | None = None,
    steps: int = 25,
    guidance_scale: float = 4.0,
    seed: int = 0,
) -> Tensor:
    """Draw by a sum of prompts' directions, such as (1, "a robot with a cat"), (-1, "a cat").

    e = e(none) + g sum_i w_i [e(p_i) - e(none)]

    The prompts are encoded as those of a run of the pipeline, so that gates know their words.

    Args:
        pipe: the protected pipeline, SD1.x, SD2, SDXL, SD3 or Flux.
        terms: (weight, prompt).
        count: pictures, from the noise of seed, seed + 1, ...
        height, width: in pixels; None is the model's own.
        steps: of a deterministic sampler. guidance_scale: g.

    Returns:
        (count, 3, H, W) in 0..1.

    Raises:
        SemipermError: no terms, no steps, or an unsupported pipeline.

    Source: Petsiuk and Saenko (arXiv 2404.13706).
    """
    if not terms or count < 1 or steps < 1:
        raise SemipermError(f"{len(terms)} terms, {count} pictures, {steps} steps; expected at least one of each")
    family_of(pipe, video=False)
    predictor, device = Predictor(pipe), device_of(pipe)
    weights, prompts = zip(*terms, strict=True)
    features = encode_text(pipe, ["", *prompts], told=True)
    rows = torch.arange(1 + len(prompts)).repeat_interleave(count).to(device)
    hidden, pooled = (None if t is None else t[rows] for t in (features.hidden, features.pooled))
    shape = latent_shape(pipe, height, width)
    noise = [torch.randn(*shape, generator=torch.Generator().manual_seed(seed + n)) for n in range(count)]

    def predict(latents: Tensor, times: Tensor) -> Tensor:
        wide, now = latents.repeat(1 + len(prompts), 1, 1, 1), times.repeat(1 + len(prompts))
        with row_layout("negative", *["positive"] * len(prompts)):
            made = predictor(wide, now, hidden, pooled).unflatten(0, (1 + len(prompts), count))
        return combined(made[0], made[1:], weights, guidance_scale)

    return decode_latents(pipe, predictor.sample(torch.stack(noise).to(device), predict, steps))
