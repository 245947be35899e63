"""A small world whose truth is known: renderer, captions, judge and an embedded latent diffusion model."""

import importlib

_EXPORTS = {
    "DEFAULT_GUIDANCE": "pipeline",
    "DEFAULT_STEPS": "pipeline",
    "Judge": "judge",
    "Scene": "render",
    "load_pipeline": "pipeline",
}
_MODULES = ("captions", "render")
__all__ = sorted([*_EXPORTS, *_MODULES])


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
