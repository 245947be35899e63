"""Putting hooks on modules, listening to methods of a pipeline, and taking both off again, without a trace."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from ..methods.modules import is_own_forward

__all__ = ["install", "listen", "parameters_of", "uninstall", "unlisten"]


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's inputs, in order: `dict(zip(names, args)) | kwargs` has a call's inputs by name."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def install(module: nn.Module, hook: ModelHook, name: str) -> None:
    """Register `hook` outermost, but inside hooks with the attribute `adds_rows`: all others must see those rows."""
    registry = HookRegistry.check_if_exists_or_initialize(module)
    adding = {} if getattr(hook, "adds_rows", False) else _adding(registry)
    for other in adding:
        registry.remove_hook(other, recurse=False)
    registry.register_hook(hook, name)
    for other, outer in adding.items():
        registry.register_hook(outer, other)


def _adding(registry: HookRegistry) -> dict[str, ModelHook]:
    found = {name: registry.get_hook(name) for name in registry._hook_order}
    return {name: hook for name, hook in found.items() if getattr(hook, "adds_rows", False)}


def uninstall(module: nn.Module, name: str) -> None:
    """Take our hook off and leave no trace of the registry where it is empty: the module is as it was made."""
    registry = getattr(module, "_diffusers_hook", None)
    if registry is None:
        return
    registry.remove_hook(name, recurse=False)
    if not registry.hooks and is_own_forward(module):
        module.__dict__.pop("forward", None)
        del module._diffusers_hook


def listen(target, name: str, listener: Callable) -> None:
    """Call `listener(result, arguments by name)` after each call of this method of this object, until `unlisten`.

    Several listeners share one wrapper, so that they may go in any order. Where there is no such method: nothing.
    """
    if not hasattr(target, name):
        return
    if not hasattr(vars(target).get(name), "listeners"):
        before, original = vars(target).get(name), getattr(target, name)
        signature = inspect.signature(original)

        @functools.wraps(original)
        def told(*args, **kwargs):
            result = original(*args, **kwargs)
            for one in list(told.listeners):
                one(result, signature.bind(*args, **kwargs).arguments)
            return result

        told.listeners, told.before = [], before
        setattr(target, name, told)
    getattr(target, name).listeners.append(listener)


def unlisten(target, name: str, listener: Callable) -> None:
    """Undo `listen`; the last one leaves the object as it was."""
    told = vars(target).get(name)
    listeners = getattr(told, "listeners", [])
    if listener in listeners:
        listeners.remove(listener)
        if not listeners:
            delattr(target, name)
            if told.before is not None:
                setattr(target, name, told.before)
