"""Extra rows beside a batch: denoised with it, seen by every layer, never given back.

A method says which rows it adds and where each takes its inputs from; everything that has one row an image is then
extended, whatever the family calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from .hooks import parameters_of

__all__ = ["ExtraRows", "RowsHook", "with_rows"]

# Positions of tokens, one row a token: they belong to no image, even where there are as many as rows.
_UNBATCHED = ("img_ids", "txt_ids")


@dataclass(eq=False)
class ExtraRows:
    """What is added to one call.

    Args:
        batch: rows of the call itself.
        sources: for each added row the row whose inputs it takes.
        own: (name, value) -> that input with its added rows, or None to take its sources'.
    """

    batch: int
    sources: Sequence[int]
    own: Callable[[str, Tensor], Tensor | None]


def with_rows(name: str, value, rows: ExtraRows):
    """An input with the added rows at its end; what has no row an image is as it was."""
    if isinstance(value, dict):
        return {key: with_rows(key, item, rows) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(with_rows(name, item, rows) for item in value)
    if not isinstance(value, Tensor) or name in _UNBATCHED or value.ndim == 0 or value.shape[0] != rows.batch:
        return value
    whole = rows.own(name, value)
    # slices: a list of indices would have to be copied to the device
    return torch.cat([value, *(value[s : s + 1] for s in rows.sources)]) if whole is None else whole


class RowsHook(ModelHook):
    """On a denoiser: asks `begin(inputs, name of the latents)` for the rows of a call, and tells `end` when it is over.

    Args:
        begin: returns `ExtraRows`, or None where this call gets none.
        end: called with whether rows were added, after the call.
    """

    adds_rows = True

    def __init__(self, module: nn.Module, begin: Callable, end: Callable):
        super().__init__()
        self.begin, self.end = begin, end
        self.names = parameters_of(module)
        self._rows: ExtraRows | None = None

    def pre_forward(self, module: nn.Module, *args, **kwargs):
        inputs = dict(zip(self.names, args, strict=False)) | kwargs
        self._rows = self.begin(inputs, self.names[0])
        if self._rows is not None:
            inputs = {name: with_rows(name, value, self._rows) for name, value in inputs.items()}
        return (), inputs

    def post_forward(self, module: nn.Module, output):
        rows, self._rows = self._rows, None
        self.end()
        if rows is None:
            return output
        if isinstance(output, tuple):
            return (output[0][: rows.batch], *output[1:])
        return type(output)(sample=output.sample[: rows.batch])
