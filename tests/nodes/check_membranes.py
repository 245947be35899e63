"""In ComfyUI's Python (see benchmarks/run_in_comfyui.py): membranes on the embedded model.

ARGUMENTS: a safetensors file with `noise` (B, 4, 16, 16), `sigmas` (S,), and the latents `plain` and `erased` that the
diffusers face made of them. Prints JSON.
"""

import json
from dataclasses import replace

import comfy.sample
import comfy.samplers
import torch
from comfy.ldm.modules.attention import optimized_attention
from safetensors.torch import load_file
from semiperm.methods.errors import SemipermError
from semiperm.methods.membranes.base_model import base_model_distance, base_model_hash
from semiperm.methods.membranes.config import MembraneConfig
from semiperm.methods.membranes.gates import fit_probe
from semiperm.methods.membranes.types import Membranes
from semiperm.nodes.canvas.model import load_canvas
from semiperm.nodes.membranes.concept_text import erase_in, text_space
from semiperm.nodes.membranes.patch import apply_membranes_to, report_of

given = load_file(ARGUMENTS[0])  # noqa: F821
noise, sigmas = given["noise"], given["sigmas"]
model, clip, _ = load_canvas()
base = {key: value.clone() for key, value in model.model.state_dict().items()}
ROBOT, OTHER = "a dotted picture of a robot on a sand background", "a flat picture of a red circle on a fog background"


def conditioning(prompt, **options):
    states, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
    return [[states, {"pooled_output": pooled, **options}]]


def sample(model, positive, noise=noise, cfg=4.0, negative="", raw=False):
    start = noise * (1 + sigmas[0] ** 2).sqrt() / sigmas[0]  # diffusers scales noise for the variance it will have
    latents = comfy.sample.sample_custom(
        model, start, cfg, comfy.samplers.sampler_object("euler"), sigmas, positive, conditioning(negative),
        torch.zeros_like(noise), disable_pbar=True, seed=0,
    )  # fmt: skip
    return latents if raw else latents / (1 + sigmas[-1] ** 2).sqrt()


def difference(a, b):
    return float((a - b).abs().max())


found = {}
plain = sample(model, conditioning(ROBOT))
membranes = erase_in(model, clip, ["robot"])
space = text_space(model, clip)
detector = fit_probe(space.encode([ROBOT, "a robot", "a robot in sketch style on sky"]).hidden,
                     space.encode([OTHER, "", "a circle", "a circle in sketch style on sky"]).hidden)  # fmt: skip
membranes = Membranes([replace(membranes[0], probe=detector)])  # the canvas' own captions: one that surely tells
found["base_model"], found["keys"] = membranes[0].base_model, list(membranes.module_keys)
erased_model = apply_membranes_to(model, membranes)
erased = sample(erased_model, conditioning(ROBOT))
found["plain against diffusers"] = difference(plain, given["plain"])
found["erased against diffusers"] = difference(erased, given["erased"])
found["effect"] = difference(erased, plain)
report = report_of(erased_model)
found["report"] = report
found["queued again"] = difference(sample(erased_model, conditioning(ROBOT)), erased)
found["without the node"] = difference(sample(model, conditioning(ROBOT)), plain)
found["strength 0"] = difference(
    sample(apply_membranes_to(model, membranes, MembraneConfig(strength=0.0)), conditioning(ROBOT)), plain
)
found["closed gate"] = difference(
    sample(erased_model, conditioning(OTHER)), sample(model, conditioning(OTHER))
)  # the gate never opens: not a bit changes

# rows judged by themselves: a batch, and conditionings for two areas, of which one asks for the robot
together = conditioning(ROBOT)[0][0], conditioning(OTHER)[0][0]
rows = [[torch.cat(together), conditioning("")[0][1]]]
found["batched rows"] = difference(sample(erased_model, rows)[:1], sample(erased_model, conditioning(ROBOT), noise[:1]))
left, right = (
    conditioning(ROBOT, area=(16, 8, 0, 0), strength=1.0),
    conditioning(OTHER, area=(16, 8, 0, 8), strength=1.0),
)
always = apply_membranes_to(model, membranes, MembraneConfig(gate="always"))
found["areas"] = difference(sample(erased_model, left + right), sample(model, left + right))
found["areas, kinds"] = [row["kind"] for row in report_of(erased_model)["rows"]]

# little memory: positive and negative run one after the other
required = model.model.memory_required
model.model.memory_required = lambda *args, **kwargs: 1e30
found["split"] = difference(sample(erased_model, conditioning(ROBOT)), erased)
found["split, kinds"] = [row["kind"] for row in report_of(erased_model)["rows"]]
model.model.memory_required = required

# another pack's attention patches, as IP-Adapter's: one that replaces attn2 by the same attention, one that adds to it
replaced = erased_model.clone()
for block, number in (("input", 1), ("output", 6), ("middle", 0)):
    replaced.set_model_attn2_replace(
        lambda q, k, v, options: optimized_attention(q, k, v, options["n_heads"]), block, number
    )
found["attention replaced"] = difference(sample(replaced, conditioning(ROBOT)), erased)
adds, adds_erased = model.clone(), erased_model.clone()
for patched in (adds, adds_erased):
    patched.set_model_attn2_output_patch(lambda n, options: n * 1.1)
one, both = sample(adds, conditioning(ROBOT)), sample(adds_erased, conditioning(ROBOT))
found["attention patched"] = [difference(one, plain), difference(both, erased), difference(both, one)]

# stacking: one node with two membranes is two nodes with one each
sketch = erase_in(model, clip, ["sketch"])
once = apply_membranes_to(model, Membranes([*membranes, *sketch]), MembraneConfig(gate="always"))
twice = apply_membranes_to(always, sketch, MembraneConfig(gate="always"))
found["two nodes against one"] = difference(sample(once, conditioning(ROBOT)), sample(twice, conditioning(ROBOT)))

# LoRA: weight patches still find the wrapped projections, and the two add up in either order
key = next(key for key in base if key.endswith("attn2.to_k.weight"))
lora = {key: ("diff", (torch.randn(base[key].shape, generator=torch.Generator().manual_seed(1)) * 0.1,))}
first, last = always.clone(), model.clone()
first.add_patches(lora)
last.add_patches(lora)
with_lora = sample(last, conditioning(ROBOT))
last = apply_membranes_to(last, membranes, MembraneConfig(gate="always"))
found["lora effect"] = difference(with_lora, plain)
found["lora before against after"] = difference(sample(first, conditioning(ROBOT)), sample(last, conditioning(ROBOT)))
found["lora and membrane against membrane"] = difference(
    sample(first, conditioning(ROBOT)), sample(always, conditioning(ROBOT))
)

# a LoRA that a run left in the weights, which all clones share: neither the fit nor the fingerprint sees it
keys = [key for key in base if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]
strong = {key: ("diff", (torch.randn(base[key].shape, generator=torch.Generator().manual_seed(2)),)) for key in keys}
left = model.clone()
left.add_patches(strong)
sample(left, conditioning(ROBOT))
live = {key: value for key, value in model.model.state_dict().items() if key in keys}
found["left in the weights"] = difference(live[key], base[key])
found["fingerprint of the live weights"] = base_model_distance(
    base_model_hash(live), base_model_hash({key: base[key] for key in live})
)
found["fit beside a lora"] = {}
for name, chosen in (("plain branch", model), ("lora branch", left)):
    again = erase_in(chosen, clip, ["robot"])
    found["fit beside a lora"][name] = [
        again[0].base_model == membranes[0].base_model,
        max(difference(pair.up, membranes[0].modules[k].up) for k, pair in again[0].modules.items()),
    ]
    sample(apply_membranes_to(chosen, membranes), conditioning(ROBOT))  # not refused

# two runs of one model, and each latent has its own report
first, second = sample(erased_model, conditioning(ROBOT), raw=True), sample(erased_model, conditioning(OTHER), raw=True)
found["fired"] = [report_of(erased_model, latents)["silent"] == [] for latents in (first, second, first)]

window = apply_membranes_to(model, membranes, MembraneConfig(gate="always", start=0.3, end=0.6))
sample(window, conditioning(ROBOT))
found["window"] = [step["active"] for step in report_of(window)["steps"]]

errors = {}
for name, call in {
    "empty": lambda: erase_in(model, clip, [" ", ""]),
    "itself": lambda: erase_in(model, clip, ["robot"], "robot"),
    "none": lambda: apply_membranes_to(model, Membranes()),
    "window": lambda: apply_membranes_to(model, membranes, MembraneConfig(start=0.5, end=0.5)),
    "strength": lambda: apply_membranes_to(model, membranes, MembraneConfig(strength=float("nan"))),
    "gate": lambda: apply_membranes_to(model, membranes, MembraneConfig(gate="paper")),
    "unsampled": lambda: report_of(apply_membranes_to(model, membranes)),
    "bare": lambda: report_of(model),
    "another latent": lambda: report_of(erased_model, first + 1),
}.items():
    try:
        call()
    except SemipermError as error:
        errors[name] = str(error)
found["errors"] = errors
paper = apply_membranes_to(model, membranes, MembraneConfig(gate="paper"), clip)
found["paper"] = difference(sample(paper, conditioning(ROBOT)), plain)
model.unpatch_model()
found["base weights"] = max(
    difference(value.float(), base[key].float()) for key, value in model.model.state_dict().items()
)
print(json.dumps(found))
