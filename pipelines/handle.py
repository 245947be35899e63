"""The handle that `apply_...` returns: a method at work on one denoiser, what it did, and how it comes off again."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TypeVar

from diffusers.hooks import ModelHook
from torch import nn

from .family import Pipeline, denoiser_of
from .hooks import install, uninstall

__all__ = ["Handle"]

AnyHandle = TypeVar("AnyHandle", bound="Handle")


class Handle(abc.ABC):
    """A context manager that removes the method on exit.

    Args:
        pipe: the pipeline that it was applied to.
        hooks: (module, hook) to install, in this order; all come off together.
    """

    NAME: str  # of our hooks in diffusers' registries, and of the handle's attribute on the denoiser

    def __init__(self, pipe: Pipeline, hooks: Sequence[tuple[nn.Module, ModelHook]] = ()):
        self.pipe, self.hooks = pipe, list(hooks)
        self.denoiser, self.attribute = denoiser_of(pipe)

    @classmethod
    def on(cls: type[AnyHandle], pipe: Pipeline) -> AnyHandle | None:
        """The handle of this method at work on a pipeline, or None."""
        return getattr(denoiser_of(pipe)[0], cls.NAME, None)

    def __enter__(self: AnyHandle) -> AnyHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def install(self) -> None:
        """Put the hooks in place; `remove` takes them out again."""
        setattr(self.denoiser, self.NAME, self)
        for module, hook in self.hooks:
            install(module, hook, self.NAME)

    def remove(self) -> None:
        """Take every hook out: the pipeline computes the bits it computed before. Removing twice is harmless."""
        if getattr(self.denoiser, self.NAME, None) is not self:
            return
        for module, _ in self.hooks:
            uninstall(module, self.NAME)
        delattr(self.denoiser, self.NAME)

    @abc.abstractmethod
    def report(self) -> dict:
        """What the method did in the last call of the pipeline."""
