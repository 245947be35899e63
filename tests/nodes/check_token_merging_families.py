"""In ComfyUI's Python (benchmarks/run_in_comfyui.py): negative token merging on small models of other architectures.

ARGUMENTS: the family. Text and VAE are stand-ins. Prints JSON.
"""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import comfy.ldm.flux.layers
import comfy.sample
import torch
from semiperm.methods.errors import SemipermError
from semiperm.nodes.token_merging.patch import ATTACHMENT, apply_token_merging_to, from_inputs, report_of

family = ARGUMENTS[0]  # noqa: F821
models = SimpleNamespace(**runpy.run_path(Path(__file__).with_name("comfy_models.py")))
model, channels = models.small_model(family)
video = family == "wan"
SIZE = (3, 8, 12) if video else (8, 12)
noise = torch.randn(2, channels, *SIZE, generator=torch.Generator().manual_seed(5))
image = torch.rand(1, 90, 64, 3, generator=torch.Generator().manual_seed(6))
TOKENS = 16
seen = []


class VAE:
    """Stands in for ComfyUI's: averages of patches, in as many channels as the model has."""

    def spacial_compression_encode(self):
        return 8

    def encode(self, pixels):
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8) - 0.5
        latent = small.repeat(1, channels, 1, 1)[:, :channels]
        return latent[:, :, None] if video else latent


def conditioning(seed, tokens=TOKENS, **options):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(1, tokens, models.WIDTH, generator=generator)
    return [[states, {"pooled_output": torch.randn(1, models.POOLED, generator=generator), **options}]]


def sample(model, noise=noise, cfg=2.0, positive=1):
    return comfy.sample.sample(
        model, noise, 4, cfg, "euler", "simple", conditioning(positive), conditioning(2), torch.zeros_like(noise),
        disable_pbar=True, seed=0,
    )  # fmt: skip


def difference(a, b):
    return float((a - b).abs().max() / b.abs().max())


def layers(patched):
    """How many layer outputs were pushed in the last run."""
    return patched.get_attachment(ATTACHMENT).record.outcomes


PUSH = {"strength": 1.0, "threshold": -1.0, "image": image, "vae": VAE(), "end": 0.6, "blocks": "all"}
plain = sample(model)
pushing = apply_token_merging_to(model, *from_inputs(**PUSH))
found = {"effect": difference(sample(pushing), plain), "layers": layers(pushing)}
pushed = sample(pushing)
report = report_of(pushing)
found["active"] = sum(step["active"] for step in report["steps"])
found["extra rows"], found["rows"] = report["extra_rows"], [(row["kind"], row["pushed"]) for row in report["rows"]]
found["queued again"] = difference(sample(pushing), pushed)
found["removed"] = difference(sample(model), plain)
found["batches of 1"] = difference(torch.cat([sample(pushing, noise[:1]), sample(pushing, noise[1:])]), pushed)
required = model.model.memory_required
model.model.memory_required = lambda *args, **kwargs: 1e30
found["split"] = difference(sample(pushing), pushed)
model.model.memory_required = required
found["without guidance"] = difference(sample(pushing, cfg=1.0), sample(model, cfg=1.0))
found["diversity"] = difference(
    sample(apply_token_merging_to(model, *from_inputs(strength=1.0, threshold=-1.0, end=0.6))), plain
)
mask = torch.zeros(1, 90, 64)
mask[:, 40:50, 20:40] = 1
found["mask"] = difference(sample(apply_token_merging_to(model, *from_inputs(**PUSH, mask=mask))), pushed)

# words for the reference: its row's text and, where the model reads it, pooled text
named = apply_token_merging_to(model, *from_inputs(**PUSH, reference=conditioning(3, tokens=TOKENS // 2)))
found["reference text"] = difference(sample(named), pushed)
watched, original = model.clone(), model.get_model_object("diffusion_model.forward")


def watch(x, *args, **kwargs):
    seen.append((x, kwargs))
    return original(x, *args, **kwargs)


watched.add_object_patch("diffusion_model.forward", watch)
sample(apply_token_merging_to(watched, *from_inputs(**PUSH, reference=conditioning(3, tokens=TOKENS // 2))))
x, inputs = seen[0]
text, pooled = conditioning(3, tokens=TOKENS // 2)[0]
found["row's text"] = difference(inputs["context"][-1, : TOKENS // 2], text[0])
found["row's pooled"] = (
    None
    if inputs.get("y") is None or video
    else difference(inputs["y"][-1, : models.POOLED], pooled["pooled_output"][0])
)
found["inputs"] = sorted({len(v) for v in inputs.values() if isinstance(v, torch.Tensor)} | {len(x)})

# blocks by their names
blocks = {
    "sdxl": ["output_blocks", "middle_block"],
    "sd3": ["joint_blocks.0"],
    "flux": ["double_blocks", "single_blocks"],
}
found["blocks"] = []
for name in blocks.get(family, ["blocks.1"]):
    part = apply_token_merging_to(model, *from_inputs(**PUSH | {"blocks": name}))
    found["blocks"].append((difference(sample(part), pushed), layers(part)))
try:
    sample(apply_token_merging_to(model, *from_inputs(**PUSH | {"blocks": "elsewhere"})))
except SemipermError as error:
    found["error"] = str(error)

if family in ("sd3", "flux"):  # another pack's override is called through, whoever came first
    calls = []

    def override(func, *args, **kwargs):
        calls.append(1)
        return func(*args, **kwargs) * 1.5

    before = model.clone()
    before.model_options["transformer_options"]["optimized_attention_override"] = override
    alone = sample(before)
    both = sample(apply_token_merging_to(before, *from_inputs(**PUSH)))
    found["override"] = [len(calls) > 0, difference(both, alone), difference(both, pushed)]
    lost = pushing.clone()
    lost.model_options["transformer_options"]["optimized_attention_override"] = override
    try:
        sample(lost)
    except SemipermError as error:
        found["override lost"] = str(error)
if family == "flux":  # as newer ComfyUI calls the UNets' patch
    plain_attention = comfy.ldm.flux.layers.attention

    def newer(q, k, v, pe, mask=None, transformer_options=None):
        out = plain_attention(q, k, v, pe, mask=mask, transformer_options=transformer_options)
        for patch in transformer_options.get("patches", {}).get("attn1_output_patch", ()):
            out = patch(out, transformer_options | {"img_slice": [TOKENS, out.shape[1]]})
        return out

    comfy.ldm.flux.layers.attention = newer
    found["newer"], found["newer, layers"] = difference(sample(pushing), pushed), layers(pushing)
    comfy.ldm.flux.layers.attention = plain_attention
if family == "sd3":  # a model that is none of ours
    stranger = model.clone()
    stranger.add_object_patch("diffusion_model", torch.nn.Identity())
    try:
        apply_token_merging_to(stranger, *from_inputs(**PUSH))
    except SemipermError as error:
        found["stranger"] = str(error)
print(json.dumps(found))
