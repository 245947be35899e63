"""The categories' conditionings, and prompts after the text seam, from a ComfyUI CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import node_helpers
import torch
from torch import Tensor

from ...methods.errors import GuidanceError
from ...methods.guidance.algorithm import Algorithm
from ...methods.guidance.config import SafeGuidanceConfig
from ...methods.guidance.summaries import last_positions
from ...methods.text_space import TextFeatures
from ..membranes.concept_text import encoder_of

__all__ = ["JointTexts", "branches_of", "filtered", "joint_texts", "phrase_states", "together_of"]

_LEAST = 1e-3  # share of the schedule: a shorter stretch holds no step


def branches_of(clip, config: SafeGuidanceConfig) -> list:
    """A conditioning for each category."""
    return [_conditioning(clip, category.text) for category in config.categories]


def together_of(clip, config: SafeGuidanceConfig) -> Tensor:
    """(1, N, d): all categories in one prompt; CLIPs of ComfyUI take any length."""
    return _conditioning(clip, ", ".join(category.text for category in config.categories))[0][0].float()


def in_turns(config: SafeGuidanceConfig) -> list[str]:
    """All phrases, each category's first, then each one's second, and so on."""
    longest = max(len(category.phrases) for category in config.categories)
    return [c.phrases[i] for i in range(longest) for c in config.categories if i < len(c.phrases)]


@dataclass(frozen=True, eq=False)
class JointTexts:
    """The categories as joint attention is given them.

    Args:
        together: (1, N, d), as many phrases of all in one prompt as fit; together_pooled: (1, p) or None.
        phrases: (P, N, d), each by itself; pooled: (P, p) or None. positions: of each phrase's last token in each
            segment. begins: whether texts have a begin-of-text token.
    """

    together: Tensor
    together_pooled: Tensor | None
    phrases: Tensor
    pooled: Tensor | None
    positions: list[list[int]]
    begins: bool


def joint_texts(model, clip, config: SafeGuidanceConfig) -> JointTexts:
    """What joint attention needs of the categories.

    Raises:
        GuidanceError: no CLIP, embeddings that are not finite, or a phrase that is longer than a prompt.
    """
    length, taken = _conditioning(clip, "")[0][0].shape[1], ""
    for phrase in in_turns(config):
        text = f"{taken}, {phrase}" if taken else phrase
        if _conditioning(clip, text)[0][0].shape[1] > length:
            break
        taken = text
    most = max((one.rank for one in config.having("values")), default=0)
    phrases = in_turns(config)[:most]
    (together, said), each = _conditioning(clip, taken)[0], [_conditioning(clip, phrase)[0] for phrase in phrases]
    if not taken or any(hidden.shape[1] > length for hidden, _ in each):
        raise GuidanceError(f"a phrase of {config.phrases} is longer than one prompt ({length} positions); shorten it")
    _, segments = encoder_of(model, clip)
    pooled = [more["pooled_output"] for _, more in each]
    return JointTexts(
        together.float(),
        None if said["pooled_output"] is None else said["pooled_output"].float(),
        torch.cat([hidden for hidden, _ in each]).float() if each else together[:0].float(),
        torch.cat(pooled).float() if pooled and pooled[0] is not None else None,
        last_positions(phrases, segments, length) if each else [],
        bool(segments) and segments[0].causal,
    )


def phrase_states(model, clip, config: SafeGuidanceConfig, most: int) -> Tensor:
    """(P, d): the categories' phrases in turns, each at its last token."""
    phrases = in_turns(config)[:most]
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
