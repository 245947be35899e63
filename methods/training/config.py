"""What a training run is set to, in every face, and the TOML file that says it."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import MembraneError

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same module, before it was part of Python
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

__all__ = [
    "ADVERSARY_GATES",
    "ANCHORS",
    "LAYERS",
    "OBJECTIVES",
    "PRECISIONS",
    "WARM_STARTS",
    "TrainingConfig",
    "TrainingFile",
    "read_training",
]

LAYERS = ("text", "cross", "all")
ANCHORS = ("both", "captions", "latent")
WARM_STARTS = ("closed_form", "none")
OBJECTIVES = ("anchoring", "trajectory")
ADVERSARY_GATES = ("auto", "probe", "paper", "always")
PRECISIONS = ("no", "fp16", "bf16")


@dataclass(frozen=True)
class TrainingConfig:
    """How membranes are trained by latent anchoring.

    L = |e_M(x, c) - [e(c*) - push (e(c) - e(c*))]|^2 + anchor_weight mean_a |e_M(x, a) - e(x, a)|^2

    with c a caption of the concept, c* the same with the surrogate, a anchors away from c, e the untouched model's
    prediction and e_M the one through the membrane.

    Args:
        steps: of the optimiser, at most; early stop may end before.
        learning_rate, warmup: peak of AdamW's, and the steps that lead up to it; from there on along a cosine.
        rank: of each projection's pair, >= 1; where a warm start has a pair, it keeps its own rank.
        layers: "text" (what reads text alone: the cheapest at work, cached once a prompt), "cross" (also the other
            projections of cross-attention, of joint attention in transformers), "all" (SPM's choice: attention, feed-
            forward, and the blocks' own projections).
        warm_start: "closed_form" (begin from `erase_concepts`) or "none" (`up` is zero: the untouched model).
        objective: "anchoring" (as above, at one point of a picture's way with each step) or "trajectory" (the whole way
            of a picture with the surrogate, see `methods.training.trajectory`; each step costs about three times
            `sampling_steps` of the other's, and `push` has no part in it).
        flow_target: log beta of the trajectory objective, >= 0: how hard it pulls in the beginning.
        push: eta >= 0, how far beyond the surrogate; 1 is SPM's, 0 the surrogate itself.
        anchor_weight: lambda >= 0; 0 keeps nothing in place.
        anchors: captions or latents drawn for each row of the concept, >= 1.
        anchor_power: alpha >= 0 of P(a) ~ (1 - |cos(a, c)|)^alpha; 0 draws without looking at the concept.
        anchor_source: "captions" (of the list to preserve), "latent" (points of text space between and beyond them), or
            "both" in turn.
        batch_size: pictures of a concept that are drawn and trained on side by side.
        height, width: of those pictures, in pixels; 0 is the model's own size.
        sampling_steps: of the sampler whose latents are trained on, one at each step.
        sampling_guidance: of that sampler, towards the concept; 1 is none.
        adversary_steps: of a search, at each step, for texts near the concept's captions that still bring it back; they
            are erased beside the captions. 0 is none; each costs about as much as a step without. For attacks on text.
        adversary_radius: how near, as a share of the captions' norm.
        adversary_gate: the gate that these texts must pass to reach the membrane, as they will at work: "auto" (of
            `MembraneConfig`), "probe", "paper", or "always" for a membrane that will be always on.
        concepts_per_batch: concepts whose rows go through the denoiser together: memory for speed, the same result.
        max_sequence_length: T5 positions (SD3, Flux), as in the pipeline's call; 0 is its default.
        validate_every: steps between two validations; 0 is never, and then nothing stops early.
        patience: validations without an improvement after which a concept stops; 0 goes on to the end.
        checkpoint_every: steps between two checkpoints, >= 1.
        precision: of the denoiser under autocast: "no" (as it was loaded), "fp16" or "bf16".
        gradient_checkpointing: compute the denoiser's layers twice and keep none: less memory, a third more time.
        seed: of all that is drawn.

    Raises:
        MembraneError: a value outside its range.

    Source: SPM (arXiv 2312.16145), equations 4 to 7. Its released code drops half of the anchors, computes an
    unconditional half that it throws away, and rejects no anchor; here every row that is computed is used.
    """

    steps: int = 200
    learning_rate: float = 5e-3
    warmup: int = 10
    rank: int = 1
    layers: str = "all"
    warm_start: str = "closed_form"
    objective: str = "anchoring"
    flow_target: float = 2.5
    push: float = 1.0
    anchor_weight: float = 10.0
    anchors: int = 2
    anchor_power: float = 1.0
    anchor_source: str = "both"
    batch_size: int = 2
    height: int = 0
    width: int = 0
    sampling_steps: int = 20
    sampling_guidance: float = 3.0
    adversary_steps: int = 0
    adversary_radius: float = 0.3
    adversary_gate: str = "auto"
    concepts_per_batch: int = 1
    max_sequence_length: int = 0
    validate_every: int = 25
    patience: int = 3
    checkpoint_every: int = 25
    precision: str = "no"
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self):
        for name, choices in (
            ("layers", LAYERS),
            ("warm_start", WARM_STARTS),
            ("anchor_source", ANCHORS),
            ("precision", PRECISIONS),
            ("objective", OBJECTIVES),
            ("adversary_gate", ADVERSARY_GATES),
        ):
            if getattr(self, name) not in choices:
                raise MembraneError(f"{name}={getattr(self, name)!r}; expected one of {', '.join(choices)}")
        for name, least in (
            *((n, 1) for n in ("steps", "rank", "anchors", "batch_size", "checkpoint_every", "concepts_per_batch")),
            ("sampling_steps", 2),
            *(
                (n, 0)
                for n in (
                    "warmup",
                    "validate_every",
                    "patience",
                    "seed",
                    "max_sequence_length",
                    "adversary_steps",
                    "height",
                    "width",
                )
            ),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise MembraneError(f"{name}={value!r}; expected a whole number, at least {least}")
        shares = ("learning_rate", "push", "anchor_weight", "anchor_power", "sampling_guidance", "adversary_radius")
        for name in (*shares, "flow_target"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise MembraneError(f"{name}={value!r}; expected a finite number >= 0")
        if self.learning_rate == 0:
            raise MembraneError("learning_rate=0 trains nothing; expected a number above 0, such as 1e-3")
        if self.adversary_steps and self.adversary_radius == 0:
            raise MembraneError("adversary_radius=0 leaves its search no room; expected a share above 0, such as 0.3")
        if self.adversary_steps and self.objective == "trajectory":
            raise MembraneError(
                "adversary_steps with objective='trajectory', which looks for no other texts; expected"
                " objective='anchoring', or adversary_steps=0"
            )
        if not isinstance(self.gradient_checkpointing, bool):
            raise MembraneError(f"gradient_checkpointing={self.gradient_checkpointing!r}; expected true or false")

    @property
    def aim(self) -> float:
        """How far beyond the surrogate the target lies: `push`, or 0 where whole trajectories lead to the surrogate."""
        return self.push if self.objective == "anchoring" else 0.0


@dataclass(frozen=True)
class TrainingFile:
    """What a TOML file says of a run; the command line's options go before it.

    Args:
        concepts: names; "robot|android|droid" names phrasings too. surrogate: what they turn into.
        preserve: captions that must not change; None is a general list.
        templates: captions with one "{}" each; None is a general list.
        settings: fields of `TrainingConfig` that the file gives.
    """

    concepts: tuple[str, ...] = ()
    surrogate: str = ""
    preserve: tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def read_training(path: str | Path) -> TrainingFile:
    """Read a run's settings from TOML.

    concepts = ["robot|android", "ghost"]
    surrogate = ""
    [training]
    steps = 200

    Raises:
        MembraneError: no such file, no TOML, a name that is none of ours, or a value of another type.
    """
    path = Path(path)
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise MembraneError(f"{str(path)!r} is no readable TOML file ({error})") from None
    settings = found.pop("training", {})
    known = {"concepts": list, "surrogate": str, "preserve": list, "templates": list}
    for name, value in found.items():
        strings = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if name not in known or not isinstance(value, known[name]) or (known[name] is list and not strings):
            raise MembraneError(
                f"{str(path)!r}: {name} = {value!r}; expected concepts, preserve and templates as lists of strings,"
                " surrogate as a string, and a table [training]"
            )
    names = {one.name for one in fields(TrainingConfig)}
    if not isinstance(settings, dict) or (unknown := [name for name in settings if name not in names]):
        what = f"[training] has {', '.join(unknown)}" if isinstance(settings, dict) else "training is no table"
        raise MembraneError(f"{str(path)!r}: {what}; expected some of {', '.join(sorted(names))}")
    lists = {name: tuple(found[name]) for name in ("concepts", "preserve", "templates") if name in found}
    try:
        TrainingConfig(**settings)
    except MembraneError as error:
        raise MembraneError(f"{str(path)!r}: {error}") from None
    return TrainingFile(surrogate=found.get("surrogate", ""), settings=settings, **lists)
