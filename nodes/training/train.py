"""Membranes trained in ComfyUI, by the core that also trains on diffusers (`methods.training`)."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ...methods.errors import MembraneError
from ...methods.membranes.base_model import base_model_hash
from ...methods.membranes.concept_fit import phrases_of
from ...methods.membranes.gate_bank import GateBank
from ...methods.membranes.types import GateProbe, Membranes
from ...methods.pictures import from_pil
from ...methods.training.config import TrainingConfig
from ...methods.training.model import OneProcess
from ...methods.training.packed import PackedMembranes, Site
from ...methods.training.plot import training_plot
from ...methods.training.run import LOG, begun, finished, stamp_of, train
from ...methods.training.trainer import Trainer
from ...methods.training.validation import ROWS
from ...methods.training.words import Words
from ..membranes.concept_text import erase_in
from ..membranes.patch import ATTACHMENT, through
from ..private import private_folder
from ..root_patch import add_around
from .layers import trained_layers
from .model import ComfyModel

logger = logging.getLogger(__name__)

__all__ = ["Trained", "train_in"]

_PREVIEW = 512  # pixels along the longer side, as ComfyUI's own previews
_SHOWN = 4  # concepts in a preview
_HALF = {torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Trained:
    """What a run gives: the membranes, and its course as a picture (1, H, W, 3)."""

    membranes: Membranes
    course: Tensor


def train_in(
    model,
    clip,
    vae,
    concepts: Sequence[str],
    surrogate: str = "",
    preserve: Sequence[str] = (),
    config: TrainingConfig | None = None,
    preview_every: int = 5,
    resume: bool = True,
) -> Trained:
    """Train one membrane per concept for this MODEL and CLIP; nothing is applied.

    Trained on the model as it is, LoRAs and other patches included; begun from the checkpoint's own weights.

    Args:
        concepts: names; "robot|android" names a synonym too. preserve: captions that must not change, from which
            anchors are drawn, in place of a general list; () takes that.
        config: its height and width are those of the pictures, in pixels. precision "no" is the model's own.
        preview_every: steps between two previews; 0 shows none.
        resume: keep a checkpoint in user/__semiperm/training, and go on from it when the same run is asked for again.

    Raises:
        MembraneError: no concept, an unsupported model, membranes at work on it, or a loss that is not finite.
        InterruptProcessingException: cancelled; a run with `resume` goes on from its last checkpoint.
    """
    concepts = [concept.strip() for concept in concepts if concept.strip(" |")]
    if not concepts:
        raise MembraneError("the concept is empty; write what to erase, one concept a line, e.g. robot|android")
    if model.get_attachment(ATTACHMENT) is not None:
        raise MembraneError(
            "membranes are at work on this model, and would be taken for the untouched one; connect the MODEL that goes"
            " into Apply Membranes or Erase Concept"
        )
    config, surrogate = config or TrainingConfig(), surrogate.strip()
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    if config.precision == "no" and dtype in _HALF:
        config = replace(config, precision=_HALF[dtype])
    kept = [caption.strip() for caption in preserve if caption.strip()] or None
    with torch.inference_mode(False), torch.no_grad():
        return _trained(model, clip, vae, concepts, surrogate, kept, config, preview_every, resume)


def _trained(model, clip, vae, concepts, surrogate, kept, config, preview_every: int, resume: bool) -> Trained:
    phrases, layers = phrases_of(concepts), trained_layers(model, config.layers)
    base = base_model_hash({key: layer.weight for key, layer in layers.items()})
    with torch.inference_mode():  # in which ComfyUI made the encoder's weights, and may move them
        solved = erase_in(model, clip, concepts, surrogate, kept or ())
    starts = begun([replace(m, probe=_graded(m.probe)) for m in solved], base, config)
    patched = model.clone()
    device = patched.load_device
    packed = PackedMembranes(
        {key: layer.shape for key, layer in layers.items()},
        list(phrases),
        config.rank,
        [start if config.warm_start == "closed_form" else None for start in starts],
        config.seed,
        device,
        [key for key, layer in layers.items() if layer.weight.ndim == 4],
    )
    for key, layer in layers.items():
        module = comfy.utils.get_attr(model.model, layer.path)
        add_around(patched, f"{layer.path}.forward", partial(through, Site(packed, key), module, layer.part))
    answering = ComfyModel(patched, clip, config.width, config.height)
    words = Words(answering.encode, phrases, surrogate, kept, None, config)
    _read(words, config)
    stamp = stamp_of(phrases, surrogate, kept, None, config, f"{base} {_patches(model)}")
    gates = GateBank(answering.texts, starts, config.adversary_gate) if config.adversary_steps else None
    try:
        answering.load()
        trainer = Trainer(answering, words, packed, OneProcess(), stamp, gates)
        folder = private_folder("training") / stamp[:16] if resume else None
        watch = _Watch(trainer, vae, preview_every)
        with torch.enable_grad():
            train(trainer, folder, watch)
    finally:
        with torch.inference_mode():  # the clone's hooks leave the model that all clones share
            comfy.model_management.load_models_gpu([model])
    rows = watch.rows if folder is None else _log(folder)
    return Trained(finished(trainer, starts), rearrange(from_pil(training_plot(rows)), "c h w -> 1 h w c"))


def _graded(probe: GateProbe | None) -> GateProbe | None:
    """The same detector, which gradients can flow through."""
    return probe and replace(probe, weight=probe.weight.clone(), pooled=_graded(probe.pooled))


def _patches(model) -> str:
    """What tells the LoRAs and other patches of the weights apart, which `base` does not see."""

    def sums(value) -> list[float]:
        if isinstance(value, Tensor):
            return [float(value.double().abs().sum())]
        return [x for one in value for x in sums(one)] if isinstance(value, (list, tuple)) else []

    found = [
        [str(key), strength, strength_model, sums(getattr(patch, "weights", patch))]
        for key, patches in sorted(model.patches.items(), key=lambda item: str(item[0]))
        for strength, patch, strength_model, *_ in patches
    ]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16] if found else ""


def _read(words: Words, config: TrainingConfig) -> None:
    """Encode all that will be said: text encoder and denoiser may not have room beside each other."""
    said = {"": None}
    for name in words.phrases:
        words.anchors(name)
        for step in range(config.steps):
            for captions in words.pairs(name, config.batch_size, step):
                said |= dict.fromkeys(captions)
        if config.validate_every:
            for captions in words.held_out(name, ROWS):
                said |= dict.fromkeys(captions)
    for caption in said:
        words.encode([caption])
        comfy.model_management.throw_exception_if_processing_interrupted()


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]


class _Watch:
    """The progress of a run on the node: its bar, its previews, and whether it was cancelled."""

    def __init__(self, trainer: Trainer, vae, every: int):
        self.trainer, self.vae, self.every = trainer, vae, every
        self.bar = comfy.utils.ProgressBar(trainer.config.steps)
        self.rows: list[dict[str, Any]] = []

    def __call__(self, figures: dict[str, Any]) -> None:
        self.rows.append(figures)
        step = figures["step"]
        preview = None
        if self.every and (step == 1 or step % self.every == 0):
            preview = "JPEG", self.picture(), _PREVIEW
        self.bar.update_absolute(step, figures["steps"], preview)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def picture(self) -> Image.Image:
        """Of each concept, the picture that is furthest: as the model makes it by itself, and through the membrane."""
        rows = []
        with torch.inference_mode():
            for pair in list(self.trainer.seen.values())[:_SHOWN]:
                pixels = self.vae.decode(self.trainer.model.model.model.process_latent_out(pair.clone()))
                rows.append(torch.cat(list(pixels.float().cpu().clamp(0, 1)), dim=1))
        self.trainer.model.load()  # the decoder may have taken its place
        return Image.fromarray((torch.cat(rows) * 255).round().byte().numpy())
