"""What a pipeline's denoiser sees of a prompt, for every supported family, and which modules read it."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ..methods.errors import ModelError, SemipermError
from ..methods.text_space import Segment, TextFeatures, Wording, whole_words
from .family import denoiser_of, device_of, family_of
from .hooks import heard, unheard
from .weights import base_layer

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")  # of any pipeline
_CHUNK = 32  # prompts per text-encoder call: it bounds memory; chosen by hand
_TEXT_TOKEN_MODULES = re.compile(r"(^|\.)(attn2\.to_[kv]|context_embedder)$")
_TEXT_POOLED_MODULES = re.compile(r"(^|\.)time_text_embed\.text_embedder\.linear_1$")


def module_keys(denoiser: nn.Module, attribute: str) -> dict[str, tuple[str, Any]]:
    """Map kohya/SPM keys ("lora_unet_...", "lora_transformer_...") to (path, module) for every projection.

    Under PEFT's adapters it is the layer that stays when they go, by the path that it has without them.
    """
    found, adapted = {}, ()
    for path, module in denoiser.named_modules():
        if adapted and path.startswith(adapted):
            continue
        if (inner := base_layer(module)) is not module:
            adapted, module = (f"{path}.",), inner
        if path and isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim in (2, 4):
            found[f"lora_{attribute}_{path.replace('.', '_')}"] = (path, module)
    return found


def text_projections(pipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """The projections that read text only: (those of token embeddings, those of the pooled embedding).

    attn2.to_k / to_v (SD, SD2, SDXL), context_embedder and time_text_embed.text_embedder.linear_1 (SD3, Flux).
    """
    denoiser, attribute = denoiser_of(pipe)
    keys = module_keys(denoiser, attribute)
    tokens = {key: module for key, (path, module) in keys.items() if _TEXT_TOKEN_MODULES.search(path)}
    pooled = {key: module for key, (path, module) in keys.items() if _TEXT_POOLED_MODULES.search(path)}
    if not tokens:
        raise ModelError(
            f"{type(denoiser).__name__} has no text projections (attn2.to_k / to_v or context_embedder): 0 modules"
            " matched; is this a text-to-image model?"
        )
    return tokens, pooled


def token_ids(pipe, prompts: Sequence[str]) -> list[list[int]]:
    """The first tokenizer's ids of each prompt, cut to its length, without special tokens."""
    return _ids(_first_tokenizer(pipe), prompts)


def vocabulary(pipe) -> list[str]:
    """The words that are one token each to the first tokenizer."""
    return whole_words(_first_tokenizer(pipe).get_vocab())


def _first_tokenizer(pipe):
    tokenizer = getattr(pipe, "tokenizer", None)  # SDXL's refiner has the second alone
    return pipe.tokenizer_2 if tokenizer is None else tokenizer


def wordings(pipe, prompts: Sequence[str], *others: Sequence[str] | None) -> list[Wording]:
    """What the text encoders are given of each prompt.

    Args:
        prompts: B strings, the `prompt` of a call.
        others: its `prompt_2` and `prompt_3`, B strings each; None or empty where they repeat the first.
    """
    given = [list(prompts), *(list(other) if other else list(prompts) for other in others)]
    tokenizers = [tokenizer for name in TOKENIZERS if (tokenizer := getattr(pipe, name, None)) is not None]
    read: list[list[str]] = []  # for each encoder B texts
    for number, tokenizer in enumerate(tokenizers):
        ids = _ids(tokenizer, given[min(number, len(given) - 1)])
        read.append(tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False))
    different = list(dict.fromkeys(map(tuple, given)))
    ids_of = [_ids(tokenizers[0], texts) for texts in different] if tokenizers else []
    return [
        Wording(
            prompt,
            tuple(tuple(rows[i]) for rows in ids_of),
            tuple(dict.fromkeys(texts[i] for texts in read)),
        )
        for i, prompt in enumerate(prompts)
    ]


# A tokenizer keeps the padding of its last call as state: asked between two lines of a pipeline that another thread
# runs, it would pad that pipeline's prompts our way. We ask copies.
_copies: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_asking = threading.RLock()


def _ask(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, cut but not padded, by a copy of the tokenizer; copied anew when tokens were added to it."""
    with _asking:
        copied = _copies.get(tokenizer)
        if copied is None or len(copied) != len(tokenizer):
            copied = _copies[tokenizer] = copy.deepcopy(tokenizer)
        return copied(list(texts), truncation=True, max_length=_length(tokenizer)).input_ids


def _ids(tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    special = set(tokenizer.all_special_ids)
    return [[i for i in row if i not in special] for row in _ask(tokenizer, prompts)]


def _length(tokenizer) -> int:
    return min(tokenizer.model_max_length, 512)


def segments_of(pipe, *, video: bool = False) -> list[Segment]:
    """Which tokenizer fills which stretch of `TextFeatures.hidden`, in order; `video`: of a family of videos, too."""
    segments: list[Segment] = []
    for row in family_of(pipe, video=video).segments:
        if getattr(pipe, row.encoder, None) is None:
            continue
        start = pipe.tokenizer_max_length if segments else 0
        segments.append(Segment(functools.partial(prefix_tokens, getattr(pipe, row.tokenizer)), start, row.causal))
    if not segments and (reader := reader_of(pipe)) is not None:
        segments.append(Segment(functools.partial(prefix_tokens, reader[1]), 0, True))
    return segments


def prefix_tokens(tokenizer, texts: Sequence[str]) -> list[int]:
    """How many positions each text fills at the start of a sequence, the begin-of-text token included."""
    begins = tokenizer.bos_token_id is not None and _ask(tokenizer, ["a"])[0][0] == tokenizer.bos_token_id
    return [int(begins) + len(ids) for ids in _ids(tokenizer, texts)]


@torch.no_grad()
def encode_text(
    pipe,
    prompts: Sequence[str],
    max_sequence_length: int | None = None,
    positions: int | None = None,
    *,
    others: Mapping[str, Sequence[str]] | None = None,
    told: bool = False,
) -> TextFeatures:
    """Encode prompts with the pipeline's own text encoders, exactly as a call of the pipeline would.

    Args:
        prompts: B strings; "" is the unconditional prompt.
        max_sequence_length: T5 positions (SD3, Flux, Wan); None is the pipeline's default. It changes every position:
            these pipelines let T5 attend to its padding.
        positions: keep only the first so many of the N positions; None keeps all.
        others: "prompt_2" and "prompt_3" -> B strings, where these encoders read something else.
        told: whether listeners hear of it, as of a run of the pipeline: then gates know the words.

    Returns:
        hidden (B, N, d) and pooled (B, p) on the pipeline's device, in its dtype.

    Raises:
        SemipermError: unsupported pipeline, or no prompts.
    """
    family, prompts = family_of(pipe), list(prompts)
    if not prompts:
        raise SemipermError("encode_text got no prompts; expected at least one string")
    # a few pipelines (InstructPix2Pix) have none of their own: their family's reads the same parts in the same way
    cls = type(pipe) if hasattr(pipe, "encode_prompt") else getattr(diffusers, family.img2img or "", None)
    if cls is None:
        raise ModelError(f"{type(pipe).__name__} has no encode_prompt; expected a text-to-image pipeline of diffusers")
    encode = functools.partial(cls.encode_prompt, pipe)
    accepted = inspect.signature(cls.encode_prompt).parameters
    kwargs = {
        "device": device_of(pipe),
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False,
        "max_sequence_length": max_sequence_length,
    }
    kwargs = {k: v for k, v in kwargs.items() if k in accepted and v is not None}
    given = {name: list((others or {}).get(name) or ()) for name in ("prompt_2", "prompt_3") if name in accepted}
    chunk = len(prompts) if told else _CHUNK  # a second call would be taken for the negative prompt
    with contextlib.nullcontext() if told else unheard():
        parts = [
            split_encoded(
                encode(
                    prompts[i : i + chunk], **kwargs, **{n: texts[i : i + chunk] or None for n, texts in given.items()}
                )
            )
            for i in range(0, len(prompts), chunk)
        ]
    hidden = torch.cat([part[0][:, :positions] for part in parts])
    pooled = None if parts[0][1] is None else torch.cat([part[1] for part in parts])
    return TextFeatures(hidden, pooled, token_ids(pipe, prompts))


def reader_of(pipe) -> tuple[nn.Module, Any] | None:
    """The (text encoder, its tokenizer) whose hidden states stand first in what the denoiser is given; None: none."""
    rows = [(row.encoder, row.tokenizer) for row in family_of(pipe).segments[:1]]
    for encoder, tokenizer in (*rows, ("text_encoder_2", "tokenizer_2")):  # SDXL's refiner has the second alone
        found = getattr(pipe, encoder, None), getattr(pipe, tokenizer, None)
        if None not in found:
            return found
    return None


class Ear:
    """A forward hook of a text encoder: tells `listener.read(prompts, hidden states)` what it was given and made of it.

    Pipelines that share the encoder are heard, too. Copies of the encoder alone are deaf: whoever copies a listener
    puts new ears in place.
    """

    def __init__(self, listener: Any = None, tokenizer: Any = None):
        self.listener, self.tokenizer = listener, tokenizer

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if torch.compiler.is_compiling() or self.listener is None or not heard():
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        states = [getattr(output, "last_hidden_state", None), *(getattr(output, "hidden_states", None) or ())]
        states = [state for state in states if isinstance(state, Tensor) and state.ndim == 3]
        if isinstance(ids, Tensor) and states:
            prompts = self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            self.listener.read(tuple(prompt.strip() for prompt in prompts), states)

    def __reduce__(self):
        return Ear, ()

    def __deepcopy__(self, memo: dict) -> Ear:
        return Ear()


def split_encoded(encoded: tuple) -> tuple[Tensor, Tensor | None]:
    """Pick (hidden, pooled) of the positive prompts out of what an `encode_prompt` returned, whatever the family."""
    tensors = [t for t in encoded if isinstance(t, Tensor)]
    hidden = tensors[0]
    pooled = next((t for t in tensors[1:] if t.ndim == 2 and t.shape[0] == hidden.shape[0]), None)
    return hidden, pooled
