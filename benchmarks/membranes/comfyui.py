"""Runs in ComfyUI's own Python (see run_in_comfyui.py): time of sampling with membranes against the bare graph.

ARGUMENTS: the number of rounds. Bare and patched are sampled in turn; a ratio is taken within each round, with the bare
run on both sides of it. Prints the rows of `semiperm bench comfyui` as JSON.
"""

import json
import statistics
import time
from dataclasses import replace

import comfy.sample
import torch
from comfyui_version import __version__ as comfyui
from semiperm.benchmarks.timing import machine, ratio_row, versions
from semiperm.methods.membranes.config import MembraneConfig
from semiperm.methods.membranes.types import Membranes
from semiperm.nodes.canvas.model import load_canvas
from semiperm.nodes.membranes.concept_text import erase_in
from semiperm.nodes.membranes.patch import apply_membranes_to

COUNTS, STEPS = (1, 10, 100), 25
rounds = int(ARGUMENTS[0])  # noqa: F821
model, clip, _ = load_canvas()
(robot,) = erase_in(model, clip, ["robot"])
noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def conditioning(prompt):
    states, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
    return [[states, {"pooled_output": pooled}]]


positive, negative = conditioning("a dotted picture of a robot on a sand background"), conditioning("")


def seconds(model):
    start = time.perf_counter()
    comfy.sample.sample(
        model, noise, STEPS, 4.0, "ddim", "ddim_uniform", positive, negative, torch.zeros_like(noise),
        disable_pbar=True, seed=0,
    )  # fmt: skip
    return time.perf_counter() - start


rows = []
seconds(model)
for count in COUNTS:
    # as many copies of one membrane at 1/K strength: the picture of one, the work of K
    stack = Membranes([replace(robot, concept=f"concept {k}") for k in range(count)])
    for gate in ("always", "probe"):
        patched = apply_membranes_to(model, stack, MembraneConfig(gate=gate, strength=1 / count))
        seconds(patched)
        bare, ratios = [], []
        before = seconds(model)
        for _ in range(rounds):
            between, after = seconds(patched), seconds(model)
            ratios.append(2 * between / (before + after))
            bare.append(after)
            before = after
        rows.append(
            ratio_row(
                f"comfyui/{gate}", count, ratios, statistics.median(bare) / STEPS, model="canvas",
                machine=machine(noise.device, noise.dtype), versions=versions("torch") | {"comfyui": comfyui},
            )
        )  # fmt: skip
print(json.dumps(rows))
