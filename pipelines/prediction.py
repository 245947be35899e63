"""A pipeline's denoiser, called by hand: any rows, each with its own text and its own noise level, for every family."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from ..methods.errors import ModelError
from ..methods.sampling import next_latents
from .family import Pipeline, denoiser_of, family_of
from .latents import pixels_per_latent
from .scheduler import alphas_of, image_tokens, levels_of, shift_of

__all__ = ["Predictor"]


class Predictor:
    """f(latents, timesteps, hidden, pooled) -> what the denoiser predicts, in float32.

    Methods at work on the denoiser act as in any call of it; gradients flow where they are wanted.

    Args:
        pipe: SD1.x, SD2, SDXL, SD3 or Flux pipeline; Wan for predictions alone.

    Raises:
        ModelError: an unsupported pipeline.
    """

    def __init__(self, pipe: Pipeline):
        self.pipe, self.family = pipe, family_of(pipe)
        self.denoiser, self._attribute = denoiser_of(pipe)

    @property
    def kind(self) -> str:
        """What is predicted, see `methods.sampling`.

        Raises:
            ModelError: something else.
        """
        if self.family.flow:
            return "flow"
        kind = self.pipe.scheduler.config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction"):
            raise ModelError(f"the model predicts {kind!r}; expected 'epsilon' or 'v_prediction'")
        return kind

    def times(self, steps: int, latents: Tensor) -> Tensor:
        """(steps + 1,) timesteps as the denoiser is given them, from pure noise to -1, which stands for the image.

        Args:
            latents: (B, C, H, W), on whose number of tokens a dynamic shift depends.
        """
        share = torch.linspace(1.0, 0.0, steps + 1)[:-1]
        if self.family.flow:
            given = self.family.pack(self.pipe, latents[:1])
            shift = shift_of(self.pipe.scheduler, image_tokens(self.family, self.denoiser, given))
            timesteps = self.family.noise_timestep * shift * share / (1 + (shift - 1) * share)
        else:
            count = len(alphas_of(self.pipe))
            timesteps = (share * count - 1).round()
        return torch.cat([timesteps, timesteps.new_tensor([-1.0])])

    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(a, s) of timesteps (B,): the shares of image and noise, (B, 1, 1, 1) each; (1, 0) for -1."""
        alphas = None if self.family.flow else alphas_of(self.pipe).to(timesteps.device)
        image, noise = levels_of(self.family, timesteps.clamp_min(0.0), alphas)
        done = timesteps < 0
        pair = image.masked_fill(done, 1.0), noise.masked_fill(done, 0.0)
        return rearrange(pair[0], "b -> b 1 1 1"), rearrange(pair[1], "b -> b 1 1 1")

    def step(self, latents: Tensor, prediction: Tensor, now: Tensor, then: Tensor) -> Tensor:
        """The latents one deterministic step on, from timesteps `now` (B,) to `then` (B,)."""
        return next_latents(self.kind, latents, prediction, self.levels(now), self.levels(then))

    @torch.no_grad()
    def sample(self, latents: Tensor, predict: Callable[[Tensor, Tensor], Tensor], steps: int) -> Tensor:
        """Draw from noise (B, C, H, W) with `predict(latents, timesteps (B,))`, guidance and all."""
        times = self.times(steps, latents).to(latents.device)
        for now, then in zip(times[:-1], times[1:], strict=True):
            rows = now.expand(len(latents))
            latents = self.step(latents, predict(latents, rows), rows, then.expand(len(latents)))
        return latents

    def __call__(
        self,
        latents: Tensor,
        timesteps: Tensor,
        hidden: Tensor,
        pooled: Tensor | None,
        words: Sequence[str] | None = None,
    ) -> Tensor:
        """What the denoiser predicts.

        Args:
            latents: (B, C, H, W), never packed; videos (B, C, F, H, W).
            timesteps: (B,), in the denoiser's unit.
            hidden: (B, N, d). pooled: (B, p) or None.
            words: of each row, for methods that read them; a denoiser does not.
        """
        family, denoiser = self.family, self.denoiser
        dtype, rows = denoiser.dtype, len(latents)
        hidden = hidden.to(latents.device, dtype)
        pooled = pooled if pooled is None else pooled.to(latents.device, dtype)
        given = latents.to(dtype)
        extra = denoiser.config.in_channels - given.shape[1]
        if family.uneven and extra > 0:  # an inpainting model is also told what to draw: here, everything
            told = given.new_zeros(rows, extra, *given.shape[-2:])
            told[:, 0] = 1
            given = torch.cat([given, told], 1)
        timesteps = timesteps.to(latents.device)
        if family.packed:
            timesteps = timesteps.to(dtype)  # as its pipeline does
        out = getattr(self.pipe, self._attribute)(
            family.pack(self.pipe, given),
            timestep=timesteps,
            encoder_hidden_states=hidden,
            return_dict=False,
            **family.inputs(self.pipe, latents, hidden, pooled),
        )[0]
        size = [side * pixels_per_latent(self.pipe) for side in latents.shape[-2:]]
        return family.unpack(self.pipe, out, *size).float()
