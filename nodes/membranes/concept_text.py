"""A ComfyUI MODEL and CLIP as the text space that closed-form membranes are fitted in."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence

import comfy.lora
import comfy.model_base
import comfy.utils
import torch
from einops import rearrange
from torch import Tensor

from ...methods.errors import MembraneError
from ...methods.membranes.closed_form import ClosedFormConfig
from ...methods.membranes.concept_fit import T5_POSITIONS, fit_concepts
from ...methods.membranes.types import Membranes
from ...methods.text_space import Segment, TextFeatures, TextSpace, whole_words
from ..base_weights import base_weights
from .wordings import prompt_ids, tokenizer_of

logger = logging.getLogger(__name__)

# diffusers' names only, as membrane files have them: ComfyUI knows each UNet projection by its own name, too
_TOKENS = re.compile(r"^lora_(unet_(down|mid|up)_block.*_attn2_to_[kv]|transformer_context_embedder)$")
_POOLED = re.compile(r"^lora_transformer_time_text_embed_text_embedder_linear_1$")
_CHUNK = 32  # captions per text-encoder call, as on diffusers


def erase_in(
    model,
    clip,
    concepts: Sequence[str],
    surrogate: str = "",
    preserve: Sequence[str] = (),
    config: ClosedFormConfig | None = None,
) -> Membranes:
    """Compute one membrane per concept for this MODEL and CLIP, in closed form; nothing is applied.

    Computed of the checkpoint's own weights: a LoRA on the model changes nothing.

    Args:
        concepts: names; "robot|android" names a synonym too.
        surrogate: what they turn into; "" leaves the phrase out of the caption.
        preserve: captions that must not change, in place of a general list; () takes that.
        config: how to solve.

    Raises:
        MembraneError: no concept, a surrogate equal to the concept, or an unsupported model.
    """
    concepts = [concept.strip() for concept in concepts if concept.strip(" |")]
    if not concepts:
        raise MembraneError("the concept is empty; write what to erase, one concept a line, e.g. robot|android")
    space, kept = text_space(model, clip), [caption.strip() for caption in preserve if caption.strip()]
    made = fit_concepts(space, concepts, surrogate.strip(), kept or None, config=config)
    logger.info("solved %d membrane%s: %s", len(made), "" if len(made) == 1 else "s", ", ".join(made.concepts))
    return made


def reads_text(key: str) -> bool:
    """Whether a module of this name reads the text alone, its tokens or the pooled one."""
    return bool(_TOKENS.match(key) or _POOLED.match(key))


def text_space(model, clip) -> TextSpace:
    """The text encoder and the projections that read it.

    Raises:
        MembraneError: an architecture without known text projections, or a CLIP that does not belong to it.
    """
    tokens, pooled, weights = {}, {}, base_weights(model)
    for key, target in comfy.lora.model_lora_keys_unet(model.model, {}).items():
        group = tokens if _TOKENS.match(key) else pooled if _POOLED.match(key) else None
        if group is not None:
            group[key] = weights[target]
    if not tokens:
        raise MembraneError(
            f"a {type(model.model).__name__} model has no known text projections; expected SD1.x, SD2, SDXL, SD3 or"
            " Flux"
        )
    if len({weight.shape[1] for weight in tokens.values()}) > 1:
        raise MembraneError("the text projections of this model read different widths; it is not supported")
    encode, segments = encoder_of(model, clip)
    width, expected = encode([""]).hidden.shape[-1], next(iter(tokens.values())).shape[1]
    if width != expected:
        raise MembraneError(
            f"this CLIP gives embeddings of width {width}, the model reads {expected}; connect the CLIP that belongs to"
            " the model"
        )
    tokenizer = getattr(tokenizer_of(clip, _first(_encoders(clip))), "tokenizer", None)
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else ()  # ComfyUI has some of other makes
    return TextSpace(encode, segments, tokens, pooled, whole_words(vocabulary))


def encoder_of(model, clip) -> tuple[Callable, list[Segment]]:
    """(prompts -> features, segments) of a CLIP, as this model is given them."""
    names = _encoders(clip)
    t5, first = [name for name in names if name.startswith("t5")], _first(names)
    segments = [] if isinstance(model.model, comfy.model_base.Flux) else [_segment(clip, first, 0, causal=True)]
    if t5:
        segments.append(_segment(clip, t5[0], 77 if segments else 0, causal=False))
    limit = segments[-1].start + T5_POSITIONS if t5 else None
    alone = t5 or any(map(_POOLED.match, comfy.lora.model_lora_keys_unet(model.model, {})))

    def encode(prompts: Sequence[str]) -> TextFeatures:
        texts = [_escaped(prompt) for prompt in prompts]
        bar = comfy.utils.ProgressBar(len(texts)) if len(texts) > _CHUNK else None
        hidden, pooled, ids = [], [], []
        # Several captions go as the chunks of one prompt. With T5 they could not be told apart in what comes back: its
        # stretch follows CLIP's, and it is as long as its text. Of several captions there is one pooled state.
        size = 1 if alone else _CHUNK
        for start in range(0, len(texts), size):
            part = [clip.tokenize(text) for text in texts[start : start + size]]
            for states, vector in _encoded(clip, part):
                hidden.append(states[:, :limit])
                pooled.append(vector)
            ids += [prompt_ids(clip, first, tokens[first]) for tokens in part]
            if bar is not None:
                bar.update(len(part))
        vectors = torch.cat(pooled) if alone and pooled[0] is not None else None
        length = min(h.shape[1] for h in hidden)  # T5 pads to a minimum and lets longer texts grow
        return TextFeatures(torch.cat([h[:, :length] for h in hidden]), vectors, ids)

    return encode, segments


def _first(names: Sequence[str]) -> str:
    """The encoder that is asked for words: the first CLIP, where there is one."""
    return next((name for name in names if not name.startswith("t5")), names[0])


def _encoders(clip) -> list[str]:
    """What tokenised prompts are named by ("l", "g", "h", "t5xxl"); SD3's tokenizer also names encoders not loaded."""
    encoder = clip.cond_stage_model
    present = {name: getattr(encoder, f"clip_{name}", getattr(encoder, name, True)) for name in clip.tokenize("")}
    return [name for name, there in present.items() if there is not None]


def _encoded(clip, tokens: list[dict]) -> list[tuple[Tensor, Tensor | None]]:
    """(hidden (1 or B, N, d), pooled) of tokenised prompts. CLIP takes several at once, as the chunks of one prompt."""
    if len(tokens) > 1 and all(len(chunks) == 1 for prompt in tokens for chunks in prompt.values()):
        together = {name: [prompt[name][0] for prompt in tokens] for name in tokens[0]}
        states = clip.encode_from_tokens(together).float().cpu()
        return [(rearrange(states, "1 (caption n) d -> caption n d", caption=len(tokens)), None)]
    out = []
    for prompt in tokens:
        states, vector = clip.encode_from_tokens(prompt, return_pooled=True)
        out.append((states.float().cpu(), None if vector is None else vector.float().cpu()))
    return out


def _escaped(text: str) -> str:
    return text.replace("(", "\\(").replace(")", "\\)")  # ComfyUI reads brackets as weights


def _segment(clip, name: str, start: int, causal: bool) -> Segment:
    def prefix_tokens(texts: Sequence[str]) -> list[int]:
        return [len(_before_end(clip, name, clip.tokenize(_escaped(text)))) for text in texts]

    return Segment(prefix_tokens, start, causal)


def _before_end(clip, name: str, tokens: dict) -> list[int]:
    """Token ids of a tokenised prompt up to the end-of-text token, the begin-of-text token included."""
    ids = [pair[0] for pair in tokens[name][0]]
    end = tokenizer_of(clip, name).end_token
    return ids[: ids.index(end)] if end in ids else ids
