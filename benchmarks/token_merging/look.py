"""Pictures of one embedded world with negative token merging and without, and what its judges see in them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...canvas.world import Sight, World
from ...methods.token_merging.config import NegativeTokenMergingConfig
from ...pipelines.loaders import load_pipeline
from ...pipelines.token_merging.apply import apply_negative_token_merging
from ..erasure.scores import wilson
from ..timing import machine, versions

__all__ = ["BATCH", "MASCOT", "Look", "Prompts", "share"]

BATCH = 4
MASCOT = "quibble"
_UNRELATED = 300  # drawn scenes, for the mean of the features, less which unrelated pictures have a cosine of about 0

Prompts = list[tuple[str, str, str]]  # (prompt, style, background)


class Look:
    """A world's model and judges.

    Args:
        steps: of denoising; None takes the model's own.
        progress: called with 1 after every batch of pictures.
    """

    def __init__(self, world: World, steps: int | None, progress: Callable[[int], object]):
        self.world, self.pipe, self.progress = world, load_pipeline(world.name), progress
        self.pipe.set_progress_bar_config(disable=True)
        self.guided = world.guidance_scale > 1  # else there is no negative prompt
        guidance = {"guidance_scale": world.guidance_scale}
        self.sampling = {"num_inference_steps": steps or world.steps, "output_type": "pt", **guidance}
        scenes = [world.draw(world.anything(random.Random(f"token-merging-{i}"))) for i in range(_UNRELATED)]
        self.judges = world.judges()
        self.means = {name: judge(scenes).features.mean(dim=0) for name, judge in self.judges.items()}

    def about(self) -> dict:
        """What every row says of where it comes from."""
        steps, scale = (self.sampling[name] for name in ("num_inference_steps", "guidance_scale"))
        made = {"world": self.world.name, "steps": steps, "guidance_scale": scale}
        return made | {
            "machine": machine(self.pipe.device, self.pipe.dtype),
            "versions": versions("torch", "diffusers"),
        }

    def away(self, name: str, thing: str, asked: Prompts, options: dict | None, **call) -> list[dict]:
        """With a plain picture of a thing as reference, a row for each judge: {"name", "reference", "judge", "images",
        "shown", "similarity", "style_kept", "background_kept", "config"}."""
        picture = self.world.draw(self.world.plain(thing))
        config = None if options is None else {"reference": picture, **options}
        drawn = self.pictures([prompt for prompt, _, _ in asked], config, **call)
        found = []
        for which, (sight, mean) in self.seen(drawn).items():
            alike = F.cosine_similarity(sight.features - mean, self.judges[which]([picture]).features - mean)
            looks = list(zip(sight.shown, asked, strict=True))
            row = {"name": name, "reference": thing, "judge": which, "images": len(asked)}
            row |= {"shown": share([thing in seen for seen, _ in looks]), "similarity": round(float(alike.mean()), 4)}
            row |= {"style_kept": share([seen.style == style for seen, (_, style, _) in looks])}
            row |= {"background_kept": share([seen.background == ground for seen, (_, _, ground) in looks])}
            found.append(row | {"config": options or call})
        return found

    def seen(self, pictures: Tensor) -> dict[str, tuple[Sight, Tensor]]:
        """What each judge sees, and the mean of its features over unrelated pictures."""
        return {name: (judge(pictures), self.means[name]) for name, judge in self.judges.items()}

    def pictures(self, prompts: Sequence[str], config: dict | None, **call) -> Tensor:
        """(B, 3, H, W), four at a time; picture i starts from the noise of seed i."""
        found, handle = [], None
        if config is not None:
            handle = apply_negative_token_merging(self.pipe, NegativeTokenMergingConfig(**config))
        try:
            for start in range(0, len(prompts), BATCH):
                batch = list(prompts[start : start + BATCH])
                noise = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
                extra = {name: [value] * len(batch) for name, value in call.items()}
                found.append(self.pipe(batch, generator=noise, **self.sampling, **extra).images)
                self.progress(1)
        finally:
            if handle is not None:
                handle.remove()
        return torch.cat(found)


def share(hits: Sequence[bool]) -> list[float]:
    """[share, low, high] with the 95 % interval."""
    part = sum(hits) / len(hits)
    return [round(value, 4) for value in (part, *wilson(part, len(hits)))]
