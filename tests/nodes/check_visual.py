"""In ComfyUI's Python (see benchmarks/run_in_comfyui.py): image-side membranes on the embedded model.

ARGUMENTS: a safetensors file with `noise` (B, 4, 16, 16), `sigmas` (S,), and the latents `plain` and `edited` of the
diffusers face; a file of image-side membranes, open and shut. Prints JSON.
"""

import json

import comfy.sample
import comfy.samplers
import torch
from safetensors.torch import load_file
from semiperm.methods.errors import SemipermError
from semiperm.methods.membranes.file import load_membranes
from semiperm.methods.membranes.types import Membranes
from semiperm.methods.membranes.visual_fit import VisualConfig
from semiperm.nodes.canvas.model import load_canvas
from semiperm.nodes.membranes.concept_text import erase_in
from semiperm.nodes.membranes.patch import apply_membranes_to, opening_maps_of, report_of
from semiperm.nodes.membranes.report_plot import report_plot
from semiperm.nodes.membranes.visual_fit import Sampling, solve_looks

given, (opened, shut) = load_file(ARGUMENTS[0]), load_membranes(ARGUMENTS[1])  # noqa: F821
noise, sigmas = given["noise"], given["sigmas"]
model, clip, _ = load_canvas()
ROBOT = "a dotted picture of a robot on a sand background"


def conditioning(prompt):
    states, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
    return [[states, {"pooled_output": pooled}]]


def sample(model, raw=False):
    start = noise * (1 + sigmas[0] ** 2).sqrt() / sigmas[0]  # diffusers scales noise for the variance it will have
    latents = comfy.sample.sample_custom(
        model, start, 4.0, comfy.samplers.sampler_object("euler"), sigmas, conditioning(ROBOT), conditioning(""),
        torch.zeros_like(noise), disable_pbar=True, seed=0,
    )  # fmt: skip
    return latents if raw else latents / (1 + sigmas[-1] ** 2).sqrt()


def difference(a, b):
    return float((a - b).abs().max())


found = {}
plain = sample(model)
found["plain"] = difference(plain, given["plain"])
edited_model = apply_membranes_to(model, Membranes(opened))
raw = sample(edited_model, raw=True)
found["edited"] = difference(raw / (1 + sigmas[-1] ** 2).sqrt(), given["edited"])
found["effect"] = difference(given["plain"], given["edited"])
found["report"] = report_of(edited_model, raw)
maps = opening_maps_of(edited_model, raw)
found["maps"] = {name: [list(each.shape), float(each.max())] for name, each in maps.items()}
found["plots"] = [list(report_plot(found["report"], m).shape) for m in ({}, maps)]
closed = apply_membranes_to(model, Membranes(shut))
found["shut"] = difference(sample(closed), plain)
found["never fired"] = report_of(closed)["silent"]
both = Membranes([opened, *erase_in(model, clip, ["robot"])])
one = sample(apply_membranes_to(model, both))
two = sample(apply_membranes_to(apply_membranes_to(model, both[1:]), both[:1]))
found["one node against two"] = difference(one, two)
found["without"] = difference(sample(model), plain)

few = VisualConfig(samples=4, background=4, steps=2, false_open=0.5, validation=1, tokens=32, others=("heart", "star"))
kept = [f"a {thing} on {where}" for thing in ("star", "heart", "moon") for where in ("sky", "sand")]
made = solve_looks(model, clip, ["robot"], "", kept, few, Sampling(128, 128, 4.0))
side = made[0].visual
found["solved"] = {
    "method": made[0].method, "keys": list(made[0].keys), "beta": side.beta, "base_model": made[0].base_model,
    "checked": side.checked, "calibrated": side.calibrated, "shares": list(side.shares),
}  # fmt: skip
solved = apply_membranes_to(model, made)  # which holds it against this model's own weights
sample(solved)
found["solved gates"] = report_of(solved)["gates"]
try:
    solve_looks(model, clip, [" "])
except SemipermError as error:
    found["empty"] = str(error)
print(json.dumps(found))
