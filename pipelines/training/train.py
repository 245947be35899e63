"""`train_membranes`: membranes by latent anchoring, for a loaded pipeline."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...methods.errors import MembraneError
from ...methods.membranes.base_model import base_model_hash
from ...methods.membranes.concept_fit import phrases_of
from ...methods.membranes.gate_bank import GateBank
from ...methods.membranes.types import Membranes
from ...methods.training.config import TrainingConfig
from ...methods.training.model import Embedding
from ...methods.training.packed import PackedMembranes, Site
from ...methods.training.run import begun, finished, stamp_of, train
from ...methods.training.trainer import Trainer
from ...methods.training.words import Words
from ..family import Pipeline, denoiser_of, device_of, family_of
from ..hooks import install, uninstall
from ..latents import latent_shape
from ..membranes.erase import erase_concepts
from ..membranes.state import MembraneHandle
from ..prediction import Predictor
from ..text import encode_text
from ..weights import shape_of, weights_of
from .layers import trained_layers

__all__ = ["train_membranes"]

_HOOK = "_semiperm_training"


def train_membranes(
    pipe: Pipeline,
    concepts: str | Sequence[str],
    surrogate: str = "",
    preserve: Iterable[str] | None = None,
    *,
    templates: Sequence[str] | None = None,
    config: TrainingConfig | None = None,
    workdir: str | Path | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> Membranes:
    """Train one membrane per concept by latent anchoring; apply them with `apply_membranes`, as any others.

    L = |e_M(x, c) - [e(c*) - push (e(c) - e(c*))]|^2 + anchor_weight mean_a |e_M(x, a) - e(x, a)|^2

    Each begins from `erase_concepts` (`TrainingConfig.warm_start`), has its detector and its phrasings, and is trained
    as if it were alone. What is returned is each concept's best by a validation on wordings that it is not trained on.
    The pipeline is as it was afterwards. Under `accelerate launch`, processes share the pictures of each step.

    Args:
        pipe: SD1.x, SD2, SDXL, SD3 or Flux pipeline, without membranes on it.
        concepts: names; "robot|android|droid" names phrasings too.
        surrogate: what they turn into; "" leaves the phrase out of the caption.
        preserve: captions that must not change, from which anchors are drawn; None is a general list.
        templates: captions with one "{}" each; None is a general list.
        config: see `TrainingConfig`.
        workdir: of the checkpoint and the log; a run that was stopped goes on from there, to the same membranes. None
            keeps nothing.
        progress: called after each step with {"step", "steps", "loss", "erasing", "anchoring"}, and with "validation"
            (concept -> loss, erased, moved) where there was one.

    Raises:
        ModelError: an unsupported pipeline.
        MembraneError: no concept, a surrogate that is one, membranes at work on the pipeline, a checkpoint of another
            run, or a loss that is not finite.

    Source: SPM (arXiv 2312.16145), section 3.2; `TrainingConfig` says where we differ from its released code.

    >>> quick = TrainingConfig(steps=1, batch_size=1, anchors=1, layers="text", validate_every=0)
    >>> train_membranes(pipe, "robot|android", config=quick)
    Membranes(robot [latent_anchoring, 14 modules])
    """
    config = config or TrainingConfig()
    family_of(pipe, video=False)
    if MembraneHandle.on(pipe) is not None:
        raise MembraneError(
            "membranes are at work on this pipeline, and would be taken for the untouched model; remove_membranes(pipe)"
            " first"
        )
    phrases, kept = phrases_of(concepts), None if preserve is None else list(preserve)
    device = device_of(pipe)
    processes = _Processes(device)
    solved = erase_concepts(
        pipe,
        ["|".join(own) for own in phrases.values()],
        surrogate,
        kept,
        templates=templates,
        max_sequence_length=config.max_sequence_length or None,
    )
    layers = trained_layers(pipe, config.layers)
    base = base_model_hash(weights_of(pipe, layers))
    starts = begun(solved, base, config)
    packed = PackedMembranes(
        {key: shape_of(module) for key, module in layers.items()},
        list(phrases),
        config.rank,
        [start if config.warm_start == "closed_form" else None for start in starts],
        config.seed,
        device,
        [key for key, module in layers.items() if hasattr(module, "kernel_size")],
    )
    if processes.num_processes > 1:  # devices may round the closed form differently: all begin from the first one's
        for parameter in packed.named().values():
            parameter.data.copy_(processes.broadcast(parameter.data))
    model = _Model(pipe, config)
    words = Words(model.encode, phrases, surrogate, kept, templates, config)
    stamp = stamp_of(phrases, surrogate, kept, templates, config, base)
    gates = None
    if config.adversary_steps:
        gates = GateBank(lambda texts: encode_text(pipe, texts, model.length), starts, config.adversary_gate)
    with _prepared(pipe, layers, packed, config):
        trainer = Trainer(model, words, packed, processes, stamp, gates)
        train(trainer, None if workdir is None else Path(workdir), progress)
    return finished(trainer, starts)


class _Model(Predictor):
    """`methods.training.model.TrainedModel` of a pipeline."""

    def __init__(self, pipe: Pipeline, config: TrainingConfig):
        super().__init__(pipe)
        self.shape = latent_shape(pipe, config.height or None, config.width or None)
        self.length = config.max_sequence_length or None

    def encode(self, caption: str) -> Embedding:
        made = encode_text(self.pipe, [caption], self.length)
        return made.hidden[0], None if made.pooled is None else made.pooled[0]


class _Processes:
    """`methods.training.model.Processes` of `accelerate`."""

    def __init__(self, device: torch.device):
        from accelerate import Accelerator

        self._accelerator = Accelerator(cpu=device.type == "cpu")
        self.num_processes, self.process_index = self._accelerator.num_processes, self._accelerator.process_index
        self.is_main_process = self._accelerator.is_main_process
        self.mixed_precision = self._accelerator.mixed_precision
        self.reduce, self.gather = self._accelerator.reduce, self._accelerator.gather

    def broadcast(self, tensor: Tensor) -> Tensor:
        from accelerate.utils import broadcast

        return broadcast(tensor)


@contextlib.contextmanager
def _prepared(pipe: Pipeline, layers: dict, packed: PackedMembranes, config: TrainingConfig) -> Iterator[None]:
    """The denoiser with our hooks, its own weights frozen; afterwards as it was."""
    denoiser, _ = denoiser_of(pipe)
    wanted = {name: p.requires_grad for name, p in denoiser.named_parameters()}
    training, before = denoiser.training, bool(getattr(denoiser, "is_gradient_checkpointing", False))
    placed = []
    try:
        denoiser.requires_grad_(False)
        denoiser.eval()
        if config.gradient_checkpointing and not before:
            denoiser.enable_gradient_checkpointing()
        for key, module in layers.items():
            install(module, Site(packed, key), _HOOK)
            placed.append(module)
        with torch.enable_grad():
            yield
    finally:
        for module in placed:
            uninstall(module, _HOOK)
        if config.gradient_checkpointing and not before:
            denoiser.disable_gradient_checkpointing()
        denoiser.train(training)
        for name, parameter in denoiser.named_parameters():
            parameter.requires_grad_(wanted[name])
