"""Runs in ComfyUI's own Python (see run_in_comfyui.py): which of its samplers keep the mark.

ARGUMENTS: a file of finished units, or "" for none; "quick" or "full". Prints the rows of `samplers.rows` as JSON.
"""

import json

import comfy.sample
import comfy.samplers
import torch
from comfyui_version import __version__ as comfyui
from einops import rearrange
from semiperm.benchmarks.store import Store, digest
from semiperm.benchmarks.timing import machine, versions
from semiperm.benchmarks.watermark.marks import OURS
from semiperm.benchmarks.watermark.places import in_bytes, place_of
from semiperm.benchmarks.watermark.samplers import SETTINGS, USUAL, WORLD, looked, rows, units_of
from semiperm.nodes.canvas.model import load_canvas
from semiperm.nodes.watermark.inversion import ComfyInverter

DETERMINISTIC = {  # tests/nodes/check_watermark.py tries whether their pictures depend on their own noise's seed
    *("euler", "euler_cfg_pp", "heun", "heunpp2", "dpm_2", "lms", "dpm_fast", "dpm_adaptive", "dpmpp_2m"),
    *("dpmpp_2m_cfg_pp", "ipndm", "ipndm_v", "deis", "res_multistep", "res_multistep_cfg_pp", "ddim", "uni_pc"),
    *("uni_pc_bh2", "gradient_estimation", "gradient_estimation_cfg_pp"),
}
resume, size = ARGUMENTS  # noqa: F821
place = place_of(WORLD)
quick = size == "quick"
model, clip, vae = load_canvas()


def conditioning(prompts):
    """One conditioning whose rows are the texts of a batch."""
    rows = [clip.encode_from_tokens(clip.tokenize(text), return_pooled=True) for text in prompts]
    return [[torch.cat([states for states, _ in rows]), {"pooled_output": rows[0][1]}]]


def plan():
    names = ["euler", "euler_ancestral"] if quick else list(comfy.samplers.SAMPLER_NAMES)
    quiet = [name for name in names if name in DETERMINISTIC]
    settings = [(name, {}, *one) for one in ([USUAL] if quick else SETTINGS) for name in quiet]
    settings += [(name, {}, *USUAL) for name in names if name not in quiet]
    return units_of("comfyui", settings, quick)


def compute(unit):
    start, count = unit["start"], unit["count"]
    texts = [one.prompt for one in place.asked(start, count)]
    latents = comfy.sample.sample(
        model, place.noise(OURS, start, count), unit["steps"], unit["guidance"], unit["sampler"], "normal",
        conditioning(texts), conditioning([""]), torch.zeros(count, 4, 16, 16),
        disable_pbar=True, seed=1,
    )  # fmt: skip
    pixels = rearrange(vae.decode(latents)[..., :3], "b h w c -> b c h w").clamp(0, 1)
    return looked(in_bytes(pixels), ComfyInverter(model, vae, conditioning([""])))


units = plan()
store = Store(resume or None, "bench watermark", digest(*place.world.files()))
keys = [json.dumps(one, sort_keys=True) for one in units]
for key, one in zip(keys, units, strict=True):
    if store.get(key) is None:
        store.put(key, compute(one))
about = {"machine": machine(torch.device("cpu"), torch.float32)}
about["versions"] = versions("torch", "numpy", "scipy", "cryptography") | {"comfyui": comfyui}
print(json.dumps([row | about for row in rows(units, [store.get(key) for key in keys])]))
