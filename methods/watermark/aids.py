"""What helps to read marks in one model's pictures, taken from files where they fit the model at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .channels import load_channels
from .reader import load_reader, trained_with

__all__ = ["aids_of_model"]

_LOADERS: dict[str, Callable[[Path], Any]] = {"reader": load_reader, "channels": load_channels}


def aids_of_model(files: Mapping[str, Path], fingerprint: Callable[[], str]) -> dict[str, Any]:
    """Fields of `DetectionConfig` from the files of a reader and of weights of channels; those of another model, a
    retrained one say, are left out: they would cost a rung, or weigh what they do not know.

    Args:
        files: kind ("reader", "channels") -> file.
        fingerprint: of the model at hand, see `model_fingerprint`; asked only where there is a file.

    Raises:
        SemipermError: a damaged file, or one of another kind.
    """
    found = {kind: _LOADERS[kind](path) for kind, path in files.items()}
    own = fingerprint() if found else ""
    return {kind: aid for kind, aid in found.items() if trained_with(aid.model, own)}
