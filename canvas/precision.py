"""How a part trains, and in which precision: a step of each is timed, and the quicker is taken and written down."""

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .loop import train

PRECISIONS = {"bfloat16": torch.bfloat16, "float32": None}


def autocast(precision: str, device: str = "cpu"):
    """Return the context in which a part trains: autocast, or nothing for "float32"."""
    dtype = PRECISIONS[precision]
    return contextlib.nullcontext() if dtype is None else torch.autocast(device, dtype)


def choose(part: str, step: Callable[[str], None], workdir: Path, repeats: int = 2) -> str:
    """Return the quicker precision of a part's training step, remembered in `workdir/precision.json`.

    Processors differ: without AVX-512 BF16 or AMX, bfloat16 is many times slower than float32.

    Args:
        step: runs one step in the precision it is given; the first call of each is not timed.
    """
    record = Path(workdir) / "precision.json"
    known = json.loads(record.read_text()) if record.exists() else {}
    if part not in known:
        seconds = {}
        for precision in PRECISIONS:
            step(precision)
            start = time.perf_counter()
            for _ in range(repeats):
                step(precision)
            seconds[precision] = round((time.perf_counter() - start) / repeats, 4)
        known[part] = {"seconds": seconds, "chosen": min(seconds, key=seconds.get)}
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(known, indent=2) + "\n")
    return known[part]["chosen"]


@dataclass(frozen=True)
class Run:
    """How a part trains: where its checkpoint and log lie, how long, on what.

    Args:
        steps: length of the schedule. stop_after: end early at this step; the same run goes on from there. compile:
            through torch.compile, where a part can.
    """

    workdir: Path
    steps: int
    batch: int
    seed: int = 0
    compile: bool = True
    stop_after: int | None = None

    def generator(self, step: int) -> torch.Generator:
        """Return the randomness of a step, which depends on nothing but seed and step."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step)

    def precision(self, name: str, model: nn.Module, loss_of: Callable[[int, str], dict[str, Tensor]]) -> str:
        """Return the quicker precision for `loss_of(step, precision)`; nothing is learnt."""

        def step(kind: str) -> None:
            loss_of(0, kind)["loss"].backward()
            model.zero_grad(set_to_none=True)

        return choose(name, step, self.workdir)

    def train(
        self, name: str, model: nn.Module, loss_of: Callable[[int, str], dict[str, Tensor]], kind: str, **settings
    ) -> nn.Module:
        """Train in a precision (see loop.train for settings) and return the model with its averaged weights, frozen."""
        average = train(
            name,
            model,
            lambda step: loss_of(step, kind),
            steps=self.steps,
            workdir=self.workdir,
            stop_after=self.stop_after,
            **settings,
        )
        model.load_state_dict(average, strict=False)
        return model.eval().requires_grad_(False)
