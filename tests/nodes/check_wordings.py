"""In ComfyUI's Python (see benchmarks/run_in_comfyui.py): the words of a conditioning reach the gates. Prints JSON.

The membrane's detector is blind, so that only words can open gate `auto`.
"""

import json

import comfy.sample
import comfy.sd
import torch
from semiperm.methods.membranes.config import MembraneConfig
from semiperm.methods.membranes.types import GateProbe, LowRank, Membrane, Membranes
from semiperm.nodes.canvas.model import load_canvas
from semiperm.nodes.membranes import wordings
from semiperm.nodes.membranes.patch import apply_membranes_to

wordings.listen()
before = comfy.sd.CLIP.encode_from_tokens
wordings.listen()
model, clip, _ = load_canvas()
found = {"once": comfy.sd.CLIP.encode_from_tokens is before}
key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v"
wide = torch.Generator().manual_seed(0)
weight = model.model.state_dict()["diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight"]
pair = LowRank(torch.randn(1, weight.shape[1], generator=wide), torch.randn(weight.shape[0], 1, generator=wide), 1.0)
probe = GateProbe(torch.zeros(weight.shape[1]), 1.0, 2.0)
blind = Membranes([Membrane("robot", {key: pair}, phrases=("robot", "mechanical man"), probe=probe)])
noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def tuples(prompt):
    states, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
    return [[states, {"pooled_output": pooled}]]


def scheduled(prompt):
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


def effect(positive, negative="", config=None, encode=scheduled):
    positive = encode(positive) if isinstance(positive, str) else positive
    latents = [
        comfy.sample.sample(
            one, noise, 1, 4.0, "euler", "normal", positive, encode(negative), torch.zeros_like(noise),
            disable_pbar=True, seed=0,
        )
        for one in (model, apply_membranes_to(model, blind, config))
    ]  # fmt: skip
    return float((latents[0] - latents[1]).abs().max())


named = ("a robot", "ROBOTS, fog", "(robot:1.2) on sand", "two mechanical men", "fog " * 40 + "robot")
found["named"] = {prompt: effect(prompt) for prompt in named}
found["tuples"] = effect("a robot", encode=tuples)
found["not named"] = {prompt: effect(prompt) for prompt in ("a robotic arm", "a mechanical star")}
found["negative"] = effect("a circle", "a robot")
found["negative rows"] = effect("a circle", "a robot", MembraneConfig(negative_rows=True))
found["always"] = effect("a circle", "a robot", MembraneConfig(gate="always"))
joined = torch.cat((scheduled("a robot")[0][0], scheduled("a star")[0][0]), dim=1)
found["joined"] = effect([[joined, {}]])
wording = wordings.wording_of(scheduled("Two (robots:1.3), fog")[0][0])
found["texts"], found["ids"] = wording.texts, [len(ids) for ids in wording.token_ids]
found["unknown"] = wordings.wording_of(torch.zeros(1, 2, 3)) is None
print(json.dumps(found))
