"""From a picture back to the noise it was drawn from: encode it, then walk the sampler's path in reverse.

UNets (SD1.x, SD2, SDXL), with a = alphas_cumprod and the denoiser's noise e (converted from v):

    z_(next) = sqrt(a_next) (z - sqrt(1 - a) e) / sqrt(a) + sqrt(1 - a_next) e

Flow matching (SD3, Flux, Wan), with the velocity v = noise - image:  z_(next) = z + (sigma_next - sigma) v

The prompt is unknown to a detector, so it is the empty one without guidance: one evaluation of the denoiser a step.
Latents are (B, C, H, W) here, for videos (B, C, F, H, W), for Flux too: its packing is left to `watermark.sign_noise`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..methods.errors import WatermarkError
from ..methods.watermark_detection import FIRST, inversion_times, whole_cells
from . import text
from .latents import alphas_of, encode_pixels, pixels_per_latent
from .text import denoiser_of, device_of, encode_text

__all__ = ["check_scheduler", "encode_images", "family_of", "invert", "latent_shape", "pixels_of"]

_DETERMINISTIC = {
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
}


def family_of(pipe) -> str:
    """Return "sd" (SD1.x, SD2), "sdxl", "sd3", "flux" or "wan".

    Raises:
        WatermarkError: another architecture.
    """
    return text.family_of(pipe, wan=True, error=WatermarkError)


def check_scheduler(pipe) -> None:
    """Refuse a sampler that adds noise on its way: the picture would forget the noise that carries the mark.

    DDIM's `eta` is an argument of the pipeline's call and cannot be seen here: leave it at 0. `signed_noise` sees it.

    Raises:
        WatermarkError: an ancestral or SDE sampler, or one that is not known to be deterministic.
    """
    scheduler = pipe.scheduler
    names = {c.__name__ for c in type(scheduler).__mro__}
    name, config = type(scheduler).__name__, scheduler.config
    algorithm = getattr(config, "algorithm_type", None) or ""
    if algorithm.startswith("sde"):
        name += f" with algorithm_type={algorithm!r}"
    elif getattr(config, "stochastic_sampling", False):
        name += " with stochastic_sampling=True"
    elif names & _DETERMINISTIC:
        return
    flow = family_of(pipe) in ("sd3", "flux", "wan")
    good = "FlowMatchEulerDiscreteScheduler" if flow else "DDIMScheduler"
    raise WatermarkError(
        f"{name} is not known to be deterministic: noise added while sampling drowns the mark in the initial noise;"
        f" expected a sampler without noise of its own: pipe.scheduler = {good}.from_config(pipe.scheduler.config)"
        f"{'' if flow else ', or Euler, Heun, DPM-Solver++, UniPC, LMS, DEIS'}"
    )


def latent_shape(pipe, height: int | None = None, width: int | None = None, frames: int | None = None) -> tuple:
    """The shape of one picture's latents, (C, H, W) or (C, F, H, W), for a size in pixels; None is the model's own.

    Raises:
        WatermarkError: a size that the model cannot draw.
    """
    family, scale, step = family_of(pipe), pixels_per_latent(pipe), multiple_of(pipe)
    native = getattr(pipe, "default_sample_size", None)
    if family == "wan":
        defaults = 480, 832
    else:
        native = native or denoiser_of(pipe)[0].config.sample_size
        defaults = native * scale, native * scale
    height, width = height or defaults[0], width or defaults[1]
    if height < step or width < step or height % step or width % step:
        raise WatermarkError(f"{type(pipe).__name__} cannot draw {height} x {width}; expected multiples of {step}")
    channels = pipe.vae.config.get("latent_channels") or pipe.vae.config.z_dim
    if family != "wan":
        return channels, height // scale, width // scale
    frames = 81 if frames is None else frames
    steps = pipe.vae_scale_factor_temporal
    if frames < 1 or (frames - 1) % steps:
        raise WatermarkError(f"{type(pipe).__name__} cannot draw {frames} frames; expected a multiple of {steps}, + 1")
    return channels, (frames - 1) // steps + 1, height // scale, width // scale


def multiple_of(pipe) -> int:
    """What height and width in pixels are a multiple of."""
    family, config = family_of(pipe), denoiser_of(pipe)[0].config
    patch = {"flux": 2, "wan": 2, "sd3": config.get("patch_size", 1)}.get(family, 1)
    return pixels_per_latent(pipe) * patch


def pixels_of(pipe, images) -> list[Tensor]:
    """Pictures as (3, H, W), videos as (F, 3, H, W), in 0..1."""
    video = family_of(pipe) == "wan"
    one = hasattr(images, "convert") or (
        isinstance(images, (Tensor, np.ndarray)) and images.ndim == (4 if video else 3)
    )
    items = [images] if one else images
    found = [torch.stack([_picture(frame) for frame in item]) if video else _picture(item) for item in items]
    if not found:
        raise WatermarkError("no pictures were given; expected at least one PIL image or tensor (3, H, W) in 0..1")
    return found


def _picture(image) -> Tensor:
    if hasattr(image, "convert"):
        image = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1).float() / 255
    elif isinstance(image, np.ndarray):
        image = torch.from_numpy(image).permute(2, 0, 1) if image.ndim == 3 else torch.from_numpy(image)
        image = image.float() / 255 if image.dtype == torch.uint8 else image
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3:
        given = f"shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise WatermarkError(f"a picture is {given}; expected a PIL image, a tensor (3, H, W) or an array (H, W, 3)")
    if not image.is_floating_point() or image.min() < -1e-3 or image.max() > 1 + 1e-3 or not image.isfinite().all():
        raise WatermarkError("a picture's values leave 0..1; expected floating point RGB in 0..1")
    return image.float()


def encode_images(pipe, images, batch_size: int = 16) -> Tensor:
    """Pictures of one size to the latents that the pipeline's decoder would have been given, without chance.

    Args:
        images: PIL images, tensors (3, H, W) in 0..1, arrays (H, W, 3) in 0..1 or uint8, or one of them; for Wan,
            videos: sequences of such frames. Pixels beyond the last whole latent on the right and below are left out.

    Returns:
        (B, C, H, W) or (B, C, F, H, W), float32, the encoder's mode, scaled and shifted as the denoiser expects.

    Raises:
        WatermarkError: no pictures, other things than pictures, or pictures of different sizes.
    """
    pixels = [whole_cells(picture, multiple_of(pipe)) for picture in pixels_of(pipe, images)]
    sizes = sorted({tuple(p.shape) for p in pixels})
    if len(sizes) > 1:
        raise WatermarkError(f"pictures of {len(sizes)} sizes, {sizes[0]} and {sizes[1]} among them; expected one size")
    starts = range(0, len(pixels), batch_size)
    batches = (torch.stack(pixels[i : i + batch_size]) * 2 - 1 for i in starts)
    if family_of(pipe) == "wan":
        batches = (batch.transpose(1, 2) for batch in batches)
    return encode_pixels(pipe, batches)


@torch.no_grad()
def invert(pipe, latents0: Tensor, steps: int, prompt: str = "", batch_size: int = 16) -> Tensor:
    """Estimate the initial noise of latents: `steps` reverse steps, each one evaluation of the denoiser.

    Args:
        latents0: (B, C, H, W) or (B, C, F, H, W) from `encode_images`.
        steps: 0 returns the latents themselves: their signs already lean towards the noise's.
        prompt: "" where it is unknown, as it is to a detector.

    Returns:
        As latents0, float32.

    Raises:
        WatermarkError: negative steps, or latents of another number of dimensions.

    Source: DDIM (arXiv 2010.02502), equation 14; the flow's Euler steps in reverse as T2SMark (arXiv 2510.22366).
    """
    family = family_of(pipe)
    if steps < 0 or latents0.ndim != (5 if family == "wan" else 4):
        raise WatermarkError(
            f"{steps} steps from latents of shape {tuple(latents0.shape)}; expected steps >= 0 and"
            f" {'(B, C, F, H, W)' if family == 'wan' else '(B, C, H, W)'} from encode_images(pipe, images)"
        )
    if not steps:
        return latents0.float()
    device = device_of(pipe)
    features = encode_text(pipe, [prompt])
    reverse = _ddim if family in ("sd", "sdxl") else _flow
    parts = latents0.float().to(device).split(batch_size)
    words = features.hidden, features.pooled
    return torch.cat([reverse(pipe, part, steps, _denoiser(pipe, family, part, *words)) for part in parts])


def _denoiser(pipe, family: str, latents: Tensor, hidden: Tensor, pooled: Tensor | None) -> Callable:
    """f(latents, t) -> prediction in float32, t as the family's denoiser counts it (0..1000)."""
    denoiser, attribute = denoiser_of(pipe)
    module, dtype, rows = getattr(pipe, attribute), denoiser.dtype, len(latents)
    hidden = hidden.to(dtype).expand(rows, -1, -1)
    kwargs = {"encoder_hidden_states": hidden, "return_dict": False}
    if pooled is not None:
        pooled = pooled.to(dtype).expand(rows, -1)
    (height, width), scale = latents.shape[-2:], pixels_per_latent(pipe)
    if family == "sdxl":
        size = height * scale, width * scale
        last = (6.0,) if pipe.config.get("requires_aesthetics_score") else size  # the refiner's
        ids = torch.tensor([[*size, 0, 0, *last]], device=latents.device, dtype=dtype)
        kwargs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids.expand(rows, -1)}
    elif family == "sd3":
        kwargs["pooled_projections"] = pooled
    elif family == "flux":
        kwargs |= {
            "pooled_projections": pooled,
            "txt_ids": torch.zeros(hidden.shape[1], 3, device=latents.device, dtype=dtype),
            "img_ids": pipe._prepare_latent_image_ids(rows, height // 2, width // 2, latents.device, dtype),
            "guidance": latents.new_ones(rows) if denoiser.config.guidance_embeds else None,
        }

    def predict(latents: Tensor, t: float) -> Tensor:
        given = latents.to(dtype)
        extra = denoiser.config.in_channels - given.shape[1]
        if family in ("sd", "sdxl") and extra > 0:  # an inpainting model is also told what to draw: here, everything
            told = given.new_zeros(rows, extra, height, width)
            told[:, 0] = 1
            given = torch.cat([given, told], 1)
        if family == "flux":
            packed = pipe._pack_latents(given, *latents.shape)
            out = module(packed, timestep=latents.new_full((rows,), t / 1000).to(dtype), **kwargs)[0]
            out = pipe._unpack_latents(out, height * scale, width * scale, scale)
            return out.float()
        return module(given, timestep=latents.new_full((rows,), t), **kwargs)[0].float()

    return predict


def _ddim(pipe, z: Tensor, steps: int, predict: Callable) -> Tensor:
    alphas = alphas_of(pipe, WatermarkError)
    kind = pipe.scheduler.config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise WatermarkError(f"the model predicts {kind!r}; expected 'epsilon' or 'v_prediction'")
    times, count = inversion_times(steps), len(alphas)
    levels = [1.0, *(float(alphas[min(count - 1, round(t * count))]) for t in times[1:])]
    for t, a, b in zip(times[:-1], levels[:-1], levels[1:], strict=True):
        out = predict(z, max(t, FIRST) * count)
        if kind == "v_prediction":  # at the level that the denoiser is told, not at the one of z
            told = float(alphas[round(max(t, FIRST) * count)])
            noise = told**0.5 * out + (1 - told) ** 0.5 * z
        else:
            noise = out
        image = (z - (1 - a) ** 0.5 * noise) / a**0.5
        z = b**0.5 * image + (1 - b) ** 0.5 * noise
    return z


def _flow(pipe, z: Tensor, steps: int, predict: Callable) -> Tensor:
    times = inversion_times(steps)
    for t, then in zip(times, [*times[1:-1], 1.0], strict=False):
        z = z + (then - t) * predict(z, max(t, FIRST) * 1000)
    return z
