"""The ways to erase that the erasure benchmark compares, each a context manager around a pipeline.

All are told the same phrasings of the concepts. The names of other concepts are for UCE alone, which is published with
a list of names to preserve; the membranes keep the package's general captions instead, as on any checkpoint.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial


@dataclass(frozen=True)
class Told:
    """What methods are told of the concepts to erase together.

    Args:
        words: {name: (name, synonym, ...)}. others: names of other concepts. kept: a fit that several methods share.
    """

    words: Mapping[str, Sequence[str]]
    others: Sequence[str] = ()
    kept: dict = field(default_factory=dict, compare=False)

    @property
    def phrases(self) -> list[str]:
        """All phrasings."""
        return [phrase for own in self.words.values() for phrase in own]


def _closed_form(pipe, told: Told, gate: str) -> AbstractContextManager[dict]:
    from ...pipelines.membranes.erase import erase_concepts

    if "membranes" not in told.kept:  # the same for every gate
        told.kept["membranes"] = erase_concepts(pipe, ["|".join(own) for own in told.words.values()])
    return applied(pipe, told.kept["membranes"], gate)


@contextmanager
def _textbook(pipe, told: Told) -> Iterator[dict]:
    """UCE as released: the last token of each bare phrase, towards the empty prompt's, preserving the other names."""
    from ..rivals.shared import textbook_uce

    with applied(pipe, textbook_uce(pipe, told.phrases, told.others), "always") as extra:
        yield extra


@contextmanager
def _negative_prompt(pipe, told: Told) -> Iterator[dict]:
    yield {"negative_prompt": ", ".join(told.phrases)}


@contextmanager
def applied(pipe, membranes, gate: str, negative_rows: bool = False) -> Iterator[dict]:
    """Apply ready membranes while the block runs."""
    from ...methods.membranes.config import MembraneConfig
    from ...pipelines.membranes.apply import apply_membranes, remove_membranes

    apply_membranes(pipe, membranes, MembraneConfig(gate=gate, negative_rows=negative_rows))
    try:
        yield {}
    finally:
        remove_membranes(pipe)


Method = Callable[[object, Told], AbstractContextManager[dict]]
METHODS: dict[str, Method] = {
    "closed_form/auto": partial(_closed_form, gate="auto"),
    "closed_form/always": partial(_closed_form, gate="always"),
    "closed_form/paper": partial(_closed_form, gate="paper"),
    "uce/textbook": _textbook,
    "negative_prompt": _negative_prompt,
}


def methods_of(guided: bool) -> dict[str, Method]:
    """METHODS; without guidance there is no negative prompt to give."""
    return {name: method for name, method in METHODS.items() if guided or name != "negative_prompt"}
