"""Ready pipelines: diffusers' own classes with membranes as methods. They load and save every checkpoint as before."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from diffusers import (
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from ...methods.membranes.config import MembraneConfig
from ...methods.membranes.file import load_membranes, save_membranes
from ...methods.membranes.types import Membrane, Membranes
from .adapters import import_membranes
from .apply import apply_membranes, remove_membranes
from .erase import erase_concepts
from .state import MembraneHandle

__all__ = [
    "MembraneFluxPipeline",
    "MembraneMixin",
    "MembraneStableDiffusion3Pipeline",
    "MembraneStableDiffusionPipeline",
    "MembraneStableDiffusionXLPipeline",
]


class MembraneMixin:
    """Membranes as methods of a pipeline: put it before any diffusers pipeline class of a supported family.

    `pipe.membranes` is what acts now. A saved pipeline names diffusers' own class, so that it loads without semiperm;
    membranes are saved apart, by `save_membranes`.
    """

    @property
    def membranes(self) -> Membranes:
        """The membranes at work, none if empty."""
        handle = self.membrane_handle
        return handle.membranes if handle is not None else Membranes()

    @property
    def membrane_handle(self) -> MembraneHandle | None:
        """The handle of the membranes at work (its `report` tells what fired), or None."""
        return MembraneHandle.on(self)

    def apply_membranes(
        self, membranes: Membrane | Iterable[Membrane], config: MembraneConfig | None = None
    ) -> MembraneHandle:
        """`semiperm.apply_membranes(self, ...)`."""
        return apply_membranes(self, membranes, config)

    def remove_membranes(self) -> None:
        """`semiperm.remove_membranes(self)`."""
        remove_membranes(self)

    def erase_concepts(
        self, concepts, surrogate: str = "", preserve=None, *, membranes=None, **options
    ) -> MembraneHandle:
        """Compute membranes for `concepts` and let them act, besides those already at work.

        Args:
            concepts, surrogate, preserve, **options: as in `semiperm.erase_concepts`.
            membranes: `MembraneConfig` to apply with; None keeps the one in force.
        """
        handle = self.membrane_handle
        config = membranes or (handle.config if handle else None)
        return apply_membranes(
            self, [*self.membranes, *erase_concepts(self, concepts, surrogate, preserve, **options)], config
        )

    def load_membranes(
        self, paths: str | Path | Iterable[str | Path], config: MembraneConfig | None = None
    ) -> MembraneHandle:
        """Load files and let their membranes act, in place of those at work."""
        return apply_membranes(self, load_membranes(paths), config)

    def import_membranes(self, path: str | Path, concept: str | None = None, **options) -> Membranes:
        """`import_membranes(self, ...)`, with its options: read somebody else's adapter; does not apply it."""
        return import_membranes(self, path, concept, **options)

    def save_membranes(self, path: str | Path) -> Path:
        """Save the membranes at work to one safetensors file."""
        return save_membranes(self.membranes, path)

    def to_json_string(self) -> str:
        """The pipeline's configuration under the name of diffusers' own class."""
        config = json.loads(super().to_json_string())
        bases = [cls for cls in type(self).__mro__ if cls.__module__.partition(".")[0] == "diffusers"]
        config["_class_name"] = bases[0].__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


class MembraneStableDiffusionPipeline(MembraneMixin, StableDiffusionPipeline):
    """SD1.x and SD2 with membranes."""


class MembraneStableDiffusionXLPipeline(MembraneMixin, StableDiffusionXLPipeline):
    """SDXL with membranes."""


class MembraneStableDiffusion3Pipeline(MembraneMixin, StableDiffusion3Pipeline):
    """SD3 with membranes."""


class MembraneFluxPipeline(MembraneMixin, FluxPipeline):
    """Flux with membranes."""
