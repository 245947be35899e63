"""The text that still brings a concept back, near the texts that name it: what a membrane is then trained on.

    h* = argmin_|h - c| <= r |c|  |e_M(x, h) - e(x, c)|^2

by projected gradient steps, each text's own gradient at unit length. e is the untouched model's prediction.

Source: after AEGIS (arXiv 2602.06771) and AdvUnlearn (arXiv 2405.15234), which search elsewhere; here in what
the denoiser reads, where every other text lies, too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import MembraneError

__all__ = ["adversarial_texts"]


def adversarial_texts(loss_of: Callable[[Tensor], Tensor], hidden: Tensor, steps: int, radius: float) -> Tensor:
    """Texts near these with a smaller loss.

    Args:
        loss_of: (B, N, d) -> (B,).
        hidden: (B, N, d) to begin from.
        steps: >= 1. radius: r > 0, as a share of each text's norm; a step is r / steps: straight on, the edge is reached.

    Returns:
        (B, N, d) without a gradient: of all points that were visited, each text's best.

    Raises:
        MembraneError: no steps, or no radius.
    """
    if steps < 1 or not 0 < radius < float("inf"):
        raise MembraneError(f"{steps} steps within radius {radius}; expected at least one, and a radius above 0")
    start = hidden.detach().float()
    norm = start.flatten(1).norm(dim=1)[:, None, None]
    point, best = start.clone(), start.clone()
    least = torch.full((len(start),), float("inf"), device=start.device)
    for step in range(steps + 1):
        with torch.enable_grad():
            asked = point.clone().requires_grad_()
            losses = loss_of(asked)
            if step < steps:
                (grad,) = torch.autograd.grad(losses.sum(), asked)
        better = losses.detach() < least
        least = torch.where(better, losses.detach(), least)
        best = torch.where(better[:, None, None], point, best)
        if step == steps:
            break
        length = grad.flatten(1).norm(dim=1)[:, None, None].clamp_min(1e-20)
        away = point - grad / length * norm * (radius / steps) - start
        far = away.flatten(1).norm(dim=1)[:, None, None] / (radius * norm)
        point = start + away / far.clamp_min(1.0)
    return best.to(hidden.dtype)
