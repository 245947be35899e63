"""Putting hooks on modules and taking them off again, without a trace."""

from __future__ import annotations

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from ..methods.membrane_runtime import is_own_forward

MEMBRANES = "semiperm_membrane"
TOKEN_MERGING = "semiperm_negative_token_merging"


def install(module: nn.Module, hook: ModelHook, name: str) -> None:
    """Register `hook` outermost, but inside the hook that adds rows to the batch: all others must see those rows."""
    registry = HookRegistry.check_if_exists_or_initialize(module)
    rows = registry.get_hook(TOKEN_MERGING) if name != TOKEN_MERGING else None
    if rows is not None:
        registry.remove_hook(TOKEN_MERGING, recurse=False)
    registry.register_hook(hook, name)
    if rows is not None:
        registry.register_hook(rows, TOKEN_MERGING)


def uninstall(module: nn.Module, name: str) -> None:
    """Take our hook off and leave no trace of the registry where it is empty: the module is as it was made."""
    registry = getattr(module, "_diffusers_hook", None)
    if registry is None:
        return
    registry.remove_hook(name, recurse=False)
    if not registry.hooks and is_own_forward(module):
        module.__dict__.pop("forward", None)
        del module._diffusers_hook
