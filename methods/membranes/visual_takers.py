"""What a fit of image-side membranes keeps of the tokens that it is shown, whatever framework shows them.

A taker's `take(key, tokens, share, text)` is given what one layer answers for P pictures, (P, N, C) or (P, T + N, C)
with `text` = T tokens of text before the image's, at a share of the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .image_site import ImageSite
from .visual import VisualSide

__all__ = ["Scores", "Tokens"]


class Tokens:
    """Keeps some tokens of every layer, picture and step: always the same places of a layer.

    Args:
        count: of one layer's answer.
    """

    def __init__(self, count: int):
        self.count = count
        self._kept: dict[str, dict[float, list[Tensor]]] = {}

    def take(self, key: str, tokens: Tensor, share: float, text: int) -> None:
        image = tokens[:, text:]
        places = torch.randperm(image.shape[1], generator=torch.Generator().manual_seed(0))[: self.count]
        kept = self._kept.setdefault(key, {}).setdefault(share, [])
        kept.append(image[:, places.to(image.device)].cpu())

    def next(self) -> None:
        """A batch of pictures is over."""

    def of(self) -> tuple[list[float], dict[str, Tensor]]:
        """(shares (J,), key -> (P, J, S, C))."""
        shares = sorted(next(iter(self._kept.values())))
        return shares, {
            key: torch.stack([torch.cat(steps[share]) for share in shares], dim=1) for key, steps in self._kept.items()
        }


class Scores:
    """Keeps each picture's highest count along each concept's directions, over tokens, layers and steps."""

    def __init__(self, sides: Sequence[VisualSide]):
        self.sites = {}
        for key in dict.fromkeys(key for side in sides for key in side.sites):
            parts = [(k, side) for k, side in enumerate(sides) if key in side.sites]
            self.sites[key] = ImageSite(key, parts, len(sides), after_text=False)
        self._now: Tensor | None = None
        self._done: list[Tensor] = []

    def take(self, key: str, tokens: Tensor, share: float, text: int) -> None:
        site, image = self.sites[key], tokens[:, text:]
        site.place(image.device)
        found = site.scores(image, site.packed_at(share, image.dtype), 0)  # rounded as it is at work
        self._now = found if self._now is None else torch.maximum(self._now, found)

    def next(self) -> None:
        """A batch of pictures is over."""
        if self._now is not None:
            self._done.append(self._now.cpu())
        self._now = None

    def of(self) -> Tensor:
        """(pictures, K)."""
        return torch.cat(self._done)
