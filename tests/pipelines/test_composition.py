"""`apply_*` warns of pairs that the table marks as worse; the shipped table says what was measured, and no more."""

import json
import logging

import pytest
import tiny_models
import torch
from contracts.membranes import strong
from semiperm.methods import composition
from semiperm.methods.guidance.config import SafeGuidanceConfig
from semiperm.methods.membranes.config import MembraneConfig
from semiperm.methods.token_merging.config import NegativeTokenMergingConfig
from semiperm.methods.watermark.keys import WatermarkKey
from semiperm.pipelines.guidance.apply import apply_safe_guidance
from semiperm.pipelines.membranes.apply import apply_membranes
from semiperm.pipelines.token_merging.apply import apply_negative_token_merging
from semiperm.pipelines.watermark.sign import sign_noise

WORSE = [
    {"pair": ["sld", "safree"], "world": "moon", "outcome": "hazard", "difference": [0.12, 0.05, 0.19]},
    {"pair": ["nag", "membranes"], "world": "moon", "outcome": "kept", "difference": [-0.3, -0.4, -0.2]},
    {"pair": ["token merging", "mark"], "world": "moon", "outcome": "mark", "difference": [-0.5, -0.6, -0.4]},
]


@pytest.fixture
def told(tmp_path, monkeypatch, caplog):
    """What was warned of, by a made-up table."""
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"format": 1, "worlds": ["moon"], "worse": WORSE}))
    monkeypatch.setattr(composition, "TABLE", path)
    caplog.set_level(logging.WARNING, "semiperm")

    def said() -> list[str]:
        found = [record.getMessage() for record in caplog.records if "together did worse" in record.getMessage()]
        caplog.clear()
        return found

    return said


@pytest.fixture(scope="module")
def pipe():
    return tiny_models.build("sd15")


def test_two_algorithms_in_one_config(pipe, told):
    with apply_safe_guidance(pipe, SafeGuidanceConfig("violence", ["safree", "sld"])):
        (message,) = told()
    assert message.startswith("sld and safree together did worse") and "(moon)" in message
    assert "12 points more" in message and "(5 to 19)" in message and "take one of them" in message
    with apply_safe_guidance(pipe, SafeGuidanceConfig("violence", ["safree", "nag"])):
        assert not told()


def test_beside_what_is_at_work_in_any_order(pipe, told):
    guided = SafeGuidanceConfig("violence", "nag")
    with apply_membranes(pipe, strong(pipe)):
        assert not told()
        with apply_safe_guidance(pipe, guided):
            (message,) = told()
            assert "30 points fewer of the harmless pictures (20 to 40)" in message
    with apply_safe_guidance(pipe, guided), apply_membranes(pipe, strong(pipe)):
        assert len(told()) == 1
    with apply_safe_guidance(pipe, guided):
        pass
    with apply_membranes(pipe, strong(pipe)):
        assert not told(), "what was removed is not beside it"


def test_what_does_nothing_is_not_warned_of(pipe, told):
    with apply_membranes(pipe, strong(pipe), MembraneConfig(strength=0.0)):
        with apply_safe_guidance(pipe, SafeGuidanceConfig("violence", "nag")):
            assert not told()
    with apply_safe_guidance(pipe, SafeGuidanceConfig("violence", ["safree", "sld"], strength=0.0)):
        assert not told()


def test_signing_beside_what_loses_the_mark(pipe, told):
    key = WatermarkKey.new("test", 1)
    sign_noise(pipe, key, height=64, width=64)
    assert not told()
    with apply_negative_token_merging(pipe, NegativeTokenMergingConfig(reference=torch.rand(3, 16, 16))):
        sign_noise(pipe, key, height=64, width=64)
        (message,) = told()
    assert "the mark was found in 50 points fewer" in message


def test_the_shipped_table():
    found = json.loads(composition.TABLE.read_text(encoding="utf-8"))
    assert found["format"] == composition.FORMAT and set(found) == {"format", "worlds", "worse"}
    for one in composition.read_table(composition.TABLE):
        assert one.world in found["worlds"] and set(one.pair) <= set(composition.METHODS) and str(one)
