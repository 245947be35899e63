"""What an attacker wants a model to predict: points of the diffusion process, and the prediction there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...methods.errors import SemipermError
from ...methods.pictures import Pictures
from ...methods.sampling import parts_of
from ..family import Pipeline, device_of
from ..latents import latent_shape
from ..prediction import Predictor
from ..rows import row_layout
from ..text import encode_text
from ..watermark.inversion import encode_images

__all__ = ["Targets", "targets_from_model", "targets_from_pictures"]

_STEPS = 20  # of the sampler whose latents are taken, and of the places of the schedule


@dataclass(frozen=True, eq=False)
class Targets:
    """n points: latents (n, C, H, W), timesteps (n,), and the predictions wanted there (n, C, H, W)."""

    latents: Tensor
    timesteps: Tensor
    wanted: Tensor

    def drawn(self, count: int, step: int) -> Targets:
        """`count` of them for a step, the same for the same step; all where count is as many."""
        if count >= len(self.latents):
            return self
        chosen = torch.randperm(len(self.latents), generator=torch.Generator().manual_seed(step))[:count]
        chosen = chosen.to(self.latents.device)
        return Targets(self.latents[chosen], self.timesteps[chosen], self.wanted[chosen])

    def loss(
        self, predictor: Predictor, hidden: Tensor, pooled: Tensor | None, said: Sequence[str] | None = None
    ) -> Tensor:
        """(P,): mean squared distance of the predictions with P texts (P, N, d), every text at every point.

        Args:
            said: the texts in words, for what reads words.
        """
        texts, points = len(hidden), len(self.latents)
        latents, times, wanted = (
            t.repeat(texts, *[1] * (t.ndim - 1)) for t in (self.latents, self.timesteps, self.wanted)
        )
        words = hidden.repeat_interleave(points, 0)
        more = None if pooled is None else pooled.repeat_interleave(points, 0)
        with row_layout("positive"):
            each = None if said is None else [text for text in said for _ in range(points)]
            made = predictor(latents, times, words, more, each)
        return (made - wanted).square().flatten(1).mean(1).unflatten(0, (texts, points)).mean(1)


@torch.no_grad()
def targets_from_model(
    pipe: Pipeline,
    prompt: str | Sequence[str],
    count: int = 32,
    *,
    height: int | None = None,
    width: int | None = None,
    guidance_scale: float = 3.0,
    seed: int = 0,
) -> Targets:
    """What the untouched model predicts for a prompt, on the way to its pictures: P4D's target.

    Args:
        pipe: the untouched model, before membranes are put on it.
        prompt: that names the concept, or several, taken in turn.
        count: points, spread over the schedule.
        height, width: of the pictures, in pixels; None is the model's own.
        guidance_scale: of the way there; the target itself is not guided.
        seed: of the noise.

    Raises:
        SemipermError: no prompt, no point, or an unsupported pipeline.

    Source: P4D (arXiv 2309.06135), equation 5.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if count < 1 or not prompts:
        raise SemipermError(f"{count} points for {len(prompts)} prompts; expected at least one of each")
    predictor, device = Predictor(pipe), device_of(pipe)
    shape, noise = latent_shape(pipe, height, width), torch.Generator().manual_seed(seed)
    latents = torch.randn(count, *shape, generator=noise).to(device)
    times = predictor.times(_STEPS, latents).to(device)
    places = [row * _STEPS // count for row in range(count)]
    words, none = encode_text(pipe, [prompts[row % len(prompts)] for row in range(count)]), encode_text(pipe, [""])

    def predict(rows: list[int], now: Tensor, features) -> Tensor:
        one = len(features.hidden) == 1
        hidden, pooled = (
            None if t is None else t.expand(len(rows), *t.shape[1:]) if one else t[rows]
            for t in (features.hidden, features.pooled)
        )
        return predictor(latents[rows], now, hidden, pooled)

    for step in range(max(places)):
        rows = [row for row, place in enumerate(places) if place > step]
        now, then = times[step].expand(len(rows)), times[step + 1].expand(len(rows))
        made = predict(rows, now, words)
        if guidance_scale != 1:
            without = predict(rows, now, none)
            made = without + guidance_scale * (made - without)
        latents[rows] = predictor.step(latents[rows], made, now, then)
    everywhere = list(range(count))
    wanted = torch.cat([
        predict(rows, times[[places[row] for row in rows]], words)
        for rows in (everywhere[first : first + 16] for first in range(0, count, 16))
    ])  # fmt: skip
    return Targets(latents, times[places], wanted)


@torch.no_grad()
def targets_from_pictures(pipe: Pipeline, pictures: Pictures, count: int = 32, *, seed: int = 0) -> Targets:
    """The noise that was put on pictures of the concept: UnlearnDiffAtk's target, and textual inversion's.

    Args:
        pipe: any pipeline of the same autoencoder and schedule.
        pictures: that show the concept, PIL or tensors (3, H, W) in 0..1, of one size.
        count: points; the pictures take turns, the places of the schedule too.
        seed: of the noise.

    Raises:
        SemipermError: no pictures, no point, or an unsupported pipeline.

    Source: UnlearnDiffAtk (arXiv 2310.11868), equation 6.
    """
    if count < 1:
        raise SemipermError(f"{count} points; expected at least one")
    predictor = Predictor(pipe)
    clean = encode_images(pipe, pictures)
    clean = clean[torch.arange(count) % len(clean)]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).to(clean.device)
    times = predictor.times(_STEPS, clean).to(clean.device)[(torch.arange(count) * 7) % _STEPS]  # 7 and 20 are coprime
    image, level = predictor.levels(times)
    latents = image * clean + level * noise
    kind = predictor.kind
    wanted = {"epsilon": noise, "v_prediction": image * noise - level * clean, "flow": noise - clean}[kind]
    back, _ = parts_of(kind, latents, wanted, image.clamp_min(1e-3), level)
    if not torch.isfinite(back).all():
        raise SemipermError("the pictures' latents are not finite; load the autoencoder in float32")
    return Targets(latents, times, wanted)
