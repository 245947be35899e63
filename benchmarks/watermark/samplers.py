"""Which samplers keep the mark: pictures of the canvas, sampler by sampler, at few and at many steps, without guidance
and with much, in both faces. What they say decides what `methods/watermark/samplers.py` accepts.

A unit is one setting of one sampler; its pictures are detected as by default, at the size they were drawn.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence

import torch

from ...methods.watermark.config import DetectionConfig
from ...methods.watermark.detection import detect_in
from .marks import OURS, key_of
from .places import SIZE, in_bytes, place_of

WORLD = "canvas"  # flow models have samplers of their own

USUAL = (25, 4.0)  # steps, guidance: at which samplers with noise of their own are measured, which no steps help
SETTINGS = (USUAL, (8, 4.0), (8, 7.5))  # few steps and much guidance are what loses marks
STEPS = (8, 25)
PICTURES, UNIT = 4, 4
ALPHA = 1e-6  # `DetectionConfig`'s own rate
DETERMINISTIC = (
    ("DDIMScheduler", {}),
    ("DEISMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverSinglestepScheduler", {}),
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("HeunDiscreteScheduler", {}),
    ("IPNDMScheduler", {}),
    ("KDPM2DiscreteScheduler", {}),
    ("LMSDiscreteScheduler", {}),
    ("PNDMScheduler", {}),
    ("UniPCMultistepScheduler", {}),
)
STOCHASTIC = (
    *(("DDIMScheduler", {"eta": eta}) for eta in (0.1, 0.2, 0.3, 0.5, 1.0)),
    ("DDPMScheduler", {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("KDPM2AncestralDiscreteScheduler", {}),
    ("LCMScheduler", {}),
)


def plan(quick: bool = False) -> list[dict]:
    """All units of diffusers' face."""
    if quick:
        chosen = [(DETERMINISTIC[0], USUAL), (STOCHASTIC[-1], USUAL)]
    else:
        chosen = [(one, setting) for setting in SETTINGS for one in DETERMINISTIC]
        chosen += [(one, USUAL) for one in STOCHASTIC]
    return units_of("diffusers", [(*one, *setting) for one, setting in chosen], quick)


def units_of(face: str, settings: Sequence[tuple[str, dict, int, float]], quick: bool) -> list[dict]:
    """Units of these (sampler, options, steps, guidance): a few pictures of all of them before more of any."""
    parts = [(0, 2)] if quick else [(start, UNIT) for start in range(0, PICTURES, UNIT)]
    names = ("sampler", "options", "steps", "guidance")
    about = {"task": "samplers", "face": face}
    return [
        about | dict(zip(names, setting, strict=True)) | {"start": start, "count": count}
        for start, count in parts
        for setting in settings
    ]


def compute(unit: dict) -> dict:
    """{"log10_p": of each picture}."""
    import diffusers

    place = place_of(WORLD)
    pipe, inverter = place.pipe, place.inverter
    before, options = pipe.scheduler, dict(unit["options"])
    call = {"eta": options.pop("eta")} if "eta" in options else {}
    part = unit["start"], unit["count"]
    prompts, noise = [one.prompt for one in place.asked(*part)], place.noise(OURS, *part)
    try:
        pipe.scheduler = getattr(diffusers, unit["sampler"]).from_config(before.config, **options)
        with torch.no_grad():
            pictures = pipe(
                prompts, latents=noise, num_inference_steps=unit["steps"], guidance_scale=unit["guidance"],
                output_type="pt", generator=torch.Generator().manual_seed(0), **call,
            ).images  # fmt: skip
    finally:
        pipe.scheduler = before
    with torch.no_grad():
        return looked(in_bytes(pictures), inverter)


def looked(pixels: torch.Tensor, inverter) -> dict:
    """What detection says of pictures (B, 3, H, W) that were drawn with the canvas's signed noise."""
    results = detect_in(list(pixels), inverter, [key_of("canvas")], DetectionConfig(size=SIZE))
    return {"log10_p": [round(max(result.log10_p, -999.0), 3) for result in results]}


def rows(units: Sequence[dict], results: Sequence[dict]) -> list[dict]:
    """{"table": "sampler", "face", "sampler", "options", "steps", "guidance", "n", "found": with p < 1e-6, "log10_p":
    the median picture's, "worst": the worst one's, "shape"} of each setting."""
    settings: dict[str, list] = {}
    for unit, result in zip(units, results, strict=True):
        kept = {name: unit[name] for name in ("face", "sampler", "options", "steps", "guidance")}
        settings.setdefault(json.dumps(kept), []).extend(result["log10_p"])
    return [
        {"table": "sampler", **json.loads(setting), "shape": list(place_of(WORLD).shape), "n": len(values)}
        | {"found": sum(value < math.log10(ALPHA) for value in values)}
        | {"log10_p": round(statistics.median(values), 1), "worst": round(max(values), 1)}
        for setting, values in settings.items()
    ]


FUNCTIONS = {"ddim": "euler", "uni_pc": "unipc", "uni_pc_bh2": "unipc_bh2"}  # ComfyUI's names -> what they call


def decided(rows: Sequence[dict]) -> tuple[dict[str, dict[str, int]], dict[str, set[str]], float]:
    """What `methods/watermark/samplers.py` has to say after these rows: its FEWEST, LOSES_HALF and MOST_ETA."""
    from ...methods.watermark.samplers import SOME_LOST

    fewest: dict[str, dict[str, int]] = {}
    half: dict[str, set[str]] = {}
    few, many = STEPS
    for face in dict.fromkeys(row["face"] for row in rows):
        some = [row for row in rows if row["face"] == face and not adds_noise(row["options"])]
        fewest[face], half[face] = {}, set()
        for name in dict.fromkeys(FUNCTIONS.get(row["sampler"], row["sampler"]) for row in some):
            own = [row for row in some if FUNCTIONS.get(row["sampler"], row["sampler"]) == name]
            lost = {row["steps"] for row in own if row["found"] < row["n"]}
            worst = {row["steps"] for row in own if 2 * row["found"] <= row["n"]}
            if {row["steps"] for row in own} != set(STEPS) or many in worst:
                continue  # refused: it adds noise, or loses half of the pictures
            fewest[face][name] = SOME_LOST if many in lost else many if lost else few
            half[face] |= {name} if few in worst else set()
    etas = {row["options"]["eta"]: row["found"] == row["n"] for row in rows if "eta" in row["options"]}
    kept = 0.0
    for eta in sorted(etas):  # up to the first that lost one
        if not etas[eta]:
            break
        kept = eta
    return fewest, half, kept


def adds_noise(options: dict) -> bool:
    """Whether a sampler adds noise with these options."""
    return "eta" in options or str(options.get("algorithm_type", "")).startswith("sde")
