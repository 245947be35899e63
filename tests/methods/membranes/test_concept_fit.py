"""Fits on a text encoder made of word vectors, whose meanings are known: what says a concept, and what says nothing."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from semiperm.methods.membranes import concept_fit, detector
from semiperm.methods.membranes.captions import PRESERVE
from semiperm.methods.membranes.concept_fit import fit_concepts
from semiperm.methods.membranes.gates import probe_gate
from semiperm.methods.membranes.types import LEAST_MEANING
from semiperm.methods.membranes.vocabulary import other_words
from semiperm.methods.text_space import Segment, TextFeatures, TextSpace

WIDTH, LENGTH = 64, 40
MEANT = {"sketch": "drawing", "pencil": "drawing", "charcoal": "drawing", "dotteds": "zzz"}  # what else a word means
NOISE = ("zzz", "teapot")  # words that the encoder takes for nothing


def vector(word: str) -> torch.Tensor:
    word = MEANT.get(word, word)
    made = torch.randn(WIDTH, generator=torch.Generator().manual_seed(sum(map(ord, word)) * 7919 + len(word)))
    return made * (0.01 if word in NOISE else 1.0)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())[: LENGTH - 2]


def encode(captions) -> TextFeatures:
    hidden = torch.zeros(len(captions), LENGTH, WIDTH)
    for row, caption in enumerate(captions):
        state = vector("begin")
        for place in range(LENGTH):  # causal: every later position carries what came before
            own = words(caption)
            state = 0.95 * state + (vector(own[place - 1]) if 0 < place <= len(own) else 0.0)
            hidden[row, place] = state
    return TextFeatures(hidden, None, [[hash(word) % 999 for word in words(caption)] for caption in captions])


@pytest.fixture
def space() -> TextSpace:
    segment = Segment(lambda texts: [1 + len(words(text)) for text in texts], 0, True)
    return TextSpace(encode, [segment], {"lora_unet_to_k": torch.eye(WIDTH)}, {})


def moved(membranes, caption: str) -> float:
    pair, hidden = membranes[0].modules["lora_unet_to_k"], encode([caption]).hidden
    return float((pair.scale * hidden @ pair.down.T @ pair.up.T).norm(dim=2).amax())


def test_what_says_the_concept_in_other_words_is_not_held(space, monkeypatch):
    free = fit_concepts(space, "sketch")
    monkeypatch.setattr(concept_fit, "_SAYS", float("inf"))
    held = fit_concepts(space, "sketch")
    assert moved(free, "a sketch of a dog") > 1.1 * moved(held, "a sketch of a dog")
    assert moved(free, "a photo of a dog") < 0.2 * moved(free, "a sketch of a dog")


def test_words_of_the_vocabulary_stand_beside_general_captions(space, monkeypatch):
    """An encoder that takes English for noise: general captions alone tell "a word that means something" from it."""
    made = [f"{a}{b}{c}" for a in "bdfg" for b in "aeiou" for c in ("nak", "rul")]
    known = ("robot", "android", *made)
    monkeypatch.setitem(MEANT, "android", "robot")
    plain, thing = vector, vector("thing")

    def knows_few(word):
        return plain(word) + thing if word in known else plain(word) * (1.0 if word == "begin" else 0.01)

    monkeypatch.setitem(globals(), "vector", knows_few)
    blind = fit_concepts(space, "robot")[0].probe
    seeing = fit_concepts(replace(space, vocabulary=sorted(known[:-10])), "robot")[0].probe
    others = encode([f"{word} on a table" for word in known[-10:]]).hidden  # that the vocabulary does not have
    assert probe_gate(others, seeing).mean() < 0.2 < 0.4 < probe_gate(others, blind).mean()
    assert probe_gate(encode(["an android on a table"]).hidden, seeing).item() == 1.0, "what it takes for the same"


def test_other_words_are_those_that_mean_most_and_something_else(space, monkeypatch):
    monkeypatch.setitem(MEANT, "android", "robot")
    words = ["android", "teapot", "phantom", "robot", "zzz", "moon"]
    assert other_words(replace(space, vocabulary=words), ["robot"])[:2] in (["phantom", "moon"], ["moon", "phantom"])
    assert "android" not in other_words(replace(space, vocabulary=words), ["robot"])
    assert other_words(space, ["robot"]) == []


def test_captions_that_a_user_gave_are_held(space, monkeypatch):
    kept = []
    solve = concept_fit.closed_form_edits
    monkeypatch.setattr(concept_fit, "closed_form_edits", lambda *a, **k: kept.append(len(a[2])) or solve(*a, **k))
    own = [caption for caption in PRESERVE if "sketch" not in caption]
    fit_concepts(space, "sketch", preserve=own)
    assert kept == [len(own) * LENGTH]
    fit_concepts(space, "sketch")
    assert kept[1] == kept[0] and kept[2] < kept[1]  # a first solution tells what to leave out of the second


def test_a_plural_without_meaning_is_no_failure_of_the_detector(space, monkeypatch):
    probe = fit_concepts(space, "dotted")[0].probe
    assert probe.gate == "auto" and probe.false_closed == 0.0 and probe.meaning > LEAST_MEANING
    monkeypatch.setattr(detector, "_ALIKE", -float("inf"))  # every plural counts as the concept
    assert not fit_concepts(space, "dotted")[0].probe.tells


def test_a_word_without_meaning_is_gated_by_itself(space):
    probe = fit_concepts(space, "teapot")[0].probe
    assert probe.meaning < LEAST_MEANING and not probe.tells and probe.gate == "words"
