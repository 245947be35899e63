"""What a method costs: a denoising step beside the untouched model's in the same run, and the bytes to hand on."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from ...methods.membranes.file import save_membranes
from ...pipelines.membranes.state import MembraneHandle
from ..store import digest
from ..timing import run_seconds, spread

__all__ = ["fingerprint", "size", "step_ratio", "storages"]

_BATCH, _STEPS = 4, 4  # of a timed run: enough that a step is not all Python


def step_ratio(pipe, bare, prompts: Sequence[str], call: Mapping[str, Any], extra: Mapping[str, Any], rounds: int):
    """{"ratio", "spread", "rounds", "ms": of the bare step}: the method's steps in times the untouched model's, with
    one of these on either side of it."""
    prompts = list(prompts[:_BATCH])
    call = {**call, "num_inference_steps": _STEPS, "output_type": "latent"}

    def seconds(of, more: Mapping[str, Any]) -> float:
        if isinstance(more.get("negative_prompt"), str):
            more = {**more, "negative_prompt": [more["negative_prompt"]] * len(prompts)}
        noise = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        device = getattr(of, "device", torch.device("cpu"))
        given = {**call, **more, "generator": noise}
        return run_seconds(lambda ended: of(prompts, callback_on_step_end=ended, **given), device)[1]

    seconds(pipe, extra)  # plans, caches and folds are made
    ratios, bares = [], [seconds(bare, {})]
    for _ in range(max(rounds, 2)):
        own = seconds(pipe, extra)
        bares.append(seconds(bare, {}))
        ratios.append(2 * own / (bares[-2] + bares[-1]))
    middle = sorted(bares)[len(bares) // 2] / (_STEPS - 1)
    return {**spread(ratios), "ms": round(middle * 1e3, 3)}


def parts_of(pipe) -> dict[str, nn.Module]:
    """The pipeline's modules by name."""
    parts = getattr(pipe, "components", {})
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def fingerprint(pipe) -> str:
    """Changes with every weight and buffer of the pipeline, with its scheduler's settings, and with hooks and functions
    put on the pipeline or its modules."""
    scheduler = getattr(pipe, "scheduler", None)
    own = sorted(name for name, value in vars(pipe).items() if isinstance(value, (FunctionType, MethodType)))
    said: list = [type(pipe).__name__, own, type(scheduler).__name__, str(getattr(scheduler, "config", ""))]
    for name, part in parts_of(pipe).items():
        for key, module in part.named_modules():
            hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
            said.append([name, key, type(module).__name__, hooks, "forward" in vars(module)])
        for key, tensor in part.state_dict().items():
            content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            said.append([name, key, digest(content)])
    return digest(said)


def _alive() -> dict[int, int]:
    """Of the tensors that are alive: where their storage lies, to its bytes."""
    gc.collect()
    found = (one for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter))
    kept = (one.untyped_storage() for one in found if one.layout == torch.strided and one.device.type != "meta")
    return {storage.data_ptr(): storage.nbytes() for storage in kept}


def storages() -> set[int]:
    """Where the tensors lie that are alive."""
    return set(_alive())


def size(pipe, bare, before: set[int]) -> dict[str, Any]:
    """{"bytes", "of": what was counted} of the method at work on the pipeline.

    Membranes: their file. Changed weights: all of the tensors that are not the untouched model's. Neither: the tensors
    that were not there before the method was (0 for a text).

    Args:
        before: `storages()` from before the method was at work.
    """
    if parts_of(pipe) and (handle := MembraneHandle.on(pipe)) is not None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "membranes.safetensors")
            save_membranes(handle.membranes, file)
            return {"bytes": file.stat().st_size, "of": "file"}
    changed, plain = 0, parts_of(bare)
    for name, part in parts_of(pipe).items():
        kept = plain[name].state_dict() if name in plain else {}
        for key, tensor in part.state_dict().items():
            if key not in kept or not torch.equal(tensor, kept[key].to(tensor)):
                changed += tensor.nbytes
    if changed:
        return {"bytes": changed, "of": "changed weights"}
    return {"bytes": sum(held for place, held in _alive().items() if place not in before), "of": "tensors held"}
