"""Categories, settings, the record and its seal."""

import json

import pytest
import torch
from semiperm.methods.errors import GuidanceError, SemipermError
from semiperm.methods.guidance.category import Category, bundled_categories, category_from_text, load_category
from semiperm.methods.guidance.config import SafeGuidanceConfig
from semiperm.methods.guidance.nag import NAG
from semiperm.methods.guidance.record import GuidanceRecord, seal, sealed_is_intact
from semiperm.methods.guidance.sld import SLD

KEY = b"sixteen bytes or more"


def test_bundled_categories():
    found = bundled_categories()
    assert {"hate", "harassment", "violence", "self harm", "sexual", "shocking", "illegal activity"} < set(found)
    assert all(len(set(category.phrases)) == len(category.phrases) >= 2 for category in found.values())
    assert load_category("self_harm") == load_category("self harm") == found["self harm"]


def test_a_category_of_ones_own(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text('name = "mine"\nphrases = ["one", "two"]\npictures = ["a.png"]\n')
    mine = load_category(path)
    assert mine.phrases == ("one", "two") and mine.pictures == (str(tmp_path / "a.png"),)
    assert category_from_text("one, two\nthree").phrases == ("one", "two", "three")
    assert category_from_text(path.read_text()).name == "mine"
    assert mine.digest() != Category("mine", ("one", "2"), pictures=mine.pictures).digest()


@pytest.mark.parametrize(
    "text", ["name = 'x'", "name = 'x'\nphrases = []", "name='x'\nphrases=['a']\nphrase='b'", "phrases = [", "  ,\n"]
)
def test_wrong_categories_are_told(text, tmp_path):
    with pytest.raises(GuidanceError, match="expected|has name"):
        category_from_text(text)
    with pytest.raises(GuidanceError, match="expected"):
        load_category("wickedness")
    with pytest.raises(GuidanceError, match="no file"):
        load_category(tmp_path / "none.toml")


def test_settings():
    config = SafeGuidanceConfig(["violence", "harassment"], ["sld", NAG("flux")])
    assert config.algorithms[0] == SLD("strong"), "the strongest that a category asks for"
    assert [one.NAME for one in config.having("outputs")] == ["nag"] and not config.having("text")
    assert config.digest() != SafeGuidanceConfig(["violence", "harassment"], ["sld"]).digest()
    same = SafeGuidanceConfig("violence", "sld")
    assert same.digest() == SafeGuidanceConfig("hate", "sld").digest()
    assert same.categories_digest() != SafeGuidanceConfig("hate", "sld").categories_digest()


@pytest.mark.parametrize(
    "wrong",
    [
        {"categories": []},
        {"categories": ["hate", "hate"]},
        {"algorithms": "magic"},
        {"algorithms": []},
        {"algorithms": ["sld", SLD("max")]},
        {"strength": float("nan")},
        {"strength": 100},
        {"start": 0.5, "end": 0.5},
        {"when_unsafe": "refuse"},
        {"when_unsafe": "shrug"},
    ],
)
def test_wrong_settings_are_told(wrong):
    with pytest.raises(SemipermError, match="expected|without"):
        SafeGuidanceConfig(**{"categories": "hate"} | wrong)


def test_the_record_says_what_fired():
    record, config = GuidanceRecord(), SafeGuidanceConfig(["hate", "violence"], "sld")
    for share, scale in ((0.0, [0.0, 0.4]), (0.5, [0.0, 0.2])):
        record.step(share, 1 - share, True, extra_rows=4)
        record.add("scale", torch.tensor(scale))
        record.add("category", torch.tensor([0, 1]))
    report = record.report(config, 2)
    one, two = report["rows"]
    assert one["fired"] == 0 and one["category"] is None and two["category"] == "violence"
    assert two["fired"] == 1 and abs(two["scale"] - 0.3) < 1e-6 and report["evaluations"] == 8
    assert json.loads(json.dumps(report)) == report


def test_the_seal_detects_changes():
    sealed = seal({"a": 1, "rows": [{"fired": 0.5}]}, KEY)
    assert sealed_is_intact(json.loads(json.dumps(sealed)), KEY)
    assert not sealed_is_intact({**sealed, "a": 2}, KEY) and not sealed_is_intact(sealed, KEY + b"x")
    with pytest.raises(GuidanceError, match="never sealed"):
        sealed_is_intact({"a": 1}, KEY)
    with pytest.raises(GuidanceError, match="16"):
        seal({}, b"short")
