"""In ComfyUI's Python (see benchmarks/run_in_comfyui.py): membranes trained on the embedded model.

ARGUMENTS: a JSON file of settings for TrainingConfig; a safetensors file to write the trained membranes to; an empty
folder. Prints JSON.
"""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from semiperm.methods.errors import SemipermError
from semiperm.methods.membranes.config import MembraneConfig
from semiperm.methods.membranes.file import save_membranes
from semiperm.methods.training.config import TrainingConfig
from semiperm.nodes.canvas.model import load_canvas
from semiperm.nodes.membranes.patch import apply_membranes_to
from semiperm.nodes.private import private_folder
from semiperm.nodes.training.layers import trained_layers
from semiperm.nodes.training.model import ComfyModel
from semiperm.nodes.training.train import train_in

settings, target, user = json.loads(Path(ARGUMENTS[0]).read_text()), Path(ARGUMENTS[1]), ARGUMENTS[2]  # noqa: F821
folder_paths.set_user_directory(user)
config = TrainingConfig(**settings)
small_model = runpy.run_path(str(Path(__file__).with_name("comfy_models.py")))["small_model"]
PRESERVE = ["a flat star", "a striped heart on sand", "a sketch of a moon", "a dotted tree", "a ghost in fog"]
model, clip, vae = load_canvas()
latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
found, previews, cancel_at = {}, [], None


def hook(value, total, preview, **kwargs):
    if preview is not None:
        previews.append((value, total, preview[0], list(preview[1].size)))
    if value == cancel_at:
        comfy.model_management.interrupt_current_processing()


def predicted(model):
    answering = ComfyModel(model, clip, 128, 128)
    answering.load()
    hidden, pooled = answering.encode("a robot")
    with torch.no_grad():
        return answering(latents, torch.tensor([2.0]), hidden[None], pooled)


def trained(config=config, resume=True, model=model):
    return train_in(model, clip, vae, ["robot|android"], "tree", PRESERVE, config, 2, resume)


def tensors(membranes):
    return {k: (p.down, p.up) for k, p in membranes[0].modules.items()}


def same(one, other):
    one, other = tensors(one), tensors(other)
    return one.keys() == other.keys() and all(
        torch.equal(a, b) for key in one for a, b in zip(one[key], other[key], strict=True)
    )


def files():
    return sorted(str(path.relative_to(user)) for path in Path(user).rglob("*") if path.is_file())


comfy.utils.set_progress_bar_global_hook(hook)
before = predicted(model)
made = trained(resume=False)
found["previews"], found["kept"] = list(previews), files()
found["course"] = list(made.course.shape)
found["untouched"] = float((predicted(model) - before).abs().max())
save_membranes(trained(replace(config, steps=2, validate_every=0), resume=False).membranes, target)
erased = apply_membranes_to(model, made.membranes, MembraneConfig(gate="always"))
found["effect"] = float((predicted(erased) - before).abs().max())

cancel_at = 3  # the checkpoint is of step 2
try:
    trained()
except comfy.model_management.InterruptProcessingException:
    found["cancelled"] = files()
found["after cancel"] = float((predicted(model) - before).abs().max())
cancel_at, previews[:] = None, []
again = trained()
found["resumed"] = same(again.membranes, made.membranes), [preview[0] for preview in previews]
previews[:] = []
found["finished"] = same(trained().membranes, made.membranes), list(previews)
found["folder"] = str(private_folder("training").relative_to(user))

found["errors"] = []
for wrong in (
    lambda: train_in(model, clip, vae, [" |"]),
    lambda: trained(model=erased),
    lambda: trained(replace(config, width=100)),
    lambda: trained_layers(small_model("wan")[0], "all"),
):
    try:
        wrong()
    except SemipermError as error:
        found["errors"].append(str(error))
found["layers"] = {family: sorted(trained_layers(small_model(family)[0], "all")) for family in ("sdxl", "sd3", "flux")}
found["hard"] = trained(replace(config, steps=1, validate_every=0, adversary_steps=1)).membranes[0].method
way = replace(config, steps=1, validate_every=0, objective="trajectory")
found["way"] = trained(way).membranes[0].method
print(json.dumps(found))
