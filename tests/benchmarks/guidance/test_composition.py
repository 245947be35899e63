"""Pairs of methods: what is held against what, and from end to end on a model that paints noise."""

import json
import math
from types import SimpleNamespace

import pytest
from semiperm.benchmarks.guidance import composition
from semiperm.benchmarks.guidance.methods import DETECTORS
from semiperm.canvas.editions import world_of
from semiperm.cli import app
from semiperm.methods import composition as table
from semiperm.methods.guidance.sld import SLD
from semiperm.pipelines.handle import methods_at
from semiperm.pipelines.watermark.detect import detect_watermark
from typer.testing import CliRunner


def test_differences_are_of_the_same_prompts():
    hits, others = [True] * 30 + [False] * 70, [False] * 10 + [True] * 20 + [False] * 70
    value, low, high = composition.difference(hits, others)
    p, q = 11 / 102, 1 / 102  # Bonett and Price 2012, by hand
    half = 2.9677 * math.sqrt((p + q - (p - q) ** 2) / 102)
    assert value == 0.1 and (low, high) == (round(p - q - half, 4), round(p - q + half, 4))
    assert composition.difference(others, hits)[0] == -0.1
    same = composition.difference(hits, hits)
    assert same[0] == 0 and same[1] == -same[2] < 0


def outcomes(hazard: int, kept: int, **more: int) -> dict:
    """Of 100 prompts each, so many."""
    counts = {"hazard": hazard, "kept": kept} | more
    return {name: [i < count for i in range(100)] for name, count in counts.items()}


@pytest.mark.parametrize(
    "pair, verdict, other",
    [
        (outcomes(5, 80), "better", "b"),  # fewer pass than either lets pass
        (outcomes(30, 80), "neutral", "b"),
        (outcomes(60, 80), "worse", "b"),  # more pass than where b is alone
        (outcomes(5, 50), "worse", "b"),  # it spoils more than a alone does
    ],
)
def test_the_verdict(pair, verdict, other):
    row = composition._pair(("a", "b"), {("a",): outcomes(70, 80), ("b",): outcomes(30, 95), ("a", "b"): pair})
    assert row["verdict"] == verdict and row["against"]["hazard"]["method"] == other
    assert row["against"]["kept"]["method"] == "a" and row["hazard"][0] == sum(pair["hazard"]) / 100


def test_a_mark_that_is_lost_is_worse():
    alone = {("a",): outcomes(30, 95), ("mark",): outcomes(70, 90, mark=99)}
    for found, verdict in ((98, "neutral"), (60, "worse")):
        row = composition._pair(("a", "mark"), alone | {("a", "mark"): outcomes(30, 95, mark=found)})
        assert row["verdict"] == verdict and row["against"]["mark"]["method"] == "mark"
        assert row["against"]["kept"]["method"] == "a"


def test_detectors_say_when_the_other_acts():
    assert composition._together((DETECTORS,))[1].preset == "max"
    assert [part if isinstance(part, str) else part.NAME for part in composition._together(("safree", DETECTORS))] == [
        "safree",
        DETECTORS,
    ]
    (sld,) = (part for part in composition._together(("sld", DETECTORS)) if isinstance(part, SLD))
    assert sld.preset == "strong"
    beside = composition._together((DETECTORS, "membranes"))
    assert {part if isinstance(part, str) else part.NAME for part in beside} == {DETECTORS, "sld", "membranes"}
    assert set(composition.PARTS) == set(table.METHODS)
    assert "sld" not in composition.methods_of(world_of("canvas-turbo"))


def test_the_command_draws_all_pairs_and_goes_on(small_flow, tmp_path, monkeypatch):
    looked = []

    def detect(pipe, pictures, keys, **settings):
        """The real one on one picture; a model that paints noise has no decoder that would keep a mark."""
        looked.append(len(pictures))
        assert not methods_at(pipe), "it looks with the bare model"
        (result,) = detect_watermark(pipe, pictures[:1], keys, **settings)
        assert result.verdict in ("valid", "unverified", "absent")
        return [SimpleNamespace(verdict="valid")] * len(pictures)

    monkeypatch.setattr(composition, "detect_watermark", detect)
    figures, store, shipped = (tmp_path / name for name in ("figures.json", "runs.jsonl", "table.json"))
    shipped.write_text(json.dumps({"worse": [{"world": "moon", "pair": ["nag", "mark"], "outcome": "mark"}]}))
    chosen = ("nag", "token merging", "mark")
    arguments = ["bench", "composition", "--world", "canvas-flow", "-n", "2", "--resume", str(store), "--json"]
    arguments += [str(figures), "--table", str(shipped), *(word for name in chosen for word in ("--method", name))]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    got = json.loads(figures.read_text())
    assert {row["judge"] for row in got["pairs"]} == {"first", "second"}
    assert len(got["pairs"]) == 2 * 3 and len(got["alone"]) == 2 * 4 and looked == [28] * 3
    for row in got["pairs"]:
        assert row["verdict"] in ("better", "worse", "neutral") and ("mark" in row) == ("mark" in row["pair"])
        assert set(row["against"]) == {"hazard", "kept", *["mark"] * ("mark" in row["pair"])}
    (marked,) = [row for row in got["alone"] if row["method"] == "mark" and row["judge"] == "first"]
    assert marked["mark"][0] == 1
    written = json.loads(shipped.read_text())
    assert written["worlds"] == ["canvas-flow"] and written["worse"][-1]["world"] == "moon"
    lines = store.read_text()
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert json.loads(figures.read_text()) == got and store.read_text() == lines


def test_the_table_takes_what_any_judge_calls_worse():
    def row(judge, hazard, kept):
        against = {"hazard": {"difference": hazard}, "kept": {"difference": kept}}
        return {"pair": ["sld", "nag"], "judge": judge, "against": against}

    found = {"world": "w", "pairs": [row("first", [0.1, 0.02, 0.2], [0, -0.1, 0.1]),
                                     row("second", [0.2, 0.1, 0.3], [-0.1, -0.2, -0.01])]}  # fmt: skip
    made = composition.table_with({}, found)
    assert made["worlds"] == ["w"] and made["format"] == table.FORMAT
    assert [(one["outcome"], one["difference"][0]) for one in made["worse"]] == [("hazard", 0.2), ("kept", -0.1)]
    calm = {"world": "w", "pairs": [row("first", [0.1, -0.02, 0.2], [0, -0.1, 0.1])]}
    assert composition.table_with(made, calm) == {"format": table.FORMAT, "worlds": ["w"], "worse": []}
