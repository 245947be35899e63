"""What membranes cost per denoising step, against the bare pipeline and PEFT with as many adapters active.

One step is the denoiser's forward with guidance, as the pipeline calls it. Bare and variants are timed in turn within
each round, and the ratio is taken within the round: whatever else the machine does falls on both. Nothing is reported
unless all variants compute the same output.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ...methods.errors import MembraneError
from ...methods.membranes.closed_form import ClosedFormConfig, closed_form_membrane
from ...methods.membranes.config import MembraneConfig
from ...methods.membranes.packing import pack
from ...methods.membranes.types import Membranes
from ...pipelines.family import denoiser_of
from ...pipelines.loaders import load_pipeline
from ...pipelines.membranes.apply import apply_membranes, remove_membranes
from ...pipelines.text import module_keys, text_projections
from ..timing import machine, ratio_row, versions

COUNTS = (1, 10, 100)
MODES = ("cached", "folded", "fused")
_PROMPT = "a robot in flat style on a sky background"
_AGREE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}  # relative; PEFT sums in another order


def run(model="canvas", quick: bool = False) -> list[dict]:
    """Time K = 1, 10, 100 closed-form membranes in every mode, and PEFT with K adapters active.

    Args:
        model: "canvas", a diffusers folder, a hub id, a .safetensors file, or a loaded pipeline.
        quick: fewer and shorter rounds, K = 1 and 10 only.

    Returns:
        Rows {"name", "k", "ratio": median, "spread": [low, high] over the middle half of the rounds, "ms": bare median,
        "rounds", "model", "machine", "versions"}. A ratio of 1 is the bare pipeline.

    Raises:
        MembraneError: the variants disagree: a wrong answer has no speed.
    """
    pipe = load_pipeline(model) if isinstance(model, (str, Path)) else model
    pipe.set_progress_bar_config(disable=True)
    denoiser, _ = denoiser_of(pipe)
    args, kwargs = _captured(pipe, denoiser)
    rounds, steps = (5, 3) if quick else (25, 5)
    rows = []
    for count in COUNTS[: 2 if quick else 3]:
        stack = synthetic(pipe, count)
        variants = {f"membranes/{mode}": _membranes(pipe, stack, mode) for mode in MODES}
        if (peer := _with_peft(pipe, stack)) is not None:
            variants["peft/adapters"] = lambda peer=peer: (peer, lambda: None)
        _check_agreement(denoiser, variants, args, kwargs)
        bare, ratios = [], {name: [] for name in variants}
        for _ in range(rounds):
            before = _step_seconds(denoiser, args, kwargs, steps)
            for name, enter in variants.items():
                active, leave = enter()
                seconds = _step_seconds(active, args, kwargs, steps)
                leave()
                after = _step_seconds(denoiser, args, kwargs, steps)
                ratios[name].append(2 * seconds / (before + after))  # the bare step on both sides of it
                bare.append(after)
                before = after
        about = {
            "model": str(model) if isinstance(model, (str, Path)) else type(pipe).__name__,
            "machine": machine(denoiser.device, denoiser.dtype),
            "versions": versions("torch", "diffusers", "peft"),
        }
        rows += [ratio_row(name, count, values, statistics.median(bare), **about) for name, values in ratios.items()]
    return rows


def synthetic(pipe, count: int, seed: int = 0) -> Membranes:
    """K closed-form membranes of the default rank over the token projections: random edits, the true cost and shape."""
    noise = torch.Generator().manual_seed(seed)
    weights = {key: module.weight.detach() for key, module in text_projections(pipe)[0].items()}
    width = next(iter(weights.values())).shape[1]
    rank, membranes = ClosedFormConfig().rank, []
    for k in range(count):
        u, v = (torch.randn(width, rank, generator=noise, dtype=torch.float64) for _ in range(2))
        edit = (u * 0.1 / count, v.T / width)
        membranes.append(closed_form_membrane(weights, edit, f"concept {k}", base_model=None))
    return Membranes(membranes)


def _membranes(pipe, stack: Membranes, mode: str) -> Callable:
    def enter():
        apply_membranes(pipe, stack, MembraneConfig(gate="always", mode=mode))
        return denoiser_of(pipe)[0], lambda: remove_membranes(pipe)

    return enter


def _with_peft(pipe, stack: Membranes):
    """A copy of the denoiser with every membrane as a LoRA adapter of its own, all active; None without PEFT."""
    try:
        import peft  # noqa: F401
    except ImportError:
        return None
    denoiser, attribute = denoiser_of(pipe)
    paths = {key: path for key, (path, _) in module_keys(denoiser, attribute).items()}
    peer = copy.deepcopy(denoiser)
    names = []
    for k, membrane in enumerate(stack):
        tensors = {}
        for key in membrane.modules:
            down, up, _ = pack([membrane], key)
            tensors[f"{paths[key]}.lora_A.weight"] = down.contiguous()
            tensors[f"{paths[key]}.lora_B.weight"] = up.T.contiguous()
        peer.load_lora_adapter(tensors, prefix=None, adapter_name=f"adapter_{k}")
        names.append(f"adapter_{k}")
    peer.set_adapters(names, [1.0] * len(names))
    return peer.to(denoiser.device, denoiser.dtype).eval()


@torch.no_grad()
def _captured(pipe, denoiser) -> tuple[tuple, dict]:
    """The arguments of the denoiser's first call in a guided run."""
    calls = []
    hook = denoiser.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    try:
        pipe(_PROMPT, num_inference_steps=1, output_type="latent")
    finally:
        hook.remove()
    return calls[0]


@torch.no_grad()
def _check_agreement(denoiser, variants: dict[str, Callable], args: tuple, kwargs: dict) -> None:
    outputs: dict[str, Tensor] = {"bare": _output(denoiser, args, kwargs)}
    for name, enter in variants.items():
        active, leave = enter()
        outputs[name] = _output(active, args, kwargs)
        leave()
    reference = outputs["membranes/fused"]
    effect = (reference - outputs.pop("bare")).norm()
    for name, output in outputs.items():
        error = float((output - reference).norm() / reference.norm())
        if not error < _AGREE[denoiser.dtype] or effect == 0:
            raise MembraneError(f"{name} differs from the fused membranes by {error:.2e}; expected the same output")


def _output(denoiser, args: tuple, kwargs: dict) -> Tensor:
    output = denoiser(*args, **kwargs)
    return (output[0] if isinstance(output, tuple) else output.sample).float()


@torch.no_grad()
def _step_seconds(denoiser, args: tuple, kwargs: dict, steps: int) -> float:
    """Median over steps, after the first, which makes plans, caches and folds."""
    cuda = denoiser.device.type == "cuda"
    seconds = []
    for _ in range(steps + 1):
        if cuda:
            torch.cuda.synchronize(denoiser.device)
        start = time.perf_counter()
        denoiser(*args, **kwargs)
        if cuda:
            torch.cuda.synchronize(denoiser.device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
