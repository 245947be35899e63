"""Which precision trains quickest on this machine: a step of each is timed, and the choice is written down."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

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
