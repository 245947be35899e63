"""Training a reader (methods/watermark/reader.py) with a model's own pictures, edited as pictures are on their way.

Pictures are drawn from plain noise, no key is involved; each is kept with its noise and what inversion makes of it
after an edit. Both halves go on where they were stopped: finished pictures lie in files of sixteen, the network's
checkpoints beside them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from ...canvas.precision import Run, autocast
from ...methods.attacks.pictures import ATTACKS, attack
from ...methods.files import read_safetensors, save_safetensors
from ...methods.watermark.reader import STEPS, Reader, save_reader
from ..attacks.pictures import model_attacks
from ..latents import latent_shape
from .channels import drawn
from .fingerprint import fingerprint
from .inversion import encode_images, invert

__all__ = ["Schedule", "train_reader"]

UNIT = 16  # pictures of a file
EDITS = 2  # of each picture:
# one out of each row, at a strength between the two. Regeneration is what marks survive worst. Turns, shifts and crops
# are not among them: the search undoes those.
_KINDS = (
    (("regenerate", 0.09, 0.36),),
    (
        ("none", None, None),
        ("vae-reencode", None, None),
        ("grey", None, None),
        ("grey", None, None),
        ("jpeg", 15, 95),
        ("jpeg", 15, 50),
        ("resize", 0.4, 0.95),
        ("blur", 0.3, 1.5),
        ("noise", 0.01, 0.08),
        ("brightness", 0.6, 1.6),
        ("contrast", 0.6, 1.6),
    ),
)
# What makes the training affordable: few steps. The noise of a picture looks the same in few as in many.
_REDRAWN = 12  # of regeneration's whole way
SAMPLING = ((8, 1.0), (8, 4.0), (8, 2.5), (10, 5.0))  # and of the pictures, with their guidance, in turn
_BATCH = 48
_RATE = 2e-3


@dataclass(frozen=True)
class Schedule:
    """What a reader learns from, and how long.

    Args:
        pictures: to learn from, each in `EDITS` forms, in whole sixteens.
        steps: of training.
        seed: of all chance.
        sampling: steps and guidance scale of the pictures, in turn.
    """

    pictures: int = 1600
    steps: int = 1500
    seed: int = 0
    sampling: Sequence[tuple[int, float]] = SAMPLING


def train_reader(
    pipe,
    prompts: Callable[[int], str],
    out: Path,
    workdir: Path,
    schedule: Schedule | None = None,
    *,
    advance: Callable[[int], object] = lambda n: None,
) -> tuple[Reader, str]:
    """Draw and edit a model's pictures, train a reader on them in the quicker precision, and write it.

    Args:
        pipe: text-to-image pipeline; nothing in it changes.
        prompts: f(number) -> what to draw.
        out: the reader's .safetensors file.
        workdir: of the pictures and checkpoints; the same call goes on from what is there.
        advance: told of finished pictures.

    Returns:
        The reader, and the precision that it was trained in.
    """
    schedule, workdir, model = schedule or Schedule(), Path(workdir), fingerprint(pipe)
    seed, name = schedule.seed, f"reader-{model}-{schedule.seed}"
    data = [
        _unit(pipe, prompts, start, schedule, workdir / f"{name}-{start:06d}.safetensors", advance)
        for start in range(0, schedule.pictures, UNIT)
    ]
    estimates, noise = (torch.cat([part[kind] for part in data]) for kind in ("estimates", "noise"))
    reader = Reader(noise.shape[1], model=model)

    def loss_of(step: int, precision: str) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(noise), (_BATCH,), generator=generator)
        seen, said = estimates[rows].float(), noise[rows].float()
        if torch.rand((), generator=generator) < 0.5:  # a mirrored picture has mirrored noise
            seen, said = seen.flip(-1), said.flip(-1)
        with autocast(precision):
            votes = reader(seen.unbind(1))
        right = (said > 0).to(torch.float32)
        # The sign of a large value is told more surely, and the mark lies in signs alone: all count the same.
        return {"loss": binary_cross_entropy_with_logits(2 * votes.float(), right)}

    run = Run(workdir, steps=schedule.steps, batch=_BATCH, seed=seed)
    precision = run.precision(name, reader, loss_of)
    run.train(name, reader, loss_of, precision, lr=_RATE, ema=0.995)
    about = {"pictures": schedule.pictures, "edits": EDITS, "steps": schedule.steps, "seed": seed}
    save_reader(reader, out, about | {"precision": precision})
    return reader, precision


@torch.no_grad()
def _unit(pipe, prompts, start: int, schedule: Schedule, path: Path, advance: Callable) -> dict[str, Tensor]:
    """(N, STEPS, C, h, w) estimates and (N, C, h, w) noise of sixteen pictures and their edits, float16."""
    if path.exists():
        advance(UNIT)
        return read_safetensors(path)[0]
    seed = schedule.seed
    generator, chance = torch.Generator().manual_seed(seed * 1_000_003 + start), random.Random(f"{seed} {start}")
    noise = torch.randn(UNIT, *latent_shape(pipe), generator=generator)
    steps, guidance = schedule.sampling[start // UNIT % len(schedule.sampling)]
    pixels = drawn(pipe, [prompts(start + i) for i in range(UNIT)], noise, steps, guidance)
    found = []
    for edited in _edited(pipe, pixels, chance, generator):
        latents = encode_images(pipe, list(edited), UNIT)
        found.append(torch.stack([invert(pipe, latents, n, batch_size=UNIT) for n in STEPS], 1).half().cpu())
    out = {"estimates": torch.cat(found), "noise": noise.half().repeat(len(found), 1, 1, 1)}
    save_safetensors(out, path, {"model": fingerprint(pipe)})
    advance(UNIT)
    return out


def _edited(pipe, pixels: Tensor, chance: random.Random, generator: torch.Generator) -> Iterator[Tensor]:
    """The pictures after one edit of each row of `_KINDS`, rounded to bytes."""
    known = ATTACKS | model_attacks(pipe, _REDRAWN)
    for kinds in _KINDS:
        name, low, high = chance.choice(kinds)
        strength = None if low is None else chance.uniform(low, high)
        if name == "jpeg":
            strength = round(strength)
        text = name if strength is None else f"{name}:{strength:g}"
        yield attack(pixels, text, generator, known).mul(255).round().div(255)
