"""In ComfyUI's Python (benchmarks/run_in_comfyui.py): membranes on small models of SDXL's, SD3's and Flux's classes.

ARGUMENTS: the family. The text encoder is a stand-in that embeds words, causally as CLIP or freely as T5. Prints JSON.
"""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import comfy.lora
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from semiperm.methods.membranes.config import MembraneConfig
from semiperm.methods.membranes.types import LowRank, Membrane, Membranes
from semiperm.nodes.membranes.concept_text import erase_in, text_space
from semiperm.nodes.membranes.patch import apply_membranes_to, report_of

family = ARGUMENTS[0]  # noqa: F821
models = SimpleNamespace(**runpy.run_path(Path(__file__).with_name("comfy_models.py")))

model, channels = models.small_model(family)
clip = models.Words(family)
noise = torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(5))


def sample(model, prompt, cfg=2.0, negative="blurred"):
    def conditioning(text):
        states, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
        return [[states, {"pooled_output": pooled}]]

    return comfy.sample.sample(
        model, noise, 3, cfg, "euler", "simple", conditioning(prompt), conditioning(negative),
        torch.zeros_like(noise), disable_pbar=True, seed=0,
    )  # fmt: skip


def difference(a, b):
    return float((a - b).abs().max() / b.abs().max())


ROBOT, OTHER = "a photo of a robot in a quiet garden", "a photo of a horse near the sea"
plain, plain_other = sample(model, ROBOT), sample(model, OTHER)
membranes = erase_in(model, clip, ["robot"])
erased = apply_membranes_to(model, membranes, MembraneConfig(gate="probe"))  # "auto" may leave it always on
found = {"modules": len(membranes.module_keys), "effect": difference(sample(erased, ROBOT), plain)}
found["gammas"] = [row["gamma"]["robot"] for row in report_of(erased)["rows"]]
found["other rows"] = difference(sample(erased, OTHER), plain_other)
found["other gamma"] = report_of(erased)["rows"][-1]["gamma"]["robot"]
found["removed"] = difference(sample(model, ROBOT), plain)

# an adapter on a projection of image tokens too; in SD3 and Flux it is a slice of a larger weight
known = comfy.lora.model_lora_keys_unet(model.model, {})
key = {
    "sdxl": "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
    "sd3": "lora_transformer_transformer_blocks_0_attn_to_k",
    "flux": "lora_transformer_transformer_blocks_0_attn_to_k",
}[family]
target = known[key]
name, part = (target, None) if isinstance(target, str) else (target[0], target[1])
weight = comfy.utils.get_attr(model.model, name)
out = weight.shape[0] if part is None else part[2]
down, up = torch.randn(2, weight.shape[1]) * 0.05, torch.randn(out, 2)
adapter = Membranes([Membrane("adapter", {key: LowRank(down, up, 2.0)})])
delta = torch.zeros_like(weight)
delta.narrow(0, part[1] if part else 0, out).copy_(up @ down)
space = text_space(model, clip)
patches = {name: ("diff", (delta,))}
for module in membranes[0].modules:
    target = known[module]
    pair = membranes[0].modules[module]
    patches[target] = ("diff", ((pair.up @ pair.down * pair.scale).to(delta),))
folded = model.clone()
folded.add_patches(patches)
always = apply_membranes_to(model, Membranes([*membranes, *adapter]), MembraneConfig(gate="always", negative_rows=True))
found["against folded weights"] = difference(sample(always, ROBOT), sample(folded, ROBOT))
found["sliced"] = part is not None
found["pooled"] = len(space.pooled)
print(json.dumps(found))
