"""Phrases in words, the record of prompts, and detectors that say how well they tell."""

import doctest
import gc
import logging

import pytest
import torch
from semiperm.methods.errors import MembraneError
from semiperm.methods.membranes import captions, phrases
from semiperm.methods.membranes.concept_fit import fit_concepts
from semiperm.methods.membranes.file import load_membranes, save_membranes
from semiperm.methods.membranes.gate_bank import GateBank
from semiperm.methods.membranes.gates import probe_gate
from semiperm.methods.membranes.phrases import fold, names, plural, singular
from semiperm.methods.membranes.types import GateProbe, LowRank, Membrane, Membranes
from semiperm.methods.text_space import Segment, TextFeatures, TextSpace, Wording

PAIRS = {"lora_unet_a": LowRank(torch.ones(1, 8), torch.ones(8, 1), 1.0)}


@pytest.mark.parametrize("module", [phrases, captions])
def test_examples_in_the_docstrings(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    "word", "robot lady box church knife mouse man mechanical_man glass bus cross axis house axe lens canvas".split()
)
def test_plurals_fold_to_their_singular(word):
    word = word.replace("_", " ")
    assert fold(plural(word)) == fold(word) and singular("glass") == "glass"


@pytest.mark.parametrize(
    ("text", "phrase", "found"),
    [
        ("A ROBOT.", "robot", True),
        ("ｒｏｂｏｔ in snow", "robot", True),
        ("ro\u200bbots, fog", "robot", True),
        ("Röbots' parade", "robot", True),
        ("the robot’s arm", "robots", True),
        ("robot ' s arm", "robot", True),
        ("van-gogh style", "Van Gogh", True),
        ("gogh, van", "van gogh", False),
        ("robotic", "robot", False),
        ("microbots", "robot", False),
        ("mechanical, man", "mechanical man", True),
        ("a mechanical old man", "mechanical man", False),
        ("一个机器人在雪中", "机器人", True),
        ("", "robot", False),
        ("anything", "!!", False),
    ],
)
def test_whole_phrases_in_any_form(text, phrase, found):
    assert names(text, [fold(phrase)]) is found


def test_the_lists_of_prompts_share_no_wording_and_no_gap():
    assert not set(captions.FREE) & set(captions.FREE_KEPT_OUT) and not set(captions.OTHERS) & set(
        captions.OTHERS_KEPT_OUT
    )
    for template in captions.FREE + captions.FREE_KEPT_OUT:
        text = captions.filled(template, "tin man")
        assert "{" not in text and names(text, [fold("tin man")]), template
        assert not names(captions.filled(template, ""), [fold("tin man")])
    assert len(captions.PRESERVE) == len(set(captions.PRESERVE)) > 200


def bank(*membranes, gate="auto", **options) -> GateBank:
    return GateBank(None, membranes, gate, **options)


def blind(concept="robot", **fields) -> Membrane:
    return Membrane(concept, PAIRS, probe=GateProbe(torch.zeros(8), 1.0, 2.0), **fields)


def said(*texts) -> Wording:
    return Wording(texts[0], ((1,),), texts)


def test_any_text_of_a_prompt_opens_and_the_record_is_as_long_as_the_call():
    gates = bank(blind(), blind("ghost"))
    rows = torch.randn(80, 5, 8)
    gates.recorded.add(rows[:40], [said(f"robot {i}", "a ghost" if i == 3 else "x") for i in range(40)], False)
    gates.recorded.add(rows[40:], [said("no robot")] * 40, True)
    gamma = gates(rows)
    assert gamma[:40, 0].eq(1).all() and gamma[:, 1].nonzero().tolist() == [[3]]
    assert gamma[40:].eq(0).all()  # negative rows
    assert bank(blind(), negative_rows=True)(rows[:1]).item() == 0.0  # nobody recorded it there
    assert gates(rows[40:41], negative=(False,)).tolist() == [[1.0, 0.0]]  # the caller knows better


def test_texts_of_several_lengths_and_repeated_ones_are_found():
    gates, short, long = bank(blind()), torch.randn(1, 4, 8), torch.randn(1, 6, 8)
    gates.recorded.add(short, [said("robot")], False)
    gates.recorded.add(long, [said("fog")], True)
    assert gates(short.repeat(1, 3, 1)).item() == 1.0 and gates(long.repeat(1, 2, 1)).item() == 0.0
    assert gates(torch.randn(1, 12, 8)).item() == 0.0
    assert gates.recorded.find(short[0].repeat(3, 1)).prompt == "robot"


def test_the_same_embedding_as_prompt_and_negative_prompt_is_protected():
    gates, row = bank(Membrane("robot", PAIRS), gate="always"), torch.randn(1, 4, 8)
    gates.recorded.add(row, [said("robot")], True)
    assert gates(row).item() == 0.0
    gates.recorded.add(row, [said("robot")], False)
    assert gates(row).item() == 1.0


def test_what_is_kept_by_somebody_stays_on_record():
    gates, kept, gone = bank(blind()), torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    gates.recorded.add(kept, [said("robot"), said("star")], False)
    gates.recorded.add(gone, [said("robot")], False)
    row = gone[:1].clone()
    del gone
    gc.collect()
    gates.recorded.begin()
    assert [entry.prompt for entry in gates.recorded.entries] == ["robot", "star"]
    assert gates(kept).tolist() == [[1.0], [0.0]] and gates(row).item() == 0.0
    kept.mul_(2)  # another text now
    assert gates(kept).tolist() == [[0.0], [0.0]]


def test_the_wider_of_detector_and_pooled_detector_counts():
    probe = GateProbe(torch.ones(2), 0.0, 1.0, pooled=GateProbe(torch.ones(3), 0.0, 2.0))
    hidden, pooled = torch.tensor([[[0.1, 0.1]], [[0.6, 0.4]]]), torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert probe_gate(hidden, probe, pooled).tolist() == pytest.approx([0.5, 1.0])
    assert probe_gate(hidden, probe).tolist() == pytest.approx([0.2, 1.0])


def test_figures_of_a_detector_travel_with_the_file(tmp_path):
    pooled = GateProbe(torch.ones(3), 0.0, 1.0, 0.5, 0.0, 0.25, (4, 8))
    probe = GateProbe(torch.ones(8), 0.0, 1.0, 0.25, 1 / 3, 0.125, (57, 80), pooled)
    (back,) = load_membranes(
        save_membranes(Membranes(Membrane("robot", PAIRS, probe=probe)), tmp_path / "a.safetensors")
    )
    for got, was in ((back.probe, probe), (back.probe.pooled, pooled)):
        for name in ("low", "high", "separation", "false_closed", "false_open", "checked"):
            assert getattr(got, name) == getattr(was, name), name
    assert not back.probe.tells and back.probe.pooled.tells


# ---- a fit, in a world where each word is a direction ----------------------------------------------------------------


def space(width=64, length=40) -> TextSpace:
    """Each word has its own direction; causal: later positions carry a share of all before them."""
    known: dict[str, torch.Tensor] = {}

    def direction(word):
        if word not in known:
            known[word] = torch.randn(
                width, generator=torch.Generator().manual_seed(sum(map(ord, word)) * 7919 % 10007)
            )
        return known[word]

    def encode(texts):
        hidden = torch.zeros(len(texts), length, width)
        for i, text in enumerate(texts):
            words = fold(text)[: length - 1]
            for j, word in enumerate(words):
                hidden[i, j + 1] += direction(word)
                hidden[i, j + 2 :] += 0.15 * direction(word)
        return TextFeatures(hidden, None, [[1]] * len(texts))

    def prefix(texts):
        return [1 + min(len(fold(text)), length - 2) for text in texts]

    return TextSpace(encode, [Segment(prefix, 0, True)], {"lora_unet_a": torch.randn(16, width)}, {})


def test_a_fitted_detector_is_tried_on_prompts_that_it_was_not_fitted_on():
    (membrane,) = fit_concepts(space(), "robot")
    probe = membrane.probe
    assert probe.tells and probe.separation > 0.3 and probe.false_closed == 0.0 and probe.false_open < 0.1
    assert min(probe.checked) >= 50
    encode = space().encode
    asked = encode(["robots!", "cups and plates, snow, a robot", "the ROBOT's hat"]).hidden
    assert probe_gate(asked, probe).tolist() == [1.0] * 3
    assert probe_gate(encode(["cups and plates, snow", "a hat"]).hidden, probe).tolist() == [0.0] * 2


def test_few_captions_left_to_preserve_are_told(caplog):
    with caplog.at_level(logging.WARNING):
        fit_concepts(space(), "robot", preserve=["a cat", "a robot in the fog"])
    assert "only 2 captions are left to preserve of those given" in caplog.text  # and the empty one
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        fit_concepts(space(), ["robot", "ghost"])
    assert "left to preserve" not in caplog.text


def test_no_concept_becomes_another_erased_one():
    with pytest.raises(MembraneError, match="'Ghosts' is 'ghost' itself, which is to be erased"):
        fit_concepts(space(), ["robot", "ghost"], "Ghosts")
    with pytest.raises(MembraneError, match="to be erased"):
        fit_concepts(space(), ["robot|android"], "an android")
