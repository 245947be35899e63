"""Rendered scenes to learn from, and their latents: picture i is fixed by (seed, i); both lie on disk in chunks.

A chunk is made whole or not at all, so a stopped run goes on where it was, and a pool can grow.
"""

import functools
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..methods.files import whole_file
from . import language, sentences
from .drawing import draw
from .loop import save_tensors
from .scenes import SIZE, Scene, random_scene, smudged

CHUNK = 1000
MEMORISED_SHARE = 0.06  # of what a training step shows
PAIR_REPEATS = 2  # scenes of two different things are learnt last, and are shown this often
_PICTURES = "pictures"


def scene_of(seed: int, index: int, smudges: float = 0.0) -> Scene:
    """Return scene `index` of the pool `seed`; in a share `smudges` a thing is painted out (for the judges)."""
    rng = random.Random(f"world-{seed}-{index}")
    scene = random_scene(rng)
    return smudged(rng, scene) if smudges and rng.random() < smudges else scene


@dataclass(frozen=True)
class Pool:
    """Scenes, the memorised ones last, and pictures (P, 128, 128, 3) uint8 or latents (P, C, 16, 16)."""

    scenes: list[Scene]
    data: np.ndarray | Tensor

    def draw_batch(self, rng: np.random.Generator, batch: int) -> np.ndarray:
        """Return indices of a training batch."""
        known, memorised = len(self.scenes) - len(language.MEMORISED), len(language.MEMORISED)
        index = rng.choice(self._order, batch)
        by_heart = rng.random(batch) < MEMORISED_SHARE
        return np.where(by_heart, known + rng.integers(0, memorised, batch), index)

    @functools.cached_property
    def _order(self) -> np.ndarray:
        """Indices of all but the memorised scenes, as often as they are shown."""
        pairs = [len(set(scene.objects)) == 2 for scene in self.scenes[: -len(language.MEMORISED)]]
        return np.repeat(np.arange(len(pairs)), np.where(pairs, PAIR_REPEATS, 1))

    def captions(self, index: np.ndarray, rng: random.Random) -> list[str]:
        """Return a new caption for each of some pictures."""
        return [sentences.describe(self.scenes[i], rng) for i in index]


def scenes_of(seed: int, n: int, smudges: float = 0.0) -> list[Scene]:
    """Return n scenes and then the memorised ones."""
    return [scene_of(seed, i, smudges) for i in range(n)] + [Scene(memorised=name) for name in language.MEMORISED]


def pictures(folder: Path | None, n: int, seed: int = 0, smudges: float = 0.0) -> Pool:
    """Return the pool's pictures: n and then the memorised ones; drawn where `folder` (None: keep nothing) lacks them.

    A pool with smudges needs a seed of its own.
    """
    from rich.progress import track

    scenes = scenes_of(seed, n, smudges)
    data = np.empty((len(scenes), SIZE, SIZE, 3), np.uint8)
    for start in track(range(0, n + CHUNK, CHUNK), "drawing", disable=n < CHUNK):
        stop = min(start + CHUNK, n) if start < n else len(scenes)
        start = min(start, n)
        data[start:stop] = _drawn(folder, seed, scenes[start:stop], start)
    return Pool(scenes, data)


def to_tensor(pictures_: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pictures_)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def latents(
    folder: Path, name: str, vae: nn.Module, encode: Callable[[Tensor], Tensor], n: int, seed: int = 0, batch: int = 20
) -> Pool:
    """Return the pool as scaled latents, encoded where `folder` lacks them.

    Args:
        name: of the autoencoder's files; a chunk that another autoencoder made is made again. encode: pictures
            (B, 3, H, W) in -1..1 -> scaled latents (B, C, H/8, W/8).
    """
    from rich.progress import track

    digest = hashlib.sha256(str(seed).encode())
    for _, weight in sorted(vae.state_dict().items()):
        digest.update(weight.float().numpy().tobytes())
    stamp = digest.hexdigest()
    scenes, found = scenes_of(seed, n), []
    for start in track(range(0, n + CHUNK, CHUNK), f"encoding for {name}", disable=n < CHUNK):
        rows = scenes[start : min(start + CHUNK, n)] if start < n else scenes[n:]
        label = f"{start:06d}-{len(rows)}" if start < n else "memorised"
        path = Path(folder) / f"latents-{name}" / f"{seed}-{label}.safetensors"
        if path.exists():
            with safe_open(str(path), "pt") as file:
                if (file.metadata() or {}).get("stamp") == stamp:
                    found.append(file.get_tensor("latents"))
                    continue
        part = _drawn(folder, seed, rows, start)
        z = torch.cat([encode(to_tensor(part[i : i + batch])).float() for i in range(0, len(part), batch)])
        save_tensors({"latents": z}, path, {"stamp": stamp})
        found.append(z)
    return Pool(scenes, torch.cat(found))


def _drawn(folder: Path | None, seed: int, scenes: list[Scene], start: int) -> np.ndarray:
    """Return pictures of some scenes; a whole chunk is kept on disk."""
    path = Path(folder) / _PICTURES / f"{seed}-{start:06d}.npy" if folder and len(scenes) == CHUNK else None
    if path and path.exists():
        return np.load(path)
    drawn = np.stack([np.asarray(draw(scene)) for scene in scenes])
    if path:
        with whole_file(path) as partial, partial.open("wb") as file:
            np.save(file, drawn)
    return drawn
