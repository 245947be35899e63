"""Gamma (B, K) for the rows a denoiser sees: each is judged by itself, so order, negatives and guidance cannot mix.

`probe` and `always` need only the row's own embedding. `paper` and `official` also need token ids: every
prompt that was encoded is recorded as (embedding row -> prompt), and a row is looked up by equality. A row
nobody recorded (embeddings passed in by the user) keeps the feature cosine alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import MembraneError
from ..text_space import TextFeatures
from .gates import facilitated_transport, official_gamma, probe_gate
from .types import GateProbe, Membrane

_REMEMBERED = 32  # recorded rows: a run needs two for each image of a batch, and 16 are a large batch


@dataclass(eq=False)
class _Recorded:
    embedding: Tensor  # (N, d)
    gamma: Tensor | None  # (K,), or None where no gate needs token ids
    prompt: str
    negative: bool

    def same(self, other: _Recorded) -> bool:
        """Whether both say the same of the same embedding."""
        if (self.prompt, self.negative) != (other.prompt, other.negative):
            return False
        a, b = self.embedding, other.embedding
        return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b)


def resolve_gate(membrane: Membrane, gate: str) -> str:
    """The gate of one membrane: "auto" is its probe where its file has one, else SPM's own."""
    if gate == "auto":
        return "probe" if membrane.probe is not None else "paper"
    if gate == "probe" and membrane.probe is None:
        raise MembraneError(
            f"gate='probe', but the membrane for {membrane.concept!r} has no probe; expected gate='paper', 'always' or"
            " 'auto', or a membrane made by erase_concepts"
        )
    return gate


class GateBank:
    """All gates of one stack: hidden (B, N, d) -> Gamma (B, K), or (B, K^2) for "official".

    Args:
        encode: phrases -> features, as the denoiser gets its prompts; called only for gates that compare with phrases.
    """

    def __init__(self, encode: Callable[[Sequence[str]], TextFeatures], membranes: Sequence[Membrane], gate: str):
        self.concepts = [m.concept for m in membranes]
        self.kinds = [resolve_gate(m, gate) for m in membranes]
        self.official = gate == "official"
        self.recorded: list[_Recorded] = []
        self._probes = [m.probe for m in membranes]
        self._phrases: list[tuple[Tensor, list[set[int]]] | None] = [None] * len(membranes)
        for k, membrane in enumerate(membranes):
            if self.kinds[k] in ("paper", "official"):
                features = encode(membrane.phrases)
                self._phrases[k] = (features.hidden, [set(ids) for ids in features.token_ids])
        self._needs_ids = any(phrase is not None for phrase in self._phrases)
        self._table: tuple[Tensor, Tensor] | None = None

    def place(self, device: torch.device) -> None:
        """Keep the gates' tensors where the text embeddings are, so that a compiled step copies nothing."""
        self._probes = [
            p if p is None or p.weight.device == device else GateProbe(p.weight.to(device), p.low, p.high)
            for p in self._probes
        ]
        self._phrases = [p if p is None else (p[0].to(device), p[1]) for p in self._phrases]

    def record(self, hidden: Tensor, prompts: Sequence[str], negative: bool, ids: Callable) -> None:
        """Remember which prompt made which rows; rows repeat for `num_images_per_prompt` in order.

        Args:
            ids: prompts -> token ids of each, without the special ones.
        """
        if hidden.ndim != 3 or hidden.shape[0] % len(prompts):
            return
        rows = hidden.detach()[:: hidden.shape[0] // len(prompts)]
        gamma = None
        if self._needs_ids:
            gamma = self._formula(rows, [set(row) for row in ids(prompts)])
        fresh = [
            _Recorded(row, None if gamma is None else gamma[i], prompt, negative)
            for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True))
        ]
        kept: list[_Recorded] = []
        for entry in fresh + self.recorded:  # each once: a compiled step sees as many rows in the next run
            if not any(entry.same(other) for other in kept):
                kept.append(entry)
        self.recorded = kept[:_REMEMBERED]
        if self._needs_ids:
            same = [
                r for r in self.recorded if r.embedding.shape == rows.shape[1:] and r.embedding.device == rows.device
            ]
            self._table = torch.stack([r.embedding for r in same]), torch.stack([r.gamma for r in same])
            for part in self._table:  # other prompts than these are no reason to compile again
                torch._dynamo.maybe_mark_dynamic(part, 0)

    def named(self, gamma: list[float]) -> dict[str, float]:
        """One row of Gamma by concept; the widest gate of membranes that share a name."""
        if self.official:  # K^2 columns; the diagonal is the squared gate that one membrane acts with
            gamma = gamma[:: len(self.concepts) + 1]
        named: dict[str, float] = {}
        for concept, value in zip(self.concepts, gamma, strict=True):
            named[concept] = max(value, named.get(concept, value))
        return named

    def recorded_row(self, row: Tensor) -> _Recorded | None:
        """The newest record whose embedding equals `row` (N, d), or None."""
        for entry in self.recorded:
            if entry.embedding.shape == row.shape and torch.equal(entry.embedding.to(row), row):
                return entry
        return None

    def __call__(self, hidden: Tensor) -> Tensor:
        gamma = self._formula(hidden, [set()] * hidden.shape[0])
        if self._table is not None and self._table[0].shape[1:] == hidden.shape[1:]:
            rows, known = self._table
            match = (hidden[:, None] == rows.to(hidden)).flatten(2).all(dim=2)  # (B, R)
            found = known.to(hidden.device)[match.int().argmax(dim=1)]  # newest first
            gamma = torch.where(match.any(dim=1, keepdim=True), found, gamma)
        return official_gamma(gamma) if self.official else gamma

    def _formula(self, hidden: Tensor, ids: list[set[int]]) -> Tensor:
        columns = []
        for kind, probe, phrases in zip(self.kinds, self._probes, self._phrases, strict=True):
            if kind == "always":
                columns.append(torch.ones(hidden.shape[0], device=hidden.device))
            elif kind == "probe":
                columns.append(probe_gate(hidden, probe))
            else:
                concept, concept_ids = phrases
                length = min(hidden.shape[1], concept.shape[1])  # max_sequence_length may differ between calls
                columns.append(
                    facilitated_transport(hidden[:, :length], concept[:, :length].to(hidden.device), ids, concept_ids)
                )
        return torch.stack(columns, dim=1)
