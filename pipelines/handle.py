"""The handle that `apply_...` returns: a method at work on one denoiser, what it did, and how it comes off again.

What belongs to a call of the denoiser, or to a run of a pipeline, lies in context variables: threads and pipelines that
share the denoiser do not meet there. The method itself lies on the denoiser, and is copied and pickled with it.
"""

from __future__ import annotations

import abc
import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..methods.composition import warn_of
from ..methods.errors import SemipermError
from .family import Pipeline, denoiser_of, family_of
from .hooks import install, listen, listeners_of, parameters_of, uninstall, unlisten
from .rows import Encoded, Run, negative_rows, said
from .text import Ear, reader_of

__all__ = ["Handle", "RootHook", "methods_at"]

logger = logging.getLogger(__name__)

AnyHandle = TypeVar("AnyHandle", bound="Handle")

# More distinct texts than a run of any pipeline has: the denoiser is called by hand, and each call is a run of its own.
_TEXTS = 64

_runs: ContextVar[Mapping[Handle, Run]] = ContextVar("semiperm_runs", default=MappingProxyType({}))
_calls: ContextVar[tuple[tuple[Handle, Any], ...]] = ContextVar("semiperm_calls", default=())


class Handle(abc.ABC):
    """A context manager that removes the method on exit.

    It listens to the pipeline: a run in which the method cannot act, or did not, never passes for one in which it did.

    Args:
        pipe: the pipeline that it was applied to; others that share its denoiser (`from_pipe`) share the method.
        config: what the method was set to; its `strength` is 0 where nothing is wanted, its `window` says when.
        hooks: (module, hook) to install, in this order; all come off together. See `pipelines.hooks`.
    """

    NAME: str  # of our hooks, and of the handle's attribute on the denoiser
    ERROR: type[SemipermError]  # the family's
    methods: frozenset[str] = frozenset()  # what it is, of `methods.composition.METHODS`

    def __init__(self, pipe: Pipeline, config, hooks: Sequence[tuple[nn.Module, Callable]] = ()):
        self.config, self.hooks = config, list(hooks)
        self.denoiser, self.attribute = denoiser_of(pipe)
        self.family = family_of(pipe)
        self.traced: Any = None  # the call at hand, for graphs, which see no context variables
        self.guided = False  # whether the last run guided, for graphs
        self._pipes: weakref.WeakSet = weakref.WeakSet([pipe])
        self._scheduler = getattr(pipe, "scheduler", None)
        self._last: Run | None = None  # the run that began last, in whatever thread
        self._told: Run | None = None  # the one that a pipeline told of last
        self._made: tuple[int, Any] | None = None  # (thread, schedule) of the last such run that called the denoiser

    @classmethod
    def on(cls: type[AnyHandle], pipe: Pipeline) -> AnyHandle | None:
        """The handle of this method at work on a pipeline, or None."""
        return getattr(denoiser_of(pipe)[0], cls.NAME, None)

    @classmethod
    def clear(cls, pipe: Pipeline) -> None:
        """Remove this method from the pipeline's denoiser; handles on denoisers that it had listen no longer."""
        for handle in (cls.on(pipe), *(other for other in listeners_of(pipe) if other.NAME == cls.NAME)):
            if handle is not None and handle.denoiser is denoiser_of(pipe)[0]:
                handle.remove()
            elif handle is not None:
                unlisten(pipe, handle)

    def replace(self, pipe: Pipeline) -> None:
        """Install this handle in place of the one that the pipeline has; where that fails, the old one is back."""
        old = self.on(pipe)
        self.clear(pipe)
        try:
            self.install()
        except BaseException:
            self.remove()
            if old is not None:
                old.install()
            raise
        if self.config.strength:
            warn_of(self.methods, methods_at(pipe))

    def __enter__(self: AnyHandle) -> AnyHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def install(self) -> None:
        """Put the hooks in place; `remove` takes them out again."""
        setattr(self.denoiser, self.NAME, self)
        for module, hook in self.hooks:
            install(module, hook, self.NAME)
        for pipe in list(self._pipes):
            self._attend(pipe)

    def _attend(self, pipe: Pipeline) -> None:
        """Listen to a pipeline, and to its text encoder, which others may share (`from_pipe`)."""
        listen(pipe, self)
        reader = reader_of(pipe)
        if reader is not None:
            encoder, tokenizer = reader
            self._deafen(encoder)
            encoder.register_forward_hook(Ear(self, tokenizer), with_kwargs=True)

    def _deafen(self, encoder: nn.Module) -> None:
        """Take our ear off a text encoder, and those that a copy left."""
        for number, hook in list(encoder._forward_hooks.items()):
            if isinstance(hook, Ear) and hook.listener in (self, None):
                del encoder._forward_hooks[number]
                encoder._forward_hooks_with_kwargs.pop(number, None)

    def remove(self) -> None:
        """Take every hook out: the pipeline computes the bits it computed before. Removing twice is harmless."""
        if getattr(self.denoiser, self.NAME, None) is not self:
            return
        for module, _ in self.hooks:
            uninstall(module, self.NAME)
        for pipe in list(self._pipes):
            unlisten(pipe, self)
            if (reader := reader_of(pipe)) is not None:
                self._deafen(reader[0])
        delattr(self.denoiser, self.NAME)

    def __getstate__(self) -> dict:
        """For copies and pickles: those of the denoiser take the method along, not the pipeline or its last run."""
        state = dict(vars(self))
        return state | {"_pipes": (), "_last": None, "_told": None, "_made": None, "traced": None}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _pipes=weakref.WeakSet())

    # ---- pipelines ----

    @property
    def pipe(self) -> Pipeline:
        """The pipeline of the run at hand, or one that listens.

        Raises:
            ERROR: there is none any more.
        """
        run = self.run
        found = (run.pipe() if run is not None and run.pipe else None) or next(iter(self._pipes), None)
        if found is None:
            raise self.ERROR(
                f"this {type(self.denoiser).__name__} carries {self.NAME.strip('_')} but belongs to no pipeline that it"
                " was applied to (a copy, or the pipeline is gone); apply it again"
            )
        return found

    @property
    def scheduler(self) -> Any:
        """Of the run at hand; that of the last known pipeline where nobody said whose run it is."""
        if torch.compiler.is_compiling():
            return self._scheduler
        run = self.run
        pipe = (run.pipe() if run is not None and run.pipe else None) or next(iter(self._pipes), None)
        if pipe is not None:
            self._scheduler = pipe.scheduler
        return self._scheduler

    def joined(self, pipe: Pipeline) -> None:
        """A copy of the pipeline: it is listened to as well."""
        self._pipes.add(pipe)
        if listeners_of(pipe).count(self) and getattr(self.denoiser, self.NAME, None) is self:
            self._attend(pipe)

    def started(self, pipe: Pipeline) -> Run:
        """A call of a pipeline begins."""
        run = self._told = self._new_run()
        run.pipe, run.before = weakref.ref(pipe), _timesteps(pipe)
        return run

    def encoded(self, pipe: Pipeline, result, arguments: dict) -> None:
        """A pipeline encoded text: a run begins. Guidance by separate calls (Flux) says so twice."""
        if denoiser_of(pipe)[0] is not self.denoiser:
            raise self.ERROR(
                f"pipe.{self.attribute} was replaced after {self.NAME.strip('_')} was applied to it, which would"
                " therefore not act; apply it again"
            )
        run = self.here
        if run is None or run.began or run.over:
            run = self.started(pipe)
        run.encodes += 1
        tensors = [t for t in result if isinstance(t, Tensor) and t.ndim == 3] if isinstance(result, tuple) else []
        # guidance by two calls encodes the negative prompt in a call of its own, as a prompt, after the other
        second = not self.family.one_call and run.encodes > 1
        run.texts += [Encoded(rows, second or bool(n)) for n, rows in enumerate(tensors[:2])]
        self.guided = len(tensors) > 1
        self.begin_run(result, arguments)

    def read(self, prompts: tuple[str, ...], states: Sequence[Tensor]) -> None:
        """A text encoder was called by a pipeline that nobody listens to (`from_pipe`): a run of it begins, or goes on.

        The prompt comes first in every pipeline, the negative one second; of a third nothing is known.

        Args:
            states: (B, N, d) hidden states, one of which the pipeline hands on.
        """
        run = self.here
        if run is None or run.began or run.over:
            run = self._new_run()
        run.reads += 1
        negative = {1: False, 2: True}.get(run.reads)
        if negative is None:
            run.texts = [replace(text, negative=None) for text in run.texts]
        run.texts += [Encoded(state, negative, prompts, sure=False) for state in states]
        self.guided = run.reads == 2

    def ended(self, pipe: Pipeline) -> None:
        """A pipeline's call is over, or somebody freed its memory by hand."""
        run = self.here
        if run is None or run.over or run.pipe is None or run.pipe() is not pipe or _timesteps(pipe) is run.before:
            return
        run.over = True
        if self.compiled or self.config.strength == 0:
            return
        if not run.began:
            raise self.ERROR(self.never_ran())
        if self.config.window.whole:  # nothing to look up
            return
        if missed := self.config.window.missed(self.steps()):
            logger.warning("%s: %s", self.NAME.strip("_"), missed)

    @property
    def compiled(self) -> bool:
        """Whether the whole denoiser is compiled: then its graph acts, but keeps no record."""
        wrapped = any(getattr(pipe, self.attribute, None) is not self.denoiser for pipe in self._pipes)
        return wrapped or getattr(self.denoiser, "_compiled_call_impl", None) is not None

    # ---- runs and calls ----

    @property
    def here(self) -> Run | None:
        """The run of this thread."""
        return _runs.get().get(self)

    @property
    def run(self) -> Run | None:
        """The run of this thread; where it has none, the one that began last."""
        return self.here or self._last

    def _new_run(self) -> Run:
        runs = weakref.WeakKeyDictionary(_runs.get())  # its own: contexts that were copied from this one keep theirs
        old = runs.pop(self, None)
        self._last = None if self._last is old else self._last
        self._told = None if self._told is old else self._told
        _runs.set(runs)
        del old  # what it held may be forgotten
        runs[self] = run = self._last = Run(self.new_record())
        return run

    def called(self) -> Run:
        """The run that a call of the denoiser belongs to; a new one where the last is over."""
        run, schedule = self.here, getattr(self.scheduler, "timesteps", None)
        if run is None or run.over or run.seen > _TEXTS:
            run = self._new_run()
        elif run.began and run.schedule is not schedule and not self._elsewhere(schedule):
            # of a pipeline that nobody listens to, with embeddings: a run makes a new schedule
            texts, run = run.texts, self._new_run()
            run.texts = [text if text.sure else replace(text, negative=None) for text in texts]
        run.began, run.schedule = True, schedule
        if run.pipe is not None:
            self._made = run.thread, schedule
        return run

    def _elsewhere(self, schedule: Any) -> bool:
        """Whether another thread made a new schedule, or may be doing so, in a run of a pipeline that we listen to."""
        run, made = self._told, self._made
        if run is not None and not run.over and run.thread != threading.get_ident():
            return True
        return made is not None and made[1] is schedule and made[0] != threading.get_ident()

    def negative_rows(self, hidden: Tensor) -> tuple[bool | None, ...]:
        """Which rows of the call at hand are guided away from, None where nothing tells; see `pipelines.rows`."""
        run = self.here
        if run is None:
            return negative_rows(hidden, (), self.family.one_call)
        found = negative_rows(hidden, run.texts, self.family.one_call)
        run.positive = run.positive or False in found
        sure = run.positive or bool(said()) or all(text.sure for text in run.texts)
        # that the second text which was read is a negative one is believed where the first was seen as a positive one
        return found if sure else tuple(None if row else row for row in found)

    @property
    def call(self) -> Any:
        """What `begin` returned for the call of the denoiser at hand; None outside of one."""
        if torch.compiler.is_compiling():
            return self.traced
        return next((call for handle, call in reversed(_calls.get()) if handle is self), None)

    @contextlib.contextmanager
    def calling(self, call: Any) -> Iterator[None]:
        """Inside, `call` is the call at hand, in this thread."""
        token, self.traced = _calls.set((*_calls.get(), (self, call))), call
        try:
            yield
        finally:
            _calls.reset(token)
            if self.traced is call:
                self.traced = None

    # ---- what a method says ----

    @abc.abstractmethod
    def report(self) -> dict:
        """What the method did in the last call of the pipeline."""

    @abc.abstractmethod
    def steps(self) -> list[dict]:
        """{"share", "sigma", "active"} of each step of the current or last call of the pipeline, empty before one."""

    def new_record(self) -> Any:
        """A fresh record for a run."""
        return None

    def begin_run(self, encoded, arguments: dict) -> None:  # noqa: B027  # a method need not look
        """A pipeline encoded text.

        Args:
            encoded: what the pipeline's encode_prompt returned. arguments: what it was called with, by name.
        """

    def begin(self, inputs: dict) -> Any:
        """Look at a call of the denoiser; what is returned is `call` until it is over. While torch.compile traces, too.

        Args:
            inputs: by name.
        """
        return None

    def change_inputs(self, call: Any, inputs: dict) -> dict | None:
        """The denoiser's inputs by name, if they are to be others."""
        return None

    def finish(self, call: Any, output: Any) -> Any:
        """The denoiser's output, changed or not; where what had to happen did not, an error."""
        return output

    def never_ran(self) -> str:
        """What to say of a run that went by the method."""
        return (
            f"the pipeline ran, but {self.NAME.strip('_')} on pipe.{self.attribute} never did: were its hooks taken off"
            " or its forward replaced? The images are the untouched model's; apply it again"
        )


def methods_at(pipe: Pipeline) -> frozenset[str]:
    """What acts on a pipeline's denoiser, of `methods.composition.METHODS`."""
    handles = [value for value in vars(denoiser_of(pipe)[0]).values() if isinstance(value, Handle)]
    return frozenset(name for handle in handles if handle.config.strength for name in handle.methods)


def _timesteps(pipe: Pipeline) -> Tensor | None:
    return getattr(getattr(pipe, "scheduler", None), "timesteps", None)


class RootHook:
    """Around a denoiser: tells a handle of every call (`begin`, `change_inputs`, `finish`).

    Args:
        outermost: whether all other methods must see the inputs as this one changes them.
    """

    def __init__(self, handle: Handle, outermost: bool = False):
        self.handle, self.outermost = handle, outermost
        self.names = parameters_of(type(handle.denoiser))

    def __call__(self, original: Callable, module: nn.Module, *args, **kwargs):
        handle, inputs = self.handle, dict(zip(self.names, args, strict=False)) | kwargs
        if torch.compiler.is_compiling():
            handle.traced = call = handle.begin(inputs)
            output = self._run(original, call, inputs, args, kwargs)
            handle.traced = None
            return output
        call = handle.begin(inputs)
        with handle.calling(call):
            return self._run(original, call, inputs, args, kwargs)

    def _run(self, original: Callable, call: Any, inputs: dict, args: tuple, kwargs: dict) -> Any:
        changed = self.handle.change_inputs(call, inputs)
        output = original(*args, **kwargs) if changed is None else original(**changed)
        return self.handle.finish(call, output)
