"""`train_membranes`: membranes by latent anchoring, for a loaded pipeline."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ...methods.errors import MembraneError
from ...methods.membranes.base_model import base_model_hash
from ...methods.membranes.concept_fit import phrases_of
from ...methods.membranes.types import Membrane, Membranes
from ...methods.training.config import TrainingConfig
from ...methods.training.loop import TrainingLog
from ...methods.training.packed import PackedMembranes, Site
from ..family import Pipeline, denoiser_of, device_of, family_of
from ..hooks import install, uninstall
from ..membranes.erase import erase_concepts
from ..membranes.state import MembraneHandle
from ..prediction import Predictor
from ..weights import shape_of, weights_of
from .layers import trained_layers
from .trainer import Trainer
from .validation import Validation
from .words import Words

__all__ = ["CHECKPOINT", "LOG", "train_membranes"]

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"  # in the working folder
METHOD = "latent_anchoring"
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
    from accelerate import Accelerator
    from accelerate.utils import broadcast

    config = config or TrainingConfig()
    family_of(pipe, video=False)
    if MembraneHandle.on(pipe) is not None:
        raise MembraneError(
            "membranes are at work on this pipeline, and would be taken for the untouched model; remove_membranes(pipe)"
            " first"
        )
    phrases, kept = phrases_of(concepts), None if preserve is None else list(preserve)
    device = device_of(pipe)
    accelerator = Accelerator(cpu=device.type == "cpu")
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
    about = {"training": json.dumps(asdict(config))}
    starts = [replace(membrane, method=METHOD, base_model=base, metadata=about) for membrane in solved]
    packed = PackedMembranes(
        {key: shape_of(module) for key, module in layers.items()},
        list(phrases),
        config.rank,
        [start if config.warm_start == "closed_form" else None for start in starts],
        config.seed,
        device,
        [key for key, module in layers.items() if hasattr(module, "kernel_size")],
    )
    if accelerator.num_processes > 1:  # devices may round the closed form differently: all begin from the first one's
        for parameter in packed.named().values():
            parameter.data.copy_(broadcast(parameter.data))
    words = Words(pipe, phrases, surrogate, kept, templates, config)
    said = [phrases, surrogate, kept, None if templates is None else list(templates), asdict(config), base]
    stamp = hashlib.sha256(json.dumps(said).encode()).hexdigest()
    with _prepared(pipe, layers, packed, config):
        trainer = Trainer(Predictor(pipe), words, packed, accelerator, stamp)
        _run(trainer, None if workdir is None else Path(workdir), progress)
    return Membranes(_finished(trainer, k, start) for k, start in enumerate(starts))


def _run(trainer: Trainer, workdir: Path | None, progress: Callable[[dict], None] | None) -> None:
    config, first = trainer.config, trainer.accelerator.is_main_process
    checkpoint = None if workdir is None else workdir / CHECKPOINT
    if checkpoint is not None and checkpoint.exists():
        trainer.load(checkpoint)
    log = TrainingLog(workdir / LOG if workdir is not None and first else None, trainer.step)
    validation = None
    if config.validate_every:
        validation = Validation(trainer.predictor, trainer.words, trainer.packed.names, trainer.device)
    if validation is not None and not trainer.step:
        log.write(0, validation=trainer.validate(validation))
    while trainer.step < config.steps and trainer.active:
        losses = trainer.train_step()
        if not all(value < float("inf") for value in losses.values()):  # NaN, too
            raise MembraneError(
                f"the loss is {losses['loss']} after {trainer.step} steps; expected a finite number: take a smaller"
                " learning_rate, precision='no' or 'bf16', or a model loaded in float32"
            )
        log.count(**losses)
        step, last = trainer.step, trainer.step == config.steps
        figures: dict[str, Any] = {}
        if validation is not None and (step % config.validate_every == 0 or last):
            figures = {"validation": trainer.validate(validation)}
            log.write(step, **figures)
        elif validation is None and (step % config.checkpoint_every == 0 or last):
            log.write(step)
        ended = last or not trainer.active
        # between two rows of the log the checkpoint would cut one in half, and a resumed run write another
        if checkpoint is not None and (ended or step % _stride(config) == 0):
            trainer.save(checkpoint)
        if progress is not None and first:
            progress({"step": step, "steps": config.steps, **losses, **figures})


def _stride(config: TrainingConfig) -> int:
    """Steps between two checkpoints: those asked for, up to the next row of the log."""
    every = config.validate_every or config.checkpoint_every
    return every * -(-config.checkpoint_every // every)


def _finished(trainer: Trainer, k: int, start: Membrane) -> Membrane:
    """What a concept's training came to: its best by validation, or its last where there was none."""
    if not trainer.config.validate_every:
        return trainer.packed.membrane(k, start)
    best = trainer.best[k]
    about = {**start.metadata, "step": str(best.step), "validation_loss": f"{best.loss:.6g}"}
    return trainer.packed.membrane(k, replace(start, metadata=about), trainer.kept[k])


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
