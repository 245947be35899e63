"""In ComfyUI's Python (see benchmarks/run_in_comfyui.py): negative token merging on the embedded model.

ARGUMENTS: a safetensors file with `noise` (B, 4, 16, 16), `sigmas` (S,), `reference` (1, 3, 128, 128), and the latents
`merged` that the diffusers face made of them. Prints JSON.
"""

import json

import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import torch
from safetensors.torch import load_file
from semiperm.methods.errors import SemipermError
from semiperm.nodes.canvas.model import load_canvas
from semiperm.nodes.membranes.concept_text import erase_in
from semiperm.nodes.membranes.patch import apply_membranes_to
from semiperm.nodes.membranes.patch import report_of as membrane_report
from semiperm.nodes.token_merging.patch import apply_token_merging_to, from_inputs, report_of

model, clip, vae = load_canvas()
given = load_file(ARGUMENTS[0])  # noqa: F821
noise = given["noise"]
image = torch.rand(1, 150, 128, 3, generator=torch.Generator().manual_seed(4))
PLUSH, OTHER = "a one eyed plush in striped style on sky", "a dotted picture of a robot on a sand background"
WIDE = {"threshold": -1.0, "end": 0.4, "blocks": "all"}
PUSH = WIDE | {"strength": 2.0, "image": image, "vae": vae}
APART = WIDE | {"strength": 1.0}
shapes = []  # of every batch that the denoiser's layers see


def conditioning(*prompts, **options):
    encoded = [clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True) for prompt in prompts]
    return [[torch.cat([states for states, _ in encoded]), {"pooled_output": encoded[0][1], **options}]]


def sample(model, positive=None, noise=noise, cfg=4.0, sampler="euler", negative=""):
    watched = model.clone()
    watched.add_wrapper_with_key(
        comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL,
        "watch",
        lambda executor, x, *args, **kwargs: (shapes.append(tuple(x.shape)), executor(x, *args, **kwargs))[1],
    )
    shapes.clear()
    return comfy.sample.sample(
        watched, noise, 10, cfg, sampler, "normal", positive or conditioning(PLUSH), conditioning(negative),
        torch.zeros_like(noise), disable_pbar=True, seed=0,
    )  # fmt: skip


def difference(a, b):
    return float((a - b).abs().max())


def apply(model=model, **options):
    return apply_token_merging_to(model, *from_inputs(**options))


found = {}
base = {key: value.clone() for key, value in model.model.state_dict().items()}
plain = sample(model)
pushing = apply(**PUSH)
pushed = sample(pushing)
found["effect"], found["shape"] = difference(pushed, plain), list(pushed.shape)
found["batches"] = [shape[0] for shape in shapes]
found["report"] = report_of(pushing)
found["queued again"] = difference(sample(pushing), pushed)
found["without the node"] = difference(sample(model), plain)
found["strength 0"] = difference(sample(apply(**PUSH | {"strength": 0.0})), plain)
found["itself"] = apply(**PUSH | {"strength": 0.0}) is model
found["towards"] = difference(sample(apply(**PUSH | {"strength": -0.5})), plain)
found["threshold 1"] = difference(sample(apply(**PUSH | {"threshold": 1.0})), plain)

# one image of the batch at a time; two prompts, each with a reference row of its own
found["two batches of 1"] = difference(
    torch.cat([sample(pushing, noise=noise[:1]), sample(pushing, noise=noise[1:])]), pushed
)
both = sample(pushing, conditioning(PLUSH, OTHER))
found["two prompts, batches"] = shapes[0][0]
alone = torch.cat([sample(pushing, noise=noise[:1]), sample(pushing, conditioning(OTHER), noise[1:])])
found["two prompts"] = difference(both, alone)

# little memory: positive and negative run one after the other; the negative one as if the node were not there
outputs = {}


def keep(name):
    def around(executor, x, *args, **kwargs):
        options = args[-1] if isinstance(args[-1], dict) else kwargs["transformer_options"]
        output = executor(x, *args, **kwargs)
        outputs.setdefault(name, {})[tuple(options["cond_or_uncond"])] = output, x
        return output

    return around


for name, patched in (("plain", model), ("pushed", pushing)):
    kept = patched.clone()
    kept.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "keep", keep(name))
    comfy.sample.sample(
        kept, noise, 1, 4.0, "euler", "normal", conditioning(PLUSH), conditioning(""), torch.zeros_like(noise),
        disable_pbar=True, seed=0,
    )  # fmt: skip
one, two = (next(iter(outputs[name].values()))[0] for name in ("plain", "pushed"))
chunks = next(iter(outputs["plain"]))
rows = one.chunk(2), two[:4].chunk(2)
found["unconditional rows"] = difference(rows[0][chunks.index(1)], rows[1][chunks.index(1)])
found["conditional rows"] = difference(rows[0][chunks.index(0)], rows[1][chunks.index(0)])
required = model.model.memory_required
model.model.memory_required = lambda *args, **kwargs: 1e30
found["split"], found["split, batches"] = difference(sample(pushing), pushed), [shape[0] for shape in shapes[:2]]
found["split, report"] = report_of(pushing)
gently = apply(**PUSH | {"strength": 0.05})  # so that a tie that falls the other way is not seen
split = sample(gently)
model.model.memory_required = required
whole = sample(gently)
found["gentle split"], found["gentle effect"] = difference(split, whole), difference(whole, plain)

# the other options
text = conditioning("a quibble")
found["reference text"] = difference(sample(apply(**PUSH, reference=text), conditioning(PLUSH, OTHER)), both)
found["reference text, batches"] = shapes[0][0]
short = [[text[0][0][:, :16], text[0][1]]]
found["shorter reference text"] = difference(sample(apply(**PUSH, reference=short)), plain)
several = apply(**PUSH | {"image": torch.cat([image, image.flip(1)])})
sample(several)
found["two references, batches"] = shapes[0][0]
mask = torch.zeros(1, 150, 128)
mask[:, 60:90, 40:80] = 1
found["mask"] = difference(sample(apply(**PUSH, mask=mask)), pushed)
found["white mask"] = difference(sample(apply(**PUSH, mask=torch.ones_like(mask))), pushed)
for name, options in {
    "rows": {"rows": "all"},
    "blocks": {"blocks": "output_blocks, middle_block"},
    "cross_attention": {"cross_attention": True},
    "max_downscale": {"max_downscale": 1},
    "noise_reference": {"noise_reference": False},
    "seed": {"reference_seed": 1},
    "matching": {"matching": "output"},
    "official": {"compat": "official", "blocks": ""},
    "window": {"start": 0.2, "end": 0.3},
}.items():
    found[f"option {name}"] = difference(sample(apply(**PUSH | options)), pushed)
    found[f"{name}, batches"] = max(shape[0] for shape in shapes)
narrow = [sample(apply(**PUSH | {"blocks": blocks})) for blocks in ("", "output_blocks")]
found["the paper's blocks"] = difference(*narrow)
window = apply(**PUSH | {"start": 0.2, "end": 0.5})
sample(window)
found["window"] = [step["active"] for step in report_of(window)["steps"]]
found["window, batches"] = [shape[0] for shape in shapes]
found["window, percents"] = [step["share"] for step in report_of(window)["steps"]]
sample(apply(**PUSH | {"end": 1.0}), cfg=1.0)
found["without guidance, batches"] = sorted({shape[0] for shape in shapes})
halves = [conditioning(p, area=(16, 8, 0, x), strength=1.0)[0] for p, x in ((PLUSH, 0), (OTHER, 8))]
found["areas"] = difference(sample(pushing, halves), sample(model, halves))

# the diffusers face, from the same noise
sigmas = given["sigmas"]
alike = WIDE | {"strength": 1.0, "end": 0.1, "reference_seed": 5, "vae": vae}
merged = comfy.sample.sample_custom(
    apply(image=given["reference"].movedim(1, -1), **alike), noise * (1 + sigmas[0] ** 2).sqrt() / sigmas[0], 4.0,
    comfy.samplers.sampler_object("euler"), sigmas, conditioning(PLUSH, OTHER), conditioning(""),
    torch.zeros_like(noise), disable_pbar=True, seed=0,
)  # fmt: skip
found["against diffusers"] = difference(merged / (1 + sigmas[-1] ** 2).sqrt(), given["merged"])

# diversity
apart = apply(**APART)
spread = sample(apart)
found["diversity"], found["diversity, batches"] = difference(spread, plain), sorted({shape[0] for shape in shapes})
found["diversity, report"] = report_of(apart)
first = sample(apply(**APART, diversity="first"))
found["diversity first, image 0"], found["diversity first"] = difference(first[:1], plain[:1]), difference(first, plain)
found["diversity, queued again"] = difference(sample(apart), spread)

# with membranes, before and after: the same, and both act
membranes = erase_in(model, clip, ["robot"])
prompts = conditioning(PLUSH, OTHER)
erased = apply_membranes_to(model, membranes)
before, after = apply(erased, **PUSH), apply_membranes_to(pushing, membranes)
first = sample(before, prompts)
found["membrane before against after"] = difference(first, sample(after, prompts))
found["with and without the membrane"] = difference(first[1:], both[1:])
found["with and without merging"] = difference(first[1:], sample(erased, prompts)[1:])
found["both, gates"] = [round(row["gamma"]["robot"], 3) for row in membrane_report(after)["rows"]]
found["both, shares"] = [row["pushed"] for row in report_of(after)["rows"]]

# two nodes: the second one's reference row is not pushed by the first, nor taken for an image
other = image.flip(2)
twice = apply(pushing, **PUSH | {"image": other, "strength": 1.0, "end": 0.2})
found["two nodes"] = difference(sample(twice), pushed)
found["two nodes, batches"] = [shape[0] for shape in shapes]
found["two nodes, rows"] = len(report_of(twice)["rows"])
found["merging and diversity"] = difference(sample(apply(pushing, **APART)), pushed)

# other packs' patches of the same outputs, before and after, and a LoRA
doubled = {}
for name, order in {"patch before": (0, 1), "patch after": (1, 0)}.items():
    patched = model
    for step in order:
        if step:
            patched = apply(patched, **PUSH)
        else:
            patched = patched.clone()
            patched.set_model_attn1_output_patch(lambda n, options: n * 1.1)
    doubled[name] = sample(patched)
    found[name] = min(difference(doubled[name], pushed), difference(doubled[name], plain))
found["patch before against after"] = difference(*doubled.values())
key = next(key for key in base if key.endswith("attn1.to_k.weight"))
lora = {key: ("diff", (torch.randn(base[key].shape, generator=torch.Generator().manual_seed(1)) * 0.2,))}
early, late = model.clone(), pushing.clone()
early.add_patches(lora)
late.add_patches(lora)
found["lora before against after"] = difference(sample(apply(early, **PUSH)), sample(late))
found["lora"] = difference(sample(late), pushed)
regrouped = pushing.clone()
regrouped.model_options["transformer_options"]["patches"]["attn1_output_patch"].insert(
    0, lambda n, options: n.reshape(n.shape[0] * 2, n.shape[1] // 2, n.shape[2])
)


def replaced(patched):
    """As a pack that throws away what it finds."""
    patched, unet = patched.clone(), model.model.diffusion_model
    patched.add_object_patch("diffusion_model.forward", type(unet).forward.__get__(unet))
    return patched


errors = {}
for name, call in {
    "vae": lambda: apply(strength=1.0, image=image),
    "mask": lambda: apply(strength=1.0, mask=mask),
    "text": lambda: apply(strength=1.0, reference=text),
    "window": lambda: apply(**PUSH, start=0.5),
    "two texts": lambda: apply(**PUSH, reference=text + text),
    "long text": lambda: sample(apply(**PUSH, reference=[[text[0][0].repeat(1, 2, 1), {}]])),
    "alone": lambda: sample(apart, noise=noise[:1]),
    "blocks": lambda: sample(apply(**PUSH | {"blocks": "single_blocks"})),
    "cropped mask": lambda: sample(apply(**PUSH, mask=torch.nn.functional.pad(torch.ones(1, 5, 128), (0, 0, 0, 145)))),
    "regrouped": lambda: sample(regrouped),
    "replaced": lambda: sample(replaced(pushing)),
    "unsampled": lambda: report_of(apply(**PUSH)),
    "bare": lambda: report_of(model),
}.items():
    try:
        call()
    except SemipermError as error:
        errors[name] = str(error)
found["errors"] = errors
found["after the errors"] = difference(sample(pushing), pushed)
model.unpatch_model()
found["base weights"] = max(
    difference(value.float(), base[key].float()) for key, value in model.model.state_dict().items()
)
print(json.dumps(found))
