"""A training run from its start or its checkpoint to its end, whatever framework calls the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..errors import MembraneError
from ..membranes.types import Membrane, Membranes
from .config import TrainingConfig
from .loop import TrainingLog
from .trainer import Trainer
from .validation import Validation

__all__ = ["CHECKPOINT", "LOG", "METHOD", "begun", "finished", "stamp_of", "train"]

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"  # in the working folder
METHOD = "latent_anchoring"


def begun(solved: Iterable[Membrane], base: str, config: TrainingConfig) -> list[Membrane]:
    """What the trained membranes are, but for their tensors.

    Args:
        solved: by the closed form, one for each concept. base: hash of the trained layers' weights.
    """
    method = METHOD if config.objective == "anchoring" else f"{METHOD}/{config.objective}"
    about = {"training": json.dumps(asdict(config))}
    return [replace(membrane, method=method, base_model=base, metadata=about) for membrane in solved]


def stamp_of(
    phrases: Mapping[str, Sequence[str]],
    surrogate: str,
    preserve: Sequence[str] | None,
    templates: Sequence[str] | None,
    config: TrainingConfig,
    base: str,
) -> str:
    """What two runs have in common that go the same way: a checkpoint of one is one of the other."""
    said = [phrases, surrogate, preserve, None if templates is None else list(templates), asdict(config), base]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def train(trainer: Trainer, workdir: Path | None, progress: Callable[[dict[str, Any]], None] | None) -> None:
    """Take all steps that are left, with validation, log and checkpoints.

    Args:
        workdir: of the checkpoint and the log; a checkpoint that is there is gone on from. None keeps nothing.
        progress: called after each step; what it raises ends the run, which goes on from its last checkpoint.

    Raises:
        MembraneError: a checkpoint of another run, or a loss that is not finite.
    """
    config, first = trainer.config, trainer.processes.is_main_process
    checkpoint = None if workdir is None else workdir / CHECKPOINT
    if checkpoint is not None and checkpoint.exists():
        trainer.load(checkpoint)
    log = TrainingLog(workdir / LOG if workdir is not None and first else None, trainer.step)
    validation = None
    if config.validate_every and trainer.step < config.steps and trainer.active:  # nothing is left to measure otherwise
        validation = Validation(trainer.model, trainer.words, trainer.packed, trainer.processes)
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


def finished(trainer: Trainer, starts: Sequence[Membrane]) -> Membranes:
    """What each concept's training came to: its best by validation, or its last where there was none."""
    packed, made = trainer.packed, []
    for k, start in enumerate(starts):
        if not trainer.config.validate_every:
            made.append(packed.membrane(k, start))
            continue
        best = trainer.best[k]
        about = {**start.metadata, "step": str(best.step), "validation_loss": f"{best.loss:.6g}"}
        made.append(packed.membrane(k, replace(start, metadata=about), trainer.kept[k]))
    return Membranes(made)
