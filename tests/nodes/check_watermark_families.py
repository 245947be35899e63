"""In ComfyUI's Python (benchmarks/run_in_comfyui.py): the mark on small models of other architectures.

ARGUMENTS: the family, a keyring file. Text and VAE are stand-ins. Prints JSON.
"""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import comfy.sample
import torch
from semiperm.methods.errors import ModelError, WatermarkError
from semiperm.methods.watermark.keyring import load_keyring
from semiperm.nodes.watermark.inversion import ComfyInverter
from semiperm.nodes.watermark.noise import sign_model, signed_like

family, key = ARGUMENTS[0], load_keyring(ARGUMENTS[1]).get("a")  # noqa: F821
models = SimpleNamespace(**runpy.run_path(Path(__file__).with_name("comfy_models.py")))
model, channels = models.small_model(family)
SIZE = {"wan": (3, 8, 12), "sdxl": (16, 24)}.get(family, (9, 12))  # an odd side: transformers pad it
noise = torch.randn(2, channels, *SIZE, generator=torch.Generator().manual_seed(5))
calls = []


def watch(x, timestep, *args, **kwargs):
    output = forward(x, timestep, *args, **kwargs)
    calls.append((x, timestep, output))
    return output


forward, model.model.diffusion_model.forward = model.model.diffusion_model.forward, watch


def conditioning():
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(1, 16, models.WIDTH, generator=generator)
    return [[states, {"pooled_output": torch.randn(1, models.POOLED, generator=generator)}]]


comfy.sample.sample(
    sign_model(model, key), noise, 2, 1.0, "euler", "simple", conditioning(), conditioning(), torch.zeros_like(noise),
    disable_pbar=True, seed=0,
)  # fmt: skip
found = {"signs": float((calls[0][0].sign() == signed_like(noise, key).sign()).float().mean())}

vae = SimpleNamespace(spacial_compression_encode=lambda: 8, encode=lambda pixels: torch.zeros(len(pixels), 3, 2, 2))
try:
    inverter = ComfyInverter(model, vae, conditioning())
    try:
        inverter.encode([torch.rand(3, 16, 16)])
    except (ModelError, WatermarkError) as error:
        found["vae"] = str(error)
    calls.clear()
    result = inverter.invert(noise, 1)
    (x, timestep, output), count = calls[0], len(calls)
    last = 1.0 if inverter.flow else inverter.level(0.961)
    expected = noise + last * output.float()
    expected = expected if inverter.flow else expected / (1 + last**2) ** 0.5
    found |= {"calls": count, "seen": float((x - noise).abs().max()), "timestep": timestep.tolist()}
    found["result"] = float((result - expected).abs().max())
    calls.clear()
    five = inverter.invert(noise, 5)
    found["five"] = len(calls), list(five.shape) == list(noise.shape), bool(five.isfinite().all())
except (ModelError, WatermarkError) as error:
    found["refused"] = str(error)
print(json.dumps(found))
