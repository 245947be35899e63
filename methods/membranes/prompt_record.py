"""Which words made which text embeddings: the record that gates look rows up in.

It holds the prompts of the call at hand, however many they are, and those of earlier calls whose embeddings somebody
still keeps (they may come back as `prompt_embeds`); all else is forgotten when a call begins.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..text_space import Wording

__all__ = ["PromptRecord", "Recorded"]


@dataclass(eq=False)
class Recorded:
    """One row that was encoded."""

    embedding: Tensor  # (N, d), a copy: what is changed in place afterwards is another text
    openings: list[float]  # (K,), by its words
    prompt: str | None  # None where the words are unknown
    negative: bool
    source: weakref.ref  # the tensor that the encoder returned

    def same(self, other: Recorded) -> bool:
        """Whether both say the same of the same embedding."""
        if (self.prompt, self.negative, self.openings) != (other.prompt, other.negative, other.openings):
            return False
        a, b = self.embedding, other.embedding
        return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b)


class PromptRecord:
    """Rows of text and the words that they came from.

    Args:
        openings: wording -> how far it opens each of the K gates.
    """

    def __init__(self, openings: Callable[[Wording], list[float]]):
        self._openings = openings
        self.entries: list[Recorded] = []  # the newest first
        self._table: tuple[Tensor, Tensor, Tensor] | None = None  # of one shape: (R, N, d), (R, K), negative (R,)

    def following(self) -> PromptRecord:
        """The record of the next call: what is still held, and nothing else. This one stays, for the call it is of."""
        record = PromptRecord(self._openings)
        record.entries, record._table = list(self.entries), self._table
        record.begin()
        return record

    def __getstate__(self) -> dict:
        """For copies and pickles, which have no calls yet."""
        return {"_openings": self._openings, "entries": [], "_table": None}

    def begin(self) -> None:
        """A call begins: forget the last one's prompts, but for those whose embeddings are still held."""
        kept = [entry for entry in self.entries if entry.source() is not None]
        if len(kept) < len(self.entries):
            self.entries, self._table = kept, None
            if kept:
                self._tabulate(kept[0].embedding)

    def add(self, hidden: Tensor, wordings: Sequence[Wording], negative: bool) -> None:
        """Record rows (B, N, d) of these prompts; rows repeat for several pictures a prompt, in order."""
        if hidden.ndim != 3 or not wordings or hidden.shape[0] % len(wordings):
            return
        rows, source = hidden.detach()[:: hidden.shape[0] // len(wordings)].clone(), weakref.ref(hidden)
        fresh = [
            Recorded(row, self._openings(wording), wording.prompt, negative, source)
            for row, wording in zip(rows, wordings, strict=True)
        ]
        kept: list[Recorded] = []
        for entry in fresh + self.entries:  # each once: a compiled step sees as many rows in the next run
            twin = next((other for other in kept if entry.same(other)), None)
            if twin is None:
                kept.append(entry)
            elif twin.source() is None:
                twin.source = entry.source
        self.entries = kept
        self._tabulate(rows[0])

    def known(self, hidden: Tensor) -> bool:
        """Whether every row (B, N, d) is on record with its words."""
        said = [e for e in self.entries if e.prompt is not None and _fits(e.embedding, hidden)]
        return bool(said) and bool(torch.stack([_equal(e.embedding, hidden) for e in said]).any(dim=0).all())

    def find(self, row: Tensor, negative: bool | None = None) -> Recorded | None:
        """The newest record whose embedding equals `row` (N, d), or fills it by repetition, or None.

        Args:
            negative: which kind is preferred; None takes it for negative only where no positive row has it.
        """
        found = [e for e in self.entries if _fits(e.embedding, row[None]) and bool(_equal(e.embedding, row[None]))]
        found.sort(key=lambda e: (e.negative != bool(negative), e.prompt is None))
        return found[0] if found else None

    def look_up(self, hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """How far the recorded words of each row open the gates (B, K), the widest of all that made this embedding; and
        whether a row is known as negative and not as positive (B,). (None, None) where nothing is known of its shape.
        """
        if torch.compiler.is_compiling():  # one fused reduction over the rows of one shape
            if self._table is None or self._table[0].shape[1:] != hidden.shape[1:]:
                return None, None
            rows, openings, negative = (part.to(hidden.device) for part in self._table)
            match = (hidden[:, None] == rows.to(hidden.dtype)).flatten(2).all(dim=2)  # (B, R)
        else:  # entry by entry: never more memory than the rows have
            entries = [e for e in self.entries if _fits(e.embedding, hidden)]
            if not entries:
                return None, None
            match = torch.stack([_equal(e.embedding, hidden) for e in entries], dim=1)
            openings = torch.tensor([e.openings for e in entries], device=hidden.device)
            negative = torch.tensor([e.negative for e in entries], device=hidden.device)
        words = torch.where(match[:, :, None], openings, 0.0).amax(dim=1)
        return words, (match & negative).any(dim=1) & ~(match & ~negative).any(dim=1)

    def _tabulate(self, like: Tensor) -> None:
        same = [e for e in self.entries if e.embedding.shape == like.shape and e.embedding.device == like.device]
        self._table = (
            torch.stack([e.embedding for e in same]),
            torch.tensor([e.openings for e in same], device=like.device),
            torch.tensor([e.negative for e in same], device=like.device),
        )
        for part in self._table:  # other prompts than these are no reason to compile again
            torch._dynamo.maybe_mark_dynamic(part, 0)


def _fits(embedding: Tensor, hidden: Tensor) -> bool:
    return embedding.shape[1] == hidden.shape[2] and hidden.shape[1] % embedding.shape[0] == 0


def _equal(embedding: Tensor, hidden: Tensor) -> Tensor:
    """(B,): whether rows (B, R N, d) are this embedding (N, d), R times over: ComfyUI repeats texts to one length."""
    return (hidden.unflatten(1, (-1, len(embedding))) == embedding.to(hidden)).flatten(1).all(dim=1)
