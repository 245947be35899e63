"""Image-side membranes at work on one layer's answer, whatever framework calls it, and what opened there.

K membranes are one projection: at each share of the schedule their directions are stacked and edited in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...kernels.dispatch import without_autocast
from ...kernels.gated_projection import gated_projection
from ..errors import MembraneError
from .visual import VisualSide

__all__ = ["ImageSite", "Openings", "knot_weights", "opened_row"]


def knot_weights(knots: Tensor, share: float | Tensor) -> Tensor:
    """(J,) weights of linear interpolation between knots (J,) at a share; outside, the first or last knot alone.

    >>> knot_weights(torch.tensor([0.0, 0.5, 1.0]), 0.125).tolist()
    [0.75, 0.25, 0.0]
    """
    ones = torch.ones_like(knots[:1])
    at = torch.clamp(share * ones, knots[:1], knots[-1:])
    gaps = knots.diff()
    rising, falling = torch.cat([ones, (at - knots[:-1]) / gaps]), torch.cat([(knots[1:] - at) / gaps, ones])
    return torch.minimum(rising, falling).clamp(0.0, 1.0)


@dataclass(eq=False)
class Openings:
    """What opened in the rows of one text batch, over layers and steps.

    Args:
        widest: (B, K) the widest gate. tokens: (B, K) the largest share of one layer's tokens that were open at once.
        maps: number of tokens -> (B, K, N): the widest gate of each token.
    """

    widest: Tensor | None = None
    tokens: Tensor | None = None
    maps: dict[int, Tensor] = field(default_factory=dict)

    def add(self, gates: Tensor, site: ImageSite, gamma: Tensor) -> None:
        """One layer's gates (B, N, R); where gamma (B, K) is 0 nothing acted."""
        each = gates.new_zeros(*gates.shape[:2], site.columns, dtype=torch.float32)
        each = each.scatter_reduce(2, site.owner.expand(gates.shape), gates.float(), "amax")
        each = each * gamma.ne(0).float()[:, None]
        widest, tokens = each.amax(dim=1), each.gt(0).float().mean(dim=1)
        self.widest = widest if self.widest is None else torch.maximum(self.widest, widest)
        self.tokens = tokens if self.tokens is None else torch.maximum(self.tokens, tokens)
        each, count = each.transpose(1, 2), each.shape[1]
        self.maps[count] = each if count not in self.maps else torch.maximum(self.maps[count], each)

    def map(self, row: int, membrane: int, height: int, width: int) -> Tensor:
        """(height, width) in 0..1: where a membrane opened in a row, on a grid of the latents' proportions."""
        found = torch.zeros(height, width)
        for count, each in self.maps.items():
            scale = math.sqrt(height * width / count)
            rows = max(1, round(height / scale))
            if count % rows:
                continue  # a layer whose tokens are no grid of these proportions
            part = each[row, membrane].float().cpu().reshape(1, 1, rows, count // rows)
            found = torch.maximum(found, torch.nn.functional.interpolate(part, (height, width))[0, 0])
        return found


def opened_row(
    gates: Sequence[float], seen: Sequence[tuple[Openings, int]], membranes: Sequence, columns: Sequence[int]
) -> tuple[list[float], dict[str, float]]:
    """A report's figures of one row of text.

    Args:
        gates: (K,) of its prompt. seen: (what opened in a batch, the row's number in it) of each batch that had it.
        membranes: the stack (`types.Membrane`). columns: each membrane's own of those K.

    Returns:
        The gates, of image-side membranes the widest that opened; and of these, concept -> the largest share of one
        layer's tokens that were open at once.
    """
    row, shares = list(gates), {}
    for membrane, column in zip(membranes, columns, strict=True):
        if membrane.visual is None:
            continue
        known = [(each.widest[i, column], each.tokens[i, column]) for each, i in seen if each.widest is not None]
        row[column], share = (max(map(float, values)) for values in zip(*(known or [(0.0, 0.0)]), strict=True))
        shares[membrane.concept] = max(share, shares.get(membrane.concept, 0.0))
    return row, shares


@without_autocast
def _exact(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


class ImageSite:
    """One layer at which image-side membranes act.

    Args:
        parts: (column of gamma, image side that has this layer) of each membrane that acts here.
        columns: of gamma.
        after_text: whether the layer's tokens are text first, then the image.
    """

    def __init__(self, key: str, parts: Sequence[tuple[int, VisualSide]], columns: int, after_text: bool):
        self.key, self.columns, self.after_text = key, columns, after_text
        own = [(column, side, side.sites[key]) for column, side in parts]
        self.owner = torch.tensor([column for column, _, site in own for _ in range(site.rank)])
        self.beta = torch.tensor([side.beta for _, side, site in own for _ in range(site.rank)])
        self.layers = [
            tuple(t.float() for t in (torch.tensor(side.shares), site.read, site.write, site.gates))
            for _, side, site in own
        ]

    def place(self, device: torch.device) -> None:
        """Keep everything where the tokens are."""
        if device != self.owner.device:
            self.owner, self.beta = self.owner.to(device), self.beta.to(device)
            self.layers = [tuple(t.to(device) for t in layer) for layer in self.layers]

    def packed_at(self, share: float | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """read (R, C), write (R, C), gates (5, R) as `gated_projection` takes them, of all membranes at this share."""
        found = []
        for knots, *layer in self.layers:
            weights = knot_weights(knots, share)
            found.append([(weights.reshape(-1, *[1] * (t.ndim - 1)) * t).sum(dim=0) for t in layer])  # not autocast's
        read, write, gates = (torch.cat(parts) for parts in zip(*found, strict=True))
        offset, low, high, seen, sure = gates.T
        gates = torch.stack([offset, low, 1.0 / (high - low), seen, 1.0 / (sure - seen)])
        return read.to(dtype), write.to(dtype), gates

    def scores(self, y: Tensor, packed: tuple[Tensor, Tensor, Tensor], text: int) -> Tensor:
        """(B, columns): how far beyond `seen` the strongest token goes along any direction, in widths sure - seen."""
        read, _, (offset, _, _, seen, slope) = packed
        image = (y[:, text:] if self.after_text else y).float()
        each = ((_exact(image, read.float().T) - offset - seen) * slope).amax(dim=1)
        found = each.new_full((len(y), self.columns), float("-inf"))
        return found.scatter_reduce(1, self.owner.expand(each.shape), each, "amax")

    def edit(self, y: Tensor, packed: tuple[Tensor, Tensor, Tensor], gamma: Tensor, text: int) -> tuple[Tensor, Tensor]:
        """The layer's answer with its concepts taken out, and the gates.

        Args:
            y: (B, N, C), or (B, T + N, C) with `text` = T tokens of text before the image's.
            packed: of `packed_at`. gamma: (B, K), how strongly each membrane acts in each row; 0 leaves its bits.

        Raises:
            MembraneError: a number of rows that is no multiple of gamma's.
        """
        read, write, gates = packed
        strength = gamma.float()[:, self.owner] * self.beta
        if len(y) != len(strength):
            if len(y) % len(strength):
                raise MembraneError(
                    f"{self.key} answered {len(y)} rows, but the prompts are {len(strength)}; expected a multiple"
                )
            strength = strength.repeat_interleave(len(y) // len(strength), dim=0)
        image = y[:, text:] if self.after_text else y
        out, opened = gated_projection(image, read, write, gates, strength)
        return (torch.cat([y[:, :text], out], dim=1) if self.after_text else out), opened
