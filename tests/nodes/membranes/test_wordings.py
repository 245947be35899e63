"""What check_wordings.py measured in the real ComfyUI: words open gates there, too."""

import pytest
from comfy_server import in_comfyui

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def found():
    return in_comfyui("check_wordings.py")


def test_words_open_gates_however_they_are_written(found):
    assert all(effect > 1e-3 for effect in found["named"].values()), found["named"]
    assert found["tuples"] > 1e-3  # nodes that call encode_from_tokens themselves


def test_other_prompts_keep_every_bit(found):
    assert set(found["not named"].values()) == {0.0}, found["not named"]
    assert found["joined"] == 0.0  # a tensor that another node made: its words are unknown, and the detector is blind


def test_the_negative_prompt_is_left_alone_unless_asked_for(found):
    assert found["negative"] == 0.0 and found["negative rows"] > 1e-3
    assert found["always"] > 1e-3  # the prompt is not


def test_encodes_are_as_they_were(found):
    assert found["once"] and found["unknown"]
    (text,) = found["texts"]
    assert text.replace(" ", "") == "tworobots,fog" and found["ids"][0] >= 4
