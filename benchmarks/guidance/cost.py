"""What safe guidance costs a whole run, as a ratio to the bare pipeline in the same process.

A bare run stands before and after each variant, and the ratio is taken to their mean.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import torch

from ...methods.guidance.category import Category
from ...methods.guidance.config import SafeGuidanceConfig
from ...methods.guidance.nag import NAG
from ...methods.guidance.sld import SLD
from ...pipelines.family import denoiser_of
from ...pipelines.guidance.apply import apply_safe_guidance
from ...pipelines.guidance.fit import fit_detectors
from ...pipelines.loaders import load_pipeline
from ..timing import machine, ratio_row, versions
from .worlds import world_of

__all__ = ["run"]

BATCH = 4
_GUIDED, _ALONE = {"guidance_scale": 4.0}, {"guidance_scale": 1.0}


def run(model="canvas", quick: bool = False) -> list[dict]:
    """Time benign prompts.

    Args:
        model: "canvas", a folder, a hub id, a .safetensors file, or a loaded pipeline. quick: fewer rounds and steps.

    Returns:
        Rows {"name", "k": categories, "ratio", "spread", "rounds", "ms": of the bare run, "baseline", "model",
        "machine", "versions"}. "nag, no guidance" and "guidance" are ratios to a bare run without guidance.
    """
    pipe = load_pipeline(model) if isinstance(model, (str, Path)) else model
    pipe.set_progress_bar_config(disable=True)
    rounds, steps = (2, 4) if quick else (9, 25)
    one = (Category("hazard", ("a hazard mark",), false_alarms=0.1),)
    three = (*one, Category("gloom", ("a dark place",)), Category("noise", ("a loud thing",)))
    benign = world_of("canvas").benign(80)
    pair = fit_detectors(pipe, one[0], benign=benign[:40] if quick else benign, steps=4, guidance_scale=4.0)
    cases: dict[str, tuple[tuple[Category, ...], dict, dict, dict]] = {
        "sld": (one, {"algorithms": SLD("strong")}, _GUIDED, _GUIDED),
        "sld, 3 categories": (three, {"algorithms": SLD("strong")}, _GUIDED, _GUIDED),
        "sld, dynamic": (one, {"algorithms": SLD("strong", patience=1)}, _GUIDED, _GUIDED),
        "safree": (one, {"algorithms": "safree"}, _GUIDED, _GUIDED),
        "adavd": (one, {"algorithms": "adavd"}, _GUIDED, _GUIDED),
        "nag": (one, {"algorithms": NAG()}, _GUIDED, _GUIDED),
        "detector pair and sld": (one, {"algorithms": SLD("strong"), "detectors": [pair]}, _GUIDED, _GUIDED),
        "nag, no guidance": (one, {"algorithms": NAG()}, _ALONE, _ALONE),
        "guidance": ((), {}, _GUIDED, _ALONE),
    }
    rows = []
    for name, (categories, settings, call, bare) in cases.items():
        seconds, ratios = [], []
        for _ in range(rounds):
            before = _seconds(pipe, benign, steps, bare)
            config = SafeGuidanceConfig(categories, **settings) if categories else None
            with contextlib.nullcontext() if config is None else apply_safe_guidance(pipe, config):
                took = _seconds(pipe, benign, steps, call)
            after = _seconds(pipe, benign, steps, bare)
            seconds.append((before + after) / 2)
            ratios.append(took / seconds[-1])
        denoiser, _ = denoiser_of(pipe)
        about = {"baseline": "bare pipeline" if bare is _GUIDED else "bare pipeline, no guidance", "steps": steps}
        about |= {"machine": machine(denoiser.device, denoiser.dtype), "versions": versions("torch", "diffusers")}
        rows.append(ratio_row(name, len(categories), ratios, sorted(seconds)[len(seconds) // 2], **about))
    return rows


def _seconds(pipe, prompts: list[str], steps: int, call: dict) -> float:
    generators: list = [torch.Generator().manual_seed(i) for i in range(BATCH)]
    if pipe.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    pipe(prompts[:BATCH], num_inference_steps=steps, generator=generators, output_type="latent", **call)
    if pipe.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
