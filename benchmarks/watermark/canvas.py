"""The watermark on the canvas's pictures: found, attacked, judged and forged, other marks beside it.

All marks get the same prompts, sampler, attacks and noise estimates. Detection is at a p-value, never at a threshold
fitted to pictures: those of all marks are exact under their random key. Pictures are rounded to bytes when drawn and
after each attack, as files are. Units as in statistics.py; each draws its own pictures.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ...methods.attacks.pictures import ATTACKS, SUITE, attack
from ...methods.errors import WatermarkError
from ...methods.watermark.detection import DetectionConfig, detect_in
from ...methods.watermark.mark import read
from ...methods.watermark.search import Search
from ...methods.watermark.statistics import without_offset
from .marks import CODE, MARKS, OURS, RINGS, SHADING, SOFT, TREE, key_of, seeded

SHAPE, SIZE = (4, 16, 16), (128, 128)
PLAIN, TREE_ALL, FIXED, SEARCHING = "plain noise", f"{TREE}, all channels", f"{OURS}, 10 steps", f"{OURS}, search"
# who draws -> who looks; the payload of the others is as long as ours, which is authenticated besides
DETECTORS = {
    PLAIN: (),
    OURS: (OURS, FIXED),
    SEARCHING: (SEARCHING,),
    SHADING: (SHADING, SOFT),
    CODE: (CODE,),
    TREE: (TREE,),
    TREE_ALL: (TREE_ALL,),
    RINGS: (RINGS,),
}
BITS = 24
LADDER, STEPS = (0, 1, 5), 10  # ours climbs, and stops where it is sure; the others take ten steps
RUNGS = (0, 1, 5, 10)
CLEAN = "none"
ALL = (*SUITE, "vae-reencode", "regenerate:0.14", "regenerate:0.3")
QUICK = (CLEAN, "jpeg:50", "noise:0.05", "flip")
GUIDANCES = (1.0, 2.5, 5.0, 7.5)
SHARE = {PLAIN: 1, OURS: 1, SEARCHING: 4}  # of the pictures, 1 in so many; 1 in 2 of the others
FORGERIES = ("as drawn", "jpeg:50", "reprompt", "transplant:0.5", "transplant:0.7", "imprint")
NULL_KEYS = 50  # that each plain picture is read with
UNIT = 8


def plan(quick: bool) -> list[dict]:
    """All units on the canvas."""
    from ...canvas import DEFAULT_GUIDANCE

    def cut(count: int, size: int = UNIT, **about) -> list[dict]:
        return [about | {"start": start, "count": min(size, count - start)} for start in range(0, count, size)]

    units = []
    for mark in (PLAIN, OURS, SEARCHING, SHADING, TREE) if quick else DETECTORS:
        pictures = (8 if quick else 48) // SHARE.get(mark, 2)
        about = {"task": "pictures", "mark": mark, "guidance": DEFAULT_GUIDANCE}
        attacks = list(QUICK if quick else ALL) if mark != PLAIN else []
        size = 2 if mark == SEARCHING else 4 if quick else UNIT  # a search takes seconds a picture
        units += cut(pictures, size, **about, attacks=attacks)
        if not quick and mark in (PLAIN, OURS):  # as drawn alone, so that figures near 1 say something
            more = cut(128, UNIT, **about, attacks=attacks[:1])
            units += [unit for unit in more if unit["start"] >= pictures]
    for guidance in GUIDANCES[:1] if quick else GUIDANCES:
        units += cut(4 if quick else 24, 4, task="pictures", mark=OURS, guidance=guidance, attacks=[CLEAN])
    units += cut(2 if quick else 32, 2, task="forgery")
    if not quick:
        units += cut(12, 4, task="decoder", steps=60)
        units += [
            unit
            for mark in DETECTORS
            if mark in (OURS, SHADING, RINGS)
            for unit in cut(8, 8, task="average", mark=mark, n=32)
        ]
    return units


def compute(unit: dict) -> dict:
    """The result of one unit, of plain values."""
    with torch.no_grad():
        return {"pictures": _pictures, "forgery": _forgery, "decoder": _decoder, "average": _average}[unit["task"]](
            unit
        )


@lru_cache(maxsize=1)
def world():
    """(pipeline, its inverter, judge), loaded once in each process."""
    import diffusers
    import transformers

    from ...canvas import load_pipeline
    from ...canvas.judge import Judge
    from ...pipelines.watermark.detect import PipelineInverter

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe, PipelineInverter(pipe), Judge.load()


@lru_cache(maxsize=1)
def the_reader():
    """The shipped reader of marks; None where it is another world's."""
    from ...canvas.pipeline import READER, WEIGHTS
    from ...pipelines.watermark.reader import reader_for

    return reader_for(world()[0], WEIGHTS / READER)


def asked(start: int, count: int) -> list[tuple[str, dict[str, str]]]:
    """(prompt, what it asks for) of the pictures `start` to `start + count`."""
    from ...canvas import captions
    from ...canvas.render import random_scene

    found = []
    for i in range(start, start + count):
        rng = random.Random(f"watermark-{i}")
        scene = random_scene(rng, hazard=False)
        text = captions.caption(scene, rng, synonyms=True, complete=True)
        found.append((text, {name: getattr(scene, name) for name in ("object", "style", "background")}))
    return found


def mark_of(name: str):
    """The mark of the canvas's pictures under that name."""
    if name == TREE_ALL:
        from ...methods.watermark.peers.tree_ring import TreeRing
        from .marks import Baseline

        return Baseline(lambda key, bits: TreeRing(key, channels=None), False, key_of("canvas"))
    ours = name in (OURS, FIXED, SEARCHING)
    return MARKS[OURS if ours else name](key_of("canvas"), None if ours else BITS)


def noise_of(mark: str, start: int, count: int) -> Tensor:
    """(count, *SHAPE) initial noise of pictures `start` to `start + count`."""
    generator = seeded("canvas", OURS if mark == SEARCHING else mark, start)
    if mark == PLAIN:
        return torch.randn(count, *SHAPE, generator=generator)
    return mark_of(mark).sample((count, *SHAPE), generator)


def draw(prompts: Sequence[str], noise: Tensor, guidance: float) -> Tensor:
    """(B, 3, 128, 128) in whole 255ths."""
    from ...canvas import DEFAULT_STEPS

    call = {"num_inference_steps": DEFAULT_STEPS, "guidance_scale": guidance, "output_type": "pt"}
    return in_bytes(world()[0](list(prompts), latents=noise, **call).images)


def in_bytes(pixels: Tensor) -> Tensor:
    return pixels.float().mul(255).round().div(255)


def estimate(pixels: Tensor, steps: int) -> Tensor:
    """The noise estimate that every detector gets."""
    inverter = world()[1]
    return without_offset(inverter.invert(inverter.encode(list(pixels)), steps))


def look(detectors: Sequence[str], pixels: Tensor, steps: int = STEPS) -> dict[str, dict[str, list]]:
    """What each detector says of pictures: {"p", "exact", "evaluations"}, lists with an entry for each."""
    found, noise = {}, None
    for name in detectors:
        mark = mark_of(name)
        if name in (OURS, SEARCHING):
            search = Search() if name == SEARCHING else None
            config = DetectionConfig(ladder=LADDER, search=search, size=SIZE)
            results = detect_in(list(pixels), world()[1], [mark.key], config)
            sent = mark.payload(SHAPE)
            entries = [(r.p_value, r.verdict == "valid" and r.payload == sent, r.model_evaluations) for r in results]
        else:
            noise = estimate(pixels, steps) if noise is None else noise
            entries = [(one.p_value, one.exact, steps) for one in (mark.find(row[None]) for row in noise)]
        p, exact, evaluations = zip(*entries, strict=True)
        found[name] = {"p": [float(f"{v:.6g}") for v in p], "exact": list(exact), "evaluations": list(evaluations)}
    return found


def attacked(pixels: Tensor, text: str, start: int) -> Tensor:
    """The pictures after an attack; chance depends on the attack and on which pictures they are."""
    from ...pipelines.attacks.pictures import model_attacks

    if text == CLEAN:
        return pixels
    return in_bytes(attack(pixels, text, seeded(text, start), ATTACKS | model_attacks(world()[0])))


def _pictures(unit: dict) -> dict:
    start, count, mark = unit["start"], unit["count"], unit["mark"]
    prompts, wanted = zip(*asked(start, count), strict=True)
    noise = noise_of(mark, start, count)
    pixels = draw(prompts, noise, unit["guidance"])
    seen = world()[2](pixels)
    result = {
        "right": {
            name: sum(w[name] == s for w, s in zip(wanted, getattr(seen, name), strict=True)) for name in wanted[0]
        },
        "features": [[round(v, 4) for v in row] for row in seen.features.tolist()],
        "found": {text: look(DETECTORS[mark], attacked(pixels, text, start)) for text in unit["attacks"]},
    }
    if mark == PLAIN:
        result["null"] = [
            float(f"{read(row[None], [key_of('canvas null', start + i, j)])[0].p_value:.6g}")
            for i, row in enumerate(estimate(pixels, STEPS))
            for j in range(NULL_KEYS)
        ]
    if mark == OURS:
        result["agreement"] = {str(steps): share_of_signs(estimate(pixels, steps), noise) for steps in RUNGS}
    return result


def share_of_signs(found: Tensor, noise: Tensor) -> list[float]:
    """Of each picture: in which share of the latent's elements both have one sign."""
    return [round(v, 4) for v in (found.sign() == noise.sign()).float().mean((1, 2, 3)).tolist()]


def _decoder(unit: dict) -> dict:
    """Decoder inversion: does a latent that decodes to the picture invert to better noise than the encoder's?"""
    from ...canvas import DEFAULT_GUIDANCE

    start, count = unit["start"], unit["count"]
    noise = noise_of(OURS, start, count)
    pixels = draw([prompt for prompt, _ in asked(start, count)], noise, DEFAULT_GUIDANCE)
    _, inverter, _ = world()
    latents, mark, result = inverter.encode(list(pixels)), mark_of(OURS), {}
    for name, given in (("encoder", latents), ("decoder", refined(latents, pixels, unit["steps"]))):
        found = without_offset(inverter.invert(given, STEPS))
        said = [mark.find(row[None]) for row in found]
        result[name] = {"p": [one.p_value for one in said], "exact": [one.exact for one in said]}
        result[name]["agreement"] = share_of_signs(found, noise)
    return result


def refined(latents: Tensor, pixels: Tensor, steps: int, rate: float = 0.02) -> Tensor:
    """Adam on |decode(z) - picture|^2 from the encoder's z. Source: Gunn et al. (arXiv 2410.07369), section 4."""
    vae = world()[0].vae
    with torch.enable_grad():
        latents = latents.clone().requires_grad_()
        optimizer = torch.optim.Adam([latents], rate)
        for _ in range(steps):
            drawn = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0] / 2 + 0.5
            (slope,) = torch.autograd.grad((drawn - pixels).square().sum(), latents)
            latents.grad = slope
            optimizer.step()
    return latents.detach()


def _average(unit: dict) -> dict:
    """The averaging attack: what n marked pictures share, against as many plain ones of the same prompts."""
    from ...canvas import DEFAULT_GUIDANCE
    from ...methods.attacks.pictures import average_forgery, average_removal

    mark, n, count, far = unit["mark"], unit["n"], unit["count"], 10_000
    kinds = []
    for name in (mark, PLAIN):
        sets = []
        for start, size in ((far, n), (unit["start"], count)):
            parts = [(i, min(UNIT, start + size - i)) for i in range(start, start + size, UNIT)]
            prompts = [[text for text, _ in asked(*part)] for part in parts]
            drawn = [draw(p, noise_of(name, *part), DEFAULT_GUIDANCE) for p, part in zip(prompts, parts, strict=True)]
            sets.append(torch.cat(drawn))
        kinds.append(sets)
    (marked, own), (clean, others) = kinds
    removed, forged = average_removal(own, marked, clean), average_forgery(others, marked, clean)
    changed = {f"average removal, {n}": removed, f"average forgery, {n}": forged}
    return {"found": {text: look(DETECTORS[mark], in_bytes(pixels)) for text, pixels in changed.items()}}


def _forgery(unit: dict) -> dict:
    """Marks with bound content, stolen for pictures of something else: the verdicts, and what the judge sees."""
    from ...canvas import DEFAULT_GUIDANCE, DEFAULT_STEPS
    from ...pipelines.attacks.pictures import imprint, reprompt, transplant
    from ...pipelines.watermark.content import generate_bound
    from ...pipelines.watermark.inversion import pixels_of

    (pipe, inverter, judge), key = world(), key_of("canvas")
    call = {"num_inference_steps": DEFAULT_STEPS, "guidance_scale": DEFAULT_GUIDANCE}
    result = {"unbound": 0, "draws": [], "verdicts": {}, "shown": {}}
    for i in range(unit["start"], unit["start"] + unit["count"]):
        ((prompt, own),), ((other, wanted),) = asked(i, 1), asked(20_000 + i, 1)
        try:
            bound = generate_bound(pipe, key, prompt, generator=seeded("bound", i), **call)
        except WatermarkError:  # the content changes whenever it is bound
            result["unbound"] += 1
            continue
        result["draws"].append(bound.draws[0])
        pixels = torch.stack(pixels_of(pipe, bound.images))
        cover = draw([other], noise_of(PLAIN, 20_000 + i, 1), DEFAULT_GUIDANCE)
        for text in FORGERIES:
            name, _, strength = text.partition(":")
            generator = seeded("forgery", text, i)
            if name == "reprompt":
                shown = reprompt(pipe, pixels, other, steps=DEFAULT_STEPS, guidance_scale=DEFAULT_GUIDANCE)
            elif name == "transplant":
                shown = transplant(pipe, pixels, cover, float(strength), generator=generator)
            elif name == "imprint":
                shown = imprint(pipe, pixels, cover)
            else:
                shown = attacked(pixels, CLEAN if text == "as drawn" else text, i)
            shown = in_bytes(shown)
            verdict = detect_in(list(shown), inverter, [key], DetectionConfig(ladder=LADDER))[0].verdict
            expected = wanted if name in ("reprompt", "transplant", "imprint") else own
            result["verdicts"].setdefault(text, []).append(verdict)
            result["shown"].setdefault(text, []).append(judge(shown).object[0] == expected["object"])
    return result
