"""Where marks are tried: an embedded model with its world, its inverter and its judge, by the model's name.

All that depends on which model draws stands here; units of work name it, and every process loads it once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ...canvas.editions import world_of
from ...canvas.models import aid_files
from ...canvas.world import PUBLIC, Asked, Sight
from ...methods.attacks.pictures import ATTACKS, attack
from ...methods.watermark.config import DetectionConfig
from ...methods.watermark.detection import detect_in
from ...methods.watermark.payload import capacity
from ...methods.watermark.search import Search
from ...methods.watermark.statistics import without_offset
from .marks import MARKS, OURS, TREE, Baseline, key_of, seeded

SIZE = (128, 128)
PLAIN, TREE_ALL, FIXED, SEARCHING = "plain noise", f"{TREE}, all channels", f"{OURS}, 10 steps", f"{OURS}, search"
LADDER, STEPS = (0, 1, 5), 10  # ours climbs, and stops where it is sure; the others take ten steps
CLEAN = "none"


class Place:
    """An embedded model, loaded when it is first asked for pictures. shape: of one picture's latents."""

    def __init__(self, name: str):
        self.world = world_of(name)
        self.shape = self.world.latent_shape
        layout = capacity(self.shape)
        # the payload of other marks is as long as ours, which is authenticated besides
        self.bits = layout.total - layout.mac - layout.bound

    @cached_property
    def pipe(self):
        import diffusers
        import transformers

        from ...pipelines.loaders import load_pipeline

        for library in (diffusers, transformers):
            library.utils.logging.set_verbosity_error()
        pipe = load_pipeline(self.world.name)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def inverter(self):
        from ...pipelines.watermark.detect import PipelineInverter

        return PipelineInverter(self.pipe)

    @cached_property
    def _judge(self):
        return next(iter(self.world.judges().values()))

    @cached_property
    def aids(self) -> dict:
        """The shipped reader of marks and weights of channels, as fields of `DetectionConfig`; what does not fit the
        model's weights is left out."""
        from ...methods.watermark.aids import aids_of_model
        from ...pipelines.watermark.fingerprint import fingerprint

        return aids_of_model(aid_files(self.world.name), lambda: fingerprint(self.pipe))

    @property
    def channels(self) -> dict:
        """The weights of channels alone."""
        return {kind: aid for kind, aid in self.aids.items() if kind == "channels"}

    def judge(self, pixels: Tensor) -> Sight:
        """What the first judge sees in pictures."""
        return self._judge(pixels)

    def asked(self, start: int, count: int) -> list[Asked]:
        """What the pictures `start` to `start + count` are asked to show."""
        return [self.world.asked(random.Random(f"watermark-{i}"), PUBLIC) for i in range(start, start + count)]

    def mark(self, name: str):
        """The mark of the pictures under that name."""
        if name == TREE_ALL:
            from ...methods.watermark.peers.tree_ring import TreeRing

            return Baseline(lambda key, bits: TreeRing(key, channels=None), False, key_of("canvas"))
        ours = name in (OURS, FIXED, SEARCHING)
        return MARKS[OURS if ours else name](key_of("canvas"), None if ours else self.bits)

    def noise(self, mark: str, start: int, count: int) -> Tensor:
        """(count, C, H, W) initial noise of pictures `start` to `start + count`."""
        generator = seeded("canvas", OURS if mark == SEARCHING else mark, start)
        if mark == PLAIN:
            return torch.randn(count, *self.shape, generator=generator)
        return self.mark(mark).sample((count, *self.shape), generator)

    def draw(self, prompts: Sequence[str], noise: Tensor, guidance: float | None = None) -> Tensor:
        """(B, 3, 128, 128) in whole 255ths; None is the model's own guidance."""
        guidance = self.world.guidance_scale if guidance is None else guidance
        call = {"num_inference_steps": self.world.steps, "guidance_scale": guidance, "output_type": "pt"}
        return in_bytes(self.pipe(list(prompts), latents=noise, **call).images)

    def estimate(self, pixels: Tensor, steps: int) -> Tensor:
        """The noise estimate that every detector gets."""
        return without_offset(self.inverter.invert(self.inverter.encode(list(pixels)), steps))

    def look(self, detectors: Sequence[str], pixels: Tensor, steps: int = STEPS) -> dict[str, dict[str, list]]:
        """What each detector says of pictures: {"p", "exact", "evaluations"}, lists with an entry for each."""
        found, noise = {}, None
        for name in detectors:
            mark = self.mark(name)
            if name in (OURS, SEARCHING):
                search = Search() if name == SEARCHING else None
                config = DetectionConfig(ladder=LADDER, search=search, size=SIZE, **self.channels)
                results = detect_in(list(pixels), self.inverter, [mark.key], config)
                sent = mark.payload(self.shape)
                entries = [
                    (r.p_value, r.verdict == "valid" and r.payload == sent, r.model_evaluations) for r in results
                ]
            else:
                noise = self.estimate(pixels, steps) if noise is None else noise
                entries = [(one.p_value, one.exact, steps) for one in (mark.find(row[None]) for row in noise)]
            p, exact, evaluations = zip(*entries, strict=True)
            found[name] = {"p": [float(f"{v:.6g}") for v in p], "exact": list(exact), "evaluations": list(evaluations)}
        return found

    def attacked(self, pixels: Tensor, text: str, start: int) -> Tensor:
        """The pictures after an attack; chance depends on the attack and on which pictures they are."""
        from ...pipelines.attacks.pictures import model_attacks

        if text == CLEAN:
            return pixels
        return in_bytes(attack(pixels, text, seeded(text, start), ATTACKS | model_attacks(self.pipe)))


@lru_cache(maxsize=1)
def place_of(name: str) -> Place:
    """The place of a model's name, loaded once in each process."""
    return Place(name)


def in_bytes(pixels: Tensor) -> Tensor:
    return pixels.float().mul(255).round().div(255)
