"""What several rivals share: words as embeddings, layers that a paper asks for, weights put in place for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...methods.errors import MembraneError, ModelError
from ...methods.membranes.captions import OTHERS, TEMPLATES, filled
from ...methods.membranes.closed_form import Edit, closed_form_membrane
from ...methods.membranes.phrases import fold, names
from ...methods.membranes.types import Membranes
from ...methods.membranes.uce import uce_membranes
from ...methods.modules import ordinary
from ...pipelines.family import denoiser_of, family_of
from ...pipelines.text import encode_text, module_keys, segments_of, text_projections
from ...pipelines.weights import weights_of

Fit = TypeVar("Fit")


def fitted(told, name: str, options: Mapping[str, Any], make: Callable[[], Fit]) -> Fit:
    """What a rival made of what it was told; it is made once, however often the rival is put to work.

    Raises:
        MembraneError: it was told of no concept.
    """
    if not told.phrases:
        raise MembraneError(f"{name} was told of no concept; expected Told({{name: (name, synonym, ...)}})")
    key = name, tuple(sorted(options.items()))
    if key not in told.kept:
        told.kept[key] = make()
    return told.kept[key]


# ---- words -----------------------------------------------------------------------------------------------------------


def last_tokens(pipe, texts: Sequence[str]) -> Tensor:
    """(S P, d) embeddings of the last token of each of P bare texts, in each of the S stretches of the text axis.

    Of an empty text it is the first token of the stretch.
    """
    texts = list(texts)
    segments = segments_of(pipe)
    if not texts:
        return encode_text(pipe, [""]).hidden[0, :0]
    hidden = encode_text(pipe, texts).hidden
    ends = [(row, s.start + max(end - 1, 0)) for s in segments for row, end in enumerate(s.prefix_tokens(texts))]
    return torch.stack([hidden[row, end] for row, end in ends])


def pooled_of(pipe, texts: Sequence[str]) -> Tensor:
    """(P, p) pooled embeddings, of families that read one."""
    texts = list(texts)
    pooled = encode_text(pipe, texts or [""]).pooled
    if pooled is None:
        raise ModelError(f"{type(pipe).__name__} reads no pooled text embedding")
    return pooled[: len(texts)]


def text_spaces(pipe) -> Iterator[tuple[dict[str, Tensor], Callable[[Any, Sequence[str]], Tensor]]]:
    """(weights that read a text, how texts are embedded for them): token embeddings, then the pooled one if it is read.

    Of the pooled one, the empty text stands for itself.
    """
    groups = text_projections(pipe)
    for modules, embed in zip(groups, (last_tokens, pooled_of), strict=True):
        if modules:
            yield weights_of(pipe, modules), embed


def textbook_uce(pipe, phrases: Sequence[str], others: Sequence[str]) -> Membranes:
    """UCE as released: the last token of each bare phrase, towards the empty prompt's, preserving the other names."""
    made = Membranes()
    for weights, embed in text_spaces(pipe):
        concept, target, preserve = (embed(pipe, texts) for texts in (phrases, [""] * len(phrases), others))
        labels = list(phrases) * (len(concept) // len(phrases))
        made += uce_membranes(weights, concept, target, preserve, labels)
    return made


def edit_membrane(weights: dict[str, Tensor], edit: Edit, told, method: str) -> Membranes:
    """An edit of text space as a membrane of all concepts together."""
    return Membranes(closed_form_membrane(weights, edit, "+".join(told.words), method=f"rival/{method}"))


def paired_captions(phrases: Sequence[str], count: int) -> tuple[list[str], list[str]]:
    """Captions with the concept, its phrasings in turn, and the same captions with other things in its place.

    They are the package's general ones, as its own fits have them.
    """
    own = [fold(phrase) for phrase in phrases]
    others = [word for word in OTHERS if not names(word, own)]
    forms = [TEMPLATES[i % len(TEMPLATES)] for i in range(count)]
    return (
        [filled(form, phrases[i % len(phrases)]) for i, form in enumerate(forms)],
        [filled(form, others[(5 * i) % len(others)]) for i, form in enumerate(forms)],
    )


# ---- layers ----------------------------------------------------------------------------------------------------------


def cross_attention(pipe, ends: str | tuple[str, ...], method: str) -> dict[str, nn.Module]:
    """Module key -> the layers of cross-attention whose path ends so, such as "attn2.to_v".

    Raises:
        ModelError: an architecture without cross-attention.
    """
    family = family_of(pipe, video=False)
    denoiser, attribute = denoiser_of(pipe)
    found = {key: m for key, (path, m) in module_keys(denoiser, attribute).items() if path.endswith(ends)}
    if not family.cross_attention or not found:
        raise ModelError(
            f"{method} acts at the cross-attention of a UNet ({ends}); the {type(denoiser).__name__} of the"
            f" {family.name} family has none, and its paper says nothing of joint attention: leave it out here"
        )
    return found


# ---- weights ---------------------------------------------------------------------------------------------------------


def parameters_of(pipe, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """Parameters of a pipeline's parts by "part.path.of.parameter".

    Raises:
        ModelError: one is missing, or is not stored as plain floating point numbers.
    """
    found = {}
    for name in names:
        part, _, path = name.partition(".")
        owner, _, last = path.rpartition(".")
        module = getattr(pipe, part, None)
        module = None if module is None else getattr(module, "_orig_mod", module).get_submodule(owner)
        parameter = None if module is None else getattr(module, last, None)
        if parameter is None or not ordinary(parameter):
            raise ModelError(
                f"{name} is {'missing' if parameter is None else f'stored as {parameter.dtype}'}; expected a parameter"
                " of floating point numbers in memory: load the model unquantised"
            )
        found[name] = parameter
    return found


@contextmanager
def in_place(pipe, values: Mapping[str, Tensor]) -> Iterator[dict]:
    """Inside, parameters have these values; afterwards the bits that they had.

    Args:
        values: "part.path.of.parameter" -> its new value.

    Raises:
        MembraneError: nothing would change, a shape differs, or a value is not finite.
    """
    parameters = parameters_of(pipe, list(values))
    for name, value in values.items():
        if value.shape != parameters[name].shape or not bool(torch.isfinite(value).all()):
            raise MembraneError(
                f"{name}: new values {tuple(value.shape)} for {tuple(parameters[name].shape)}, or some not finite"
            )
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    after = {name: value.to(before[name]) for name, value in values.items()}
    if all(torch.equal(before[name], after[name]) for name in after):
        raise MembraneError(f"the edit leaves all {len(after)} weights as they are: nothing is erased")
    try:
        _put(parameters, after)
        yield {}
    finally:
        _put(parameters, before)


@torch.no_grad()
def _put(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
