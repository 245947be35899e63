"""What words a conditioning was made of: kept on the embedding itself, from CLIP's encode to the sampler.

ComfyUI's conditionings are embeddings; the text they came from is gone. While this package is loaded, every encode by a
ComfyUI CLIP notes on the tensor that it returns which token ids it had, and what they stand for: plain data in an
attribute, which another copy of this package reads as well. Nothing else about an encode changes. A tensor that another
node computed from it (an average, a concatenation) is a new one without a note.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

from torch import Tensor

from ...methods.text_space import Wording

_NOTE = "semiperm_wording"  # of a tensor: {"token_ids": ..., "texts": ...}; of a method: that it takes notes already


def listen() -> None:
    """Take notes of every encode from now on; once is enough. Without ComfyUI's CLIP in the process: nothing."""
    module = sys.modules.get("comfy.sd")
    if module is None:
        return
    for name in ("encode_from_tokens", "encode_from_tokens_scheduled"):
        original = getattr(module.CLIP, name)
        if not hasattr(original, _NOTE):
            setattr(module.CLIP, name, _noting(original))


def wording_of(cond: Tensor | None) -> Wording | None:
    """The words that an embedding was encoded from, or None where nobody noted them."""
    note = getattr(cond, _NOTE, None)
    if not note:
        return None
    texts = tuple(note["texts"])
    return Wording(texts[0] if texts else "", tuple(map(tuple, note["token_ids"])), texts)


def _noting(original: Callable) -> Callable:
    @functools.wraps(original)
    def encode(self, tokens, *args, **kwargs):
        result = original(self, tokens, *args, **kwargs)
        if isinstance(tokens, dict):
            note = _note(self, tokens)
            for cond in _embeddings(result):
                setattr(cond, _NOTE, note)
        return result

    setattr(encode, _NOTE, True)
    return encode


def _embeddings(result) -> list[Tensor]:
    """The embeddings (1, N, d) in what an encode returned: a tensor, (tensor, pooled), a dict, or a schedule."""
    if isinstance(result, dict):
        result = result.get("cond")
    elif isinstance(result, tuple):
        result = result[0]
    found = [entry[0] for entry in result] if isinstance(result, list) else [result]
    return [cond for cond in found if isinstance(cond, Tensor)]


def _note(clip, tokens: dict) -> dict:
    ids = {name: prompt_ids(clip, name, chunks) for name, chunks in tokens.items() if isinstance(chunks, list)}
    clips = [name for name in ids if not name.startswith("t5")]
    texts = [_decoded(tokenizer_of(clip, name), own) for name, own in ids.items()]
    return {"token_ids": [ids[name] for name in clips or ids], "texts": list(dict.fromkeys(texts))}


def tokenizer_of(clip, name: str):
    """The tokenizer behind a name in tokenised prompts: "l", "g", "h", "t5xxl"; None where ComfyUI has another."""
    return getattr(clip.tokenizer, f"clip_{name}", None) or getattr(clip.tokenizer, name, None)


def prompt_ids(clip, name: str, chunks: list) -> list[int]:
    """Token ids of all chunks of a tokenised prompt, without special ones, padding and embedded vectors."""
    tokenizer = tokenizer_of(clip, name)
    start, end = getattr(tokenizer, "start_token", None), getattr(tokenizer, "end_token", None)
    found: list[int] = []
    for chunk in chunks:
        ids = [pair[0] for pair in chunk]
        ids = ids[: ids.index(end)] if end in [i for i in ids if isinstance(i, int)] else ids
        found += [i for i in ids if isinstance(i, int) and i != start]
    return found


def _decoded(tokenizer, ids: list[int]) -> str:
    inner = getattr(tokenizer, "tokenizer", None)
    if hasattr(inner, "decode"):
        return inner.decode(ids)
    pieces = getattr(tokenizer, "inv_vocab", {})
    text = "".join(str(pieces.get(i, " ")) for i in ids)
    return text.replace("</w>", " ").replace("\u2581", " ").strip()
