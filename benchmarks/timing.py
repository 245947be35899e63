"""What the overhead benchmarks share: a row of figures, and what it was measured on. Imports no diffusers, no comfy."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

import torch


def ratio_row(name: str, k: int, ratios: Sequence[float], bare_seconds: float, **about) -> dict:
    """A row {"name", "k", "ratio": median, "spread": [low, high] over the middle half, "rounds", "ms": bare, ...}.

    Args:
        ratios: one a round, variant to bare. bare_seconds: of one step. about: further entries, as they are.
    """
    return {"name": name, "k": k, **spread(ratios), "ms": round(bare_seconds * 1e3, 3), **about}


def spread(ratios: Sequence[float]) -> dict:
    """The entries {"ratio": median, "spread": [low, high] over the middle half, "rounds"} of one ratio a round."""
    low, median, high = statistics.quantiles(ratios, n=4)
    return {"ratio": round(median, 4), "spread": [round(low, 4), round(high, 4)], "rounds": len(ratios)}


def run_seconds(draw: Callable[[Callable], object], device: torch.device) -> tuple[float, float]:
    """(of a pipeline's run, of its steps after the first, in which text is read and plans are made).

    Args:
        draw: runs the pipeline with what it is given as `callback_on_step_end`; two steps or more.
    """
    ends: list[float] = []

    def ended(pipe, step, timestep, kwargs):
        ends.append(_now(device))
        return kwargs

    start = _now(device)
    draw(ended)
    return _now(device) - start, ends[-1] - ends[0]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def machine(device: torch.device, dtype: torch.dtype) -> str:
    """The GPU's name, or the CPU with its threads; and the precision."""
    precision = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {precision}"
    return (
        f"{platform.machine()} CPU with {vectors()}, {torch.get_num_threads()} of {os.cpu_count()} cores, {precision}"
    )


def vectors() -> str:
    """The CPU's vector instructions that torch uses: ratios of kernels hold for these alone."""
    capability = torch.backends.cpu.get_cpu_capability()
    bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return f"{capability} and its bfloat16 products" if capability.startswith("AVX512") and bfloat16 else capability


def versions(*names: str) -> dict[str, str]:
    """Python's version and those of the packages, "absent" where one is not installed."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found
