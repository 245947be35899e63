"""What a pipeline's scheduler says of a step: how far the run has come, and how much noise there is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..methods.errors import ModelError
from ..methods.schedule import flow_share
from .family import Family

__all__ = [
    "alphas_of",
    "image_tokens",
    "levels_of",
    "noise_levels",
    "on_host",
    "share_of",
    "shift_of",
    "sigma_of",
    "timestep_at",
]

# How far, relatively, a timestep that went through a half-precision model may lie from the scheduler's own: bfloat16
# keeps 8 bits, so it is off by up to 2^-9; steps of a run of 100 are ten times as far apart.
_ROUNDED = 2**-8


def alphas_of(pipe) -> Tensor:
    """The scheduler's alphas_cumprod, by which a UNet's step has a noise level.

    Raises:
        ModelError: the scheduler has none.
    """
    alphas = getattr(pipe.scheduler, "alphas_cumprod", None)
    if alphas is None:
        raise ModelError(
            f"{type(pipe.scheduler).__name__} has no alphas_cumprod, so the noise level of a UNet's step is unknown;"
            " use DDIM, Euler, DPM-Solver or another scheduler of that family"
        )
    return alphas


def image_tokens(family: Family, denoiser: nn.Module, sample: Tensor) -> int:
    """How many image tokens a transformer makes of the latents that it is given."""
    if family.packed:
        return sample.shape[1]
    frames, rows, columns = family.patch(denoiser)
    count = sample.shape[2] // frames if family.video else 1
    return count * (sample.shape[-2] // rows) * (sample.shape[-1] // columns)


def on_host(timestep: Tensor) -> Tensor:
    """The timestep of a call, (1,) float32 on the CPU: the one time that a call waits for its device."""
    return torch.as_tensor(timestep).reshape(-1)[:1].float().cpu()


def share_of(
    scheduler, family: Family, timestep: Tensor, tokens: int, timesteps: Sequence[float] | None = None
) -> float | Tensor:
    """The share of the unshifted schedule (`methods.schedule`) at a call of the denoiser.

    Args:
        timestep: as the denoiser is given it; its first element counts.
        tokens: of the image (`image_tokens`); the dynamic shift of a flow model depends on them.
        timesteps: the scheduler's own as numbers, where they are known already: then nothing but `timestep` is read.

    Returns:
        A number; while torch.compile traces, a tensor.
    """
    t = torch.as_tensor(timestep).reshape(-1)[0].float()
    if not torch.compiler.is_compiling():
        if timesteps is None:
            own = getattr(scheduler, "timesteps", None)
            timesteps = [] if own is None else torch.as_tensor(own).tolist()
        t = _unrounded(float(t), timesteps, family.noise_timestep / 1000.0)
    if family.flow:
        return flow_share(t / family.noise_timestep, shift_of(scheduler, tokens))
    return 1.0 - t / (scheduler.config.num_train_timesteps - 1)


def timestep_at(scheduler, family: Family, share: float, tokens: int) -> float:
    """The timestep, as the denoiser is given it, at a share of the unshifted schedule: undoes `share_of`."""
    if not family.flow:
        return (1.0 - share) * (scheduler.config.num_train_timesteps - 1)
    shift, level = shift_of(scheduler, tokens), 1.0 - share
    return family.noise_timestep * shift * level / (1.0 + (shift - 1.0) * level)


def _unrounded(t: float, timesteps: Sequence[float], scale: float) -> float:
    """The scheduler's timestep that became `t` in the model's precision, in the model's unit; else `t` itself."""
    nearest = min((step * scale for step in timesteps), key=lambda step: abs(step - t), default=t)
    return nearest if abs(nearest - t) <= _ROUNDED * abs(t) else t


def shift_of(scheduler, tokens: int) -> float:
    """What the scheduler shifts this run's schedule by; exp(mu) of the image's size where the shift is dynamic.

    Source: diffusers' `calculate_shift` and `FlowMatchEulerDiscreteScheduler.time_shift`.
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return float(getattr(scheduler, "shift", None) or config.get("flow_shift") or config.get("shift") or 1.0)
    fewest, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) * (tokens - fewest) / (most - fewest)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def noise_levels(family: Family, timestep: Tensor, alphas: Tensor | None) -> tuple[Tensor, Tensor]:
    """`levels_of` the first timestep that the denoiser is given, (1,) each."""
    return levels_of(family, timestep.reshape(-1)[:1], alphas)


def levels_of(family: Family, timesteps: Tensor, alphas: Tensor | None) -> tuple[Tensor, Tensor]:
    """(share of the image, share of the noise) in what the denoiser is given at timesteps (B,), (B,) each.

    Args:
        alphas: of `alphas_of`, on the timesteps' device; None for flow models.
    """
    t = timesteps.float()
    if family.flow:
        sigma = t / family.noise_timestep
        return 1 - sigma, sigma
    t = t.clamp(0, len(alphas) - 1)
    low = t.floor().long()
    high = (low + 1).clamp(max=len(alphas) - 1)
    alpha = torch.lerp(alphas[low].float(), alphas[high].float(), t - low)
    return alpha.sqrt(), (1 - alpha).sqrt()


def sigma_of(scheduler, family: Family, timestep: Tensor) -> float | None:
    """The noise level as samplers count it: noise over image for UNets, the share of the noise for flow models.

    None where the scheduler does not tell.
    """
    alphas = None if family.flow else getattr(scheduler, "alphas_cumprod", None)
    if alphas is None and not family.flow:
        return None
    image, noise = (
        float(level) for level in noise_levels(family, timestep.cpu(), alphas if family.flow else alphas.cpu())
    )
    return noise if family.flow else noise / max(image, 1e-8)
