"""Ready pipelines: diffusers' own classes with membranes as methods. They load and save every checkpoint as before."""

from __future__ import annotations

import json

from diffusers import (
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from ...methods.membranes.types import Membranes
from ..training import train
from . import adapters, apply, erase
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

    A method is the function of the same name: `pipe.erase_concepts(...)` returns membranes and applies nothing. A saved
    pipeline names diffusers' own class, so that it loads without semiperm; membranes are saved apart, by
    `semiperm.save_membranes(pipe.membranes, path)`.

    >>> from diffusers import StableDiffusionPipeline
    >>> class Mine(MembraneMixin, StableDiffusionPipeline): ...
    >>> mine = Mine(**pipe.components, requires_safety_checker=False)
    >>> handle = mine.apply_membranes(membranes)
    >>> mine.membranes.concepts
    ('robot', 'ghost')
    """

    apply_membranes = apply.apply_membranes
    remove_membranes = apply.remove_membranes
    erase_concepts = erase.erase_concepts
    train_membranes = train.train_membranes
    import_membranes = adapters.import_membranes
    export_lora = adapters.export_lora

    @property
    def membranes(self) -> Membranes:
        """The membranes at work, none if empty."""
        handle = self.membrane_handle
        return handle.membranes if handle is not None else Membranes()

    @property
    def membrane_handle(self) -> MembraneHandle | None:
        """The handle of the membranes at work (its `report` tells what fired), or None."""
        return MembraneHandle.on(self)

    def to_json_string(self) -> str:
        """The pipeline's configuration under the name of diffusers' own class."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]  # of the pipeline class beside this mixin
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
