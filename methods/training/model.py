"""What a training run asks of a model and of the processes that share it; every face answers in its own way."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

__all__ = ["Embedding", "OneProcess", "Processes", "TrainedModel"]

Embedding = tuple[Tensor, Tensor | None]  # hidden (B, N, d) and pooled (B, p) or None


class TrainedModel(Protocol):
    """A denoiser with its text encoder; membranes in training act in its calls through the hooks of its face."""

    @property
    def kind(self) -> str:
        """What it predicts, one of `methods.sampling.KINDS`."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one picture's latents in this run."""
        ...

    def times(self, steps: int, latents: Tensor, /) -> Tensor:
        """(steps + 1,) noise levels in the model's own unit, from pure noise to the image."""
        ...

    def levels(self, times: Tensor, /) -> tuple[Tensor, Tensor]:
        """(a, s) of noise levels (B,): the shares of image and noise, (B, 1, 1, 1) each; (1, 0) for the image."""
        ...

    def encode(self, caption: str, /) -> Embedding:
        """(N, d) and (p,) or None of one caption, as the denoiser is given it; N is the same for all."""
        ...

    def __call__(self, latents: Tensor, times: Tensor, hidden: Tensor, pooled: Tensor | None, /) -> Tensor:
        """(B, C, H, W) float32: what is predicted of latents with a^2 + s^2 = 1, or a + s = 1 for "flow"."""
        ...


class Processes(Protocol):
    """The processes that share the pictures of each step, as `accelerate` has them."""

    num_processes: int
    process_index: int
    is_main_process: bool
    mixed_precision: str  # "no", "fp16" or "bf16": taken where the run's settings say nothing

    def reduce(self, tensor: Tensor, reduction: str, /) -> Tensor: ...

    def gather(self, tensor: Tensor, /) -> Tensor: ...

    def broadcast(self, tensor: Tensor, /) -> Tensor: ...


class OneProcess:
    """`Processes` where there is one."""

    num_processes, process_index, is_main_process, mixed_precision = 1, 0, True, "no"

    def reduce(self, tensor: Tensor, reduction: str = "mean") -> Tensor:
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        return tensor
