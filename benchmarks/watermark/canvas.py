"""The watermark on an embedded model's pictures: found, attacked, judged and forged, other marks beside it.

All marks get the same prompts, sampler, attacks and noise estimates. Detection is at a p-value, never at a threshold
fitted to pictures: those of all marks are exact under their random key. Pictures are rounded to bytes when drawn and
after each attack, as files are. Units as in statistics.py, each naming its model; each draws its own pictures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...canvas.editions import world_of
from ...methods.attacks.pictures import SUITE
from ...methods.errors import WatermarkError
from ...methods.watermark.config import DetectionConfig
from ...methods.watermark.detection import detect_in
from ...methods.watermark.mark import read
from ...methods.watermark.statistics import without_offset
from .marks import CODE, OURS, RINGS, SHADING, SOFT, TREE, key_of, seeded
from .places import CLEAN, FIXED, LADDER, PLAIN, SEARCHING, STEPS, TREE_ALL, Place, in_bytes, place_of

# who draws -> who looks
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
RUNGS = (0, 1, 5, 10)
ALL = (*SUITE, "vae-reencode", "regenerate:0.14", "regenerate:0.3")
QUICK = (CLEAN, "jpeg:50", "noise:0.05", "flip")
GUIDANCES = (1.0, 2.5, 5.0, 7.5)
SHARE = {PLAIN: 1, OURS: 1, SEARCHING: 4}  # of the pictures, 1 in so many; 1 in 2 of the others
GENUINE = ("as drawn", "jpeg:50")
FORGERIES = (*GENUINE, "reprompt", "transplant:0.5", "transplant:0.7", "imprint")
NULL_KEYS = 50  # that each plain picture is read with
UNIT = 8


def plan(quick: bool, name: str = "canvas") -> list[dict]:
    """All units on a model's pictures."""
    own = world_of(name).guidance_scale

    def cut(count: int, size: int = UNIT, **about) -> list[dict]:
        about = {"world": name} | about
        return [about | {"start": start, "count": min(size, count - start)} for start in range(0, count, size)]

    units = []
    for mark in (PLAIN, OURS, SEARCHING, SHADING, TREE) if quick else DETECTORS:
        pictures = (8 if quick else 48) // SHARE.get(mark, 2)
        about = {"task": "pictures", "mark": mark, "guidance": own}
        attacks = list(QUICK if quick else ALL) if mark != PLAIN else []
        size = 2 if mark == SEARCHING else 4 if quick else UNIT  # a search takes seconds a picture
        units += cut(pictures, size, **about, attacks=attacks)
        if not quick and mark in (PLAIN, OURS):  # as drawn alone, so that figures near 1 say something
            more = cut(128, UNIT, **about, attacks=attacks[:1])
            units += [unit for unit in more if unit["start"] >= pictures]
    for guidance in GUIDANCES[: 1 if quick else None] if own > 1 else ():
        units += cut(4 if quick else 24, 4, task="pictures", mark=OURS, guidance=guidance, attacks=[CLEAN])
    forged = 2 if quick else 32
    units += cut(forged, 2, task="forgery", attacks=list(FORGERIES))
    if not quick:
        genuine = cut(128, 4, task="forgery", attacks=list(GENUINE))  # false alarms are rare: more of them
        units += [unit for unit in genuine if unit["start"] >= forged]
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
    tasks = {"pictures": _pictures, "forgery": _forgery, "decoder": _decoder, "average": _average}
    with torch.no_grad():
        return tasks[unit["task"]](unit, place_of(unit["world"]))


def _pictures(unit: dict, place: Place) -> dict:
    start, count, mark = unit["start"], unit["count"], unit["mark"]
    asked, noise = place.asked(start, count), place.noise(mark, start, count)
    pixels = place.draw([one.prompt for one in asked], noise, unit["guidance"])
    seen = place.judge(pixels)
    pairs = [(one.shown, shown) for one, shown in zip(asked, seen.shown, strict=True)]
    result = {
        "right": {
            domain: sum(all(name in shown for name in wanted.names(domain)) for wanted, shown in pairs)
            for domain in ("object", "style", "background")
        },
        "features": [[round(v, 4) for v in row] for row in seen.features.tolist()],
        "found": {text: place.look(DETECTORS[mark], place.attacked(pixels, text, start)) for text in unit["attacks"]},
    }
    if mark == PLAIN:
        result["null"] = [
            float(f"{read(row[None], [key_of('canvas null', start + i, j)])[0].p_value:.6g}")
            for i, row in enumerate(place.estimate(pixels, STEPS))
            for j in range(NULL_KEYS)
        ]
    if mark == OURS:
        result["agreement"] = {str(steps): share_of_signs(place.estimate(pixels, steps), noise) for steps in RUNGS}
    return result


def share_of_signs(found: Tensor, noise: Tensor) -> list[float]:
    """Of each picture: in which share of the latent's elements both have one sign."""
    return [round(v, 4) for v in (found.sign() == noise.sign()).float().mean((1, 2, 3)).tolist()]


def _decoder(unit: dict, place: Place) -> dict:
    """Decoder inversion: does a latent that decodes to the picture invert to better noise than the encoder's?"""
    start, count = unit["start"], unit["count"]
    noise = place.noise(OURS, start, count)
    pixels = place.draw([one.prompt for one in place.asked(start, count)], noise)
    latents, mark, result = place.inverter.encode(list(pixels)), place.mark(OURS), {}
    for name, given in (("encoder", latents), ("decoder", refined(place.pipe.vae, latents, pixels, unit["steps"]))):
        found = without_offset(place.inverter.invert(given, STEPS))
        said = [mark.find(row[None]) for row in found]
        result[name] = {"p": [one.p_value for one in said], "exact": [one.exact for one in said]}
        result[name]["agreement"] = share_of_signs(found, noise)
    return result


def refined(vae, latents: Tensor, pixels: Tensor, steps: int, rate: float = 0.02) -> Tensor:
    """Adam on |decode(z) - picture|^2 from the encoder's z. Source: Gunn et al. (arXiv 2410.07369), section 4."""
    shift = vae.config.get("shift_factor") or 0.0
    with torch.enable_grad():
        latents = latents.clone().requires_grad_()
        optimizer = torch.optim.Adam([latents], rate)
        for _ in range(steps):
            drawn = vae.decode(latents / vae.config.scaling_factor + shift, return_dict=False)[0] / 2 + 0.5
            (slope,) = torch.autograd.grad((drawn - pixels).square().sum(), latents)
            latents.grad = slope
            optimizer.step()
    return latents.detach()


def _average(unit: dict, place: Place) -> dict:
    """The averaging attack: what n marked pictures share, against as many plain ones of the same prompts."""
    from ...methods.attacks.pictures import average_forgery, average_removal

    mark, n, count, far = unit["mark"], unit["n"], unit["count"], 10_000
    kinds = []
    for name in (mark, PLAIN):
        sets = []
        for start, size in ((far, n), (unit["start"], count)):
            parts = [(i, min(UNIT, start + size - i)) for i in range(start, start + size, UNIT)]
            prompts = [[one.prompt for one in place.asked(*part)] for part in parts]
            drawn = [place.draw(p, place.noise(name, *part)) for p, part in zip(prompts, parts, strict=True)]
            sets.append(torch.cat(drawn))
        kinds.append(sets)
    (marked, own), (clean, others) = kinds
    removed, forged = average_removal(own, marked, clean), average_forgery(others, marked, clean)
    changed = {f"average removal, {n}": removed, f"average forgery, {n}": forged}
    return {"found": {text: place.look(DETECTORS[mark], in_bytes(pixels)) for text, pixels in changed.items()}}


def _forgery(unit: dict, place: Place) -> dict:
    """Marks with bound content, stolen for pictures of something else: the verdicts, and what the judge sees."""
    from ...pipelines.attacks.pictures import imprint, reprompt, transplant
    from ...pipelines.watermark.content import generate_bound
    from ...pipelines.watermark.inversion import pixels_of

    pipe, world, key = place.pipe, place.world, key_of("canvas")
    call = {"num_inference_steps": world.steps, "guidance_scale": world.guidance_scale}
    result = {"unbound": 0, "draws": [], "verdicts": {}, "shown": {}}
    for i in range(unit["start"], unit["start"] + unit["count"]):
        (own,), (wanted,) = place.asked(i, 1), place.asked(20_000 + i, 1)
        try:
            bound = generate_bound(pipe, key, own.prompt, generator=seeded("bound", i), **call)
        except WatermarkError:  # the content changes whenever it is bound
            result["unbound"] += 1
            continue
        result["draws"].append(bound.draws[0])
        pixels = torch.stack(pixels_of(pipe, bound.images))
        cover = None  # what forgers put the mark on; genuine pictures need none
        if set(unit["attacks"]) - set(GENUINE):
            cover = place.draw([wanted.prompt], place.noise(PLAIN, 20_000 + i, 1))
        for text in unit["attacks"]:
            name, _, strength = text.partition(":")
            generator = seeded("forgery", text, i)
            if name == "reprompt":
                shown = reprompt(pipe, pixels, wanted.prompt, steps=world.steps, guidance_scale=world.guidance_scale)
            elif name == "transplant":
                shown = transplant(pipe, pixels, cover, float(strength), generator=generator)
            elif name == "imprint":
                shown = imprint(pipe, pixels, cover)
            else:
                shown = place.attacked(pixels, CLEAN if text == "as drawn" else text, i)
            shown = in_bytes(shown)
            config = DetectionConfig(ladder=LADDER, **place.channels)
            verdict = detect_in(list(shown), place.inverter, [key], config)[0].verdict
            expected = own if text in GENUINE else wanted
            result["verdicts"].setdefault(text, []).append(verdict)
            result["shown"].setdefault(text, []).append(expected.shown.objects[0] in place.judge(shown).shown[0])
    return result
