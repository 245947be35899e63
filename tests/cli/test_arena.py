"""`semiperm arena` from end to end on a model that paints noise: files, resuming, mistakes."""

import json

import pytest
from PIL import Image
from semiperm.benchmarks.arena import settings
from terminal import fails, run, runs

QUICK = settings.Settings(
    asks=1, others=2, part=1, attacked=1, searches=("relaxed",), search_steps=1, embedding_steps=1, inversion_steps=1,
    points=2, rounds=2, steps=2, minutes=9.0,
)  # fmt: skip


@pytest.fixture
def tiny(monkeypatch, small_flow):
    monkeypatch.setattr(settings, "QUICK", QUICK)


def test_files_and_resuming(tiny, tmp_path):
    names = {"json": tmp_path / "a.json", "markdown": tmp_path / "a.md", "plot": tmp_path / "a.png"}
    store = tmp_path / "cells.jsonl"
    arguments = ["arena", "--quick", "--world", "canvas-flow", "--methods", "negative_prompt,casteer", "--concepts",
                 "android", "--sets", "3", "--resume", store]  # fmt: skip
    for name, path in names.items():
        arguments += [f"--{name}", path]
    result = run(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert "canvas-flow, first judge, other objects kept" not in result.output  # none of its erasers can act here
    assert "no eraser was measured here" in names["markdown"].read_text()
    figures = json.loads(names["json"].read_text())
    assert figures["quick"] and figures["settings"]["asks"] == 1 and "CPU" in figures["machine"]
    rows = {(row["judge"], row["method"], row["concept"]): row for row in figures["rows"]}
    methods = ("untouched", "negative_prompt", "casteer")
    assert set(rows) == {
        (judge, method, concept)
        for judge in ("first", "second")
        for method in methods
        for concept in ("robot", "characters", "3 at once")
    }
    own, other = rows["first", "negative_prompt", "robot"], rows["first", "casteer", "robot"]
    assert own["ua"][0] in (0.0, 1.0) and own["step"][0] > 0 and own["seconds"] < 5
    assert "needs negative_prompt" in own["why"]["arithmetic"]
    assert other["ua"] == [None] * 3 and "Error" in other["why"]["public"]  # made for UNets
    assert "# The arena, canvas-flow" in names["markdown"].read_text() and "- casteer:" in names["markdown"].read_text()
    assert Image.open(names["plot"]).width > 300
    lines = store.read_text()
    assert run(*arguments).exit_code == 0 and json.loads(names["json"].read_text())["rows"] == figures["rows"]
    assert store.read_text() == lines
    # a part of it stands in the same file
    printed = runs(*arguments[:4], "--methods", "negative_prompt", "--concepts", "robot", "--resume", store)
    assert "**Characters** (robot), %:" in printed and store.read_text() == lines


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--world", "moon"), "--world moon is no embedded model"),
        (("--methods", "magic"), "no method is called 'magic'"),
        (("--concepts", "elephant"), "no concept 'elephant'"),
        (("--sets", "1"), "--sets 1: expected whole numbers of at least 2"),
        (("--membrane", "robot.safetensors"), "expected NAME=FILE"),
        (("--membrane", "mine=none.safetensors"), "none.safetensors"),
    ],
)
def test_mistakes_are_one_line(arguments, words):
    assert words in fails("arena", *arguments)
