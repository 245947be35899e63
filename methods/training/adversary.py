"""The text that still brings a concept back, near the texts that name it: what a membrane is then trained on.

    h* = argmin_|h - c| <= r |c|  |e_M(x, h) - e(x, c)|^2

by projected gradient steps, each text's own gradient at unit length, shorter wherever they went too far. e is the
untouched model's prediction.

Source: after AEGIS (arXiv 2602.06771) and AdvUnlearn (arXiv 2405.15234), which search elsewhere; here in what
the denoiser reads, where every other text lies, too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import MembraneError

__all__ = ["adversarial_texts"]

_SHORTER = 4  # of a step that found nothing better; a few of them reach a hundredth of the first


def adversarial_texts(loss_of: Callable[[Tensor], Tensor], hidden: Tensor, steps: int, radius: float) -> Tensor:
    """Texts near these with a smaller loss.

    Args:
        loss_of: (B, N, d) -> (B,).
        hidden: (B, N, d) to begin from.
        steps: >= 1. radius: r > 0, as a share of each text's norm; a step is r / steps.

    Returns:
        (B, N, d) without a gradient: of all points that were visited, each text's best.

    Raises:
        MembraneError: no steps, or no radius.
    """
    if steps < 1 or not 0 < radius < float("inf"):
        raise MembraneError(f"{steps} steps within radius {radius}; expected at least one, and a radius above 0")
    start = hidden.detach().float()
    norm = start.flatten(1).norm(dim=1)[:, None, None]
    point, best, slope = start.clone(), start.clone(), torch.zeros_like(start)
    least, stride = torch.full((len(start),), float("inf"), device=start.device), norm * (radius / steps)
    for step in range(steps + 1):
        with torch.enable_grad():
            asked = point.clone().requires_grad_()
            losses = loss_of(asked)
            (grad,) = torch.autograd.grad(losses.sum(), asked)
        better = losses.detach() < least
        least = torch.where(better, losses.detach(), least)
        better = better[:, None, None]
        best, slope = torch.where(better, point, best), torch.where(better, grad, slope)
        stride = torch.where(better, stride, stride / _SHORTER)
        if step < steps:
            length = slope.flatten(1).norm(dim=1)[:, None, None].clamp_min(1e-20)
            away = best - slope / length * stride - start
            far = away.flatten(1).norm(dim=1)[:, None, None] / (radius * norm)
            point = start + away / far.clamp_min(1.0)
    return best.to(hidden.dtype)
