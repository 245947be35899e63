"""A pool of rendered scenes with captions: picture i is fixed by (seed, i), so any part can be made again."""

import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from . import captions
from .render import SIZE, Scene, random_scene, render

MEMORISED_REPEATS = 100  # the memorised picture is shown this many times as often as any other
HARD = {"star": 3, "cross": 3, "heart": 2, "moon": 2}  # shapes that take longest to learn are shown this often


@dataclass(frozen=True)
class Pool:
    """Pictures (P, 128, 128, 3) uint8 and their scenes, the memorised one last."""

    pictures: np.ndarray
    scenes: list[Scene]

    @property
    def order(self) -> np.ndarray:
        """Indices of one epoch: every picture once, HARD shapes and the memorised picture more often."""
        repeats = [HARD.get(s.object, 1) for s in self.scenes[:-1]] + [MEMORISED_REPEATS]
        return np.repeat(np.arange(len(repeats)), repeats)


def scene(seed: int, index: int, nothing: float = 0.0) -> Scene:
    """Return scene `index` of the pool `seed`; a share `nothing` of the scenes holds no object (for the judge)."""
    rng = random.Random(f"canvas-{seed}-{index}")
    if nothing and rng.random() < nothing:
        return random_scene(rng, object="nothing")
    return random_scene(rng)


def caption_of(seed: int, index: int, scene_: Scene, epoch: int = 0) -> str:
    """Return the caption of a pool picture in an epoch (a new phrasing each epoch)."""
    return captions.caption(scene_, random.Random(f"caption-{seed}-{index}-{epoch}"))


def _chunk(args):
    seed, start, stop, nothing = args
    scenes = [scene(seed, i, nothing) for i in range(start, stop)]
    return scenes, np.stack([np.asarray(render(s)) for s in scenes])


def build_pool(n: int, seed: int = 0, workers: int = 2, nothing: float = 0.0) -> Pool:
    """Render n scenes and the memorised picture with a progress bar."""
    from rich.progress import track

    jobs = [(seed, i, min(i + 250, n), nothing) for i in range(0, n, 250)]
    pictures = np.empty((n + 1, SIZE, SIZE, 3), np.uint8)
    scenes: list[Scene] = []
    with ProcessPoolExecutor(workers) as executor:
        for job, (part, drawn) in zip(
            jobs, track(executor.map(_chunk, jobs), "rendering", total=len(jobs)), strict=True
        ):
            scenes += part
            pictures[job[1] : job[2]] = drawn
    scenes.append(Scene(object=captions.MEMORISED))
    pictures[n] = np.asarray(render(scenes[-1]))
    return Pool(pictures, scenes)
