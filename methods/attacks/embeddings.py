"""Embeddings found by gradient: what no word says, handed to a model that takes embeddings.

    h* = argmin_h mean_(z, t) |e(z, t, h) - target(z, t)|^2

with h some token embeddings (textual inversion) or the whole text that the denoiser reads.

Sources: textual inversion (arXiv 2208.01618), equation 2; against erasure, concept inversion (arXiv 2308.01508).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SemipermError

__all__ = ["Learned", "learn_tensors"]


@dataclass(frozen=True, eq=False)
class Learned:
    """The tensors of the least smoothed loss, and every step's loss."""

    tensors: tuple[Tensor, ...]
    losses: tuple[float, ...]


def learn_tensors(
    loss_of: Callable[[Sequence[Tensor], int], Tensor],
    start: Sequence[Tensor],
    steps: int,
    learning_rate: float,
    progress: Callable[[int, float], None] | None = None,
) -> Learned:
    """Adam on tensors.

    Args:
        loss_of: (tensors, step) -> () loss; all that is drawn in it should depend on the step alone.
        start: where to begin; not changed.
        steps: >= 1. learning_rate: > 0.
        progress: called with (step, loss).

    Raises:
        SemipermError: no steps, no rate, or a loss that is not finite.
    """
    if steps < 1 or not 0 < learning_rate < float("inf"):
        raise SemipermError(f"{steps} steps at learning_rate={learning_rate}; expected at least 1, and a rate above 0")
    tensors = [t.detach().float().clone().requires_grad_() for t in start]
    optimizer = torch.optim.Adam(tensors, learning_rate)
    smooth, least, best, losses = None, float("inf"), [t.detach().clone() for t in tensors], []
    for step in range(steps):
        with torch.enable_grad():
            loss = loss_of(tensors, step)
            grads = torch.autograd.grad(loss, tensors)
        losses.append(float(loss.detach()))
        if not abs(losses[-1]) < float("inf"):  # NaN, too
            raise SemipermError(f"the attacker's loss is {losses[-1]} at step {step}; expected a finite number")
        # what is drawn differs from step to step: one lucky draw is no better text
        smooth = losses[-1] if smooth is None else 0.9 * smooth + 0.1 * losses[-1]
        if smooth < least:
            least, best = smooth, [t.detach().clone() for t in tensors]
        for tensor, grad in zip(tensors, grads, strict=True):
            tensor.grad = grad
        optimizer.step()
        if progress is not None:
            progress(step, losses[-1])
    return Learned(tuple(best), tuple(losses))
