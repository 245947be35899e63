"""A trajectory-level objective: the concept's whole way from noise to picture becomes the surrogate's.

A stochastic sampler (DDIM with eta = 1) draws the way z_T ... z_1 of a picture with the surrogate c*, by the untouched
model. Through the membrane, the concept's prompt c must find this way as likely, up to a constant:

    L = (log Z + S - log beta)^2
    S = sum_t [ log p_M(z_t-1 | z_t, c) - log p(z_t-1 | z_t, c*) ] / D
      = sum_t mean_D [ (z_t-1 - mu*_t)^2 - (z_t-1 - mu_t)^2 ] / (2 sigma_t^2)

D is the number of the latent's elements, mu the two models' means of the step, sigma its noise. log Z is learned, one
for each concept, from 0 on. S is 0 where the two ways are the same and -KL / D in expectation elsewhere, so at first
log beta > 0 presses S upwards, and once log Z has come to log beta, what is left to fall is S's variance over ways.
No reward is asked for: every way of the surrogate's has the same one, beta.

With F = log Z - log beta, L = F^2 + 2 F S + S^2. In the middle term each step stands by its expectation over the step's
noise, -|mu_t - mu*_t|^2 / (2 sigma_t^2): the mean is the same, and so is the minimum, but the one draw's noise, which F
would multiply, is gone. With few elements or a weak concept it hides the gradient.

Source: after EraseFlow (arXiv 2511.00804), which holds trajectory balance (arXiv 2201.13259) to a constant reward on an
anchor prompt's ways. Ours is relative to the untouched model (arXiv 2405.20971), whose density takes the place of the
backward policy's, and a mean over the latent, so that beta means the same at every size. Anchors are kept as in latent
anchoring.
"""

from __future__ import annotations

from torch import Tensor

from ..sampling import parts_of

__all__ = ["expected_ratio", "log_ratio", "noisy_step", "trajectory_loss"]


def noisy_step(
    kind: str, latents: Tensor, prediction: Tensor, now: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """(mean, sigma) of the next latents: the posterior of the noising process, given the image that is predicted.

    sigma^2 = (s'^2 / s^2) (s^2 - (a / a')^2 s'^2),   mean = a' x + sqrt(s'^2 - sigma^2) n

    Args:
        kind: see `methods.sampling`. latents, prediction: (B, C, H, W).
        now, then: (a, s) of the step at hand and of the next, a' > 0; s' = 0 gives sigma = 0.

    Source: DDIM (arXiv 2010.02502), equations 12 and 16 with eta = 1, for any a and s.
    """
    (a, s), (a_then, s_then) = now, then
    clean, pure = parts_of(kind, latents, prediction, a, s)
    variance = ((s_then / s).square() * (s.square() - (a / a_then * s_then).square())).clamp_min(0.0)
    return a_then * clean + (s_then.square() - variance).clamp_min(0.0).sqrt() * pure, variance.sqrt()


def log_ratio(drawn: Tensor, mean: Tensor, reference: Tensor, sigma: Tensor) -> Tensor:
    """(B,): one step's term of S.

    Args:
        drawn: (B, C, H, W) z_t-1. mean, reference: mu and mu*. sigma: broadcasts over them, > 0.
    """
    gap = (drawn - reference).square() - (drawn - mean).square()
    return (gap / (2 * sigma.square())).flatten(1).mean(1)


def expected_ratio(mean: Tensor, reference: Tensor, sigma: Tensor) -> Tensor:
    """(B,): the mean of `log_ratio` over what is drawn: minus the step's Kullback-Leibler divergence over D."""
    return -((mean - reference).square() / (2 * sigma.square())).flatten(1).mean(1)


def trajectory_loss(flow: Tensor, ratio: Tensor, expected: Tensor, target: float) -> Tensor:
    """(B,): F^2 + 2 F S' + S^2 with F = log Z - log beta, whose mean is that of (F + S)^2.

    Args:
        flow: log Z, () or (B,). ratio: (B,) S. expected: (B,) S', of `expected_ratio`. target: log beta.
    """
    gap = flow - target
    return gap.square() + 2 * gap * expected + ratio.square()
