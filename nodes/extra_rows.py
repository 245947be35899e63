"""Extra rows beside a batch, in ComfyUI: denoised with it, seen by every layer, never given back.

The counterpart of pipelines/rows.py. A method says which rows it adds and where each takes its inputs from; everything
that has one row an image is then extended. `transformer_options` tell the layers which rows came from the sampler, and
other packs, which count rows by cond_or_uncond and uuids, find as many of these as there are rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ExtraRows", "Rows", "call_with_rows", "rows_of", "with_rows"]

_ROWS = "semiperm_rows"  # in transformer_options, by name: another copy of this package may have put them there
_CONTEXT = 1  # where the text is among the forward's arguments after x: forward(x, timesteps, context, ...)


class Rows(NamedTuple):
    """The rows of one call of the denoiser.

    Args:
        sampled: how many came from the sampler; they come first.
        chunks: ComfyUI's cond_or_uncond: which conditioning each run of these rows has.
        total: all rows, those included that were added.
    """

    sampled: int
    chunks: list[int]
    total: int

    @property
    def each(self) -> int:
        """Rows of one chunk."""
        return max(1, self.sampled // len(self.chunks))

    def chunk_of(self, row: int) -> int:
        """The number of a row's chunk."""
        return min(row // self.each, len(self.chunks) - 1)


@dataclass(eq=False)
class ExtraRows:
    """What is added to one call.

    Args:
        sources: for each of S added rows the row whose inputs it takes.
        x: (S, C, ...) the added rows themselves; None adds their sources once more.
        context: (S or 1, T, C) their text; None takes their sources'.
        pooled: (S or 1, P) takes the place of the first P elements of their `y`; None leaves it their sources'.
    """

    sources: Sequence[int]
    x: Tensor | None = None
    context: Tensor | None = None
    pooled: Tensor | None = None


def rows_of(x: Tensor, options: dict) -> Rows:
    """The rows of a call with this input and these transformer_options."""
    chunks = list(options.get("cond_or_uncond") or [0])
    return Rows(*options.get(_ROWS) or (x.shape[0], chunks, x.shape[0]))


def with_rows(value, batch: int, sources: Sequence[int]):
    """Every tensor of `batch` rows in this value, with the rows `sources` once more at its end."""
    if isinstance(value, Tensor):
        if value.ndim == 0 or value.shape[0] != batch:
            return value
        return torch.cat([value, *(value[s : s + 1] for s in sources)])
    if isinstance(value, dict):
        return {key: with_rows(item, batch, sources) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(with_rows(item, batch, sources) for item in value)
    return value


def call_with_rows(original: Callable, x: Tensor, args: Sequence, kwargs: dict, extra: ExtraRows) -> Tensor:
    """The diffusion model's forward with the added rows, which its answer does not have.

    Args:
        original: the forward.
        x, args, kwargs: what it was to be called with: x (B, C, ...), timesteps, context, ...
    """
    batch, sources = x.shape[0], extra.sources
    options = _options_with(x, kwargs.get("transformer_options") or {}, sources)
    if not sources:
        return original(x, *args, **kwargs | {"transformer_options": options})
    args = [with_rows(value, batch, sources) for value in args]
    kwargs = {name: with_rows(value, batch, sources) for name, value in kwargs.items() if name != "transformer_options"}
    if extra.context is not None:
        given = kwargs if "context" in kwargs else args
        where = "context" if "context" in kwargs else _CONTEXT
        given[where] = torch.cat([given[where][:batch], extra.context.expand(len(sources), -1, -1)])
    if extra.pooled is not None and isinstance(kwargs.get("y"), Tensor):
        kwargs["y"][batch:, : extra.pooled.shape[-1]] = extra.pooled.to(kwargs["y"])
    x = with_rows(x, batch, sources) if extra.x is None else torch.cat([x, extra.x])
    return original(x, *args, **kwargs, transformer_options=options)[:batch]


def _options_with(x: Tensor, options: dict, sources: Sequence[int]) -> dict:
    rows = rows_of(x, options)
    options = options | {_ROWS: tuple(rows._replace(total=x.shape[0] + len(sources)))}
    if not sources or len(sources) % rows.each:  # no whole chunks: nothing that could be said of them
        return options
    chunks = [rows.chunk_of(source) for source in sources[:: rows.each]]
    for name in ("cond_or_uncond", "uuids"):  # other packs count on: rows = chunks x rows of a chunk
        if known := options.get(name):
            options[name] = [*known, *(known[chunk] for chunk in chunks)]
    return options
