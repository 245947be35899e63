"""Latent anchoring: what a membrane's prediction is held to, at its concept and away from it."""

from __future__ import annotations

from torch import Tensor

__all__ = ["anchoring_loss", "erasing_loss", "erasing_target"]


def erasing_target(concept: Tensor, surrogate: Tensor, push: float) -> Tensor:
    """e(c*) - eta (e(c) - e(c*)), from the untouched model's predictions.

    The three kinds of prediction (noise, v, flow) are affine in each other at one latent, with one factor for all three
    terms, so the formula holds in the model's own; only the weight of a step differs.

    Args:
        concept, surrogate: (B, C, H, W) e(x, c) and e(x, c*). push: eta.

    Source: SPM (arXiv 2312.16145), equation 4; ESD (arXiv 2303.07345), equation 7, with a surrogate.
    """
    return surrogate - push * (concept - surrogate)


def erasing_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """(B,): mean over the latent of |e_M(x, c) - target|^2."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def anchoring_loss(prediction: Tensor, untouched: Tensor) -> Tensor:
    """(B,): mean over the latent of |e_M(x, a) - e(x, a)|^2.

    Source: SPM (arXiv 2312.16145), equation 5.
    """
    return (prediction.float() - untouched.float()).square().flatten(1).mean(1)
