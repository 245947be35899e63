"""What every training here shares: the learning rate's course, a checkpoint to go on from, and the log.

A checkpoint is one safetensors file that appears whole or not at all, so that a run that was killed anywhere goes on
from the last one, and ends with the bits of a run that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import open_safetensors, save_safetensors, write_file

__all__ = ["TrainingLog", "learning_rate", "load_checkpoint", "save_checkpoint"]

_FLOOR = 0.02  # of the peak, at which the cosine ends; chosen by hand


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then cosine to 2 % of the peak.

    >>> [round(learning_rate(step, 12, 1.0, 2), 2) for step in (0, 1, 2, 7, 12)]
    [0.5, 1.0, 1.0, 0.51, 0.02]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    x = (step - warmup) / max(1, steps - warmup)
    return peak * (_FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, x))))


def save_checkpoint(
    path: str | Path,
    step: int,
    parameters: Mapping[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    extra: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write parameters with the state of AdamW or Muon, and whatever else the run must remember.

    Args:
        step: how many steps were taken.
        parameters: name -> parameter of one of the optimisers; those that it never moved have no state.
        extra: further tensors; their names begin with neither "model.", "m.", "v.", "n." nor "muon.".
        metadata: further strings.
    """
    out = dict(extra or {})
    for name, parameter in parameters.items():
        out[f"model.{name}"] = parameter
        state = _owner(parameter, optimizers).state.get(parameter)
        if not state:
            continue
        if "momentum_buffer" in state:
            out[f"muon.{name}"] = state["momentum_buffer"]
        else:
            out |= {f"m.{name}": state["exp_avg"], f"v.{name}": state["exp_avg_sq"]}
            out[f"n.{name}"] = torch.as_tensor(state["step"], dtype=torch.float32).reshape(())
    save_safetensors(out, path, {**(metadata or {}), "step": str(step)})


def load_checkpoint(
    path: str | Path, parameters: Mapping[str, Tensor], optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[int, dict[str, Tensor], dict[str, str]]:
    """Put a checkpoint's parameters and their optimisers' state in place.

    Returns:
        (steps taken, extra tensors, metadata).

    Raises:
        SemipermError: no readable file, or other parameters than these.
    """
    with open_safetensors(path) as file:
        names, metadata = set(file.keys()), dict(file.metadata() or {})
        step = int(metadata["step"])
        ours = {f"{part}.{name}" for name in parameters for part in ("model", "m", "v", "n", "muon")}
        for name, parameter in parameters.items():
            parameter.data.copy_(file.get_tensor(f"model.{name}"))
            optimizer = _owner(parameter, optimizers)
            if f"muon.{name}" in names:
                optimizer.state[parameter] = {"momentum_buffer": file.get_tensor(f"muon.{name}").to(parameter.device)}
            if f"m.{name}" not in names:
                continue
            count = file.get_tensor(f"n.{name}") if f"n.{name}" in names else torch.tensor(float(step))
            moments = {"exp_avg": file.get_tensor(f"m.{name}"), "exp_avg_sq": file.get_tensor(f"v.{name}")}
            moments = {key: value.to(parameter.device) for key, value in moments.items()}
            # a fused optimiser keeps its count beside the moments
            fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
            optimizer.state[parameter] = {"step": count.to(parameter.device if fused else "cpu"), **moments}
        return step, {name: file.get_tensor(name) for name in names - ours}, metadata


def _owner(parameter: Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """The optimiser that moves a parameter."""
    return next(
        optimizer
        for optimizer in optimizers
        if any(parameter is own for group in optimizer.param_groups for own in group["params"])
    )


class TrainingLog:
    """Named figures by step, one JSON object a line; what a resumed run will write again is cut off first.

    Args:
        path: None keeps the rows in memory alone.
        step: of the checkpoint that the run goes on from; 0 begins anew.
    """

    def __init__(self, path: str | Path | None, step: int = 0):
        self.path = None if path is None else Path(path)
        self.rows: list[dict[str, Any]] = []
        if self.path is not None and step and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            self.rows = [row for row in map(_parsed, lines) if row is not None and row["step"] <= step]
        if self.path is not None:
            write_file(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._sums: dict[str, float] = {}
        self._counted, self._since = 0, time.monotonic()

    def count(self, **figures: float) -> None:
        """Add one step's figures to the row to come, which has their means."""
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._counted += 1

    def write(self, step: int, **figures: Any) -> dict[str, Any]:
        """Write the row of the steps counted since the last one; figures are added as they are."""
        means = {name: float(f"{value / self._counted:.6g}") for name, value in self._sums.items()}
        row = {"step": step, **means, **figures}
        if self._counted:
            row["seconds_per_step"] = round((time.monotonic() - self._since) / self._counted, 3)
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self._sums, self._counted, self._since = {}, 0, time.monotonic()
        return row


def _parsed(line: str) -> dict[str, Any] | None:
    """A row; None for a line that was cut off when the run was killed."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
