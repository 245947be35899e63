"""A model's runs for one fit of image-side membranes, whatever framework runs it: what is drawn, from which noise, and
what is kept of it.

A face gives two things alone: how pictures are drawn, and how pictures are shown to the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .types import Membrane
from .visual import VisualSide
from .visual_fit import VisualConfig
from .visual_takers import Scores, Tokens

__all__ = ["LOOKED_AT", "Drawing"]

LOOKED_AT = (0.3, 0.5, 0.7)  # shares to which a picture is noised to see what it shows: neither all noise nor none
_AWAY = 1_000_000  # between the seeds of the fit, the thresholds and the validation


class Drawing(ABC):
    """Runs of a model, under watch.

    Args:
        layers: keys of the layers that read the text. every_layer: those and self-attention, which looks at the picture
            alone.
    """

    def __init__(self, config: VisualConfig, layers: Sequence[str], every_layer: Sequence[str]):
        self.config, self.layers, self.every_layer = config, list(layers), list(every_layer)
        self._known: dict[tuple[str, ...], tuple[list[float], dict[str, Tensor]]] = {}

    @abstractmethod
    def draw(
        self, prompts: Sequence[str], seed: int, taker: Any = None, keys: Sequence[str] = (), more: int = 0
    ) -> Tensor:
        """The latents of runs in `config.steps` + `more` steps: picture i starts from the noise of `config.seed` + seed
        + i. A taker sees what the layers `keys` answer for it, and `taker.next()` ends each batch."""

    @abstractmethod
    def redrawn(self, prompts: Sequence[str], seed: int, membrane: Membrane) -> Tensor:
        """The same with a membrane at work."""

    @abstractmethod
    def show(self, pictures: Tensor, captions: Sequence[str], taker: Any, keys: Sequence[str]) -> None:
        """Each picture is noised to the shares of `LOOKED_AT` and denoised once under its caption, seen by a taker;
        `taker.next()` ends each picture."""

    def tokens(self, prompts: Sequence[str], keep: bool) -> tuple[list[float], dict[str, Tensor]]:
        """(shares (J,), key -> tokens (P, J, S, C)) of runs; `keep`: they are asked for again."""
        key = tuple(prompts)
        if key in self._known:
            return self._known[key]
        taker = Tokens(self.config.tokens)
        self.draw(prompts, 0, taker, self.layers)
        found = taker.of()
        self._known |= {key: found} if keep else {}
        return found

    def scores(self, sides: Sequence[VisualSide], prompts: Sequence[str]) -> Tensor:
        """(P, K): the highest count of each run along each side's directions; of one step more than `tokens`."""
        taker = Scores(sides)
        self.draw(prompts, _AWAY, taker, list(taker.sites), more=1)
        return taker.of()

    def validate(self, side: VisualSide, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Draws new pictures: (P,) their highest counts, and the pictures themselves, for `seen`."""
        taker = Scores([side])
        pictures = self.draw(prompts, 2 * _AWAY, taker, list(taker.sites))
        return taker.of()[:, 0], pictures

    def redraw(self, prompts: Sequence[str], membrane: Membrane | None) -> Tensor:
        """Pictures from the noise of `validate`, with a membrane at work or without."""
        seed = 2 * _AWAY
        return self.draw(prompts, seed) if membrane is None else self.redrawn(prompts, seed, membrane)

    def look(self, pictures: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """key -> tokens (P, J, S, C) of pictures, noised to the J shares of `LOOKED_AT` and shown to the untouched
        model under captions of their own."""
        taker = Tokens(self.config.tokens)
        self.show(pictures, captions, taker, self.every_layer)
        return taker.of()[1]

    def seen(self, side: VisualSide, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        """(P,): the highest counts of pictures that are shown like that."""
        taker = Scores([side])
        self.show(pictures, captions, taker, list(taker.sites))
        return taker.of()[:, 0]
