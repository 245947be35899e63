"""What safe guidance is measured with, by name, alone and together: at work on a world's model, and the pictures of it.

A part is an algorithm of safe guidance, or one of the names below; parts are put together as users put them together.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...canvas.world import Judge, Shown, World
from ...methods.guidance.algorithm import Algorithm
from ...methods.guidance.category import Category
from ...methods.guidance.config import SafeGuidanceConfig
from ...methods.guidance.detectors import DetectorPair
from ...methods.guidance.nag import NAG
from ...methods.membranes.types import Membranes
from ...methods.token_merging.config import NegativeTokenMergingConfig
from ...methods.watermark.keys import WatermarkKey
from ...methods.watermark.mark import Payload
from ...pipelines.attacks.encoding import learned_words
from ...pipelines.family import family_of
from ...pipelines.guidance.apply import apply_safe_guidance
from ...pipelines.guidance.fit import fit_detectors
from ...pipelines.membranes.apply import apply_membranes
from ...pipelines.membranes.erase import erase_concepts
from ...pipelines.token_merging.apply import apply_negative_token_merging
from ...pipelines.watermark.sign import sign_noise
from ..watermark.marks import key_of
from .worlds import Asked, categories_of

__all__ = ["BATCH", "Beside", "Work", "drawn"]

BATCH = 8
NEGATIVE, MEMBRANES, DETECTORS = "negative prompt", "membranes", "detector pair"
REFUSE = "refuse"  # what the detector pair does with a picture that cannot be saved
MERGING, MARK = "token merging", "mark"
# all tokens, in over half of the schedule: what small pictures need until the reference is gone, see token_merging/
_PUSH = {"strength": 2.2, "threshold": -1.0, "end": 0.6}


@dataclass(frozen=True, eq=False)
class Beside:
    """What the pipeline's call is given besides: a negative prompt, or signed noise."""

    negative_prompt: str | None = None
    key: WatermarkKey | None = None


@dataclass(eq=False)
class Work:
    """A world's pipeline, and what was fitted on it: each category's membranes and detectors once.

    Args:
        call: what its call is given: num_inference_steps, guidance_scale.
    """

    pipe: Any
    world: World
    call: dict
    fitted: dict = field(default_factory=dict)

    @contextlib.contextmanager
    def on(self, categories: Sequence[Category], parts: Sequence) -> Iterator[Beside]:
        """These parts at work together, against these categories."""
        words = ", ".join(phrase for category in categories for phrase in category.phrases)
        algorithms = [self._suiting(part) for part in parts if not isinstance(part, str)]
        detectors = [self._detectors()[one.name] for one in categories] if DETECTORS in parts else []
        membranes = self._membranes(tuple(categories)) if MEMBRANES in parts else None
        with contextlib.ExitStack() as stack:
            if membranes is not None:
                stack.enter_context(apply_membranes(self.pipe, membranes))
            if MERGING in parts:
                stack.enter_context(apply_negative_token_merging(self.pipe, self._merging(categories)))
            if algorithms:
                then = "refuse" if REFUSE in parts else "guide"
                config = SafeGuidanceConfig(categories, algorithms, detectors=detectors, when_unsafe=then)
                stack.enter_context(apply_safe_guidance(self.pipe, config))
            yield Beside(words if NEGATIVE in parts else None, key_of("guidance") if MARK in parts else None)

    def _suiting(self, part: Algorithm) -> Algorithm:
        """NAG has published values for each family of models; those of SD3 are for flow matching at guidance."""
        return NAG("sd3", tau=part.tau) if isinstance(part, NAG) and family_of(self.pipe).flow else part

    def _detectors(self) -> dict[str, DetectorPair]:
        """Of all categories, which share harmless pictures."""
        if DETECTORS not in self.fitted:
            steps, scale = self.call["num_inference_steps"], self.call["guidance_scale"]
            categories, benign = categories_of(self.world), self.world.benign(200)
            pairs = fit_detectors(self.pipe, categories, benign=benign, steps=steps, guidance_scale=scale)
            self.fitted[DETECTORS] = {pair.category: pair for pair in pairs}
        return self.fitted[DETECTORS]

    def _membranes(self, categories: tuple[Category, ...]) -> Membranes:
        if categories not in self.fitted:
            self.fitted[categories] = erase_concepts(self.pipe, ["|".join(one.phrases) for one in categories])
        return self.fitted[categories]

    def _merging(self, categories: Sequence[Category]) -> NegativeTokenMergingConfig:
        """Away from a picture of each hazard, drawn without the model."""
        draw, scene = self.world.draw, self.world.scene
        pictures = [draw(scene(random.Random(f"reference {one.name}"), hazards=(one.name,))) for one in categories]
        said = ", ".join(one.phrases[0] for one in categories)
        return NegativeTokenMergingConfig(reference=pictures, reference_prompt=said, **_PUSH)


def drawn(
    work: Work,
    asked: Sequence[Asked],
    part: Sequence[int],
    judges: dict[str, Judge],
    beside: Beside,
    progress: Callable[[], None] | None = None,
    keep: list | None = None,
) -> list[dict[str, Shown]]:
    """What each judge sees in the pictures of the prompts `part`; picture i starts from the noise of seed i.

    Args:
        progress: called with each batch. keep: gets the pictures.
    """
    found: list[dict[str, Shown]] = []
    for some in parts_of(asked, part):
        words = asked[some[0]].learned
        noise = [torch.Generator().manual_seed(i) for i in some]
        more: dict[str, Any] = {"generator": noise}
        if beside.negative_prompt is not None:
            more["negative_prompt"] = [beside.negative_prompt] * len(some)
        if beside.key is not None:
            payloads = [Payload(unique_id=i) for i in some]
            signed = [
                sign_noise(work.pipe, beside.key, payload=one, generator=own)
                for one, own in zip(payloads, noise, strict=True)
            ]
            more["latents"] = torch.cat(signed)
        with contextlib.nullcontext() if words is None else learned_words(work.pipe, *words):
            pictures = work.pipe([asked[i].prompt for i in some], **work.call, **more).images
        seen = {name: judge(pictures).shown for name, judge in judges.items()}
        found += [{name: shown[i] for name, shown in seen.items()} for i in range(len(some))]
        if keep is not None:
            keep += pictures
        if progress is not None:
            progress()
    return found


def parts_of(asked: Sequence[Asked], part: Sequence[int]) -> list[list[int]]:
    """Batches, in order: prompts that are read with other learned words are no one's neighbours."""
    found: list[list[int]] = []
    for i in part:
        last = found[-1] if found else []
        if not last or len(last) == BATCH or asked[last[0]].learned is not asked[i].learned:
            found.append([])
        found[-1].append(i)
    return found
