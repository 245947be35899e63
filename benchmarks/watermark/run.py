"""The watermark's benchmark: its units on all cores, resumable, and what signing and searching cost.

    python -m semiperm.benchmarks.watermark.run sign --shape 4 64 64 --rounds 50 --json FILE

is one timing in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from pathlib import Path

import torch

from ...canvas.editions import world_of
from ...canvas.models import aid_files
from ...methods.watermark.mark import KeyedMark, Payload, read
from ..store import Store, digest
from ..timing import machine, versions
from . import statistics as watermark_statistics
from .marks import key_of, seeded
from .statistics import through

KEYS = 10_000
# what, shape, threads, rounds in the full and in the quick form
SPEEDS = (
    ("sign", (4, 64, 64), 1, 200, 20),
    ("sign", (16, 128, 128), 1, 50, 10),
    ("bank", (4, 16, 16), 2, 5, 0),
    ("bank", (4, 64, 64), 2, 5, 1),
    ("bank", (16, 128, 128), 2, 5, 0),
)
PARTS = ("latents", "linked", "canvas", "repaint", "everyday", "speed")  # by default
ON_REQUEST = ("samplers",)
OF_A_WORLD = ("linked", "canvas", "repaint", "everyday")  # "linked" of the model's latent shape; the rest is about
# latents of any, about samplers of one model, or about time
# The tables of each part; "null" rows are told apart by the latents they are of.
TABLES = {
    "latents": ("null", "classifier", "channel"),
    "linked": ("linked",),
    "canvas": ("attack", "guidance", "quality", "decoder", "forgery", "null"),
    "repaint": ("repaint",),
    "everyday": ("everyday",),
    "speed": ("speed",),
    "samplers": ("sampler",),
}


class TimingError(RuntimeError):
    """A timing's process failed; with the end of what it wrote."""


def run(
    quick: bool = False,
    parts: Sequence[str] = PARTS,
    workers: int | None = None,
    resume: Path | None = None,
    starting: Callable[[str, int], Callable[[int], object]] = lambda label, total: lambda n: None,
    world: str = "canvas",
) -> list[dict]:
    """All figures of the watermark, or some parts of them.

    Args:
        quick: fewer latents, pictures, trials and rounds: about a minute on two cores instead of about 100.
        parts: out of PARTS and ON_REQUEST: latents alone, pairs of them, the canvas's pictures, repainted ones,
            everyday's conversions, time and memory; which of diffusers' samplers keep the mark.
        workers: processes; None is one for each core, 1 stays in this process.
        resume: file of finished units: what the same code has computed is not computed again.
        world: the embedded model that draws; another than the default goes with parts out of OF_A_WORLD alone.
        starting: called with a label and a number of pieces before they start; returns what is told of finished ones.

    Returns:
        The rows of `statistics.rows`, `linked.rows`, `canvas_rows.rows`, `repaint.rows`, `everyday.rows`,
        `samplers.rows`, and {"table": "speed", "what", "shape", "keys", "threads", "rounds", "ms": median, "best_ms",
        "peak_mb": of the process, "extra_mb": beyond what it had before}; each with "machine" and "versions".

    Raises:
        ValueError: an unknown part. TimingError: a timing's process failed.
    """
    if unknown := set(parts) - {*PARTS, *ON_REQUEST}:
        known = ", ".join((*PARTS, *ON_REQUEST))
        raise ValueError(f"there is no part {', '.join(sorted(unknown))}; expected some of {known}")
    if world != "canvas" and (unfit := set(parts) - set(OF_A_WORLD)):
        raise ValueError(
            f"{', '.join(sorted(unfit))} do not depend on {world}; expected some of {', '.join(OF_A_WORLD)}"
        )
    found, drawn = [], None
    if set(parts) & {*OF_A_WORLD, *ON_REQUEST} - {"linked"}:
        drawn = digest(*world_of(world).files(), *aid_files(world).values())
    if "latents" in parts:
        units = watermark_statistics.plan(quick)
        found += watermark_statistics.rows(units, computed(units, workers, resume, starting("latents", len(units))))
    if "canvas" in parts:
        from . import canvas as watermark_canvas
        from . import canvas_rows as watermark_canvas_rows

        units = watermark_canvas.plan(quick, world)
        done = computed(units, workers, resume, starting("canvas", len(units)), drawn)
        found += watermark_canvas_rows.rows(units, done)
    for name in ("linked", "repaint", "everyday", "samplers"):
        if name in parts:
            module = import_module(f".{name}", __package__)
            units = module.plan(quick, world) if name in OF_A_WORLD else module.plan(quick)
            about = None if name == "linked" else drawn
            found += module.rows(units, computed(units, workers, resume, starting(name, len(units)), about))
    if "speed" in parts:
        speeds = [(*case[:3], case[3 + quick]) for case in SPEEDS if case[3 + quick]]
        advance = starting("speed; keep the machine quiet", len(speeds))
        for case in speeds:
            found.append(in_own_process(*case))
            advance(1)
    about = {"versions": versions("torch", "numpy", "scipy", "cryptography", "diffusers")}
    about["machine"] = machine(torch.device("cpu"), torch.float32)
    return [row | about | ({"world": world} if world != "canvas" else {}) for row in found]


def compute(unit: dict) -> dict:
    """The result of one unit of any part."""
    if unit["task"] in watermark_statistics.TASKS:
        return watermark_statistics.compute(unit)
    if unit["task"] in TABLES:
        with torch.no_grad():
            return import_module(f".{unit['task']}", __package__).compute(unit)
    from . import canvas as watermark_canvas

    return watermark_canvas.compute(unit)


def computed(
    units: Sequence[dict],
    workers: int | None,
    resume: Path | None,
    advance: Callable[[int], object],
    settings: object = None,
) -> list[dict]:
    """The results of the units, in their order, from the file or computed under these settings and added to it."""
    store, keys = Store(resume, "bench watermark", settings), [json.dumps(unit, sort_keys=True) for unit in units]
    missing = [(key, unit) for key, unit in zip(keys, units, strict=True) if store.get(key) is None]
    advance(len(units) - len(missing))
    workers = min(workers or os.cpu_count() or 1, max(1, len(missing)))
    with _pool(workers) as pool:
        if pool is None:
            done: Iterator[tuple[str, dict]] = ((key, compute(unit)) for key, unit in missing)
        else:
            waiting = {pool.submit(compute, unit): key for key, unit in missing}
            done = ((waiting[future], future.result()) for future in as_completed(waiting))
        for key, result in done:
            store.put(key, result)
            advance(1)
    return [store.get(key) for key in keys]


@contextlib.contextmanager
def _pool(workers: int):
    """Processes with one thread each; None for one worker, which is this process."""
    if workers == 1:
        yield None
        return
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the libraries of the new processes when they load
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C the units under way are finished, no others
        os.environ.pop("OMP_NUM_THREADS")
        os.environ |= {} if before is None else {"OMP_NUM_THREADS": before}


# Speed


def in_own_process(what: str, shape: Sequence[int], threads: int, rounds: int) -> dict:
    """One row of the speed table.

    Raises:
        TimingError: the process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        command = [sys.executable, "-m", __name__, what, "--shape", *map(str, shape), "--rounds", str(rounds)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run([*command, "--json", str(path)], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise TimingError(f"timing {what} {tuple(shape)} ended with {done.returncode}: {done.stderr[-2000:]}")
        return json.loads(path.read_text(encoding="utf-8")) | {"threads": threads}


def timed(what: str, shape: tuple[int, ...], rounds: int) -> dict:
    """Time signing one latent, or searching 10^4 keys for the mark of one, in this process.

    Raises:
        ValueError: the key was not found.
    """
    if what == "sign":
        mark, before = KeyedMark(key_of("speed")), peak_mb()
        taken = [_seconds(lambda: mark.sample((1, *shape), Payload(1)))[0] for _ in range(rounds + 1)]
    else:
        keys = [key_of("speed", i) for i in range(KEYS)]
        latents = KeyedMark(keys[KEYS // 3]).sample((1, *shape), Payload(1), seeded("speed", shape))
        latents, before, taken = through(latents, 0.8, seeded("noise", shape)), peak_mb(), []
        for _ in range(rounds + (rounds > 1)):
            seconds, readings = _seconds(lambda: read(latents, keys))
            taken.append(seconds)
        if readings[0].key_name != keys[KEYS // 3].name or not readings[0].mac_ok:
            raise ValueError(f"the mark in a latent of shape {shape} was not found among {KEYS} keys")
    taken = taken[1:] or taken  # the first one fills the caches
    row = {"table": "speed", "what": what, "shape": list(shape), "keys": 1 if what == "sign" else KEYS}
    row |= {"rounds": len(taken), "ms": round(statistics.median(taken) * 1e3, 3), "best_ms": round(min(taken) * 1e3, 3)}
    return row | {"peak_mb": round(peak_mb()), "extra_mb": round(peak_mb() - before)}


def _seconds(function: Callable):
    start = time.perf_counter()
    found = function()
    return time.perf_counter() - start, found


def peak_mb() -> float:
    """The most memory that this process ever held, in 10^6 bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage there counts what the process was forked from
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024 / 1e6
    import resource  # not on Windows, where the other tables are printed all the same

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def main(arguments: list[str] | None = None) -> int:
    """Write one row to --json FILE. Returns the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m semiperm.benchmarks.watermark.run", description=__doc__)
    parser.add_argument("what", choices=("sign", "bank"))
    parser.add_argument("--shape", type=int, nargs="+", required=True)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    row = timed(options.what, tuple(options.shape), options.rounds)
    options.json.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
