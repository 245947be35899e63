"""`erase_concepts`: closed-form membranes for a loaded pipeline, from words or pictures; nothing is trained."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ...methods.errors import MembraneError
from ...methods.membranes.closed_form import ClosedFormConfig
from ...methods.membranes.concept_fit import T5_POSITIONS, fit_concepts
from ...methods.membranes.types import Membranes
from ...methods.membranes.visual_fit import VisualConfig
from ...methods.text_space import TextSpace
from ..family import Pipeline
from ..text import encode_text, segments_of, text_projections, vocabulary
from ..weights import weights_of
from .visual_fit import fit_visual

__all__ = ["SIDES", "erase_concepts"]

SIDES = ("text", "image", "both")


@torch.no_grad()
def erase_concepts(
    pipe: Pipeline,
    concepts: str | Sequence[str],
    surrogate: str = "",
    preserve: Iterable[str] | None = None,
    *,
    synonyms: Mapping[str, Sequence[str]] | None = None,
    templates: Sequence[str] | None = None,
    config: ClosedFormConfig | None = None,
    max_sequence_length: int | None = None,
    side: str = "text",
    pictures: Mapping[str, Sequence[Any]] | None = None,
    visual: VisualConfig | None = None,
    progress: Callable[[int], None] | None = None,
) -> Membranes:
    """Compute one membrane per concept in closed form; apply them with `apply_membranes`, store with `save_membranes`.

    side="text", in seconds: each concept is put into full captions, in all its phrasings; from its first token on, the
    text embeddings are regressed onto those of the same captions with the surrogate in its place, while the embeddings
    of `preserve` stay (methods/membranes/closed_form.py). W (I + u v) is then a low-rank membrane of every projection
    that reads text. A probe is fitted on the same captions, so that gate "probe" closes for unrelated prompts.

    side="image", some hundred short runs of the pipeline: each concept is drawn in captions beside the same captions
    with other things in its place, and what tells their image tokens apart is taken out of every picture that shows it,
    however it was asked for (methods/membranes/visual_fit.py). Runs of `preserve` set the thresholds so that in at most
    `VisualConfig.false_open` of such pictures a gate opens; where none does, the picture is the untouched one's.

    side="both": the membranes of either side, which stack.

    Args:
        pipe: SD1.x, SD2, SDXL, SD3 or Flux pipeline.
        concepts: names; "robot|android|droid" names synonyms too.
        surrogate: what they turn into; "" leaves the phrase out of the caption.
        preserve: captions that must not change; None is a general list. Captions that name an erased concept are left
            out, and a warning says where fewer than 50 remain.
        synonyms: name -> further phrasings.
        templates: captions with one "{}" each; None is a general list.
        config: how to solve.
        max_sequence_length: of T5 (SD3, Flux), the one you will generate with; None is the pipeline's default. For the
            image side it belongs into `VisualConfig.sampling`.
        side: "text", "image" or "both".
        pictures: concept -> at least 4 pictures of it (PIL, path, array or tensor): its image side is then fitted on
            these, and its name need mean nothing to the model.
        visual: how the image side is fitted.
        progress: called with the number of pictures that the image side's fit drew.

    Raises:
        ModelError: an unsupported pipeline.
        MembraneError: no concept, a template without "{}", a surrogate that is a concept to be erased, another side,
            pictures for the text side, membranes at work on the pipeline where the image side is fitted, or a concept
            that no layer tells from others.

    Source: UCE (arXiv 2308.14761), SPEED (arXiv 2503.07392), RECE (arXiv 2407.12383); see `ClosedFormConfig.method`.

    >>> erase_concepts(pipe, ["robot", "ghost|phantom"])
    Membranes(robot [closed_form/uce, 14 modules], ghost [closed_form/uce, 14 modules])
    """
    if side not in SIDES:
        raise MembraneError(f"side={side!r}; expected one of {SIDES}")
    if side == "text" and (pictures or visual is not None):
        raise MembraneError("pictures and `visual` are for the image side; expected side='image' or 'both'")
    preserve = None if preserve is None else list(preserve)
    looks = Membranes()
    if side != "text":
        looks = fit_visual(
            pipe,
            concepts,
            surrogate,
            preserve,
            synonyms=synonyms,
            templates=templates,
            pictures=pictures,
            config=visual,
            progress=progress,
        )
    if side == "image":
        return looks
    segments = segments_of(pipe)
    last = segments[-1]
    encode = functools.partial(
        encode_text,
        pipe,
        max_sequence_length=max_sequence_length,
        positions=None if last.causal else last.start + T5_POSITIONS,
    )
    tokens, pooled = (weights_of(pipe, group) for group in text_projections(pipe))
    space = TextSpace(encode, segments, tokens, pooled, vocabulary(pipe))
    words = fit_concepts(space, concepts, surrogate, preserve, synonyms=synonyms, templates=templates, config=config)
    return words + looks
