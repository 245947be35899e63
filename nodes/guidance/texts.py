"""The categories' conditionings, and prompts after the text seam, from a ComfyUI CLIP."""

from __future__ import annotations

from collections.abc import Sequence

import node_helpers
import torch
from torch import Tensor

from ...methods.errors import GuidanceError
from ...methods.guidance.algorithm import Algorithm
from ...methods.guidance.config import SafeGuidanceConfig
from ...methods.guidance.summaries import last_positions
from ...methods.text_space import TextFeatures
from ..membranes.concept_text import encoder_of

__all__ = ["branches_of", "filtered", "phrase_states", "together_of"]

_LEAST = 1e-3  # share of the schedule: a shorter stretch holds no step


def branches_of(clip, config: SafeGuidanceConfig) -> list:
    """A conditioning for each category."""
    return [_conditioning(clip, category.text) for category in config.categories]


def together_of(clip, config: SafeGuidanceConfig) -> Tensor:
    """(1, N, d): all categories in one prompt; CLIPs of ComfyUI take any length."""
    return _conditioning(clip, ", ".join(category.text for category in config.categories))[0][0].float()


def phrase_states(model, clip, config: SafeGuidanceConfig, most: int) -> Tensor:
    """(P, d): the categories' phrases in turns, each at its last token."""
    longest = max(len(category.phrases) for category in config.categories)
    phrases = [c.phrases[i] for i in range(longest) for c in config.categories if i < len(c.phrases)][:most]
    encode, segments = encoder_of(model, clip)
    hidden = encode(phrases).hidden
    positions = last_positions(phrases, segments, hidden.shape[1])
    return torch.stack([hidden[i, p] for i, ps in enumerate(positions) for p in ps])


def _conditioning(clip, text: str) -> list:
    if clip is None:
        raise GuidanceError("no clip, which reads the categories; connect the CLIP of the model")
    hidden, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
    if not bool(hidden.isfinite().all()):
        raise GuidanceError("the CLIP's embedding of a category is NaN or infinite; load the CLIP in another dtype")
    return [[hidden, {"pooled_output": pooled}]]


def filtered(model, clip, text: str, config: SafeGuidanceConfig, algorithm: Algorithm) -> tuple[list, dict]:
    """A prompt's conditioning after the text seam: as edited up to a share of sampling, then as it is.

    Returns:
        CONDITIONING, and what was done: {"fired": share of words, "until": share of the schedule}.
    """
    _, segments = encoder_of(model, clip)

    def encode(prompts: Sequence[str]) -> TextFeatures:
        found = [_conditioning(clip, prompt)[0] for prompt in prompts]
        length = min(hidden.shape[1] for hidden, _ in found)
        pooled = [said["pooled_output"] for _, said in found]
        vectors = None if pooled[0] is None else torch.cat(pooled).float()
        return TextFeatures(torch.cat([h[:, :length] for h, _ in found]).float(), vectors, [[] for _ in prompts])

    edit = algorithm.edit_text(text, encode, segments, config.phrases, config.strength)
    plain = _conditioning(clip, text)
    until = min(edit.until, config.end)
    if until < _LEAST or not edit.fired:
        return plain, {"fired": edit.fired, "until": 0.0}
    hidden, said = plain[0]
    changed = hidden.clone()
    changed[0, : edit.hidden.shape[0]] = edit.hidden.to(hidden)
    pooled = said["pooled_output"] if edit.pooled is None else edit.pooled[None].to(hidden)
    edited = [[changed, {"pooled_output": pooled}]]
    stretches = [(edited, config.start, until)]
    stretches += [(plain, 0.0, config.start)] if config.start >= _LEAST else []
    stretches += [(plain, until, 1.0)] if until <= 1 - _LEAST else []
    found = []
    for conditioning, start, end in stretches:
        found += node_helpers.conditioning_set_values(conditioning, {"start_percent": start, "end_percent": end})
    return found, {"fired": edit.fired, "until": until}
