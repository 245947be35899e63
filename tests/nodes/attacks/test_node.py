"""The attack suite's node, without ComfyUI."""

import importlib
import importlib.util

import comfy_stub
import pytest
import torch
from semiperm.methods.errors import WatermarkError


@pytest.fixture
def image_attacks(tmp_path):
    with comfy_stub.stand_in(tmp_path):
        yield importlib.import_module("semiperm.nodes.attacks.node")


def test_attacks_make_one_batch(image_attacks):
    images = torch.rand(2, 24, 32, 3, generator=torch.Generator().manual_seed(0))
    found, names = image_attacks.attacked(images, "none\n\n flip # left and right\nnoise:0.1", 0)
    assert found.shape == (6, 24, 32, 3) and found.is_contiguous()
    assert names.splitlines() == ["none (0)", "none (1)", "flip (0)", "flip (1)", "noise:0.1 (0)", "noise:0.1 (1)"]
    assert found[:2].equal(images) and found[2:4].equal(images.flip(2))
    alone, name = image_attacks.attacked(images[:1], "noise:0.1", 0)
    assert name == "noise:0.1" and alone[0].equal(found[4]), "each line begins with the seed anew"
    assert not image_attacks.attacked(images[:1], "noise:0.1", 1)[0].equal(alone)
    assert image_attacks.attacked(torch.rand(1, 24, 32, 4), "none", 0)[0].shape == (1, 24, 32, 3)
    for text, words in (
        ("\n# none", "no attack was given"),
        ("jpg", "did you mean jpeg"),
        ("none\ncrop:0.5", "several"),
    ):
        with pytest.raises(WatermarkError, match=words):
            image_attacks.attacked(images, text, 0)
    output = image_attacks.SemipermAttackSuite.execute(images, "flip", 0)
    assert output.args[0].equal(images.flip(2)) and output.args[1] == "flip (0)\nflip (1)"
