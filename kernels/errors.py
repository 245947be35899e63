"""The one base of every error that this package raises on purpose, and the kernels' own.

It stands in the lowest layer, so that every family's errors (methods/errors.py) and the kernels' have one base.
"""

__all__ = ["KernelError", "SemipermError"]


class SemipermError(ValueError):
    """Base of every error for wrong input, wrong files, wrong models, or a protection that cannot run."""


class KernelError(SemipermError):
    """A kernel was called with tensors it cannot take, or was forced onto a path that cannot run here."""
