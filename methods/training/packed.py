"""Membranes while they are trained: K of them packed in every projection, each with parameters of its own.

    y = W x + ((x D^T) * Gamma[row, owner]) U

Gamma (rows, K) says which membrane acts on which row of the batch, so K concepts are trained side by side, and none
sees another: the packed form is the sum of the single ones, and its gradient falls apart into theirs.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import MembraneError
from ..membranes.sites import add_low_rank
from ..membranes.types import LowRank, Membrane

__all__ = ["PackedMembranes", "Site", "seed_of"]


class PackedMembranes:
    """The parameters of K membranes over the same modules, and which of them act on which row.

    Args:
        shapes: module key -> (out, in) of its weight.
        names: K concepts, each once.
        rank: of pairs that begin at zero.
        starts: K membranes to begin from, or None for those that begin at zero: `down` uniform within
            1 / sqrt(in), as SPM's (Kaiming with a = sqrt 5), `up` zero.
        seed: of those.
        convolutions: which of the modules are 1x1 convolutions, whose pairs are stored with a trailing (1, 1).

    Raises:
        MembraneError: no modules, a name twice, or a start that wraps another module.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        names: Sequence[str],
        rank: int,
        starts: Sequence[Membrane | None],
        seed: int,
        device: torch.device | str = "cpu",
        convolutions: Collection[str] = (),
    ):
        if not shapes or not names or len(set(names)) < len(names):
            raise MembraneError(
                f"{len(shapes)} modules and the concepts {list(names)} to train; expected at least one of each, and no"
                " name twice"
            )
        self.names, self.shapes, self._convolutions = tuple(names), dict(shapes), frozenset(convolutions)
        self.acting: tuple[int, ...] = ()  # which membranes act in the call at hand
        self.gamma: Tensor | None = None  # (rows, len(acting)) of that call; None: none acts
        self.parameters: list[dict[str, nn.Parameter]] = []
        for name, start in zip(names, starts, strict=True):
            given = {} if start is None else start.modules
            if foreign := [key for key in given if key not in shapes]:
                raise MembraneError(
                    f"the membrane for {start.concept!r} to begin from wraps {foreign[0]}, which is not among the"
                    f" {len(shapes)} projections to be trained; expected layers='all', or a membrane of those layers"
                )
            self.parameters.append(
                {f"{key}.{part}": value for key, shape in shapes.items()
                 for part, value in self._pair(key, shape, given.get(key), rank, seed, name, device).items()}
            )  # fmt: skip

    @staticmethod
    def _pair(key, shape, start, rank, seed, name, device) -> dict[str, nn.Parameter]:
        out, into = shape
        if start is None:
            # of the concept and the module alone: trained with others or without, it begins the same
            noise = torch.Generator().manual_seed(seed_of(seed, name, key))
            down = (torch.rand(rank, into, generator=noise) * 2 - 1) / math.sqrt(into)
            up = torch.zeros(rank, out)
        else:
            down, up = start.down.flatten(1).float(), start.up.flatten(1).float().T * start.scale
        return {part: nn.Parameter(t.to(device).contiguous().clone()) for part, t in (("down", down), ("up", up))}

    def named(self) -> dict[str, nn.Parameter]:
        """All parameters: "<k>.<module key>.down" (r, in) and ".up" (r, out)."""
        return {f"{k}.{name}": p for k, own in enumerate(self.parameters) for name, p in own.items()}

    @contextlib.contextmanager
    def on(self, rows: Sequence[int], gates: Tensor | None = None) -> Iterator[None]:
        """Inside, membrane rows[i] alone acts on row i of every call: until the backward pass is over.

        Args:
            gates: (rows,) how far it is open in each; None is all the way. Gradients flow through them.

        Layers that are computed twice (gradient checkpointing) ask again in the backward pass.
        """
        self.acting = tuple(dict.fromkeys(rows))
        self.gamma = torch.tensor([[float(k == row) for k in self.acting] for row in rows])
        if gates is not None:
            self.gamma = self.gamma.to(gates.device) * gates[:, None]
        try:
            yield
        finally:
            self.acting, self.gamma = (), None

    def pair(self, key: str) -> tuple[Tensor, Tensor, list[int]]:
        """D (R, in), U (R, out) of one module, and which column of gamma each of the R rank rows is gated by."""
        downs, ups = ([self.parameters[k][f"{key}.{part}"] for k in self.acting] for part in ("down", "up"))
        return torch.cat(downs), torch.cat(ups), [n for n, down in enumerate(downs) for _ in range(len(down))]

    def membrane(self, k: int, like: Membrane, tensors: Mapping[str, Tensor] | None = None) -> Membrane:
        """Membrane k with these tensors (its own where None), and all else as `like` has it."""
        own = self.parameters[k] if tensors is None else tensors
        modules = {}
        for key in self.shapes:
            down, up = (own[f"{key}.{part}"].detach().cpu().float().clone() for part in ("down", "up"))
            tail = (1, 1) if key in self._convolutions else ()
            modules[key] = LowRank(
                down.reshape(*down.shape, *tail), up.T.contiguous().reshape(*up.T.shape, *tail), float(len(down))
            )
        return Membrane(
            like.concept, modules, like.phrases, like.surrogate, like.method, like.base_model, like.probe, like.metadata
        )


class Site:
    """A hook (`original, module, x -> y`) that lets the membranes act on one projection."""

    def __init__(self, packed: PackedMembranes, key: str):
        self.packed, self.key = packed, key

    def __call__(self, original: Callable, module: nn.Module, x: Tensor, *args, **kwargs) -> Tensor:
        y, gamma = original(x, *args, **kwargs), self.packed.gamma
        if gamma is None:
            return y
        down, up, owner = self.packed.pair(self.key)
        gamma = gamma[:, owner].to(y.device, y.dtype)
        return add_low_rank(y, x, down.to(y.device, y.dtype), up.to(y.device, y.dtype), gamma, self.key)


def seed_of(seed: int, *parts: str | int) -> int:
    """A seed for one thing that is drawn: the same for the same parts, whatever else is drawn."""
    text = "\x1f".join(map(str, (seed, *parts))).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
