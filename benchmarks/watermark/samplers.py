"""Which samplers keep the mark: pictures of the canvas, sampler by sampler, at few and at many steps, without guidance
and with much, in both faces. What they say decides what `methods/watermark/samplers.py` accepts.

A unit is one setting of one sampler; its pictures are detected as by default, at the size they were drawn.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from ...methods.watermark.detection import DetectionConfig, detect_in
from .canvas import SHAPE, SIZE, asked, in_bytes, noise_of, world
from .marks import OURS, key_of

STEPS, GUIDANCES = (8, 25), (1.0, 4.0, 7.5)
USUAL = (25, 4.0)  # at which samplers with noise of their own are measured, which no number of steps helps
PICTURES = 8
ALPHA = 1e-6  # `DetectionConfig`'s own rate
DETERMINISTIC = (
    ("DDIMScheduler", {}),
    ("DEISMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}),
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
    found = []
    for name, options in DETERMINISTIC[:1] if quick else DETERMINISTIC:
        settings = [USUAL] if quick else [(steps, cfg) for steps in STEPS for cfg in GUIDANCES]
        found += [_unit(name, options, *one, 2 if quick else PICTURES) for one in settings]
    found += [
        _unit(name, options, *USUAL, 2 if quick else PICTURES) for name, options in STOCHASTIC[-1 if quick else 0 :]
    ]
    return found


def _unit(sampler: str, options: dict, steps: int, guidance: float, count: int) -> dict:
    about = {"task": "sampler", "face": "diffusers", "sampler": sampler, "options": options}
    return about | {"steps": steps, "guidance": guidance, "count": count}


def compute(unit: dict) -> dict:
    """{"log10_p": of each picture}."""
    import diffusers

    pipe, inverter, _ = world()
    before, options = pipe.scheduler, dict(unit["options"])
    call = {"eta": options.pop("eta")} if "eta" in options else {}
    prompts, noise = [text for text, _ in asked(0, unit["count"])], noise_of(OURS, 0, unit["count"])
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
    the median picture's, "worst": the worst one's} of each unit."""
    found = []
    for unit, result in zip(units, results, strict=True):
        values = result["log10_p"]
        kept = {name: unit[name] for name in ("face", "sampler", "options", "steps", "guidance")}
        seen = {"n": len(values), "found": sum(value < -6 for value in values)}  # log10 of ALPHA
        seen |= {"log10_p": round(statistics.median(values), 1), "worst": round(max(values), 1), "shape": list(SHAPE)}
        found.append({"table": "sampler", **kept, **seen})
    return found
