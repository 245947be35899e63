"""`erase_concepts`: closed-form membranes for a loaded pipeline, from captions alone; nothing is trained or applied."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

import torch

from ...methods.membranes.closed_form import ClosedFormConfig
from ...methods.membranes.concept_fit import T5_POSITIONS, fit_concepts
from ...methods.membranes.types import Membranes
from ...methods.text_space import TextSpace
from ..family import Pipeline
from ..text import encode_text, segments_of, text_projections
from ..weights import weights_of


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
) -> Membranes:
    """Compute one membrane per concept in closed form; apply them with `apply_membranes`, store with `save_membranes`.

    Each concept is put into full captions, in all its phrasings; from its first token on, the text embeddings are
    regressed onto those of the same captions with the surrogate in its place, while the embeddings of `preserve` stay
    (methods/membranes/closed_form.py). W (I + u v) is then a low-rank membrane of every projection that reads text. A
    probe is fitted on the same captions, so that gate "probe" closes for unrelated prompts.

    Args:
        pipe: SD1.x, SD2, SDXL, SD3 or Flux pipeline.
        concepts: names; "robot|android|droid" names synonyms too.
        surrogate: what they turn into; "" leaves the phrase out of the caption.
        preserve: captions that must not change; None is a general list. Captions that name an erased concept are left
            out, and a warning says where fewer than 50 remain.
        synonyms: name -> further phrasings.
        templates: captions with one "{}" each; None is a general list.
        config: how to solve.
        max_sequence_length: of T5 (SD3, Flux), the one you will generate with; None is the pipeline's default.

    Raises:
        ModelError: an unsupported pipeline.
        MembraneError: no concept, a template without "{}", or a surrogate that is a concept to be erased.

    Source: UCE (arXiv 2308.14761), SPEED (arXiv 2503.07392), RECE (arXiv 2407.12383); see `ClosedFormConfig.method`.

    >>> erase_concepts(pipe, ["robot", "ghost|phantom"])
    Membranes(robot [closed_form/uce, 14 modules], ghost [closed_form/uce, 14 modules])
    """
    segments = segments_of(pipe)
    last = segments[-1]
    encode = functools.partial(
        encode_text,
        pipe,
        max_sequence_length=max_sequence_length,
        positions=None if last.causal else last.start + T5_POSITIONS,
    )
    tokens, pooled = (weights_of(pipe, group) for group in text_projections(pipe))
    space = TextSpace(encode, segments, tokens, pooled)
    return fit_concepts(space, concepts, surrogate, preserve, synonyms=synonyms, templates=templates, config=config)
