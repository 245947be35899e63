"""Standing around the calls of a model's modules, and listening to its pipelines, without a trace afterwards.

A hook is any callable `hook(original, module, *args, **kwargs)`: it stands around `module(...)` and answers in its
place. It never replaces `forward`, which accelerate (offloading), diffusers' own hooks and layerwise casting replace
and put back as they like, before us or after us: whatever they do is inside `original`.

Hooks are part of the module: they are copied and pickled with it, and every pipeline that shares it shares them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from diffusers import ModelMixin
from torch import nn

__all__ = [
    "branch_of",
    "heard",
    "install",
    "listen",
    "listeners_of",
    "others_at",
    "parameters_of",
    "unheard",
    "uninstall",
    "unlisten",
    "untouched",
]

_CALLS, _LISTENERS = "_semiperm_calls", "_semiperm_listeners"  # attributes of modules and pipelines at work
_branch: ContextVar[str | None] = ContextVar("semiperm_branch", default=None)
_ours: ContextVar[bool] = ContextVar("semiperm_ours", default=False)  # whether we ourselves call the pipeline


def parameters_of(cls: type) -> tuple[str, ...]:
    """The names of a module class's inputs, in order: `dict(zip(names, args)) | kwargs` has a call's inputs by name."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


# ---- modules ---------------------------------------------------------------------------------------------------------


def install(module: nn.Module, hook: Callable, name: str) -> None:
    """Put `hook` around the calls of a module, outermost; outside of all others by its `outermost` (False: as applied).

    Raises:
        ValueError: there is one of this name.
    """
    calls = getattr(module, _CALLS, {})
    if name in calls:
        raise ValueError(f"{type(module).__name__} has a hook {name!r} already; uninstall it first")
    ordered = sorted({**calls, name: hook}.items(), key=lambda item: getattr(item[1], "outermost", False))
    if not calls:
        _enter(module)
    setattr(module, _CALLS, dict(ordered))


def uninstall(module: nn.Module, name: str) -> None:
    """Take a hook off; the last one leaves the module as it was made. Where there is none: nothing."""
    calls = {other: hook for other, hook in getattr(module, _CALLS, {}).items() if other != name}
    if calls:
        setattr(module, _CALLS, calls)
    elif hasattr(module, _CALLS):
        delattr(module, _CALLS)
        _leave(module)


def others_at(module: nn.Module, name: str) -> bool:
    """Whether hooks of other names stand around a module."""
    return bool(set(getattr(module, _CALLS, {})) - {name})


def untouched(module: nn.Module) -> Callable:
    """What calls a layer without the hooks around it."""
    base = getattr(type(module), "_semiperm_base", None)
    return module if base is None else functools.partial(base.__call__, module)


def _enter(module: nn.Module) -> None:
    """A layer gets a class of its own, which torch.compile guards on.

    A whole model keeps its class, by which pipelines know their parts: `_call_impl` is what torch calls (and compiles)
    in it.
    """
    if not isinstance(module, ModelMixin):
        module.__class__ = _surrounded(type(module))
        return
    vars(module)["_call_impl"] = _Model(module, type(module)._call_impl.__get__(module))
    if hasattr(module, "cache_context"):
        vars(module)["cache_context"] = _CacheContext(module)
    if module._compiled_call_impl is not None:  # compiled before: its graph has the layers, but not us
        module._compiled_call_impl = _Model(module, module._compiled_call_impl)


def _leave(module: nn.Module) -> None:
    if not isinstance(module, ModelMixin):
        if "_semiperm_base" in vars(type(module)):  # else somebody put a class of their own above ours
            module.__class__ = type(module)._semiperm_base
        return
    for name in ("_call_impl", "cache_context"):
        vars(module).pop(name, None)
    if isinstance(module._compiled_call_impl, _Model):
        module._compiled_call_impl = module._compiled_call_impl.original


def _through(module: nn.Module, original: Callable, args: tuple, kwargs: dict) -> Any:
    for hook in getattr(module, _CALLS, {}).values():
        original = functools.partial(hook, original, module)
    return original(*args, **kwargs)


class _Model:
    """A whole model's call, with the hooks around it."""

    def __init__(self, module: nn.Module, original: Callable):
        self.module, self.original = module, original

    def __call__(self, *args, **kwargs):
        return _through(self.module, self.original, args, kwargs)


def branch_of() -> str | None:
    """How the pipeline calls this call: "cond" or "uncond" where guidance is two calls; None if it is silent."""
    return _branch.get()


class _CacheContext:
    """diffusers' `denoiser.cache_context(name)`, by which pipelines tell the two calls of a guided step apart."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.name: str | None = None  # for graphs, which see no context variables

    @contextlib.contextmanager
    def __call__(self, name: str, **kwargs):
        before, token = self.name, _branch.set(name)
        self.name = name
        try:
            with type(self.module).cache_context(self.module, name, **kwargs):
                yield
        finally:
            self.name = before
            _branch.reset(token)


@functools.cache
def _surrounded(base: type) -> type:
    """The class of layers with hooks around them."""

    call = base.__call__  # the function: torch.compile does not look it up on every class

    class Surrounded(base):
        _semiperm_base = base

        def __call__(self, *args, **kwargs):
            return _through(self, functools.partial(call, self), args, kwargs)

        def __reduce_ex__(self, protocol):
            return _restore, (_surrounded, base), *super().__reduce_ex__(protocol)[2:]

    return _named_like(Surrounded, base)


def _named_like(cls: type, base: type) -> type:
    cls.__name__, cls.__qualname__, cls.__module__ = base.__name__, base.__qualname__, base.__module__
    cls.__doc__ = base.__doc__
    return cls


def _restore(make: Callable[[type], type], base: type) -> Any:
    """An empty object, for copies and pickles."""
    cls = make(base)
    return cls.__new__(cls)


# ---- pipelines -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """What is encoded inside belongs to no run of a pipeline: no listener is told."""
    token = _ours.set(True)
    try:
        yield
    finally:
        _ours.reset(token)


def heard() -> bool:
    """Whether listeners are to be told at all, see `unheard`."""
    return not _ours.get()


def listen(pipe: Any, listener: Any) -> None:
    """Tell `listener.started(pipe)` that a call began, `listener.encoded(pipe, result, arguments by name)` of each
    `encode_prompt`, and `listener.ended(pipe)` of the call's end.

    Copies of the pipeline have the same listeners, deep copies and pickles those of the parts that they hold;
    `listener.joined(pipe)` tells of each.
    """
    if not hasattr(pipe, _LISTENERS):
        pipe.__class__ = _listening(type(pipe))
        vars(pipe)[_LISTENERS] = []
    if listener not in listeners_of(pipe):
        vars(pipe)[_LISTENERS] = [*listeners_of(pipe), listener]


def unlisten(pipe: Any, listener: Any) -> None:
    """Undo `listen`; the last one leaves the pipeline as it was."""
    left = [other for other in listeners_of(pipe) if other is not listener]
    if left:
        vars(pipe)[_LISTENERS] = left
    elif vars(pipe).pop(_LISTENERS, None) is not None:
        pipe.__class__ = type(pipe).__mro__[1]


def listeners_of(pipe: Any) -> list:
    """Who listens to a pipeline."""
    return list(vars(pipe).get(_LISTENERS, ()))


@functools.cache
def _listening(base: type) -> type:
    def check_inputs(self, *args, **kwargs):  # the first thing that every pipeline's call does
        result = base.check_inputs(self, *args, **kwargs)
        for listener in listeners_of(self):
            listener.started(self)
        return result

    def encode_prompt(self, *args, **kwargs):
        if not heard():
            return base.encode_prompt(self, *args, **kwargs)
        with unheard():  # its text encoders' calls are this one's
            result = base.encode_prompt(self, *args, **kwargs)
        arguments = inspect.signature(base.encode_prompt).bind(self, *args, **kwargs).arguments
        for listener in listeners_of(self):
            listener.encoded(self, result, arguments)
        return result

    def maybe_free_model_hooks(self, *args, **kwargs):  # the last one
        result = base.maybe_free_model_hooks(self, *args, **kwargs)
        for listener in listeners_of(self):
            listener.ended(self)
        return result

    def __reduce_ex__(self, protocol):
        return _restore, (_listening, base), *base.__reduce_ex__(self, protocol)[2:]

    def __setstate__(self, state):
        vars(self).update(state)
        for listener in listeners_of(self):
            listener.joined(self)

    told = {
        method.__name__: functools.wraps(getattr(base, method.__name__))(method)
        for method in (check_inputs, encode_prompt, maybe_free_model_hooks)
        if hasattr(base, method.__name__)
    }
    body = {**told, "__reduce_ex__": __reduce_ex__, "__setstate__": __setstate__}
    return _named_like(type(base.__name__, (base,), body), base)
