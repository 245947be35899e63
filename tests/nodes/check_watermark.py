"""In ComfyUI's Python (benchmarks/run_in_comfyui.py): the mark on the embedded model.

ARGUMENTS: a safetensors file with `pixels` (B, 3, 128, 128), the `latents` that diffusers encodes them to, and what it
inverts those to in 1 and 5 steps: `noise1`, `noise5`; a keyring file; a file to write the signed picture to.
Prints JSON.
"""

import json

import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import torch
from PIL import Image
from safetensors.torch import load_file
from semiperm.methods.errors import ModelError, WatermarkError
from semiperm.methods.watermark.config import DetectionConfig
from semiperm.methods.watermark.keyring import load_keyring
from semiperm.methods.watermark.keys import WatermarkKey
from semiperm.nodes.canvas.model import load_canvas
from semiperm.nodes.watermark.heatmap import detection_text, heat_maps
from semiperm.nodes.watermark.inversion import ComfyInverter, detect_pictures, signed_size
from semiperm.nodes.watermark.noise import SignedNoise, check_sampler, sign_model, signed_like, unsigned

given, ring, target = load_file(ARGUMENTS[0]), load_keyring(ARGUMENTS[1]), ARGUMENTS[2]  # noqa: F821
model, clip, vae = load_canvas()
key, other = ring
found = {}


def conditioning(prompt):
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


PROMPT, EMPTY = conditioning("an eared mascot in striped style on sky"), conditioning("")


def difference(a, b):
    return float((a - b).abs().max())


def sample(model, seed=3, batch=1, steps=25, sampler="ddim", noise_seed=None, latent=None, denoise=1.0):
    latent = torch.zeros(batch, 4, 16, 16) if latent is None else latent
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample(
        model, noise, steps, 4.0, sampler, "normal", PROMPT, EMPTY, latent, denoise=denoise, disable_pbar=True,
        seed=seed if noise_seed is None else noise_seed,
    )  # fmt: skip


def detect(images, keys=ring, *, width=0, height=0, search=False, mask=None, clip=clip, conditioning=None):
    config = DetectionConfig(search=search, size=signed_size(width, height))
    return detect_pictures(images, keys, ComfyInverter(model, vae, conditioning, clip), config, mask).results


# ---- signing --------------------------------------------------------------------------------------------------------

plain = comfy.sample.prepare_noise(torch.zeros(3, 4, 16, 16), 3)
signed = signed_like(plain, key)
found["magnitudes"] = difference(signed.abs(), plain.abs())
found["signs kept"] = float((signed.sign() == plain.sign()).float().mean())
found["images alike"] = float((signed[0].sign() == signed[1].sign()).float().mean())
found["batch of one"] = difference(signed_like(plain[1:2], key)[0], signed[1])
found["other key"] = float((signed_like(plain, other).sign() == signed.sign()).float().mean())
node = SignedNoise(3, key)
found["node"] = difference(node.generate_noise({"samples": torch.zeros(3, 4, 16, 16)}), signed)
picked = node.generate_noise({"samples": torch.zeros(2, 4, 16, 16), "batch_index": [2, 0]})
found["batch_index"] = difference(picked, signed[[2, 0]])
found["zero stays"] = difference(signed_like(torch.zeros(1, 4, 16, 16), key), torch.zeros(1, 4, 16, 16))
half = torch.randn(1, 16, 16, 16).half()
found["half"] = str(signed_like(half, key).dtype), difference(signed_like(half, key).abs(), half.abs())
found["video"] = list(signed_like(torch.randn(1, 4, 5, 8, 8), key).shape)

signing = sign_model(model, key)
marked = sample(signing, batch=2)
found["model is noise"] = difference(
    comfy.sample.sample(
        model, signed[:2], 25, 4.0, "ddim", "normal", PROMPT, EMPTY, torch.zeros(2, 4, 16, 16), disable_pbar=True,
        seed=3,
    ), marked,
)  # fmt: skip
unmarked = sample(model, batch=2)
found["effect"] = difference(marked, unmarked)
found["queued again"] = difference(sample(signing, batch=2), marked)
found["unsigned again"] = difference(sample(unsigned(signing), batch=2), unmarked)
found["last one counts"] = difference(sample(sign_model(sign_model(model, other), key), batch=2), marked)

# ---- every sampler that ComfyUI has: refused where the seed alone changes the picture, and only there ----------------

found["samplers"] = {}
for name in comfy.samplers.SAMPLER_NAMES:
    try:
        check_sampler(comfy.samplers.sampler_object(name))
        allowed = True
    except ModelError:
        allowed = False
    runs = [sample(model, seed=1, steps=4, sampler=name, noise_seed=noise_seed) for noise_seed in (1, 2)]
    found["samplers"][name] = [allowed, difference(*runs) == 0.0]
found["options"] = []
for name, options in (
    ("euler_ancestral", {"eta": 0.0}),
    ("heun", {"s_churn": 0.0}),
    ("euler", {"s_churn": 1.0}),
    ("dpm_adaptive", {"eta": 0.5}),
):
    sampler = comfy.samplers.ksampler(name, options)
    try:
        check_sampler(sampler)
        found["options"].append(True)
    except ModelError:
        found["options"].append(False)

# ---- inversion, against diffusers ------------------------------------------------------------------------------------

inverter = ComfyInverter(model, vae, EMPTY)
latents = inverter.encode(list(given["pixels"]))
found["multiple"], found["encode"] = inverter.multiple, difference(latents, given["latents"])
for steps in (1, 5):
    noise, theirs = inverter.invert(latents, steps), given[f"noise{steps}"]
    found[f"invert {steps}"] = difference(noise, theirs) / float(theirs.abs().max())
found["invert 0"] = difference(inverter.invert(latents, 0), latents)
found["through a signing model"] = difference(
    ComfyInverter(signing, vae, EMPTY).invert(latents, 1), inverter.invert(latents, 1)
)

# ---- detection -------------------------------------------------------------------------------------------------------

pictures = vae.decode(torch.cat([marked, unmarked]))
Image.fromarray((pictures[0] * 255).round().byte().numpy()).save(target)
results = detect(pictures)
found["verdicts"] = [r.verdict for r in results]
found["log10_p"] = [r.log10_p for r in results]
found["keys"] = [r.key_name for r in results]
found["evaluations"] = [r.model_evaluations for r in results]
found["unique ids"] = [None if r.payload is None else r.payload.unique_id for r in results]
found["text"] = detection_text(results, "one\ntwo")
maps = heat_maps(pictures, results)
found["maps"] = [list(maps.shape), float(maps.min()), float(maps.max()), float((maps[:2] - maps[2:]).abs().mean())]
found["another key"] = [r.verdict for r in detect(pictures, [WatermarkKey.new("stranger", 7)])]
found["a detector's"] = [r.verdict for r in detect(pictures[:1], ring.detector())]
found["conditioning"] = [r.verdict for r in detect(pictures[:1], clip=None, conditioning=EMPTY)]
found["four channels"] = [r.verdict for r in detect(torch.cat([pictures[:1], torch.ones(1, 128, 128, 1)], -1))]
flipped = pictures[:1].flip(2)
found["flipped"] = [r.verdict for r in detect(flipped)]
undone = detect(flipped, search=True)
found["flipped, search"] = [undone[0].verdict, undone[0].transform]
found["flipped, map"] = list(heat_maps(flipped, undone).shape)
large = torch.nn.functional.interpolate(pictures[:1].movedim(-1, 1), scale_factor=2, mode="bicubic").movedim(1, -1)
found["resized"] = [r.verdict for r in detect(large.clamp(0, 1), width=128, height=128)]
found["native"] = inverter.native
found["resized, size unknown"] = [r.verdict for r in detect(large.clamp(0, 1))]

# the content bound: the same noise under another prompt is a reprompt forgery
begun = []


class Counting:
    def decode(self, latents):
        begun.append(len(latents))
        return vae.decode(latents)


binding = sign_model(model, key, vae=Counting())
found["bound, prompt once more"] = difference(sample(signing, batch=2), marked)
used = []
watched = binding.clone()
watched.add_wrapper_with_key(
    comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE,
    "watch",
    lambda executor, *args: (used.append(args[4].clone()), executor(*args))[1],
)
bound = sample(watched, batch=2)
found["bound, draws"] = len(begun)
found["bound, queued again"] = difference(sample(binding, batch=2), bound)
results = detect(vae.decode(bound))
found["bound"], found["bound, content p"] = [r.verdict for r in results], [r.content_p_value for r in results]
forged = comfy.sample.sample(
    model, used[-1], 25, 4.0, "ddim", "normal", conditioning("a dotted picture of a robot on a sand background"), EMPTY,
    torch.zeros(2, 4, 16, 16), disable_pbar=True, seed=3,
)  # fmt: skip
found["bound, other content"] = [r.verdict for r in detect(vae.decode(forged))]

# img2img: the mark is in the noise that was added to another picture
begin = sample(model, seed=11, batch=4)
for denoise in (1.0, 0.6, 0.3):
    again = vae.decode(sample(signing, seed=21, batch=4, latent=begin, denoise=denoise))
    found[f"denoise {denoise}"] = [r.verdict != "absent" for r in detect(again)]

# inpainting: the mark is where the mask is white, and nothing else is counted
mask = torch.zeros(1, 128, 128)
mask[:, :, :80] = 1
noise = comfy.sample.prepare_noise(begin, 31)
drawn = comfy.sample.sample(
    signing, noise, 25, 4.0, "euler", "normal", PROMPT, EMPTY, begin, noise_mask=mask[:, None], disable_pbar=True,
    seed=31,
)  # fmt: skip
inpainted = vae.decode(drawn)
found["inpainted"] = [r.verdict != "absent" for r in detect(inpainted, mask=mask)]
found["beside the mask"] = [r.verdict != "absent" for r in detect(inpainted, mask=1 - mask)]
small = torch.nn.functional.interpolate(mask[None], size=(64, 64))[0]
found["mask of another size"] = [r.verdict != "absent" for r in detect(inpainted, mask=small)]

errors = {}
for name, call in {
    "ancestral": lambda: sample(signing, sampler="euler_ancestral"),
    "detector's key": lambda: sign_model(model, key.detector()),
    "small": lambda: signed_like(torch.randn(1, 4, 8, 8), key),
    "flat": lambda: signed_like(torch.randn(4, 16, 16), key),
    "no text": lambda: detect(pictures, clip=None),
    "one side": lambda: detect(pictures, width=128),
    "two masks": lambda: detect(pictures, mask=torch.ones(2, 128, 128)),
    "no keys": lambda: detect(pictures, []),
}.items():
    try:
        call()
    except (ModelError, WatermarkError) as error:
        errors[name] = str(error)
found["errors"] = errors
print(json.dumps(found))
