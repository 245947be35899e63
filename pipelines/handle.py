"""The handle that `apply_...` returns: a method at work on one denoiser, what it did, and how it comes off again."""

from __future__ import annotations

import abc
import logging
from collections.abc import Sequence
from typing import TypeVar

from diffusers.hooks import ModelHook
from torch import nn

from ..methods.errors import SemipermError
from .family import Pipeline, denoiser_of
from .hooks import install, listen, uninstall, unlisten

__all__ = ["Handle"]

logger = logging.getLogger(__name__)

AnyHandle = TypeVar("AnyHandle", bound="Handle")


class Handle(abc.ABC):
    """A context manager that removes the method on exit.

    It listens to the pipeline: a run in which the method cannot act, or did not, never passes for one in which it did.

    Args:
        pipe: the pipeline that it was applied to.
        config: what the method was set to; its `strength` is 0 where nothing is wanted, its `window` says when.
        hooks: (module, hook) to install, in this order; all come off together.
    """

    NAME: str  # of our hooks in diffusers' registries, and of the handle's attribute on the denoiser
    ERROR: type[SemipermError]  # the family's

    def __init__(self, pipe: Pipeline, config, hooks: Sequence[tuple[nn.Module, ModelHook]] = ()):
        self.pipe, self.config, self.hooks = pipe, config, list(hooks)
        self.denoiser, self.attribute = denoiser_of(pipe)
        self._running = False  # from a pipeline's encode_prompt to its end
        self._timesteps = None  # the schedule that was there when it began: a run makes a new one

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
        listen(self.pipe, "encode_prompt", self._encoded)
        listen(self.pipe, "maybe_free_model_hooks", self._ended)  # the last thing that every pipeline's call does

    def remove(self) -> None:
        """Take every hook out: the pipeline computes the bits it computed before. Removing twice is harmless."""
        if getattr(self.denoiser, self.NAME, None) is not self:
            return
        for module, _ in self.hooks:
            uninstall(module, self.NAME)
        unlisten(self.pipe, "encode_prompt", self._encoded)
        unlisten(self.pipe, "maybe_free_model_hooks", self._ended)
        delattr(self.denoiser, self.NAME)

    @property
    def compiled(self) -> bool:
        """Whether the whole denoiser is compiled: then its graph acts, but keeps no record."""
        wrapped = getattr(self.pipe, self.attribute) is not self.denoiser
        return wrapped or getattr(self.denoiser, "_compiled_call_impl", None) is not None

    @abc.abstractmethod
    def report(self) -> dict:
        """What the method did in the last call of the pipeline."""

    @abc.abstractmethod
    def steps(self) -> list[dict]:
        """{"share", "sigma", "active"} of each step of the current or last call of the pipeline, empty before one."""

    @abc.abstractmethod
    def begin_run(self, encoded, arguments: dict) -> None:
        """A run begins: forget the last one's record. Guidance by separate calls (Flux) says so twice.

        Args:
            encoded: what the pipeline's encode_prompt returned. arguments: what it was called with, by name.
        """

    def never_ran(self) -> str:
        """What to say of a run that went by the method."""
        return (
            f"the pipeline ran, but {self.NAME.strip('_')} on pipe.{self.attribute} never did: were its hooks taken off"
            " or its forward replaced? The images are the untouched model's; apply it again"
        )

    def _encoded(self, result, arguments: dict) -> None:
        if denoiser_of(self.pipe)[0] is not self.denoiser:
            raise self.ERROR(
                f"pipe.{self.attribute} was replaced after {self.NAME.strip('_')} was applied to it, which would"
                " therefore not act; apply it again"
            )
        self._running, self._timesteps = True, self._schedule()
        self.begin_run(result, arguments)

    def _schedule(self):
        return getattr(getattr(self.pipe, "scheduler", None), "timesteps", None)

    def _ended(self, result, arguments: dict) -> None:
        running, self._running = self._running and self._schedule() is not self._timesteps, False
        if not running or self.compiled or self.config.strength == 0:
            return
        steps = self.steps()
        if not steps:
            raise self.ERROR(self.never_ran())
        if missed := self.config.window.missed(steps):
            logger.warning("%s: %s", self.NAME.strip("_"), missed)
