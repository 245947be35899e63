"""In ComfyUI's Python (benchmarks/run_in_comfyui.py): the attention seam where text and image attend to each other.

ARGUMENTS: "sd3" or "flux", small models of ComfyUI's classes with random weights; or "canvas-flow" and a safetensors
file with `noise`, `sigmas`, and the latents that the diffusers face made of them by each algorithm. Prints JSON.
"""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import comfy.sample
import comfy.samplers
import torch
from safetensors.torch import load_file
from semiperm.methods.errors import GuidanceError
from semiperm.methods.guidance.category import Category
from semiperm.methods.guidance.config import SafeGuidanceConfig
from semiperm.methods.guidance.nag import NAG
from semiperm.methods.membranes.config import MembraneConfig
from semiperm.nodes.guidance.patch import guide_model, report_of
from semiperm.nodes.membranes.concept_text import erase_in
from semiperm.nodes.membranes.patch import apply_membranes_to

family = ARGUMENTS[0]  # noqa: F821
PROMPT = "a dotted picture of a robot on a sand background"
HARM = Category("machines", ("a robot", "a machine"))
PRESET = "flux" if family == "flux" else "sd3"
if family == "canvas-flow":
    from semiperm.nodes.canvas.model import load_canvas

    model, clip, _ = load_canvas(family)
    given = load_file(ARGUMENTS[1])  # noqa: F821
    noise, sigmas = given["noise"], given["sigmas"]
else:
    models = SimpleNamespace(**runpy.run_path(Path(__file__).with_name("comfy_models.py")))
    model, channels = models.small_model(family)
    clip, given = models.Words(family), {}
    noise = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(5))
    sigmas = torch.linspace(1, 0, 4)


def sample(model, prompt=PROMPT, cfg=4.0):
    def conditioning(text):
        states, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
        return [[states, {"pooled_output": pooled}]]

    return comfy.sample.sample_custom(
        model, noise, cfg, comfy.samplers.sampler_object("euler"), sigmas, conditioning(prompt), conditioning(""),
        torch.zeros_like(noise), disable_pbar=True, seed=0,
    )  # fmt: skip


def guided(algorithm, harm=HARM, model=model, **settings):
    return guide_model(model, SafeGuidanceConfig(harm, algorithm, **settings), clip)


def relative(a, b):
    return float((a - b).norm() / b.norm())


found, plain = {}, sample(model)
algorithms = {"adavd": "adavd", "nag": NAG(PRESET)}
if given:
    found["plain"] = relative(plain, given["plain"])
for name, algorithm in algorithms.items():
    patched = guided(algorithm)
    out = sample(patched)
    found[f"{name}, effect"] = relative(out, plain)
    found[f"{name}, again"] = float((sample(patched) - out).abs().max())
    found[f"{name}, evaluations"] = report_of(patched)["evaluations"]
    found[f"{name}, scale"] = report_of(patched)["rows"][0]["scale"]
    if given:
        found[name] = relative(out, given[name])
found["untouched after"] = float((sample(model) - plain).abs().max())
found["strength 0"] = float((sample(guided("adavd", strength=0.0)) - plain).abs().max())
found["nag at cfg 1"] = relative(sample(guided(NAG(PRESET)), cfg=1.0), sample(model, cfg=1.0))
# away from the prompt's own words there is nowhere to go
itself = Category("itself", (PROMPT,))
found["nag, away from the prompt itself"] = relative(sample(guided(NAG(PRESET), itself)), plain)
if family != "canvas-flow":  # a fit solves in as many columns as text has
    membranes = erase_in(model, clip, ["robot"])
    always = MembraneConfig(gate="always")
    one = apply_membranes_to(guided(NAG(PRESET)), membranes, always)
    other = guided(NAG(PRESET), model=apply_membranes_to(model, membranes, always))
    found["nag and membranes"] = relative(sample(one), sample(other))
    found["membranes beside nag"] = relative(sample(one), sample(guided(NAG(PRESET))))
    try:
        sample(guided(NAG(PRESET)), " ".join(["a long prompt"] * 40))
    except GuidanceError as error:
        found["a prompt of another length"] = str(error)
print(json.dumps(found))
