"""The nouns of the package: a membrane, its low-rank pairs, its gate probe, and an ordered stack of membranes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

import torch
from torch import Tensor

from ..errors import MembraneError
from .visual import VisualSide

# Of prompts that name the concept: what a detector may miss and still be relied on. The words themselves are matched
# beside it; this bounds what else it would let pass of what it was made to know.
MOST_FALSE_CLOSED = 0.02
# Below it a word is none that the text encoder knows: on the embedded worlds words that it learnt move captions by 1.4
# to 2.3 times their spread, nouns that it takes for noise by 0.06 to 0.21.
LEAST_MEANING = 0.25


@dataclass(frozen=True, eq=False)
class LowRank:
    """One wrapped projection: y = W x + gamma * scale * up (down x), with scale = alpha / rank.

    Args:
        down: (r, in), or (r, in, 1, 1) as files of 1x1 convolutions keep it.
        up: (out, r), or (out, r, 1, 1).
        alpha: finite; `alpha = rank` makes the scale 1, `alpha = 0` is neutral.

    Raises:
        MembraneError: shapes that do not fit together, kernels other than 1x1, NaN or Inf.
    """

    down: Tensor
    up: Tensor
    alpha: float

    def __post_init__(self):
        down, up = tuple(self.down.shape), tuple(self.up.shape)
        ok = len(down) == len(up) and len(down) in (2, 4) and down[2:] == up[2:] == (1, 1)[: len(down) - 2]
        if not ok or down[0] != up[1] or 0 in down + up:
            raise MembraneError(
                f"a low-rank pair has down {down} and up {up}; expected (r, in) and (out, r), or both with a trailing"
                " (1, 1); larger convolution kernels are not supported: export the adapter without them"
            )
        if not (self.down.is_floating_point() and self.up.is_floating_point()):
            raise MembraneError(f"a low-rank pair holds {self.down.dtype}/{self.up.dtype}; expected floating point")
        finite = torch.isfinite(self.down).all() and torch.isfinite(self.up).all()
        if not finite or not math.isfinite(self.alpha):
            raise MembraneError("a low-rank pair holds NaN or Inf; the file or the fit that made it is broken")

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def in_features(self) -> int:
        return self.down.shape[1]

    @property
    def out_features(self) -> int:
        return self.up.shape[0]

    @property
    def is_conv(self) -> bool:
        return self.down.ndim == 4


@dataclass(frozen=True, eq=False)
class GateProbe:
    """A linear detector on the text encoder's per-token hidden states h_t.

    gamma = clip((max_t <h_t, weight> - low) / (high - low), 0, 1), so gamma is exactly 0 below `low`, 1 above `high`.

    Args:
        weight: (d,).
        low, high: response thresholds, low < high.
        separation: lowest concept response in the fit set minus the one that all but 1 % of the others stay below, as
            a share of the distance of their means: 1 is ideal, <= 0 means that they overlap. None if unknown.
        false_closed: share, of prompts kept out of the fit that name the concept, for which it is not fully open.
        false_open: share, of prompts kept out of the fit that do not, for which it is not fully closed.
        checked: how many prompts each of the two was measured on. None: all three unknown.
        pooled: the detector on the pooled embedding (p,) of the families that read one; the wider gate counts.
        meaning: how far the concept's words move a caption's embeddings in the mean, as a share of how far captions lie
            from their mean. None if unknown.

    Raises:
        MembraneError: a weight that is not finite floats (d,), or low >= high.
    """

    weight: Tensor
    low: float
    high: float
    separation: float | None = None
    false_closed: float | None = None
    false_open: float | None = None
    checked: tuple[int, int] | None = None
    pooled: GateProbe | None = None
    meaning: float | None = None

    def __post_init__(self):
        if self.weight.ndim != 1 or not self.weight.is_floating_point() or not torch.isfinite(self.weight).all():
            raise MembraneError(f"a probe weight of shape {tuple(self.weight.shape)}; expected finite floats (d,)")
        if not self.low < self.high:
            raise MembraneError(f"probe thresholds low={self.low}, high={self.high}; expected low < high")

    def to(self, device: torch.device | str) -> GateProbe:
        """The same detector with its weights on this device."""
        return replace(
            self, weight=self.weight.to(device), pooled=None if self.pooled is None else self.pooled.to(device)
        )

    @property
    def tells(self) -> bool:
        """Whether it can be trusted to open: its fit set does not overlap, and of the prompts kept out at most
        `MOST_FALSE_CLOSED` found it closed. What is unknown is trusted."""
        apart = self.separation is None or self.separation > 0
        return apart and (self.false_closed is None or self.false_closed <= MOST_FALSE_CLOSED)

    @property
    def gate(self) -> str:
        """What gate "auto" comes to: "auto" where the detector tells; else "words" where the encoder does not know the
        concept's words, whose membrane has nothing to erase in prompts that do not say them; else "always"."""
        unknown = self.meaning is not None and self.meaning < LEAST_MEANING
        return "auto" if self.tells else "words" if unknown else "always"


@dataclass(frozen=True, eq=False)
class Membrane:
    """One concept's adapter, and what is needed to gate and to identify it: low-rank pairs, or what it looks like.

    Args:
        concept: the concept's name.
        modules: kohya/SPM prefix (`lora_unet_<diffusers path, "." as "_">`, `lora_transformer_...`) -> pair; {} for an
            image-side membrane.
        phrases: the concept and its synonyms, for the text gates; () means (concept,).
        surrogate: what the concept turns into; "" is the empty prompt.
        method: "spm", "lora", "closed_form/uce", "closed_form/null_space", "closed_form/rece", "visual/words", ...
        base_model: `base_model_hash` of the wrapped weights it was made for, or None.
        probe: the detector for gate "probe", or None.
        metadata: whatever else its file said.
        named: False where nobody said what it erases: `concept` is then its file's name, for people alone, and no gate
            compares a prompt with it.
        visual: an image-side membrane's directions, thresholds and layers; no words gate it.

    Raises:
        MembraneError: no name, or neither pairs nor an image side, or both of them.
    """

    concept: str
    modules: dict[str, LowRank]
    phrases: tuple[str, ...] = ()
    surrogate: str = ""
    method: str = "spm"
    base_model: str | None = None
    probe: GateProbe | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    named: bool = True
    visual: VisualSide | None = None

    def __post_init__(self):
        if not self.concept:
            raise MembraneError("a membrane without a concept name; give it one, e.g. concept='robot'")
        if not self.modules and self.visual is None:
            raise MembraneError(
                f"the membrane for {self.concept!r} wraps no module; expected at least one low-rank pair"
            )
        if self.modules and self.visual is not None:
            raise MembraneError(
                f"the membrane for {self.concept!r} has low-rank pairs and an image side; make two of it, which stack"
            )
        object.__setattr__(self, "phrases", tuple(self.phrases) or (self.concept,) * self.named)

    @property
    def keys(self) -> tuple[str, ...]:
        """The modules that it wraps, or whose answers it reads."""
        return tuple(self.modules) if self.visual is None else tuple(self.visual.sites)

    def with_concept(self, concept: str) -> Membrane:
        """The same membrane under this name; its synonyms stay."""
        phrases = (concept, *(phrase for phrase in self.phrases if phrase not in (concept, self.concept)))
        return replace(self, concept=concept, phrases=phrases, named=True)


class Membranes(Sequence[Membrane]):
    """An ordered, immutable stack of membranes; `+` concatenates, and the order does not change the result.

    Args:
        membranes: one, or any number; () is the empty stack.

    >>> pair = LowRank(down=torch.zeros(1, 8), up=torch.ones(4, 1), alpha=1.0)
    >>> stack = Membranes(Membrane("robot", {"lora_unet_to_k": pair})) + Membrane("ghost", {"lora_unet_to_k": pair})
    >>> stack.concepts, stack[1:].concepts
    (('robot', 'ghost'), ('ghost',))
    """

    def __init__(self, membranes: Membrane | Iterable[Membrane] = ()):
        self._items = (membranes,) if isinstance(membranes, Membrane) else tuple(membranes)

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Membrane: ...

    @overload
    def __getitem__(self, index: slice) -> Membranes: ...

    def __getitem__(self, index: int | slice) -> Membrane | Membranes:
        return Membranes(self._items[index]) if isinstance(index, slice) else self._items[index]

    def __add__(self, other: Membrane | Iterable[Membrane]) -> Membranes:
        return Membranes((*self, *Membranes(other)))

    def __repr__(self) -> str:
        return f"Membranes({', '.join(f'{m.concept} [{m.method}, {len(m.keys)} modules]' for m in self)})"

    @property
    def concepts(self) -> tuple[str, ...]:
        return tuple(m.concept for m in self)

    @property
    def module_keys(self) -> tuple[str, ...]:
        """Every wrapped module's key once, in order of first appearance; `image_keys` has the image-side layers."""
        return tuple(dict.fromkeys(key for m in self for key in m.modules))

    @property
    def image_keys(self) -> tuple[str, ...]:
        """Every layer once whose image tokens some membrane reads."""
        return tuple(dict.fromkeys(key for m in self if m.visual is not None for key in m.visual.sites))
