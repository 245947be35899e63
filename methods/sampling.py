"""Deterministic sampling, row by row: each row of a batch may stand at a noise level of its own.

A noised latent is z = a x + s n, with the image x and the noise n. UNets have a^2 + s^2 = 1, flow models a + s = 1.
What a denoiser predicts at (z, a, s) is one of

    epsilon        n                  x = (z - s n) / a
    v_prediction   v = a n - s x      x = a z - s v,   n = a v + s z
    flow           v = n - x          x = z - s v,     n = z + a v

and the next latent is a' x + s' n: DDIM without noise, and the flow's Euler step.
"""

from __future__ import annotations

from torch import Tensor

from .errors import ModelError

__all__ = ["KINDS", "next_latents", "parts_of"]

KINDS = ("epsilon", "v_prediction", "flow")


def parts_of(kind: str, latents: Tensor, prediction: Tensor, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """(x, n): the image and the noise that a prediction says are in the latents.

    Args:
        kind: one of KINDS.
        latents, prediction: (B, ...).
        image, noise: a and s, which broadcast over the latents; a > 0 for "epsilon".

    Raises:
        ModelError: another kind.
    """
    if kind == "epsilon":
        return (latents - noise * prediction) / image, prediction
    if kind == "v_prediction":
        return image * latents - noise * prediction, image * prediction + noise * latents
    if kind == "flow":
        return latents - noise * prediction, latents + image * prediction
    raise ModelError(f"the model predicts {kind!r}; expected one of {', '.join(KINDS)}")


def next_latents(
    kind: str, latents: Tensor, prediction: Tensor, now: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor]
) -> Tensor:
    """The latents one step on.

    Args:
        now, then: (a, s) of the step at hand and of the next; (1, 0) is the image.

    Source: DDIM (arXiv 2010.02502), equation 12 with sigma = 0.

    >>> import torch
    >>> z, one, zero = torch.tensor([2.0]), torch.ones(1), torch.zeros(1)
    >>> next_latents("flow", z, torch.tensor([0.5]), (zero, one), (one, zero))
    tensor([1.5000])
    """
    clean, pure = parts_of(kind, latents, prediction, *now)
    return then[0] * clean + then[1] * pure
