"""How much memory a computation needs beside its inputs and its outputs."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Peak", "peak_bytes"]


class Peak(TorchDispatchMode):
    """Bytes of all storages that operators make while it is on. What they use inside does not count."""

    def __init__(self):
        super().__init__()
        self.live, self.log, self.serial = {}, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = set(_storages((args, kwargs)))
        out = func(*args, **(kwargs or {}))
        for key, storage in _storages(out).items():
            if key not in self.live and key not in given:
                self.serial += 1
                self.live[key] = self.serial, storage.nbytes()
                self.log.append((self.serial, storage.nbytes()))
                weakref.finalize(storage, self._freed, key)
        return out

    def _freed(self, key: int) -> None:
        serial, size = self.live.pop(key)
        self.log.append((serial, -size))

    def beyond(self, outputs) -> int:
        """Peak bytes beside the outputs'."""
        kept = {self.live[key][0] for key in _storages(outputs) if key in self.live}
        now = peak = 0
        for serial, size in self.log:
            now += size if serial not in kept else 0
            peak = max(peak, now)
        return peak


def peak_bytes(function: Callable, *args) -> int:
    """The most bytes that function(*args) holds at once, beside its arguments and what it returns.

    On CUDA the allocator's; elsewhere those of the tensors that its operators make. Meta tensors do: nothing is
    allocated, nor computed, then. On CUDA the outputs count as if they were alive at the peak: where they come after
    it, the figure is too low by their size.
    """
    devices = [t.device for t in tree_leaves(args) if isinstance(t, Tensor) and t.is_cuda]
    if not devices:
        with Peak() as peak:
            outputs = function(*args)
        return peak.beyond(outputs)
    torch.cuda.synchronize(devices[0])
    torch.cuda.reset_peak_memory_stats(devices[0])
    before = torch.cuda.memory_allocated(devices[0])
    outputs = function(*args)
    torch.cuda.synchronize(devices[0])
    given = _storages(args)
    kept = sum(storage.nbytes() for key, storage in _storages(outputs).items() if key not in given)
    return max(0, torch.cuda.max_memory_allocated(devices[0]) - before - kept)


def _storages(tree) -> dict[int, torch.UntypedStorage]:
    storages = [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, Tensor)]
    return {storage._cdata: storage for storage in storages}
