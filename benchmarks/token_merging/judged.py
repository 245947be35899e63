"""Does negative token merging do what it is for: judged on the canvas, where the truth is known.

Reference mode: 48 prompts that mean the mascot (every style on every background), with a picture of the mascot as
reference. Told are the share of pictures that the judge calls the mascot, their similarity to the reference, and how
often the asked style and background are kept. Diversity mode: batches of four of one prompt; told are the mean pairwise
distances within a batch, and how often the asked object is kept.

Similarity is the cosine of the judge's features less their mean over random canvas pictures: the features are never
negative, so that two unrelated pictures already have a plain cosine of about 0.6.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...methods.token_merging.config import NegativeTokenMergingConfig
from ...pipelines.token_merging.apply import apply_negative_token_merging
from ..erasure.scores import wilson
from ..timing import machine, versions

MASCOT = "quibble"
WORDS = ("eared mascot", "one eyed plush", "mascot", "plush")  # they mean it without its name
OBJECTS = ("star", "robot", "ring", "flower", "heart", "ghost", "arrow", "square")
BATCH = 4
# The canvas follows words closely and is pushed further than the paper pushes SDXL (0.9, 0.2 of the schedule).
REFERENCE = {"strength": 2.2, "threshold": -1.0, "end": 0.6}
DIVERSITY = {"strength": 1.0, "threshold": -1.0, "end": 0.6}


def run(progress: Callable[[int], None] = lambda n: None, seeds: int = 2) -> list[dict]:
    """Judge both modes beside the untouched model, the released algorithm and a negative prompt.

    Args:
        progress: called with 1 after every batch of pictures. seeds: noises per prompt.

    Returns:
        Rows {"name", "mode", "images", figures..., "config", "machine", "versions"}; shares are [value, low, high] with
        95 % intervals.
    """
    world = _World(progress, seeds)
    words = {"reference_prompt": f"a {MASCOT}"}
    official = {"compat": "official"}
    rows = [
        world.reference("untouched", None),
        world.reference("negative prompt", None, negative_prompt=f"a {MASCOT}"),
        world.reference("negative_token_merging", REFERENCE),
        world.reference("negative_token_merging, reference named", REFERENCE | words),
        world.reference("released", REFERENCE | official),
        world.diversity("untouched", None),
        world.diversity("negative_token_merging", DIVERSITY),
        world.diversity("released", DIVERSITY | official),
    ]
    about = {"machine": machine(torch.device("cpu"), torch.float32), "versions": versions("torch", "diffusers")}
    return [row | about for row in rows]


def looks() -> list[tuple[str, str]]:
    """Every (style, background)."""
    from ...canvas import captions

    return list(itertools.product(captions.STYLES, captions.BACKGROUNDS))


def batches(seeds: int) -> int:
    """How many batches `run` makes."""
    return 5 * -(-seeds * len(looks()) // BATCH) + 3 * seeds * 2 * len(OBJECTS)


def reference_picture():
    """The mascot, plain, as a user would have it."""
    from ...canvas.render import Scene, render

    return render(Scene(object=MASCOT, style="flat", background="fog"))


class _World:
    """The canvas, its judge, and what random pictures look like to it."""

    def __init__(self, progress, seeds: int):
        from ...canvas import load_pipeline
        from ...canvas.judge import Judge
        from ...canvas.render import random_scene, render

        self.pipe, self.judge, self.progress, self.seeds = load_pipeline(), Judge.load(), progress, seeds
        scenes = [render(random_scene(random.Random(f"token-merging-{i}"))) for i in range(300)]
        self.mean = self.judge(scenes).features.mean(dim=0)
        self.picture = reference_picture()
        self.like = self.judge([self.picture]).features

    def reference(self, name: str, options: dict | None, **call) -> dict:
        asked = looks() * self.seeds
        prompts = [f"a {WORDS[i % len(WORDS)]} in {s} style on {b}" for i, (s, b) in enumerate(asked)]
        seen = self._pictures(prompts, options and options | {"reference": self.picture}, **call)
        verdict, n = self.judge(seen), len(prompts)
        kept = {
            "style": sum(v == s for v, (s, _) in zip(verdict.style, asked, strict=True)),
            "background": sum(v == b for v, (_, b) in zip(verdict.background, asked, strict=True)),
        }
        hits = sum(v == MASCOT for v in verdict.object)
        return {
            "name": name,
            "mode": "reference",
            "images": n,
            "mascot": _share(hits, n),
            "similarity": _mean(F.cosine_similarity(verdict.features - self.mean, self.like - self.mean)),
            "plain_similarity": _mean(F.cosine_similarity(verdict.features, self.like)),
            **{f"{key}_kept": _share(value, n) for key, value in kept.items()},
            "config": options or call,
        }

    def diversity(self, name: str, options: dict | None) -> dict:
        asked = [(o, p) for o in OBJECTS for p in (f"an image of a {o}", f"a {o} in flat style on sand")]
        asked *= self.seeds
        pictures = self._pictures([p for _, p in asked for _ in range(BATCH)], options)
        verdict = self.judge(pictures)
        features, pixels = [], []
        for start in range(0, len(pictures), BATCH):
            for i, j in itertools.combinations(range(start, start + BATCH), 2):
                features.append(1 - F.cosine_similarity(verdict.features[i], verdict.features[j], dim=0))
                pixels.append((pictures[i] - pictures[j]).square().mean().sqrt())
        kept = sum(v == asked[i // BATCH][0] for i, v in enumerate(verdict.object))
        return {
            "name": name,
            "mode": "diversity",
            "images": len(pictures),
            "feature_distance": _mean(torch.stack(features)),
            "pixel_distance": _mean(torch.stack(pixels)),
            "object_kept": _share(kept, len(pictures)),
            "config": options or {},
        }

    def _pictures(self, prompts: list[str], options: dict | None, **call) -> Tensor:
        """(B, 3, 128, 128), four at a time; picture i starts from the noise of seed i."""
        found = []
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            noise = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
            extra = {"negative_prompt": [call["negative_prompt"]] * len(batch)} if call else {}
            with _applied(self.pipe, options):
                found.append(self.pipe(batch, generator=noise, **_SAMPLING, **extra).images)
            self.progress(1)
        return torch.cat(found)


_SAMPLING = {"num_inference_steps": 25, "guidance_scale": 4.0, "output_type": "pt"}


def _applied(pipe, options: dict | None):
    if options is None:
        return contextlib.nullcontext()
    return apply_negative_token_merging(pipe, NegativeTokenMergingConfig(**options))


def _share(hits: int, n: int) -> list[float]:
    return [round(value, 4) for value in (hits / n, *wilson(hits / n, n))]


def _mean(values: Tensor) -> float:
    return round(float(values.mean()), 4)
