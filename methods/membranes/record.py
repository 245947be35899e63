"""What a stack of membranes did in one run, in the same words in every face."""

from __future__ import annotations

from collections.abc import Sequence

from .config import MembraneConfig
from .gate_bank import GateBank

__all__ = ["FIRED", "membrane_report"]

FIRED = 0.01  # a gate below it in every row, in either direction, counts as never fired: nothing is seen of less


def membrane_report(
    bank: GateBank,
    config: MembraneConfig,
    rows: Sequence[dict],
    steps: Sequence[dict],
    *,
    modules: int,
    idle_modules: Sequence[str] = (),
    modes: Sequence[str] = (),
) -> dict:
    """The report of a run.

    Args:
        bank: the stack's gates. config: what it was set to.
        rows: {"kind": "positive" or "negative", "prompt", "source", "gamma": {concept: gate}, "opened": {concept:
            share}} of each row of text that the denoiser saw. Of an image-side membrane `gamma` is the widest gate of
            any token, and `opened` the largest share of one layer's tokens that were open at once. `prompt` is None
            where it is unknown; `source` says what the gate was judged from: "prompt" (text and token ids), or "embeds"
            (the embedding alone: gates that need token ids then used the feature cosine).
        steps: {"share", "sigma", "active"} of each step.
        modules: how many projections are wrapped. idle_modules: those that did not run.
        modes: how they were computed.

    Returns:
        {"concepts", "gates", "strength", "window", "modules", "idle_modules", "modes", "silent": concepts that never
        fired, "rows": as given, numbered by "row", "steps"}.
    """
    numbered = [{"row": number, **row} for number, row in enumerate(rows)]
    concepts = list(bank.concepts)
    silent = [c for c in dict.fromkeys(concepts) if all(abs(row["gamma"].get(c, 0.0)) < FIRED for row in numbered)]
    return {
        "concepts": concepts,
        "gates": list(bank.kinds),
        "strength": float(config.strength),
        "window": [config.start, config.end],
        "modules": modules,
        "idle_modules": list(idle_modules),
        "modes": list(modes),
        "silent": silent,
        "rows": numbered,
        "steps": list(steps),
    }
