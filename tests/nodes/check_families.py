"""In ComfyUI's Python (benchmarks/run_in_comfyui.py): membranes on small models of SDXL's, SD3's and Flux's classes.

ARGUMENTS: the family. The text encoder is a stand-in that embeds words, causally as CLIP or freely as T5. Prints JSON.
"""

import json
import runpy
import zlib
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
WIDTH, POOLED = models.WIDTH, models.POOLED


class Words:
    """Stands in for ComfyUI's CLIP: every word is a token with a fixed random embedding."""

    NAMES = {"sdxl": ("l", "g"), "sd3": ("l", "t5xxl"), "flux": ("l", "t5xxl")}[family]
    LENGTH = {"l": 77, "g": 77, "t5xxl": 96}

    def __init__(self):
        self.cond_stage_model = SimpleNamespace()  # says of no encoder that it is absent
        one = SimpleNamespace(start_token=1, end_token=2)
        self.tokenizer = SimpleNamespace(clip_l=one, clip_g=one, t5xxl=SimpleNamespace(start_token=None, end_token=2))

    def tokenize(self, text):
        words = [3 + zlib.crc32(word.encode()) % 997 for word in text.replace(",", " ,").split()]
        found = {}
        for name in self.NAMES:
            ids = ([1] if name != "t5xxl" else []) + words + [2]
            found[name] = [[(i, 1.0) for i in ids + [0] * (self.LENGTH[name] - len(ids))]]
        return found

    def _states(self, tokens, name, width):
        table = torch.randn(1000, width, generator=torch.Generator().manual_seed(len(name)))
        rows = table[torch.tensor([[pair[0] for pair in chunk] for chunk in tokens[name]])]
        if name == "t5xxl":
            return rows + 0.2 * rows.mean(1, keepdim=True)
        return rows + rows.cumsum(1) / torch.arange(1, rows.shape[1] + 1)[:, None]

    def encode_from_tokens(self, tokens, return_pooled=False):
        if family == "sdxl":
            states = torch.cat([self._states(tokens, "l", 24), self._states(tokens, "g", WIDTH - 24)], dim=2)
            states = states.reshape(1, -1, WIDTH)  # several chunks come out as one long prompt
        elif family == "sd3":
            states = torch.cat([self._states(tokens, "l", WIDTH), self._states(tokens, "t5xxl", WIDTH)], dim=1)
        else:
            states = self._states(tokens, "t5xxl", WIDTH)
        pooled = self._states(tokens, "l", POOLED).mean(1)[:1]
        return (states, pooled) if return_pooled else states


model, channels = models.small_model(family)
clip = Words()
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
