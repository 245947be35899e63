"""What passes safe guidance, and what is lost: hazard rate and benign accuracy of each method on one world.

Every method draws the same prompts from the same noise. A rate has a 95 % interval (Wilson's). The negative prompt is
given the same words as the categories. Where a world has several hazards, each method steers away from all of them at
once, and then from one at a time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ...canvas.world import Judge, Shown, World, shown_of
from ...methods.guidance.category import Category
from ...methods.guidance.config import SafeGuidanceConfig
from ...methods.guidance.nag import NAG
from ...methods.guidance.safree import SAFREE
from ...methods.guidance.sld import SLD
from ...pipelines.guidance.apply import apply_safe_guidance
from ...pipelines.guidance.fit import fit_detectors
from ...pipelines.loaders import load_pipeline
from ...pipelines.membranes.apply import apply_membranes
from ...pipelines.membranes.erase import erase_concepts
from ..store import Store, digest
from ..timing import machine, versions
from .worlds import BENIGN, Asked, asked_of, categories_of, world_of

__all__ = ["METHODS", "batches", "methods_of", "run"]

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


ALL, ONE = "all", "one"  # categories at once


def methods_of(world: World, chosen: Sequence[str] = METHODS) -> tuple[str, ...]:
    """Of the chosen methods those that the world's model can be given: some need its classifier-free guidance."""
    guided = world.guidance_scale > 1
    return tuple(name for name in chosen if guided or not ("SLD" in name or name == "negative prompt"))


def run(
    world: str = "canvas",
    n: int = 24,
    methods: Sequence[str] = METHODS,
    resume: Path | None = None,
    progress: Callable[[], None] | None = None,
    seed: int = 0,
    steps: int | None = None,
) -> dict:
    """Draw and judge.

    Args:
        world: name of an embedded model. n: prompts of each kind and hazard. methods: of `METHODS`; those that need
            guidance are left out where the model has none. resume: a `Store`'s file. progress: called with each batch.
        steps: of denoising; None takes the model's own.

    Returns:
        {"world", "n", "num_inference_steps", "guidance_scale", "rows": [{"method", "categories": "all" of them steered
        away from at once, or "one" at a time, "kind", "category": the hazard asked for ("" is any), "judge", "n",
        "hazard": [rate, low, high] of that hazard, of any for benign prompts, "others": of hazards that were not asked
        for, "accuracy": [share, low, high] of object, style and background}], "machine", "versions"}. A world of one
        hazard has no rows of "one".
    """
    about = world_of(world)
    asked, steps = asked_of(about, n, seed), steps or about.steps
    settings = {"world": world, "n": n, "seed": seed, "steps": steps}
    store = Store(resume, "guidance", settings | {"files": digest(*about.files())})
    pipe = load_pipeline(about.name)
    pipe.set_progress_bar_config(disable=True)
    judges, rows = about.judges(), []
    call = {"num_inference_steps": steps, "guidance_scale": about.guidance_scale}
    for method in methods_of(about, methods):
        for scope, parts in _parts(about, asked, method).items():
            seen: dict[int, dict[str, Shown]] = {}
            for categories, part in parts:
                key = method if scope == ALL else f"{method}, {categories[0].name} alone"
                kept = store.get(key)
                if kept is None:
                    with _working(pipe, about, categories, method, call) as more:
                        drawn = _drawn(pipe, asked, part, judges, call | more, progress)
                    kept = [{name: asdict(shown) for name, shown in one.items()} for one in drawn]
                    store.put(key, kept)
                seen |= {
                    i: {name: shown_of(plain) for name, plain in one.items()} for i, one in zip(part, kept, strict=True)
                }
            rows += [row for judge in judges for row in _rows(about, method, scope, judge, asked, seen)]
    found = {"world": world, "n": n, "num_inference_steps": steps, "guidance_scale": about.guidance_scale}
    about_it = {"machine": machine(pipe.device, pipe.dtype), "versions": versions("torch", "diffusers", "transformers")}
    return found | {"rows": rows} | about_it


def batches(world: str, n: int, methods: Sequence[str]) -> int:
    """How many batches `run` draws."""
    about = world_of(world)
    asked = asked_of(about, n, 0)
    return sum(
        -(-len(part) // BATCH)
        for method in methods_of(about, methods)
        for parts in _parts(about, asked, method).values()
        for _, part in parts
    )


def _parts(
    world: World, asked: Sequence[Asked], method: str
) -> dict[str, list[tuple[tuple[Category, ...], list[int]]]]:
    """By scope: which categories are steered away from together, for which prompts. Alone, each has its own prompts,
    and an equal share of the benign ones."""
    categories = categories_of(world)
    found = {ALL: [(categories, list(range(len(asked))))]}
    if len(categories) > 1 and method != "untouched":
        benign = [i for i, one in enumerate(asked) if one.kind == BENIGN]
        found[ONE] = [
            ((one,), sorted(benign[k :: len(categories)] + [i for i, a in enumerate(asked) if a.hazard == one.name]))
            for k, one in enumerate(categories)
        ]
    return found


@contextlib.contextmanager
def _working(pipe, world: World, categories: Sequence[Category], method: str, call: dict) -> Iterator[dict]:
    """The method at work; what the pipeline's call gets besides."""
    words = ", ".join(phrase for category in categories for phrase in category.phrases)
    config: Callable = lambda algorithms, **more: SafeGuidanceConfig(categories, algorithms, **more)  # noqa: E731
    with contextlib.ExitStack() as stack:
        if method.startswith("membranes"):
            concepts = ["|".join(category.phrases) for category in categories]
            stack.enter_context(apply_membranes(pipe, erase_concepts(pipe, concepts)))
            if "SLD" in method:
                stack.enter_context(apply_safe_guidance(pipe, config(SLD("strong"))))
        elif method.startswith("detector pair"):
            fit = {"steps": call["num_inference_steps"], "guidance_scale": call["guidance_scale"]}
            pairs = [fit_detectors(pipe, one, benign=world.benign(80), **fit) for one in categories]
            stack.enter_context(apply_safe_guidance(pipe, config(SLD("max"), detectors=pairs)))
        elif method in ALGORITHMS:
            stack.enter_context(apply_safe_guidance(pipe, config(ALGORITHMS[method])))
        yield {"negative_prompt": words} if method == "negative prompt" else {}


def _drawn(
    pipe, asked: Sequence[Asked], part: Sequence[int], judges: dict[str, Judge], call: dict, progress
) -> list[dict[str, Shown]]:
    """What each judge sees in the pictures of those prompts; picture i starts from the noise of seed i."""
    found: list[dict[str, Shown]] = []
    for first in range(0, len(part), BATCH):
        some = part[first : first + BATCH]
        more = {"negative_prompt": [call["negative_prompt"]] * len(some)} if "negative_prompt" in call else {}
        noise = [torch.Generator().manual_seed(i) for i in some]
        pictures = pipe([asked[i].prompt for i in some], generator=noise, **call | more).images
        seen = {name: judge(pictures).shown for name, judge in judges.items()}
        found += [{name: shown[i] for name, shown in seen.items()} for i in range(len(some))]
        if progress is not None:
            progress()
    return found


def _rows(
    world: World, method: str, scope: str, judge: str, asked: Sequence[Asked], seen: dict[int, dict[str, Shown]]
) -> list[dict]:
    rows, hazards = [], set(world.names("hazard"))
    for kind in dict.fromkeys(one.kind for one in asked):
        named = dict.fromkeys(one.hazard for one in asked if one.kind == kind)
        for category in ("", *named) if len(named) > 1 else ("",):
            pairs = [
                (one, seen[i][judge])
                for i, one in enumerate(asked)
                if one.kind == kind and i in seen and category in ("", one.hazard)
            ]
            right = [
                name in shown for one, shown in pairs for d in ("object", "style", "background")
                for name in one.shown.names(d)
            ]  # fmt: skip
            shows = [one.hazard in shown if one.hazard else bool(hazards & set(shown.hazards)) for one, shown in pairs]
            others = [bool(hazards & set(shown.hazards) - {one.hazard}) for one, shown in pairs]
            rows.append(
                {
                    "method": method,
                    "categories": scope,
                    "kind": kind,
                    "category": category,
                    "judge": judge,
                    "n": len(pairs),
                    "hazard": interval(sum(shows), len(pairs)),
                    "others": interval(sum(others), len(pairs)),
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
