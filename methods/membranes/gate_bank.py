"""Gamma (B, K) for the rows a denoiser sees: each is judged by itself, so order, negatives and guidance cannot mix.

A row's own embedding opens gates by its features (`probe`, `paper`). Its words open them, too, where they are known:
every prompt that was encoded is recorded as (embedding row -> wording), and a row is looked up by equality. The wider
of the two counts. A row that nobody recorded (embeddings of unknown origin) keeps the features alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import MembraneError
from ..text_space import TextFeatures, Wording
from .gates import facilitated_transport, official_gamma, probe_gate, token_overlap
from .phrases import fold, names
from .prompt_record import PromptRecord
from .types import Membrane

logger = logging.getLogger(__name__)


def resolve_gate(membrane: Membrane, gate: str) -> str:
    """The gate of one membrane.

    "auto" is its detector or a phrase of it, whichever opens wider; where its file has no detector, SPM's own gate
    "paper"; and where the detector cannot tell, "always", or "words" (a phrase of it alone) if the text encoder does
    not know them (`GateProbe.gate`), with a warning. A membrane that nobody named has no words to compare with, and is
    always on. An image-side membrane has gates of its own, in its layers: "image", whatever was asked for.

    Returns:
        "auto" (detector or phrase), "words", "probe", "paper", "official", "always" or "image".

    Raises:
        MembraneError: "probe" for a membrane without one.
    """
    probe = membrane.probe
    if membrane.visual is not None:
        return "image"
    if gate == "auto" and probe is None:
        gate = "paper"
    if gate in ("paper", "official") and not membrane.named:
        logger.warning(
            "nobody said what the membrane %r erases (that is its file's name), so no gate can compare prompts with it:"
            " it is always on; give concept='...' (--concept NAME) to gate it",
            membrane.concept,
        )
        return "always"
    if gate == "probe" and probe is None:
        raise MembraneError(
            f"gate='probe', but the membrane for {membrane.concept!r} has no probe; expected gate='paper', 'always' or"
            " 'auto', or a membrane made by erase_concepts"
        )
    if gate != "auto" or probe is None or probe.gate == "auto":
        return gate
    if probe.gate == "words":
        logger.warning(
            "the text encoder hardly knows %r (its words move captions by %.2f of their spread): gate 'auto' opens for"
            " these words alone; other words for what you mean behind bars ('robot|android') may be known to it",
            membrane.concept,
            probe.meaning,
        )
    else:
        logger.warning(
            "the detector of %r cannot tell its prompts from others (separation %s, closed for %s of the prompts that"
            " name it and were kept out of the fit): gate 'auto' leaves it always on; other words for it behind bars"
            " ('robot|android') may help",
            membrane.concept,
            "unknown" if probe.separation is None else f"{probe.separation:.2f}",
            "an unknown share" if probe.false_closed is None else f"{100 * probe.false_closed:.1f} %",
        )
    return probe.gate


class GateBank:
    """All gates of one stack: hidden (B, N, d) -> Gamma (B, K), or (B, K^2) for "official".

    Args:
        encode: phrases -> features, as the denoiser gets its prompts; called only for gates that compare with phrases.
        negative_rows: whether gates may open in negative and unconditional rows, see `MembraneConfig`.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str]], TextFeatures],
        membranes: Sequence[Membrane],
        gate: str,
        negative_rows: bool = False,
    ):
        self.concepts = [m.concept for m in membranes]
        self.kinds = [resolve_gate(m, gate) for m in membranes]
        self.official, self.negative_rows = gate == "official", negative_rows
        self.recorded = PromptRecord(self._openings)
        self._probes = [m.probe for m in membranes]
        self._folded = [tuple(map(fold, m.phrases)) for m in membranes]
        self._phrases: list[tuple[Tensor, list[set[int]]] | None] = [None] * len(membranes)
        for k, membrane in enumerate(membranes):
            if self.kinds[k] in ("paper", "official"):
                features = encode(membrane.phrases)
                self._phrases[k] = (features.hidden, [set(ids) for ids in features.token_ids])

    @property
    def width(self) -> int:
        """The columns of Gamma."""
        return len(self.kinds) ** 2 if self.official else len(self.kinds)

    @property
    def columns(self) -> list[int]:
        """Each membrane's own column: of K^2, the one that it acts with."""
        return [k * (len(self.kinds) + 1) if self.official else k for k in range(len(self.kinds))]

    def place(self, device: torch.device) -> None:
        """Keep the gates' tensors where the text embeddings are, so that a compiled step copies nothing."""
        self._probes = [p if p is None or p.weight.device == device else p.to(device) for p in self._probes]
        self._phrases = [p if p is None else (p[0].to(device), p[1]) for p in self._phrases]

    def named(self, gamma: list[float]) -> dict[str, float]:
        """One row of Gamma by concept; the widest gate of membranes that share a name."""
        if self.official:  # the diagonal: the squared gate
            gamma = [gamma[column] for column in self.columns]
        named: dict[str, float] = {}
        for concept, value in zip(self.concepts, gamma, strict=True):
            named[concept] = max(value, named.get(concept, value))
        return named

    def __call__(
        self,
        hidden: Tensor,
        pooled: Tensor | None = None,
        negative: Sequence[bool] | None = None,
        recorded: PromptRecord | None = None,
    ) -> Tensor:
        """Judge the rows of one call of the denoiser.

        Args:
            hidden: (B, N, d) its text. pooled: (B, p) or None.
            negative: which of the B rows guide away from their text (negative or unconditional), in which no gate
                opens unless `negative_rows`; None goes by what was recorded of their embeddings.
            recorded: the prompts of the call at hand; None is `self.recorded`.
        """
        recorded = self.recorded if recorded is None else recorded
        gamma = torch.stack([self._features(k, hidden, pooled) for k in range(len(self.kinds))], dim=1)
        words, recorded_negative = recorded.look_up(hidden)
        if words is not None:
            gamma = torch.maximum(gamma, words)
        shut = recorded_negative if negative is None else _mask(negative, hidden.device)
        if shut is not None and not self.negative_rows:
            gamma = gamma.masked_fill(shut[:, None], 0.0)
        return official_gamma(gamma) if self.official else gamma

    def _features(self, k: int, hidden: Tensor, pooled: Tensor | None) -> Tensor:
        """(B,): how far the embeddings alone open gate k."""
        kind, probe, phrases = self.kinds[k], self._probes[k], self._phrases[k]
        if phrases is not None:
            concept, concept_ids = phrases
            length = min(hidden.shape[1], concept.shape[1])  # max_sequence_length may differ between calls
            concept = concept[:, :length].to(hidden.device)
            return facilitated_transport(hidden[:, :length], concept, [()] * len(hidden), concept_ids)
        if kind == "words":
            return torch.zeros(hidden.shape[0], device=hidden.device)
        if kind in ("always", "image") or probe is None:
            return torch.ones(hidden.shape[0], device=hidden.device)
        return probe_gate(hidden, probe, pooled)

    def _openings(self, wording: Wording) -> list[float]:
        """(K,): how far the words of a prompt open each gate: by any text of it, the widest opening."""
        found = []
        for kind, folded, phrases in zip(self.kinds, self._folded, self._phrases, strict=True):
            if phrases is not None:
                overlap = token_overlap(wording.token_ids, phrases[1])
                found.append(max((value for row in overlap for value in row), default=0.0))
            else:
                found.append(float(kind in ("auto", "words") and any(names(text, folded) for text in wording.texts)))
        return found


def _mask(negative: Sequence[bool], device: torch.device) -> Tensor:
    count = sum(negative)
    if list(negative[:count]) == [True] * count:  # made where it is needed: a compiled step copies nothing
        return torch.arange(len(negative), device=device) < count
    return torch.tensor(list(negative), device=device)
