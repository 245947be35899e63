"""Do membranes hold on a fine-tuned model? Made on an embedded model, applied as they are to a copy in another style.

The copy is the model's own denoiser, fine-tuned on pictures of its world whose colours or texture are shifted, with the
world's captions. Both are asked for the concepts in words that no method knows, with and without the membranes; what a
membrane loses is

    ua_lost    = UA on the original - UA on the copy
    kept_lost  = what the membrane takes of the others' accuracy (IRA) on the copy, more than on the original

in shares of pictures. The untouched copy's UA stands beside it: where its pictures no longer show what was asked for, a
judge that sees less of the concept proves nothing.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...canvas.world import PUBLIC, RESERVED, World
from ...methods.errors import MembraneError
from ...methods.membranes.types import Membranes
from ...methods.pictures import from_pil
from ...methods.training.loop import TrainingLog, learning_rate, load_checkpoint, save_checkpoint
from ...methods.training.packed import seed_of
from ...pipelines.family import denoiser_of, device_of
from ...pipelines.latents import encode_pixels
from ...pipelines.prediction import Predictor
from ...pipelines.text import encode_text
from ..erasure.cases import built_in_cases
from ..erasure.evaluate import evaluate
from ..erasure.methods import applied
from ..store import Store, digest
from ..timing import machine, versions

__all__ = ["SHIFTS", "TransferConfig", "fine_tune", "run", "shifted"]

SHIFTS = ("colours", "texture")
_PIECE = 64  # pictures drawn and encoded at once
_LEVELS = 1000  # noise levels that are drawn from
_UNNAMED = 0.1  # share of pictures trained without their caption, as guidance needs it
_METHOD = "membrane"


@dataclass(frozen=True)
class TransferConfig:
    """How the copy is made, and how much is measured.

    Args:
        shift: "colours" (red becomes green, green blue, blue red) or "texture" (a fine woven pattern).
        strength: of the shift, above 0 (nothing) to 1 (wholly).
        steps, learning_rate, batch_size: of AdamW's.
        pictures: to train on, each drawn once. each: pictures that ask for a concept, and as many that do not.
        seed: of all that is drawn.

    Raises:
        MembraneError: a value outside its range.
    """

    shift: str = "colours"
    strength: float = 0.6
    steps: int = 400
    learning_rate: float = 1e-4
    batch_size: int = 16
    pictures: int = 1024
    each: int = 24
    seed: int = 0

    def __post_init__(self):
        if self.shift not in SHIFTS or not 0 < self.strength <= 1 or not self.learning_rate > 0:
            raise MembraneError(
                f"shift={self.shift!r}, strength={self.strength}, learning_rate={self.learning_rate}; expected one of"
                f" {', '.join(SHIFTS)}, a strength above 0 up to 1, and a rate above 0"
            )
        if min(self.steps, self.batch_size, self.pictures, self.each) < 1 or self.seed < 0:
            raise MembraneError(
                f"steps={self.steps}, batch_size={self.batch_size}, pictures={self.pictures}, each={self.each},"
                f" seed={self.seed}; expected 1 or more each, and a seed of 0 or more"
            )


def shifted(pixels: Tensor, shift: str, strength: float) -> Tensor:
    """Pictures in the other style.

    Args:
        pixels: (B, 3, H, W) in 0..1. shift, strength: see `TransferConfig`.
    """
    if shift == "colours":
        other = pixels.roll(1, dims=1)
    else:  # threads of four pixels, over and under, as dark as half the picture's light
        down, across = torch.meshgrid(
            *(torch.arange(n, device=pixels.device) // 4 for n in pixels.shape[-2:]), indexing="ij"
        )
        other = pixels * (1 - 0.5 * ((down + across) % 2).to(pixels.dtype))
    return pixels + strength * (other - pixels)


def fine_tune(pipe, world: World, config: TransferConfig, work: Path | None = None, advance=None) -> dict[str, Tensor]:
    """The state of a fine-tuned copy of the pipeline's denoiser, which is left as it was.

    Args:
        work: folder of the checkpoint and the log; a run that was stopped goes on from there. None keeps nothing.
        advance: called with the number of steps taken.

    Raises:
        SemipermError: a checkpoint of another model.
    """
    denoiser, _ = denoiser_of(pipe)
    device, predictor = device_of(pipe), Predictor(pipe)
    before = {name: t.detach().clone() for name, t in denoiser.state_dict().items()}
    wanted = {name: p.requires_grad for name, p in denoiser.named_parameters()}
    parameters = {name: p for name, p in denoiser.named_parameters() if p.is_floating_point()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=0.0)
    checkpoint = None if work is None else Path(work) / "copy.safetensors"
    try:
        first = load_checkpoint(checkpoint, parameters, [optimizer])[0] if checkpoint and checkpoint.exists() else 0
        log = TrainingLog(None if work is None else Path(work) / "copy.jsonl", first)
        if first < config.steps:
            latents, hidden, pooled = _pictures(pipe, world, config)
            blank = encode_text(pipe, [""])
        denoiser.requires_grad_(True)
        for step in range(first, config.steps):
            generator = torch.Generator().manual_seed(seed_of(config.seed, "transfer", step))
            rows = torch.randint(len(latents), (config.batch_size,), generator=generator)
            clean = latents[rows].to(device)
            texts, vectors = hidden[rows].clone(), None if pooled is None else pooled[rows].clone()
            unnamed = torch.rand(len(rows), generator=generator) < _UNNAMED
            texts[unnamed] = blank.hidden.to(texts)
            if vectors is not None:
                vectors[unnamed] = blank.pooled.to(vectors)
            levels = predictor.times(_LEVELS, clean)[:-1]
            times = levels[torch.randint(len(levels), (len(rows),), generator=generator)].to(device)
            image, noise = predictor.levels(times)
            pure = torch.randn(clean.shape, generator=generator).to(device)
            target = {"epsilon": pure, "v_prediction": image * pure - noise * clean, "flow": pure - clean}[
                predictor.kind
            ]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config.steps, config.learning_rate, min(20, config.steps // 10))
            with torch.enable_grad():
                loss = (predictor(image * clean + noise * pure, times, texts, vectors) - target).square().mean()
                loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            log.count(loss=loss.item())
            done = step + 1
            if done % 50 == 0 or done == config.steps:
                log.write(done)
                if checkpoint is not None:
                    save_checkpoint(checkpoint, done, parameters, [optimizer])
            if advance is not None:
                advance(1)
        return {name: t.detach().clone() for name, t in denoiser.state_dict().items()}
    finally:
        denoiser.load_state_dict(before)
        for name, parameter in denoiser.named_parameters():
            parameter.requires_grad_(wanted[name])
            parameter.grad = None


def run(
    pipe,
    world: World,
    made: Mapping[str, Membranes],
    config: TransferConfig | None = None,
    work: str | Path | None = None,
    advance: Callable[[int], object] | None = None,
    **sampling,
) -> dict[str, Any]:
    """Measure membranes on the model that they were made on and on its copy.

    Args:
        pipe: the world's model, untouched. made: concept of the world -> its membranes, made on it.
        work: folder of all that a stopped run goes on from; one model's, config's and membranes' alone.
        advance: called with the number of training steps or pictures done.

    Returns:
        {"rows": [{"concept", "judge", "ua_original", "ua_copy", "ua_lost", "kept_lost", "untouched_ua_copy", ...}],
        "shift", ...}.

    Raises:
        MembraneError: no membranes, unknown concepts, or a membrane that the copy refuses.
    """
    config = config or TransferConfig()
    if not made:
        raise MembraneError("no membranes to carry over; expected at least one concept with its membranes")
    made = {world.resolve(name)[0]: Membranes(own) for name, own in made.items()}
    folder = None if work is None else Path(work)
    about = [asdict(config), digest(*world.files()), {n: repr(_sums(own)) for n, own in made.items()}, sampling]
    words = next(name for name, asking in world.askings.items() if asking.wording == RESERVED)
    cases, judges, found = built_in_cases(world, words=words), world.judges(), {}

    @contextlib.contextmanager
    def at_work(pipe, told) -> Iterator[dict]:
        stack = Membranes(m for name in told.words for m in made[name])
        with applied(pipe, stack, "auto") as extra:
            yield extra

    copied = fine_tune(pipe, world, config, None if folder is None else folder / digest(about[:2]), advance)
    for which, state in (("original", None), ("copy", copied)):
        kept = Store(None if folder is None else folder / f"{which}.jsonl", "transfer", [which, *about])
        with _weights(pipe, state):
            found[which] = evaluate(
                pipe, world, judges, cases, [(name,) for name in made], methods={_METHOD: at_work}, words=words,
                each=config.each, finished=kept, advance=advance, **sampling,
            )["rows"]  # fmt: skip
    made_on = {"machine": machine(pipe.device, pipe.dtype), "versions": versions("torch", "diffusers")}
    return {"world": world.name, **asdict(config), **sampling, **made_on, "rows": compared(found)}


def compared(found: Mapping[str, Sequence[dict]]) -> list[dict]:
    """Rows of both models side by side, one for each concept (or group of them) and judge."""
    by = {(which, r["method"], r["concept"], r["judge"]): r for which, rows in found.items() for r in rows}
    rows = []
    for _, method, concept, judge in [key for key in by if key[0] == "original" and key[1] == _METHOD]:
        each = {w: by[w, method, concept, judge] for w in ("original", "copy")}
        bare = {w: by[w, "untouched", concept, judge] for w in ("original", "copy")}
        drops = [each[w].get("ira_drop") for w in ("copy", "original")]
        rows.append(
            {
                "concept": concept,
                "judge": judge,
                **{f"ua_{w}": each[w]["ua"] for w in each},
                "ua_lost": each["original"]["ua"][0] - each["copy"]["ua"][0],
                **{f"untouched_ua_{w}": bare[w]["ua"] for w in bare},
                **{f"ira_{w}": each[w]["ira"] for w in each},
                "kept_lost": None if None in drops else drops[0] - drops[1],
                "n": each["copy"]["n"],
            }
        )
    return rows


def _pictures(pipe, world: World, config: TransferConfig) -> tuple[Tensor, Tensor, Tensor | None]:
    """Latents of shifted pictures of the world, and their captions' embeddings."""
    latents, hidden, pooled = [], [], []
    for start in range(0, config.pictures, _PIECE):
        scenes, captions = [], []
        for number in range(start, min(start + _PIECE, config.pictures)):
            rng = random.Random(f"transfer {config.seed} {number}")
            scenes.append(world.anything(rng))
            captions.append(world.caption(scenes[-1], rng, PUBLIC))
        pixels = torch.stack([from_pil(world.draw(scene).convert("RGB")) for scene in scenes])
        pixels = shifted(pixels, config.shift, config.strength)
        latents.append(encode_pixels(pipe, [2 * pixels - 1]).cpu())
        text = encode_text(pipe, captions)
        hidden.append(text.hidden)
        pooled.append(text.pooled)
    return torch.cat(latents), torch.cat(hidden), None if pooled[0] is None else torch.cat(pooled)


@contextlib.contextmanager
def _weights(pipe, state: Mapping[str, Tensor] | None) -> Iterator[None]:
    """The denoiser with other weights; afterwards with its own."""
    denoiser, _ = denoiser_of(pipe)
    before = {name: t.detach().clone() for name, t in denoiser.state_dict().items()}
    try:
        if state is not None:
            denoiser.load_state_dict(state)
        yield
    finally:
        denoiser.load_state_dict(before)


def _sums(membranes: Membranes) -> list:
    """What tells membranes of one name apart."""
    pairs = [(m.method, m.concept, m.base_model, m.modules, m.visual) for m in membranes]
    return [
        (method, concept, base, sorted((k, float(p.up.double().abs().sum())) for k, p in modules.items()),
         side and sorted((k, float(s.read.double().abs().sum())) for k, s in side.sites.items()))
        for method, concept, base, modules, side in pairs
    ]  # fmt: skip
