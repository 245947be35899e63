"""What safe guidance costs a run and a step, as a ratio to the bare pipeline in the same process.

A bare run stands before and after each variant, and the ratio is taken to their mean. Beside the time, which a busy
machine spoils, stand two counts that are the same everywhere: rows of the denoiser, and floating point operations of
its and the text encoders' products.
"""

from __future__ import annotations

import contextlib
import statistics
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ...methods.guidance.category import Category
from ...methods.guidance.config import SafeGuidanceConfig
from ...methods.guidance.nag import NAG
from ...methods.guidance.sld import SLD
from ...pipelines.family import denoiser_of
from ...pipelines.guidance.apply import apply_safe_guidance
from ...pipelines.guidance.fit import fit_detectors
from ...pipelines.loaders import load_pipeline
from ..timing import machine, ratio_row, run_seconds, versions
from .worlds import world_of

__all__ = ["run"]

BATCH = 4
_GUIDED, _ALONE = {"guidance_scale": 4.0}, {"guidance_scale": 1.0}


def run(model="canvas", quick: bool = False) -> list[dict]:
    """Time benign prompts.

    Args:
        model: "canvas", a folder, a hub id, a .safetensors file, or a loaded pipeline. quick: fewer rounds and steps.

    Returns:
        Rows {"name", "k": categories, "ratio": of whole runs, "spread", "rounds", "step": ratio of what follows the
        first step, in which text is read, "rows", "operations": ratios of the counts, "ms": of the bare run,
        "baseline", "model", "machine", "versions"}. "nag, no guidance" and "guidance" are ratios to a bare run without
        guidance.
    """
    pipe = load_pipeline(model) if isinstance(model, (str, Path)) else model
    pipe.set_progress_bar_config(disable=True)
    rounds, steps = (2, 4) if quick else (9, 25)
    # 49 pictures are the fewest that can tell one in fifty; the short version has 40
    one = (Category("hazard", ("a hazard mark",), false_alarms=0.1 if quick else 0.02),)
    three = (*one, Category("gloom", ("a dark place",)), Category("noise", ("a loud thing",)))
    prompts = world_of(getattr(pipe, "semiperm_canvas", "canvas")).benign(84)  # others are asked by the canvas's words
    benign, fitted = prompts[-BATCH:], prompts[:40] if quick else prompts[:-BATCH]
    pair = fit_detectors(pipe, one[0], benign=fitted, steps=4, guidance_scale=4.0)
    cases: dict[str, tuple[tuple[Category, ...], dict, dict, dict]] = {
        "sld": (one, {"algorithms": SLD("strong")}, _GUIDED, _GUIDED),
        "sld, 3 categories": (three, {"algorithms": SLD("strong")}, _GUIDED, _GUIDED),
        "sld, dynamic": (one, {"algorithms": SLD("strong", patience=2)}, _GUIDED, _GUIDED),
        "safree": (one, {"algorithms": "safree"}, _GUIDED, _GUIDED),
        "adavd": (one, {"algorithms": "adavd"}, _GUIDED, _GUIDED),
        "nag": (one, {"algorithms": NAG()}, _GUIDED, _GUIDED),
        "detector pair and sld": (one, {"algorithms": SLD("strong"), "detectors": [pair]}, _GUIDED, _GUIDED),
        "nag, no guidance": (one, {"algorithms": NAG()}, _ALONE, _ALONE),
        "guidance": ((), {}, _GUIDED, _ALONE),
    }
    rows = []
    for name, (categories, settings, call, bare) in cases.items():
        seconds, ratios, steps_alone = [], [], []

        def guided(seconds_of=_seconds):
            config = SafeGuidanceConfig(categories, **settings) if categories else None  # noqa: B023
            with contextlib.nullcontext() if config is None else apply_safe_guidance(pipe, config):
                return seconds_of(pipe, benign, steps, call)  # noqa: B023

        for _ in range(rounds):
            before, took, after = _seconds(pipe, benign, steps, bare), guided(), _seconds(pipe, benign, steps, bare)
            seconds.append((before[0] + after[0]) / 2)
            ratios.append(took[0] / seconds[-1])
            steps_alone.append(2 * took[1] / (before[1] + after[1]))
        counts = [a / b for a, b in zip(guided(_counts), _counts(pipe, benign, steps, bare), strict=True)]
        denoiser, _ = denoiser_of(pipe)
        about = {"baseline": "bare pipeline" if bare is _GUIDED else "bare pipeline, no guidance", "steps": steps}
        about |= {"step": round(statistics.median(steps_alone), 4)}
        about |= dict(zip(("rows", "operations"), (round(count, 4) for count in counts), strict=True))
        about |= {"machine": machine(denoiser.device, denoiser.dtype), "versions": versions("torch", "diffusers")}
        rows.append(ratio_row(name, len(categories), ratios, sorted(seconds)[len(seconds) // 2], **about))
    return rows


def _seconds(pipe, prompts: list[str], steps: int, call: dict) -> tuple[float, float]:
    """(of the run, of its steps after the first)."""
    return run_seconds(lambda ended: _draw(pipe, prompts, steps, call, callback_on_step_end=ended), pipe.device)


def _counts(pipe, prompts: list[str], steps: int, call: dict) -> tuple[int, int]:
    """(rows that the denoiser was given, floating point operations of a run)."""
    denoiser, _ = denoiser_of(pipe)
    rows = []
    first = next(module for module in denoiser.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))
    hook = first.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    try:
        with FlopCounterMode(display=False) as counter:
            _draw(pipe, prompts, steps, call)
    finally:
        hook.remove()
    return sum(rows), counter.get_total_flops()


def _draw(pipe, prompts: list[str], steps: int, call: dict, **more) -> None:
    generators: list = [torch.Generator().manual_seed(i) for i in range(BATCH)]
    pipe(prompts, num_inference_steps=steps, generator=generators, output_type="latent", **call, **more)
