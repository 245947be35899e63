"""What negative token merging costs a whole sampling run, beside the released algorithm.

A run is the pipeline from prompt to latents, four images of one prompt. A bare run stands before and after each
variant, and the ratio is taken to their mean. Nothing is reported unless our layers agree with the naive formula.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...methods.errors import TokenMergingError
from ...methods.token_merging.config import NegativeTokenMergingConfig
from ...methods.token_merging.merging import diversity_rows, merge_tokens
from ...pipelines.family import denoiser_of
from ...pipelines.loaders import load_pipeline
from ...pipelines.token_merging.apply import apply_negative_token_merging
from ..memory import Peak
from ..timing import machine, ratio_row, versions

BATCH = 4
WIDE = 0.6  # of the schedule: the window that the canvas needs, see benchmarks/token_merging/judged.py
_PROMPT = "a robot in flat style on a sky background"
_TIE = 1e-5  # of a cosine: ten times what float32 products of a thousand channels are off
_AGREE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # relative


def run(model="canvas", quick: bool = False) -> list[dict]:
    """Time sampling with negative token merging in both modes, at the default window and at a wide one.

    Args:
        model: "canvas", a diffusers folder, a hub id, a .safetensors file, or a loaded pipeline.
        quick: fewer rounds and steps, and no peers.

    Returns:
        Rows {"name", "shape", "baseline", "ratio": median, "spread": [low, high] over the middle half of the rounds,
        "ms": bare run, "rounds", "peak_bytes": of one active step beside the bare one's, "window", "model", "machine",
        "versions"}. The peers "negtome/..." are the released algorithm, re-implemented from its formula.

    Raises:
        TokenMergingError: our layers disagree with the naive formula: a wrong answer has no speed.
    """
    pipe = load_pipeline(model) if isinstance(model, (str, Path)) else model
    pipe.set_progress_bar_config(disable=True)
    rounds, steps = (2, 5) if quick else (15, 25)
    picture = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))
    default = NegativeTokenMergingConfig().end
    variants: dict[tuple[str, float], Callable] = {
        (f"negative_token_merging/{mode}", end): _ours(pipe, NegativeTokenMergingConfig(reference=image, end=end))
        for end in (default, WIDE)
        for mode, image in (("diversity", None), ("reference", picture))
    }
    if not quick and hasattr(pipe, "unet"):
        variants["negtome/diversity", default] = released(pipe, default, None)
        variants["negtome/reference", default] = released(pipe, default, picture)
    _check_agreement(pipe)
    bare, ratios = [], {name: [] for name in variants}
    _seconds(pipe, steps, BATCH)
    for _ in range(rounds):
        before = _seconds(pipe, steps, BATCH)
        for name, enter in variants.items():
            with enter() as images:
                seconds = _seconds(pipe, steps, images)
            after = _seconds(pipe, steps, BATCH)
            ratios[name].append(2 * seconds / (before + after))
            bare.append(after)
            before = after
    denoiser, _ = denoiser_of(pipe)
    about = {
        "baseline": "bare",
        "model": str(model) if isinstance(model, (str, Path)) else type(pipe).__name__,
        "machine": machine(denoiser.device, denoiser.dtype),
        "versions": versions("torch", "diffusers"),
    }
    rows = []
    for (name, end), values in ratios.items():
        row = ratio_row(name, BATCH, values, statistics.median(bare), **about)
        row["shape"] = f"B{row.pop('k')}, {steps} steps"
        rows.append(row | {"window": [0.0, end], "peak_bytes": _peak(pipe, variants[name, end])})
    return rows


def _ours(pipe, config: NegativeTokenMergingConfig) -> Callable:
    @contextlib.contextmanager
    def enter() -> Iterator[int]:
        with apply_negative_token_merging(pipe, config):
            yield BATCH

    return enter


def naive_merge(x: Tensor, alpha: float = 0.9, threshold: float = 0.7, axis: int = -1) -> Tensor:
    """The released algorithm: row 0 of the batch is the reference, and the whole matrix of cosines is made.

    Args:
        axis: -2 as released (the best output token for each reference token), -1 as meant.
    """
    unit = F.normalize(x, dim=-1)
    score, index = (unit @ unit[:1].mT).max(dim=axis)
    match = x[:1].expand_as(x).gather(1, index[..., None].expand_as(x))
    return torch.where((score > threshold)[..., None], (1 + alpha) * x - alpha * match, x)


def released(pipe, end: float, picture: Tensor | None) -> Callable:
    """Both attentions of the up blocks, each half of guidance by itself; the reference is encoded at every step, and
    is denoised as one more image, in every step."""

    @contextlib.contextmanager
    def enter() -> Iterator[int]:
        inside = [False]

        def root(_, args, kwargs):
            timestep = args[1] if len(args) > 1 else kwargs["timestep"]
            inside[0] = 1 - float(timestep) / 1000 <= end
            if picture is not None:
                latents = pipe.vae.encode(
                    (picture[None] * 2 - 1).to(pipe.vae.device, pipe.vae.dtype)
                ).latent_dist.mode()
                sample = args[0].clone()
                sample[0] = sample[len(sample) // 2] = latents[0] * pipe.vae.config.scaling_factor
                return (sample, *args[1:]), kwargs
            return None

        def layer(_, __, output):
            return torch.cat([naive_merge(half, axis=-2) for half in output.chunk(2)]) if inside[0] else output

        hooks = [pipe.unet.register_forward_pre_hook(root, with_kwargs=True)]
        hooks += [
            module.register_forward_hook(layer)
            for path, module in pipe.unet.named_modules()
            if path.startswith("up_blocks") and path.endswith(("attn1", "attn2"))
        ]
        try:
            yield BATCH + (picture is not None)
        finally:
            for hook in hooks:
                hook.remove()

    return enter


@torch.no_grad()
def _check_agreement(pipe) -> None:
    """Our merge of a layer's real outputs against the naive formula along the right axis, image 0 as reference."""
    denoiser, _ = denoiser_of(pipe)
    path, layer = next((n, m) for n, m in denoiser.named_modules() if n.endswith(("attn1", "attn")))
    outputs = []
    hook = layer.register_forward_hook(lambda *call: outputs.append(call[2]))
    try:
        _seconds(pipe, 1, BATCH)
    finally:
        hook.remove()
    x = (outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0])[-BATCH:]
    config = NegativeTokenMergingConfig(threshold=0.7, diversity="first")
    merged, _ = merge_tokens(x, x, diversity_rows([0] * BATCH, "first", x.device), config)
    expected = naive_merge(x.float())
    unit = F.normalize(x.double(), dim=-1)
    best, second = (unit @ unit[:1].mT).topk(2).values.unbind(-1)
    clear = (best - second > _TIE) & ((best - config.threshold).abs() > _TIE)  # either match is right where two tie
    clear[0] = False
    error = float((merged.float() - expected)[clear].norm() / expected[clear].norm())
    if not error < _AGREE[x.dtype] or not torch.equal(merged[0], x[0]):
        raise TokenMergingError(f"{path}: merged tokens are off the naive formula by {error:.2e}; nothing is reported")


def _seconds(pipe, steps: int, images: int) -> float:
    cuda = denoiser_of(pipe)[0].device.type == "cuda"
    noise = torch.Generator().manual_seed(0)
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    pipe(_PROMPT, num_images_per_prompt=images, num_inference_steps=steps, generator=noise, output_type="latent")
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def _peak(pipe, enter: Callable) -> int:
    """Peak bytes of the first step, less those of the bare one."""

    def of(images: int) -> int:
        if denoiser_of(pipe)[0].device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            _seconds(pipe, 1, images)
            return torch.cuda.max_memory_allocated()
        with Peak() as peak:
            _seconds(pipe, 1, images)
        return peak.beyond(())

    with enter() as images:
        with_it = of(images)
    return with_it - of(BATCH)
