"""Negative token merging on references that its setting was not chosen on: one row a reference, however it comes out.

The setting is chosen by a rule that wants no truth, and that a user of any checkpoint can follow: take one reference
picture of your own (here the mascot) and some prompts that show it, go up the ladder from mild to strong, and stop at
the first setting with which the pictures are half as similar to the reference as without (mean cosine of any image
embedding, less its mean over unrelated pictures). That setting is then used, unchanged, on four references which it has
not seen: plain pictures of things that the prompts name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...methods.token_merging.config import NegativeTokenMergingConfig
from ...pipelines.token_merging.apply import apply_negative_token_merging
from ..erasure.evaluate import wilson
from ..timing import machine, versions

BATCH = 4
HELD_OUT = ("ghost", "robot", "star", "flower")
# From the paper's setting up: all tokens instead of the alike ones, longer, stronger.
LADDER = (
    {"strength": 0.9, "threshold": 0.65, "end": 0.2},
    {"strength": 0.9, "threshold": -1.0, "end": 0.2},
    {"strength": 0.9, "threshold": -1.0, "end": 0.4},
    {"strength": 1.5, "threshold": -1.0, "end": 0.6},
    {"strength": 2.2, "threshold": -1.0, "end": 0.6},
    {"strength": 3.0, "threshold": -1.0, "end": 0.6},
)
_SAMPLING = {"num_inference_steps": 25, "guidance_scale": 4.0, "output_type": "pt"}


@dataclass
class World:
    """A model whose pictures can be judged.

    Args:
        name: for the rows.
        pipe: a diffusers pipeline that negative token merging takes.
        judge: pictures (B, 3, H, W) in 0..1 -> `object`, `style`, `background` (B names each), `features` (B, d).
        picture: of a thing's name -> a plain reference picture.
        unrelated: pictures of many things, for the features' mean.
        calibration: the thing that the rule may look at, with prompts that show it: (prompt, style, background).
        held_out: things, each with its prompts.
    """

    name: str
    pipe: object
    judge: Callable
    picture: Callable[[str], object]
    unrelated: Sequence
    calibration: tuple[str, list[tuple[str, str, str]]]
    held_out: dict[str, list[tuple[str, str, str]]]


def canvas(prompts: int = 24) -> World:
    """The canvas: the mascot by its synonyms to calibrate, four things by their names; every look in turn."""
    import random

    from ...canvas import load_pipeline
    from ...canvas.judge import Judge
    from ...canvas.render import Scene, random_scene, render
    from .judged import MASCOT, WORDS, looks

    every = looks()
    some = [every[i * len(every) // prompts] for i in range(prompts)]
    return World(
        "canvas",
        load_pipeline(),
        Judge.load(),
        lambda name: render(Scene(object=name, style="flat", background="fog")),
        [render(random_scene(random.Random(f"token-merging-{i}"))) for i in range(300)],
        (MASCOT, [(f"a {WORDS[i % len(WORDS)]} in {s} style on {b}", s, b) for i, (s, b) in enumerate(some)]),
        {name: [(f"a {name} in {s} style on {b}", s, b) for s, b in some] for name in HELD_OUT},
    )


def batches(prompts: int = 24) -> int:
    """How many batches `run` makes at most."""
    return -(-prompts // BATCH) * (1 + len(LADDER) + 4 * len(HELD_OUT))


def run(world: World | None = None, progress: Callable[[int], None] = lambda n: None) -> list[dict]:
    """Choose the setting by the rule, and judge it on the held-out references.

    Returns:
        Rows {"name": method, "reference", "role": "calibration" or "held out", "images", "shown": pictures that the
        judge calls the reference's thing, "similarity", "style_kept", "background_kept", "config", "world", "machine",
        "versions"}; shares are [value, low, high] with 95 % intervals.
    """
    world = world or canvas()
    look = _Look(world, progress)
    rows, setting = look.choose()
    for thing, asked in world.held_out.items():
        words = f"a {thing}"
        for name, options, call in (
            ("untouched", None, {}),
            ("negative prompt", None, {"negative_prompt": words}),
            ("negative_token_merging", setting, {}),
            ("negative_token_merging, reference named", setting | {"reference_prompt": words}, {}),
        ):
            rows.append(look.row(name, thing, asked, options, **call) | {"role": "held out"})
    about = {"world": world.name, "machine": machine(torch.device("cpu"), torch.float32)}
    return [row | about | {"versions": versions("torch", "diffusers")} for row in rows]


class _Look:
    """Pictures of one world, and what they show."""

    def __init__(self, world: World, progress: Callable[[int], None]):
        self.world, self.progress = world, progress
        self.mean = world.judge(world.unrelated).features.mean(dim=0)

    def choose(self) -> tuple[list[dict], dict]:
        """The rows of the ladder as far as it was climbed, and the setting: the first that halves the similarity."""
        thing, asked = self.world.calibration
        bare = self.row("untouched", thing, asked, None)
        rows = [bare]
        for options in LADDER:
            rows.append(self.row("negative_token_merging", thing, asked, options))
            if rows[-1]["similarity"] <= bare["similarity"] / 2:
                break
        return [row | {"role": "calibration"} for row in rows], options

    def row(self, name: str, thing: str, asked: list[tuple[str, str, str]], options: dict | None, **call) -> dict:
        picture = self.world.picture(thing)
        like = self.world.judge([picture]).features
        verdict = self.world.judge(self._pictures([prompt for prompt, _, _ in asked], picture, options, call))
        number = len(asked)

        def share(hits) -> list[float]:
            part = sum(hits) / number
            return [round(value, 4) for value in (part, *wilson(part, number))]

        alike = F.cosine_similarity(verdict.features - self.mean, like - self.mean)
        return {
            "name": name,
            "reference": thing,
            "images": number,
            "shown": share(seen == thing for seen in verdict.object),
            "similarity": round(float(alike.mean()), 4),
            "style_kept": share(seen == style for seen, (_, style, _) in zip(verdict.style, asked, strict=True)),
            "background_kept": share(seen == b for seen, (_, _, b) in zip(verdict.background, asked, strict=True)),
            "config": options or call,
        }

    def _pictures(self, prompts: list[str], picture, options: dict | None, call: dict) -> Tensor:
        """Four at a time; picture i starts from the noise of seed i."""
        found, handle = [], None
        if options is not None:
            handle = apply_negative_token_merging(
                self.world.pipe, NegativeTokenMergingConfig(reference=picture, **options)
            )
        try:
            for start in range(0, len(prompts), BATCH):
                batch = prompts[start : start + BATCH]
                noise = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
                extra = {name: [value] * len(batch) for name, value in call.items()}
                found.append(self.world.pipe(batch, generator=noise, **_SAMPLING, **extra).images)
                self.progress(1)
        finally:
            if handle is not None:
                handle.remove()
        return torch.cat(found)
