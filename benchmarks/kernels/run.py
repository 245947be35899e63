"""What the kernels cost beside the naive algorithms, eager and under torch.compile: time and extra memory.

All are timed in turn within each round, and the ratio is taken within the round: whatever else the machine does falls
on all of them. Nothing is reported unless they agree, on a small case and on the outputs that were timed.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable

import torch

from ...kernels.dispatch import kernel_path
from ..memory import peak_bytes
from ..timing import machine, spread, versions
from .cases import KernelBenchmarkError, Operation, small_cases, timed_cases

__all__ = ["KernelBenchmarkError", "run"]

COMPILED = "naive, torch.compile"  # and ours compiled, too, in that row
_OURS = {"naive": "kernel", COMPILED: "kernel, torch.compile"}
_VARIABLES = ("OMP_NUM_THREADS", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "SEMIPERM_KERNELS")
# name -> dense bfloat16 FLOP/s with float32 sums, bytes/s; from the makers' data sheets
_PEAKS = {
    "NVIDIA A100-SXM4-40GB": (312e12, 1.555e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.039e12),
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA GeForce RTX 4090": (165e12, 1.008e12),
    "AMD Instinct MI300X": (1307e12, 5.3e12),
}


def run(device: str = "auto", quick: bool = False, tell: Callable[[str], None] = lambda text: None) -> list[dict]:
    """Time every kernel against the naive algorithm: float32 on a CPU, bfloat16 on a GPU.

    Args:
        device: "auto" is CUDA where there is some. quick: small sizes, few rounds, no torch.compile.
        tell: is told what comes next.

    Returns:
        Rows {"name", "shape", "dtype", "path": "triton" or "reference", "baseline", "ratio": median of our time to the
        baseline's, "spread": [low, high] over the middle half, "rounds", "ms", "baseline_ms", "peak_bytes",
        "baseline_peak_bytes": beside inputs and outputs, "gbps": least traffic to our time, "roofline": share of it,
        on a GPU we know, "machine", "environment", "versions"}. A baseline that is too large to run has "computed":
        true, its memory computed from its tensors, and no ratio. Beside the compiled naive stands our kernel, compiled.
        A CPU's compiled code does not tell its memory: None.

    Raises:
        KernelBenchmarkError: a kernel and a baseline disagree.
    """
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = []
    with torch.no_grad():
        for case in small_cases():
            tell(f"checking {case.name}")
            inputs = case.inputs(device, dtype)
            case.check(inputs, case.kernel(*inputs), case.naive(*inputs))
        for case in timed_cases(device, quick):
            tell(f"timing {case.name}, {case.shape}")
            rows += _rows(case, device, case.dtype or dtype, quick)
    return rows


def _rows(case: Operation, device: torch.device, dtype: torch.dtype, quick: bool) -> list[dict]:
    inputs = case.inputs(device, dtype)
    peak = peak_bytes(case.kernel, *inputs)
    naive_peak = peak_bytes(case.naive, *(t.to("meta") for t in inputs))
    timed = case.timed and (device.type == "cpu" or torch.cuda.mem_get_info(device)[0] > 2 * naive_peak)
    contestants = {"kernel": case.kernel} | ({"naive": case.naive} if timed else {})
    peaks = {"naive": peak_bytes(case.naive, *inputs) if timed else naive_peak}
    own_peaks = {"naive": peak, COMPILED: None}
    for name, peer in case.peers.items() if timed else ():
        contestants[name], peaks[name], own_peaks[name] = peer, peak_bytes(peer, *inputs), peak
    if timed and not quick and (compiled := _compiled(case.naive, inputs)) is not None:
        contestants[COMPILED], contestants[_OURS[COMPILED]] = compiled, _compiled(case.kernel, inputs)
        peaks[COMPILED] = peak_bytes(compiled, *inputs) if device.type == "cuda" else None
        if device.type == "cuda":
            own_peaks[COMPILED] = peak_bytes(contestants[_OURS[COMPILED]], *inputs)
    seconds, outputs = _interleaved(contestants, inputs, device, rounds=1 if not timed else 5 if quick else 15)
    for baseline in peaks:
        case.check(inputs, outputs[_OURS.get(baseline, "kernel")], outputs.get(baseline))

    moved, flops = case.work(dtype.itemsize)
    rows = []
    for baseline, peak_of_baseline in peaks.items():
        own, theirs = seconds[_OURS.get(baseline, "kernel")], seconds.get(baseline)
        ours = statistics.median(own)
        ratios = [mine / other for mine, other in zip(own, theirs or (), strict=bool(theirs))]
        row = {
            "name": case.name,
            "shape": case.shape,
            "dtype": str(dtype).removeprefix("torch."),
            "path": kernel_path(inputs[0]),
            "baseline": baseline,
            **(spread(ratios) if timed else {"ratio": None, "spread": None, "rounds": 1}),
            "ms": round(ours * 1e3, 3),
            "baseline_ms": round(statistics.median(theirs) * 1e3, 3) if timed else None,
            "peak_bytes": own_peaks[baseline],
            "baseline_peak_bytes": peak_of_baseline,
            "gbps": round(moved / ours / 1e9, 4),
        }
        if not timed:
            row["computed"] = True
        if device.type == "cuda" and (roofs := _PEAKS.get(torch.cuda.get_device_name(device))):
            share = flops / roofs[0] if case.bound == "arithmetic" else moved / roofs[1]
            row["roofline"] = round(share / ours, 3)
        row |= {
            "machine": machine(device, dtype),
            "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
            "versions": versions("torch", "triton"),
        }
        rows.append(row)
    torch._dynamo.reset()
    return rows


def _compiled(function: Callable, inputs: tuple) -> Callable | None:
    """The function under torch.compile, compiled; None where there is no compiler for this device."""
    compiled = torch.compile(function, dynamic=False)
    try:
        compiled(*inputs)
    except torch._dynamo.exc.BackendCompilerFailed:
        return None
    return compiled


def _interleaved(contestants: dict[str, Callable], inputs: tuple, device: torch.device, rounds: int):
    """Return seconds of a call, a list with one a round for each contestant; and what the last calls returned."""
    repeats, seconds, outputs = {}, {name: [] for name in contestants}, {}
    for name, function in contestants.items() if rounds > 1 else ():
        warm, _ = _seconds(function, inputs, device, 1)
        repeats[name] = min(100, math.ceil(0.05 / warm))
    for _ in range(rounds):
        for name, function in contestants.items():
            outputs.pop(name, None)
            spent, outputs[name] = _seconds(function, inputs, device, repeats.get(name, 1))
            seconds[name].append(spent)
    return seconds, outputs


def _seconds(function: Callable, inputs: tuple, device: torch.device, repeats: int) -> tuple[float, tuple]:
    """Seconds of one call, and its outputs. On a GPU with cold caches, and without the launches' time on the host."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            outputs = function(*inputs)
        return (time.perf_counter() - start) / repeats, outputs
    other = torch.empty(256 << 20, dtype=torch.uint8, device=device)  # larger than any GPU's cache
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in events:
        other.zero_()
        start.record()
        outputs = function(*inputs)
        stop.record()
    torch.cuda.synchronize(device)
    return sum(start.elapsed_time(stop) for start, stop in events) / repeats / 1e3, outputs
