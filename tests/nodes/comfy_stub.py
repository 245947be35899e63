"""The smallest stand-in for ComfyUI that lets the files of nodes/ be imported: the V3 schema classes and folder_paths.

It knows nothing of models. What needs `comfy` itself is tested against the real ComfyUI (marker `comfy`).
"""

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace


class Socket:
    def __init__(self, id=None, *, optional=False, display_name=None, tooltip=None, **options):
        self.id, self.optional, self.display_name, self.tooltip = id, optional, display_name, tooltip
        self.options = options


def custom(io_type: str) -> type:
    kinds = {kind: type(kind, (Socket,), {"io_type": io_type}) for kind in ("Input", "Output")}
    return type(io_type, (), kinds)


class Schema:
    def __init__(self, node_id, *, display_name, category, description, inputs, outputs, is_output_node=False):
        self.node_id, self.display_name, self.category, self.description = node_id, display_name, category, description
        self.inputs, self.outputs, self.is_output_node = inputs, outputs, is_output_node


class NodeOutput:
    def __init__(self, *args, ui=None):
        self.args, self.ui = args, ui


class PreviewText:
    def __init__(self, value):
        self.value = value

    def as_dict(self):
        return {"text": (self.value,)}


class PreviewImage:
    def __init__(self, image, cls=None):
        self.image = image

    def as_dict(self):
        return {"images": [tuple(self.image.shape)], "animated": (False,)}


class SavedImages:
    def __init__(self, results):
        self.results = results

    def as_dict(self):
        return {"images": self.results}


TYPES = ("Model", "Clip", "Vae", "Latent", "Image", "Mask", "Conditioning", "Noise", "Sampler")
TYPES += ("String", "Float", "Int", "Boolean", "Combo")
IO = SimpleNamespace(
    ComfyNode=object,
    Schema=Schema,
    NodeOutput=NodeOutput,
    Custom=custom,
    Input=Socket,
    **{name: custom(name.upper()) for name in TYPES},
)
UI = SimpleNamespace(PreviewText=PreviewText, PreviewImage=PreviewImage, SavedImages=SavedImages)


def folder_paths(models: Path) -> ModuleType:
    """A stand-in for the module of that name over one models folder, which may change at any time."""
    module = ModuleType("folder_paths")
    known = {"loras": ([str(models / "loras")], {".safetensors", ".pt", ".ckpt"})}

    def listed(folder):
        paths, suffixes = known[folder]
        walks = ((path, *walk) for path in paths for walk in os.walk(path, followlinks=True))
        names = {os.path.relpath(os.path.join(below, file), path) for path, below, _, files in walks for file in files}
        return sorted(name for name in names if os.path.splitext(name)[1].lower() in suffixes)

    def full_path(folder, name):
        candidates = (os.path.join(path, name) for path in known[folder][0])
        return next((path for path in candidates if os.path.isfile(path)), None)

    module.models_dir, module.folder_names_and_paths = str(models), known
    module.get_user_directory = lambda: str(models / "user")
    module.get_output_directory = lambda: str(models / "output")
    module.get_folder_paths = lambda folder: list(known[folder][0])
    module.get_filename_list, module.get_full_path = listed, full_path
    return module


def _replaced(name: str) -> bool:
    return name in ("comfy_api", "comfy_api.latest", "folder_paths") or name.split(".")[:2] == ["semiperm", "nodes"]


@contextmanager
def stand_in(models: Path):
    """Let `semiperm.nodes` be imported afresh without ComfyUI; afterwards everything is as it was before."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if _replaced(name)}
    latest = ModuleType("comfy_api.latest")
    latest.io, latest.ui, latest.ComfyExtension = IO, UI, object
    sys.modules |= {"comfy_api": ModuleType("comfy_api"), "comfy_api.latest": latest}
    sys.modules["folder_paths"] = folder_paths(models)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if _replaced(name)]:
            del sys.modules[name]
        sys.modules.update(before)
