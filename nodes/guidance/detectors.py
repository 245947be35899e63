"""Detectors of safe guidance on ComfyUI models: fitted from words, read from files, and judging a prompt.

A conditioning does not say which words it was made of, so that a text detector judges the prompt where it is typed;
when the model samples, that prompt's conditioning must be there. The picture detector sees what the model predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...methods.errors import GuidanceError
from ...methods.guidance.category import Category
from ...methods.guidance.detectors import DetectorPair, load_detectors
from ...methods.guidance.examples import fit_text_detector, harmless, in_sentences
from ...methods.guidance.summaries import summaries
from ..membranes.concept_text import encoder_of
from .picture_fit import Examples, fit_pictures

__all__ = ["Detectors", "detectors_for"]


@dataclass(frozen=True, eq=False)
class Detectors:
    """What a SEMIPERM_GUIDANCE_DETECTORS socket carries.

    Args:
        pairs: of the categories. scores: of each pair's text detector on the prompt, by how far it lies above its
            threshold; None without one, or without a prompt.
        prompt: (1, N, d), the prompt that was judged, as its CLIP encodes it; None: none was.
        when_unsafe: as in `SafeGuidanceConfig`.
    """

    pairs: tuple[DetectorPair, ...]
    scores: tuple[float | None, ...]
    prompt: Tensor | None
    when_unsafe: str = "guide"

    @property
    def said(self) -> str:
        """What the text detectors said of the prompt, in words."""
        return "\n".join(
            f"{pair.category}: " + ("not judged by words" if score is None else f"{score:+.2f} (above 0 fires)")
            for pair, score in zip(self.pairs, self.scores, strict=True)
        )

    def check(self, conditionings: Sequence[Tensor]) -> None:
        """Refuse to sample another prompt than the one that was judged.

        Raises:
            GuidanceError: none of these embeddings (B, N, d) is the prompt's.
        """
        if self.prompt is None:
            return
        for hidden in conditionings:
            length = min(hidden.shape[1], self.prompt.shape[1])
            one, other = hidden[:1, :length].float().cpu(), self.prompt[:, :length].float().cpu()
            if one.shape == other.shape and torch.allclose(one, other, atol=1e-3, rtol=1e-3):
                return
        raise GuidanceError(
            "the prompt that is sampled is not the one that Guidance Detector judged: give both the same words and the"
            " same CLIP, or leave the detector's prompt empty, so that its picture detector alone decides"
        )


def detectors_for(
    model,
    clip,
    category: Category,
    path: Path | None,
    benign: Sequence[str] | None,
    prompt: str,
    examples: Examples | None = None,
    when_unsafe: str = "guide",
) -> Detectors:
    """The detectors of a category.

    Args:
        path: a file of `semiperm guard fit`; None fits a text detector of this CLIP.
        benign: harmless prompts to fit from; None takes ours. prompt: what is judged; "" where nothing is.
        examples: fits a picture detector, too, and each of the pair gets half of the false alarms.
        when_unsafe: what follows where a picture detector still fires halfway, see `SafeGuidanceConfig`.

    Raises:
        GuidanceError: the file has none of the category; nothing could ever fire, or see what is unsafe.
    """
    encode, segments = encoder_of(model, clip)

    def read(texts: Sequence[str]) -> Tensor:
        return summaries(encode(texts).hidden, texts, segments).cpu()

    if path is None:
        alarms = category.false_alarms / (1 if examples is None else 2)
        calm = harmless(benign, alarms, category.phrases)
        text = fit_text_detector(read, in_sentences(category.phrases), calm, alarms)
        picture = None if examples is None else fit_pictures(model, clip, examples, calm, alarms)
        pairs: tuple[DetectorPair, ...] = (DetectorPair(category.name, text, picture, category.false_alarms),)
    else:
        found = load_detectors(path)
        pairs = tuple(pair for pair in found if pair.category == category.name)
        if not pairs:
            names = ", ".join(pair.category for pair in found)
            raise GuidanceError(f"{path.name} has detectors of {names}, none of {category.name!r}: choose one of these")
    if when_unsafe != "guide" and all(pair.picture is None for pair in pairs):
        raise GuidanceError(
            f"when_unsafe is {when_unsafe}, and there is no picture detector, which alone sees what is unsafe: fit from"
            " pictures, or load a file of `semiperm guard fit` with one"
        )
    if not prompt.strip():
        if all(pair.picture is None for pair in pairs):
            raise GuidanceError(
                "a text detector without a prompt never fires, and there is no picture detector: type or connect the"
                " prompt that is sampled, or load a file of `semiperm guard fit` with a picture detector"
            )
        return Detectors(pairs, (None,) * len(pairs), None, when_unsafe)
    features = read([prompt])
    scores = (None if p.text is None else float(p.text.score(features)[0]) - p.text.threshold for p in pairs)
    return Detectors(pairs, tuple(scores), encode([prompt]).hidden[:1], when_unsafe)
