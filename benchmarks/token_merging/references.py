"""Negative token merging on references that its setting was not chosen on: one row a reference, however it comes out.

The setting is chosen by a rule that wants no truth, and that a user of any checkpoint can follow: take one reference
picture of your own (here the mascot) and some prompts that show it, go up the ladder from mild to strong, and stop at
the first setting with which the pictures are half as similar to the reference as without (mean cosine of any image
embedding, less its mean over unrelated pictures). That setting is then used, unchanged, on four references which it has
not seen: plain pictures of things that the prompts name.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...canvas.editions import world_of
from ...canvas.world import Shown, World
from ...methods.token_merging.config import NegativeTokenMergingConfig
from ...pipelines.loaders import load_pipeline
from ...pipelines.token_merging.apply import apply_negative_token_merging
from ..erasure.scores import wilson
from ..timing import machine, versions

BATCH = 4
MASCOT, HELD_OUT = "quibble", ("ghost", "robot", "star", "flower")
UNRELATED = 300  # drawn scenes, for the mean of the features
# From the paper's setting up: all tokens instead of the alike ones, longer, stronger.
LADDER = (
    {"strength": 0.9, "threshold": 0.65, "end": 0.2},
    {"strength": 0.9, "threshold": -1.0, "end": 0.2},
    {"strength": 0.9, "threshold": -1.0, "end": 0.4},
    {"strength": 1.5, "threshold": -1.0, "end": 0.6},
    {"strength": 2.2, "threshold": -1.0, "end": 0.6},
    {"strength": 3.0, "threshold": -1.0, "end": 0.6},
)


Prompts = list[tuple[str, str, str]]  # (prompt, style, background)


def asked_of(world: World, prompts: int = 24) -> tuple[Prompts, dict[str, Prompts]]:
    """The mascot by its synonyms to calibrate, and four things by their names; every look in turn."""
    every = list(itertools.product(world.names("style"), world.names("background")))
    some = [every[i * len(every) // prompts] for i in range(prompts)]
    synonyms = world.phrases(MASCOT)[1:]
    mascot = [(f"a {synonyms[i % len(synonyms)]} in {s} style on {b}", s, b) for i, (s, b) in enumerate(some)]
    return mascot, {name: [(f"{world.mention(name)} in {s} style on {b}", s, b) for s, b in some] for name in HELD_OUT}


def batches(prompts: int = 24) -> int:
    """How many batches `run` makes at most."""
    return -(-prompts // BATCH) * (1 + len(LADDER) + 4 * len(HELD_OUT))


def run(
    name: str = "canvas",
    prompts: int = 24,
    steps: int | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> list[dict]:
    """Choose the setting by the rule, and judge it on the held-out references.

    Args:
        name: of an embedded model. prompts: of each reference. steps: of denoising; None takes the model's own.
        progress: called with 1 after every batch of pictures.

    Returns:
        Rows {"name": method, "reference", "role": "calibration" or "held out", "judge", "images", "shown": pictures in
        which the judge sees the reference's thing, "similarity", "style_kept", "background_kept", "config", "world",
        "steps", "guidance_scale", "machine", "versions"}; shares are [value, low, high] with 95 % intervals. Without
        guidance there is no negative prompt beside it.
    """
    world = world_of(name)
    look = _Look(world, steps or world.steps, progress)
    calibration, held_out = asked_of(world, prompts)
    rows, setting = look.choose(calibration)
    for thing, asked in held_out.items():
        words = world.mention(thing)
        for method, options, call in (
            ("untouched", None, {}),
            ("negative prompt", None, {"negative_prompt": words}),
            ("negative_token_merging", setting, {}),
            ("negative_token_merging, reference named", setting | {"reference_prompt": words}, {}),
        ):
            if call and world.guidance_scale <= 1:
                continue
            rows += [row | {"role": "held out"} for row in look.rows(method, thing, asked, options, **call)]
    about = {"world": world.name, "steps": look.sampling["num_inference_steps"]}
    about |= {"guidance_scale": world.guidance_scale, "machine": machine(look.pipe.device, look.pipe.dtype)}
    return [row | about | {"versions": versions("torch", "diffusers")} for row in rows]


class _Look:
    """Pictures of one world, and what its judges see in them."""

    def __init__(self, world: World, steps: int, progress: Callable[[int], None]):
        self.world, self.pipe, self.progress = world, load_pipeline(world.name), progress
        self.pipe.set_progress_bar_config(disable=True)
        guidance = {"guidance_scale": world.guidance_scale}
        self.sampling = {"num_inference_steps": steps, "output_type": "pt", **guidance}
        scenes = [world.draw(world.anything(random.Random(f"token-merging-{i}"))) for i in range(UNRELATED)]
        self.judges = world.judges()
        self.means = {name: judge(scenes).features.mean(dim=0) for name, judge in self.judges.items()}

    def choose(self, asked: Prompts) -> tuple[list[dict], dict]:
        """The rows of the ladder as far as it was climbed, and the setting: the first that halves the similarity, as
        the first judge's features have it."""
        bare = self.rows("untouched", MASCOT, asked, None)
        found = list(bare)
        for options in LADDER:
            some = self.rows("negative_token_merging", MASCOT, asked, options)
            found += some
            if some[0]["similarity"] <= bare[0]["similarity"] / 2:
                break
        return [row | {"role": "calibration"} for row in found], options

    def rows(self, name: str, thing: str, asked: Prompts, options: dict | None, **call) -> list[dict]:
        """A row for each judge."""
        picture = self.world.draw(self.world.plain(thing))
        drawn = self._pictures([prompt for prompt, _, _ in asked], picture, options, call)
        found = []
        for which, judge in self.judges.items():
            sight, mean = judge(drawn), self.means[which]
            alike = F.cosine_similarity(sight.features - mean, judge([picture]).features - mean)
            found.append(
                {
                    "name": name,
                    "reference": thing,
                    "judge": which,
                    "images": len(asked),
                    "shown": _share([thing in shown for shown in sight.shown]),
                    "similarity": round(float(alike.mean()), 4),
                    **_kept(asked, sight.shown),
                    "config": options or call,
                }
            )
        return found

    def _pictures(self, prompts: list[str], picture, options: dict | None, call: dict) -> Tensor:
        """Four at a time; picture i starts from the noise of seed i."""
        found, handle = [], None
        if options is not None:
            handle = apply_negative_token_merging(self.pipe, NegativeTokenMergingConfig(reference=picture, **options))
        try:
            for start in range(0, len(prompts), BATCH):
                batch = prompts[start : start + BATCH]
                noise = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
                extra = {name: [value] * len(batch) for name, value in call.items()}
                found.append(self.pipe(batch, generator=noise, **self.sampling, **extra).images)
                self.progress(1)
        finally:
            if handle is not None:
                handle.remove()
        return torch.cat(found)


def _kept(asked: Prompts, shown: list[Shown]) -> dict[str, list[float]]:
    return {
        "style_kept": _share([seen.style == style for seen, (_, style, _) in zip(shown, asked, strict=True)]),
        "background_kept": _share([seen.background == b for seen, (_, _, b) in zip(shown, asked, strict=True)]),
    }


def _share(hits: list[bool]) -> list[float]:
    part = sum(hits) / len(hits)
    return [round(value, 4) for value in (part, *wilson(part, len(hits)))]
