"""What goes wrong, by family. All are `SemipermError`, and none is another's."""

from __future__ import annotations

from ..kernels.errors import KernelError, SemipermError

__all__ = [
    "GuidanceError",
    "KernelError",
    "MembraneError",
    "ModelError",
    "SemipermError",
    "TokenMergingError",
    "WatermarkError",
]


class ModelError(SemipermError):
    """A model, pipeline, scheduler or checkpoint that is not supported, or that lacks what is needed."""


class MembraneError(SemipermError):
    """Wrong membranes, membrane files, gates or options; or a model on which no membrane could act."""


class GuidanceError(SemipermError):
    """Wrong settings, categories or detectors of safe guidance; or a run in which it could not act, or did not."""


class TokenMergingError(SemipermError):
    """Wrong options, wrong images, or a model on which no token could be merged."""


class WatermarkError(SemipermError):
    """A key, keyring, payload, latent, picture or provenance record that cannot be used as given."""
