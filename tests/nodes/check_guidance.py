"""In ComfyUI's Python (see benchmarks/run_in_comfyui.py): safe guidance on the embedded model.

ARGUMENTS: a safetensors file with `noise` (B, 4, 16, 16), `sigmas` (S,), and the latents that the diffusers face made
of them by each algorithm. Prints JSON.
"""

import json
from dataclasses import replace

import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import torch
from safetensors.torch import load_file
from semiperm.methods.errors import SemipermError
from semiperm.methods.guidance.category import Category
from semiperm.methods.guidance.config import SafeGuidanceConfig
from semiperm.methods.guidance.detectors import DetectorPair, PictureDetector
from semiperm.methods.guidance.examples import halves
from semiperm.methods.guidance.nag import NAG
from semiperm.methods.guidance.safree import SAFREE
from semiperm.methods.guidance.sld import SLD
from semiperm.nodes.canvas.model import load_canvas
from semiperm.nodes.guidance.detectors import detectors_for
from semiperm.nodes.guidance.guider import SafeGuider
from semiperm.nodes.guidance.patch import guide_model, report_of
from semiperm.nodes.guidance.texts import filtered
from semiperm.nodes.membranes.concept_text import erase_in
from semiperm.nodes.membranes.patch import apply_membranes_to
from semiperm.nodes.token_merging.patch import apply_token_merging_to, from_inputs

model, clip, vae = load_canvas()
given = load_file(ARGUMENTS[0])  # noqa: F821
noise = given["noise"]
PROMPT = "a dotted picture of a robot on a sand background"
HARM = Category("machines", ("a robot", "a machine"))
MP = comfy.patcher_extension.WrappersMP


def conditioning(text):
    states, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
    return [[states, {"pooled_output": pooled}]]


def sample(model, positive=None, cfg=4.0, sampler="euler", sigmas=None, negative=None, noise=noise):
    sigmas = given["sigmas"] if sigmas is None else sigmas
    start = noise * (1 + sigmas[0] ** 2).sqrt() / sigmas[0]  # diffusers scales noise for the variance it will have
    latents = comfy.sample.sample_custom(
        model, start, cfg, comfy.samplers.sampler_object(sampler), sigmas, positive or conditioning(PROMPT),
        negative or conditioning(""), torch.zeros_like(noise), disable_pbar=True, seed=0,
    )  # fmt: skip
    return latents / (1 + sigmas[-1] ** 2).sqrt()


def guided(algorithm, model=model, **settings):
    return guide_model(model, SafeGuidanceConfig(HARM, algorithm, **settings), clip)


def difference(a, b):
    return float((a - b).abs().max())


def relative(a, b):
    return float((a - b).norm() / b.norm())


found, faults = {}, {}
plain = sample(model)
found["plain"] = relative(plain, given["plain"])
for name, algorithm in {"sld": SLD("max"), "adavd": "adavd", "nag": NAG("sd15")}.items():
    patched = guided(algorithm)
    out = sample(patched)
    found[name] = relative(out, given[name])
    found[f"{name}, effect"] = relative(out, plain)
    found[f"{name}, again"] = difference(sample(patched), out)
    found[f"{name}, report"] = report_of(patched)
found["untouched after"] = difference(sample(model), plain)
config = SafeGuidanceConfig(HARM, SAFREE(adaptive=False))
edited, said = filtered(model, clip, PROMPT, config, config.algorithms[0])
found["safree"] = relative(sample(model, edited), given["safree"])
found["safree, effect"] = relative(sample(model, edited), plain)
found["safree, said"] = said
found["strength 0"] = difference(sample(guided("sld", strength=0.0)), plain)
found["nag at cfg 1"] = relative(sample(guided(NAG("sd15")), cfg=1.0), sample(model, cfg=1.0))

# detectors: of text by the prompt, of pictures by what the model predicts (thresholds at which each fires, or none)
benign = [
    f"a {thing} on {ground}" for thing in ("ghost", "star", "heart", "circle") for ground in ("sky", "fog", "sand")
]
rough = replace(HARM, false_alarms=0.3)
calm = min(halves(benign)[1], key=lambda words: detectors_for(model, clip, rough, None, benign, words).scores[0])
for name, prompt in {"detected": PROMPT, "not detected": calm}.items():
    detectors = detectors_for(model, clip, rough, None, benign, prompt)
    patched = guide_model(model, SafeGuidanceConfig(rough, SLD("max"), detectors=detectors.pairs), clip, detectors)
    out, bare = sample(patched, conditioning(prompt)), sample(model, conditioning(prompt))
    found[name] = relative(out, bare) if name == "detected" else difference(out, bare)
    found[f"{name}, evaluations"] = report_of(patched)["evaluations"]
    found[f"{name}, text score"] = report_of(patched)["rows"][0]["text_score"]
    if name == "detected":
        found["detected, as without"] = relative(out, sample(guided(SLD("max"))))
        judged = patched
for name, threshold in {"seen": -1.0, "never seen": 1.0}.items():
    flat = PictureDetector(torch.linspace(0, 1, 5), torch.zeros(4, 100), torch.zeros(4), threshold)
    pair = DetectorPair(HARM.name, None, flat, 0.1)
    patched = guided(SLD("max"), detectors=[pair])
    out = sample(patched)
    found[name] = relative(out, plain) if name == "seen" else difference(out, plain)
    found[f"{name}, evaluations"] = report_of(patched)["evaluations"]
    out = sample(guided("adavd", detectors=[pair]))
    found[f"{name} by adavd"] = relative(out, plain) if name == "seen" else difference(out, plain)

# a picture that cannot be saved ends as plain grey, the other one beside it as it would alone
weights = torch.randn(1, 100, generator=torch.Generator().manual_seed(1))
several = torch.cat([noise[:1], torch.randn(noise[:1].shape, generator=torch.Generator().manual_seed(9))])


def judged_by(threshold, **settings):
    seeing = PictureDetector(torch.tensor([0.0, 1.0]), weights, torch.zeros(1), threshold)
    pair = DetectorPair(HARM.name, None, seeing, 0.1)
    return guided("adavd", detectors=[pair], hopeless=0.0, **settings)


def two(patched):
    return sample(patched, noise=several), [row["picture_score"] for row in report_of(patched)["rows"]]


untouched, scores = two(judged_by(1e6))
between = sum(scores) / 2 + 1e6
patched = judged_by(between, when_unsafe="refuse")
out, _ = two(patched)
seen = scores.index(max(scores))
found["refused"] = [row["refused"] for row in report_of(patched)["rows"]] == [i == seen for i in range(2)]
found["grey"] = float(out[seen].abs().max() / untouched[seen].abs().max())
found["beside it"] = difference(out[1 - seen], untouched[1 - seen])
try:
    two(judged_by(between, when_unsafe="raise"))
except SemipermError as error:
    found["raised"] = str(error)
assert detectors_for(model, clip, rough, None, benign, PROMPT).when_unsafe == "guide"
try:
    detectors_for(model, clip, rough, None, benign, PROMPT, when_unsafe="refuse")
except SemipermError as error:
    found["refuse without a picture detector"] = str(error)

# dynamic mode, with everything silent
patched = guided(SLD("max", patience=1, probe=5, silent=1.0))
found["dynamic"] = relative(sample(patched), plain) // 1e-5
found["dynamic, evaluations"] = report_of(patched)["evaluations"]
found["dynamic, alignment"] = report_of(patched)["rows"][0]["alignment"]

# the guider gives the same, and runs others' hooks
patched = guided(SLD("max"))
expected = sample(patched)
hooked = []
watched = patched.clone()
watched.set_model_sampler_post_cfg_function(lambda args: (hooked.append("post"), args["denoised"])[1])
watched.set_model_sampler_pre_cfg_function(lambda args: (hooked.append("pre"), args["conds_out"])[1])
guider = SafeGuider(watched)
guider.set_conds(conditioning(PROMPT), conditioning(""))
guider.set_cfg(4.0)
euler = comfy.samplers.sampler_object("euler")
sigmas = given["sigmas"]
start = noise * (1 + sigmas[0] ** 2).sqrt() / sigmas[0]
out = guider.sample(start, torch.zeros_like(noise), euler, sigmas, disable_pbar=True, seed=0)
out = out / (1 + sigmas[-1] ** 2).sqrt()
found["guider"], found["hooks"] = difference(out, expected), sorted(set(hooked))

# split by memory, and one by one
batches = []
original = type(model.model).memory_required
type(model.model).memory_required = lambda self, *args, **kwargs: 1e18
split = guided(SLD("max"))
split.add_wrapper_with_key(
    MP.DIFFUSION_MODEL, "watch", lambda executor, x, *a, **k: (batches.append(x.shape[0]), executor(x, *a, **k))[1]
)
found["split"] = relative(sample(split), expected)
type(model.model).memory_required = original
found["split, rows"] = sorted(set(batches))
batches.clear()
sample(split)
found["one batch, rows"] = sorted(set(batches))

# second order: one momentum update a step
kept = []
from semiperm.methods.guidance.algorithm import Momentum  # noqa: E402

keep = Momentum.keep
Momentum.keep = lambda self, value, update: (kept.append(self.level if update else None), keep(self, value, update))[1]
for name in ("heun", "dpm_2"):
    kept.clear()
    sample(guided(SLD("max")), sampler=name)
    levels = [level for level in kept if level is not None]
    found[f"{name}, levels"] = [len(set(levels)), len(given["sigmas"]) - 1]
Momentum.keep = keep

# beside the others, in any order
merging = from_inputs(threshold=-1.0, end=0.5, strength=1.0)
membranes = erase_in(model, clip, ["ghost"])
steps = {
    "guidance": lambda m: guided(SLD("max"), m),
    "attention": lambda m: guided("adavd", m),
    "membranes": lambda m: apply_membranes_to(m, membranes),
    "merging": lambda m: apply_token_merging_to(m, *merging),
}
for one, other in (("guidance", "membranes"), ("guidance", "merging"), ("attention", "membranes")):
    outs = [sample(steps[b](steps[a](model))) for a, b in ((one, other), (other, one))]
    found[f"{one} and {other}"] = relative(*outs)


def fault(name):
    def run(function):
        try:
            function()
            faults[name] = None
        except SemipermError as error:
            faults[name] = str(error)

    return run


@fault("guidance off")
def _():
    sample(guided("sld"), cfg=1.0)


@fault("calculated by another")
def _():
    other = guided("sld")

    def alone(args):
        return comfy.samplers._calc_cond_batch(
            args["model"], args["conds"], args["input"], args["sigma"], args["model_options"]
        )

    other.set_model_sampler_calc_cond_batch_function(alone)
    sample(other)


@fault("a guider of another pack")
def _():
    class Other(comfy.samplers.CFGGuider):
        def outer_predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006
            return self.predict_noise(x, timestep, model_options, seed)

    other = Other(guided("sld"))
    other.set_conds(conditioning(PROMPT), conditioning(""))
    other.set_cfg(4.0)
    other.sample(noise, torch.zeros_like(noise), euler, given["sigmas"], disable_pbar=True, seed=0)


@fault("a branch left out")
def _():
    other = guided("sld")
    other.add_wrapper_with_key(
        MP.CALC_COND_BATCH, "z", lambda executor, m, conds, *a, **k: executor(m, conds[:2], *a, **k)
    )
    sample(other)


@fault("categories taken out of the guider")
def _():
    other = guided("sld")

    def take(executor, x, timestep, *args, **kwargs):
        guider = executor.class_obj
        guider.conds = {k: v for k, v in guider.conds.items() if "semiperm" not in k}
        return executor(x, timestep, *args, **kwargs)

    other.add_wrapper_with_key(MP.PREDICT_NOISE, "z", take)
    sample(other)


@fault("not a number")
def _():
    other = guided("sld")
    other.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * float("nan"))
    sample(other)


@fault("forward replaced")
def _():
    other = guided("adavd")
    unet = other.get_model_object("diffusion_model")
    other.add_object_patch("diffusion_model.forward", type(unet).forward.__get__(unet))
    sample(other)


@fault("layers replaced")
def _():
    other = guided("nag")
    unet = other.get_model_object("diffusion_model")
    for path, module in unet.named_modules():
        if path.endswith("attn2"):
            name = f"diffusion_model.{path}.to_out.forward"
            other.add_object_patch(name, type(module.to_out).forward.__get__(module.to_out))
    sample(other)


@fault("no clip")
def _():
    guide_model(model, SafeGuidanceConfig(HARM, "sld"), None)


@fault("the text seam on a model")
def _():
    guided("safree")


@fault("a model without it for the guider")
def _():
    SafeGuider(model)


@fault("no report before a run")
def _():
    report_of(guided("sld"))


@fault("no report without it")
def _():
    report_of(model)


@fault("an embedding that is not a number")
def _():
    class Broken:
        def tokenize(self, text):
            return clip.tokenize(text)

        def encode_from_tokens(self, tokens, return_pooled=False):
            states, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
            return states * float("nan"), pooled

    guide_model(model, SafeGuidanceConfig(HARM, "sld"), Broken())


@fault("another prompt than the one that was judged")
def _():
    sample(judged, conditioning(calm))


@fault("an empty category")
def _():
    SafeGuidanceConfig(Category("none", ()), "sld")


found["faults"] = faults
print(json.dumps(found))
