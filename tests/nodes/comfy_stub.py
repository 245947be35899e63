"""The smallest stand-in for ComfyUI that lets the files of nodes/ be imported: the V3 schema classes and folder_paths.

Of models it knows only how a patch is put on one and called: `Model` and `sample`. What a patch does to real models is
tested against the real ComfyUI (marker `comfy`).
"""

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch


class Socket:
    def __init__(self, id=None, *, optional=False, display_name=None, tooltip=None, **options):
        self.id, self.optional, self.display_name, self.tooltip = id, optional, display_name, tooltip
        self.options = options


def custom(io_type: str) -> type:
    kinds = {kind: type(kind, (Socket,), {"io_type": io_type}) for kind in ("Input", "Output")}
    return type(io_type, (), kinds)


class Schema:
    __dataclass_fields__ = {"search_aliases": None}  # as newer ones have

    def __init__(self, node_id, *, display_name, category, description, inputs, outputs, **options):
        self.node_id, self.display_name, self.category, self.description = node_id, display_name, category, description
        self.inputs, self.outputs, self.options = inputs, outputs, options


class NodeOutput:
    def __init__(self, *args, ui=None, expand=None):
        self.args, self.ui, self.expand = args, ui, expand


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


TYPES = ("Model", "Clip", "Vae", "Latent", "Image", "Mask", "Conditioning", "Noise", "Sampler", "Guider")
TYPES += ("String", "Float", "Int", "Boolean", "Combo")
IO = SimpleNamespace(
    ComfyNode=object,
    Schema=Schema,
    NodeOutput=NodeOutput,
    Custom=custom,
    Input=Socket,
    Hidden=SimpleNamespace(prompt="PROMPT", unique_id="UNIQUE_ID"),
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


class Sampling:
    """A model_sampling without a shift: sigma is the share of the noise."""

    def percent_to_sigma(self, percent):
        return 1.0 - percent


class Model:
    """A ModelPatcher as far as our patches need one."""

    def __init__(self, unet=None):
        self.model = SimpleNamespace(diffusion_model=unet)
        self.unet, self.patches, self.options, self.attachment = unet, {}, {"transformer_options": {}}, None
        self.objects, self.wrappers = {"diffusion_model": unet, "model_sampling": Sampling()}, {}

    def clone(self):
        made = Model(self.unet)
        for name in ("patches", "objects", "wrappers"):
            getattr(made, name).update(getattr(self, name))
        made.attachment = self.attachment
        return made

    def get_model_object(self, name):
        return self.objects.get(name, getattr(self.unet, "forward", None))

    def add_object_patch(self, name, value):
        self.objects[name] = value

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers[key] = wrapper

    def set_attachments(self, name, value):
        self.attachment = value

    def get_attachment(self, name):
        return self.attachment

    def set_model_attn1_output_patch(self, patch):
        self.patches["attn1_output"] = patch

    def set_model_attn2_output_patch(self, patch):
        self.patches["attn2_output"] = patch


def sample(patch, model, steps=2, rows=4):
    """A sampling run of this many equal steps through `patch.sample` and `patch.around`, in which `model` denoises.

    Args:
        model: (x, timestep, context, transformer_options) -> x; half of the rows are a negative prompt's.
    """
    forward = patch.around(model)
    x, context = torch.zeros(rows, 4, 8, 8), torch.ones(rows, 5, 8)

    def run(noise):
        for step in range(steps):
            sigma = torch.tensor([1.0 - step / steps])
            options = {"sigmas": sigma, "cond_or_uncond": [1, 0]}
            forward(x, sigma.expand(rows), context, transformer_options=options)
        return noise

    run.class_obj = SimpleNamespace(model_patcher=Model(), conds={})
    return patch.sample(run, x)


def _comfy() -> dict[str, ModuleType]:
    """The modules of `comfy` that patches import; each class in them stands for a denoiser that is not there."""
    classes = {
        "comfy.lora": {"model_lora_keys_unet": lambda model, found: found},
        "comfy.utils": {"get_attr": lambda target, path: target},
        "comfy.patcher_extension": {"WrappersMP": SimpleNamespace(OUTER_SAMPLE="outer_sample")},
    }
    denoisers = {"flux.model": "Flux", "wan.model": "WanModel"}
    denoisers |= {f"modules.diffusionmodules.{n}": c for n, c in (("mmdit", "MMDiT"), ("openaimodel", "UNetModel"))}
    classes |= {f"comfy.ldm.{name}": {cls: type(cls, (), {})} for name, cls in denoisers.items()}
    found = {}
    for name, members in classes.items():
        for end in [i for i, letter in enumerate(name) if letter == "."] + [len(name)]:
            found.setdefault(name[:end], ModuleType(name[:end]))
        vars(found[name]).update(members)
    for name, module in found.items():
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(found[parent], last, module)
    return found


def _replaced(name: str) -> bool:
    ours = name in ("comfy_api", "comfy_api.latest", "folder_paths") or name.split(".")[:2] == ["semiperm", "nodes"]
    return ours or name.partition(".")[0] == "comfy"


@contextmanager
def stand_in(models: Path):
    """Let `semiperm.nodes` be imported afresh without ComfyUI; afterwards everything is as it was before."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if _replaced(name)}
    latest = ModuleType("comfy_api.latest")
    latest.io, latest.ui, latest.ComfyExtension = IO, UI, object
    sys.modules |= {"comfy_api": ModuleType("comfy_api"), "comfy_api.latest": latest}
    sys.modules |= _comfy() | {"folder_paths": folder_paths(models)}
    try:
        yield
    finally:
        for name in [name for name in sys.modules if _replaced(name)]:
            del sys.modules[name]
        sys.modules.update(before)
