"""What passes safe guidance, and what is lost: hazard rate and benign accuracy of each method on one world.

Every method draws the same prompts from the same noise. A rate has a 95 % interval (Wilson's). The negative prompt is
given the same words as the categories.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ...methods.guidance.config import SafeGuidanceConfig
from ...methods.guidance.nag import NAG
from ...methods.guidance.safree import SAFREE
from ...methods.guidance.sld import SLD
from ...pipelines.guidance.apply import apply_safe_guidance
from ...pipelines.guidance.fit import fit_detectors
from ...pipelines.loaders import load_pipeline
from ...pipelines.membranes.apply import apply_membranes
from ...pipelines.membranes.erase import erase_concepts
from ..store import Store
from ..timing import machine, versions
from .worlds import Asked, Seen, World, world_of

__all__ = ["METHODS", "run"]

BATCH = 8
_NORMAL = 1.959964  # the standard normal's 97.5 % quantile

ALGORITHMS = {
    "SLD weak": (SLD("weak"),),
    "SLD medium": (SLD("medium"),),
    "SLD strong": (SLD("strong"),),
    "SLD strong, dynamic": (SLD("strong", patience=2),),
    "SLD max": (SLD("max"),),
    "SAFREE": (SAFREE(),),
    "SAFREE, every step": (SAFREE(adaptive=False),),
    "AdaVD": ("adavd",),
    "NAG": (NAG(),),
    "SAFREE and SLD strong": (SAFREE(), SLD("strong")),
    "AdaVD and SLD strong": ("adavd", SLD("strong")),
}
METHODS = (
    "untouched",
    "negative prompt",
    *ALGORITHMS,
    "detector pair, SLD max",
    "membranes",
    "membranes and SLD strong",
)


def run(
    world: str = "canvas",
    n: int = 24,
    methods: Sequence[str] = METHODS,
    resume: Path | None = None,
    progress: Callable[[], None] | None = None,
    seed: int = 0,
) -> dict:
    """Draw and judge.

    Args:
        world: of `worlds.WORLDS`. n: prompts of each kind. methods: of `METHODS`. resume: a `Store`'s file.
        progress: called with each batch.

    Returns:
        {"world", "n", "num_inference_steps", "guidance_scale", "rows": [{"method", "kind", "n", "hazard": [rate, low,
        high], "accuracy": [share, low, high] over all aspects}], "machine", "versions"}.
    """
    about = world_of(world)
    asked = about.asked(n, seed)
    store = Store(resume, "guidance", {"world": world, "n": n, "seed": seed})
    pipe = load_pipeline(about.model)
    pipe.set_progress_bar_config(disable=True)
    see, rows = about.judge(), []
    for method in methods:
        seen = store.get(method)
        if seen is None:
            with _working(pipe, about, method) as call:
                seen = [(one.hazard, one.aspects) for one in _drawn(pipe, about, asked, see, call, progress)]
            store.put(method, seen)
        rows += _rows(method, asked, [Seen(*one) for one in seen])
    found = {"world": world, "n": n, "num_inference_steps": about.steps, "guidance_scale": about.guidance_scale}
    about_it = {"machine": machine(pipe.device, pipe.dtype), "versions": versions("torch", "diffusers", "transformers")}
    return found | {"rows": rows} | about_it


@contextlib.contextmanager
def _working(pipe, world: World, method: str) -> Iterator[dict]:
    """The method at work; what the pipeline's call gets besides."""
    words = ", ".join(phrase for category in world.categories for phrase in category.phrases)
    config: Callable = lambda algorithms, **more: SafeGuidanceConfig(world.categories, algorithms, **more)  # noqa: E731
    with contextlib.ExitStack() as stack:
        if method.startswith("membranes"):
            concepts = ["|".join(category.phrases) for category in world.categories]
            stack.enter_context(apply_membranes(pipe, erase_concepts(pipe, concepts)))
            if "SLD" in method:
                stack.enter_context(apply_safe_guidance(pipe, config(SLD("strong"))))
        elif method.startswith("detector pair"):
            pairs = [
                fit_detectors(
                    pipe, one, benign=world.benign(80), steps=world.steps, guidance_scale=world.guidance_scale
                )
                for one in world.categories
            ]
            stack.enter_context(apply_safe_guidance(pipe, config(SLD("max"), detectors=pairs)))
        elif method in ALGORITHMS:
            stack.enter_context(apply_safe_guidance(pipe, config(ALGORITHMS[method])))
        yield {"negative_prompt": words} if method == "negative prompt" else {}


def _drawn(pipe, world: World, asked: Sequence[Asked], see: Callable, call: dict, progress) -> list[Seen]:
    found: list[Seen] = []
    for first in range(0, len(asked), BATCH):
        part = asked[first : first + BATCH]
        more = {name: [value] * len(part) for name, value in call.items()}
        pictures = pipe(
            [one.prompt for one in part],
            num_inference_steps=world.steps,
            guidance_scale=world.guidance_scale,
            generator=[torch.Generator().manual_seed(first + i) for i in range(len(part))],
            **more,
        ).images
        found += see(pictures)
        if progress is not None:
            progress()
    return found


def _rows(method: str, asked: Sequence[Asked], seen: Sequence[Seen]) -> list[dict]:
    rows = []
    for kind in dict.fromkeys(one.kind for one in asked):
        pairs = [(a, s) for a, s in zip(asked, seen, strict=True) if a.kind == kind]
        right = [s.aspects[name] == value for a, s in pairs for name, value in a.expected.items()]
        rows.append(
            {
                "method": method,
                "kind": kind,
                "n": len(pairs),
                "hazard": interval(sum(s.hazard for _, s in pairs), len(pairs)),
                "accuracy": interval(sum(right), len(right)),
            }
        )
    return rows


def interval(hits: int, n: int) -> list[float]:
    """[share, low, high] of Wilson's 95 % interval."""
    share, z2 = hits / n, _NORMAL**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _NORMAL * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return [round(share, 4), round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4)]
