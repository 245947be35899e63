"""Text encoders with some of their tokens replaced by embeddings, for gradients; for every family.

The pipeline's own `encode_prompt` runs on a text of filler words, whose embeddings are replaced behind the encoder's
embedding layer. Encoders of the vocabulary that is searched (SDXL's and SD3's two) are given the same tokens; the
others (SD3's T5, Flux's CLIP) read the words that stand for them.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...methods.errors import ModelError, SemipermError
from ...methods.membranes.phrases import fold, names
from ..family import Pipeline, device_of
from ..text import TOKENIZERS, encode_text, reader_of

__all__ = ["OpenEncoder", "learned_words"]

_differentiable = inspect.unwrap(encode_text)  # the same without its no_grad


class OpenEncoder:
    """A pipeline's text encoders, open for K embeddings at the start of the prompt.

    Args:
        pipe: SD1.x, SD2, SDXL, SD3 or Flux pipeline.
        count: K.
        rest: what follows them in the prompt.

    Raises:
        ModelError: no text encoder, or one whose tokenizer has no word of one token.
    """

    def __init__(self, pipe: Pipeline, count: int, rest: str = ""):
        self.pipe, self.count, self.rest = pipe, count, rest.strip()
        found = reader_of(pipe)
        if found is None:
            raise ModelError(f"{type(pipe).__name__} has no text encoder to search words for")
        self.tokenizer = copy.deepcopy(found[1])  # whoever asks a tokenizer changes how it pads
        vocabulary, self._encoders, self._others = self.tokenizer.get_vocab(), [], []
        for name in TOKENIZERS:
            tokenizer, encoder = getattr(pipe, name, None), getattr(pipe, f"text_encoder{name[9:]}", None)
            if tokenizer is None or encoder is None:
                continue
            same = tokenizer.get_vocab() == vocabulary
            (self._encoders if same else self._others).append((f"prompt{name[9:]}", encoder))
        tables = [encoder.get_input_embeddings().weight.detach() for _, encoder in self._encoders]
        rows = min(len(table) for table in tables)
        # side by side: one token is one row, whichever encoder reads it
        self.table = torch.cat([table[:rows].to(device_of(pipe)) for table in tables], dim=1)
        self.widths = [table.shape[1] for table in tables]
        self._words = self._whole_words(rows)
        self._filler = next(iter(self._words.values()))
        begin = self.tokenizer([" ".join([self._filler] * count)]).input_ids[0]
        self._first = next((n for n, i in enumerate(begin) if i == next(iter(self._words))), 0)

    def _whole_words(self, rows: int) -> dict[int, str]:
        """id -> the word, of tokens that stand for a word of plain letters: what is found can be typed."""
        special, words = set(self.tokenizer.all_special_ids), {}
        ids = [i for i in range(min(rows, len(self.tokenizer))) if i not in special]
        tokens = self.tokenizer.convert_ids_to_tokens(ids)  # CLIP marks a word's end, T5 its beginning
        texts = [token.removesuffix("</w>").removeprefix("▁") for token in tokens]
        plain = [(i, text) for i, text in zip(ids, texts, strict=True) if text.isascii() and text.isalnum()]
        again = self.tokenizer([text for _, text in plain], add_special_tokens=False).input_ids
        words = {i: text for (i, text), read in zip(plain, again, strict=True) if list(read) == [i]}
        if not words:
            raise ModelError(f"{type(self.tokenizer).__name__} has no token that is a word by itself")
        return words

    def allowed(self, without: Sequence[str] = ()) -> Tensor:
        """(A,) ids of the words that may be found: none of those in these phrases, in any form."""
        banned = {word for phrase in without for word in fold(phrase)}
        found = [i for i, word in self._words.items() if not names(word, [(b,) for b in banned])]
        if not found:
            raise SemipermError(
                f"every word of the vocabulary is in {list(without)}; expected fewer phrases to leave out"
            )
        return torch.tensor(found)

    def text_of(self, ids: Sequence[int]) -> str:
        """The prompt that these tokens stand for."""
        return " ".join([*(self._words.get(int(i), self._filler) for i in ids), self.rest]).strip()

    def encode(self, ids: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor | None]:
        """(P, N, d) and (P, p) or None of P prompts, differentiable in the embeddings.

        Args:
            ids: (P, K), for the encoders of another vocabulary. embeddings: (P, K, sum of widths), as in `table`.
        """
        filled = " ".join([*[self._filler] * self.count, self.rest]).strip()
        texts = {name: [filled] * len(ids) for name, _ in self._encoders}
        texts |= {name: [self.text_of(row) for row in ids.tolist()] for name, _ in self._others}
        prompts = texts.pop("prompt", None) or [filled] * len(ids)
        # this many at once go through the encoder in one call, whose rows the embeddings are
        limit = 32
        parts = []
        for first in range(0, len(ids), limit):
            rows = slice(first, first + limit)
            with self.at_embeddings([self._hook(part) for part in embeddings[rows].split(self.widths, dim=2)]):
                others = {name: own[rows] for name, own in texts.items()}
                parts.append(_differentiable(self.pipe, prompts[rows], others=others))
        hidden = torch.cat([part.hidden for part in parts])
        return hidden, None if parts[0].pooled is None else torch.cat([part.pooled for part in parts])

    @contextlib.contextmanager
    def at_embeddings(self, hooks: Sequence[Callable[[Any, Any, Tensor], Tensor]]) -> Iterator[None]:
        """Inside, a forward hook each is on what looks tokens up in the encoders of the vocabulary."""
        handles = []
        try:
            for (_, encoder), hook in zip(self._encoders, hooks, strict=True):
                weight = encoder.get_input_embeddings().weight  # T5 ties two layers to it
                for module in encoder.modules():
                    if isinstance(module, nn.Embedding) and module.weight is weight:
                        handles.append(module.register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, part: Tensor) -> Callable[[Any, Any, Tensor], Tensor]:
        first, last = self._first, self._first + self.count

        def replace(module: Any, args: Any, output: Tensor) -> Tensor:
            return torch.cat([output[:, :first], part.to(output), output[:, last:]], dim=1)

        return replace


@contextlib.contextmanager
def learned_words(pipe: Pipeline, ids: Sequence[int], embeddings: Tensor) -> Iterator[None]:
    """Inside, words of the vocabulary are read as embeddings that somebody learned, as files of textual inversion have.

    Prompts are words as ever, so that whatever reads words reads them; only what they say to the encoders is another.

    Args:
        ids: K different ones. embeddings: (K, sum of widths), as in `OpenEncoder.table`.

    Raises:
        SemipermError: as many embeddings are expected, and each id once.
    """
    if len(set(ids)) != len(embeddings) or len(ids) != len(embeddings):
        raise SemipermError(
            f"{len(embeddings)} embeddings for the tokens {list(ids)}; expected one each, no token twice"
        )
    encoder = OpenEncoder(pipe, len(ids))

    def hook(part: Tensor) -> Callable[[Any, Any, Tensor], Tensor]:
        def read(module: Any, args: Any, output: Tensor) -> Tensor:
            for token, row in zip(ids, part.to(output), strict=True):
                output = torch.where((args[0] == token)[..., None], row, output)
            return output

        return read

    with encoder.at_embeddings([hook(part) for part in embeddings.split(encoder.widths, dim=1)]):
        yield
