"""`demo` and `evaluate` from end to end, on a canvas with random weights: the wiring, not the figures."""

import json

import pytest
from PIL import Image
from semiperm.benchmarks.erasure.scores import SCORES
from semiperm.cli import app
from semiperm.cli.demo import COLUMNS, PICTURES
from typer.testing import CliRunner

CSV = """prompt,seed,object,style
a robot in sketch style on sky,1,robot,sketch
a red disc in neon style on fog,2,circle,neon
a star image in polka dot style,3,star,dotted
"""


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def test_demo(untrained_canvas, small_flow, tmp_path):
    result = run("demo", "--out", tmp_path / "out", "--seed", 5)
    assert "mechanical man" in " ".join(result.output.split()) or "by synonym" in result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["seconds"] > 0 and report["seeds"] == [5, 6] and list(report["models"]) == list(COLUMNS)
    for model, columns in COLUMNS.items():
        found, titles = report["models"][model], [column.title for column in columns]
        assert list(found["before"]) == list(found["after"]) == titles
        assert all(found["before"][title]["erased"] == [] for title in titles)
        assert [found["after"][c.title]["erased"] for c in columns] == [list(c.erased) for c in columns]
        assert all(len(found[side][title]["seen"]) == PICTURES for side in ("before", "after") for title in titles)
    assert Image.open(tmp_path / "out" / "demo.png").width > 800


def test_erase_then_evaluate(untrained_canvas, tmp_path):
    file, figures, prompts = tmp_path / "robot.safetensors", tmp_path / "figures.json", tmp_path / "prompts.csv"
    prompts.write_text(CSV)
    run("erase", "canvas", "--concept", "robot", "-o", file)
    arguments = ("evaluate", "canvas", "--membrane", file, "--prompts", prompts, "--json", figures)
    result = run(*arguments)
    assert "UA" in result.output and "robot" in result.output
    got = json.loads(figures.read_text())
    assert got["n"] == 3 and got["method"] == "membrane" and len(got["ua"]) == 3
    assert set(got["untouched"]) == set(SCORES) and got["machine"] and got["versions"]["torch"]
    assert got["world"] == "canvas" and {row["judge"] for row in got["rows"]} == {"first"}
    assert {row["concept"] for row in got["rows"]} == {"robot"}
    run(*arguments, "--concept", "circle", "--resume", tmp_path / "runs.jsonl")
    assert json.loads(figures.read_text())["rows"][0]["concept"] == "circle"
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 3  # a header, and two runs
    run(*arguments, "--gate", "auto", "--gate", "always")
    got = json.loads(figures.read_text())
    assert [row["method"] for row in got["rows"]] == ["untouched", "membrane/auto", "membrane/always"]
    assert got["method"] == "membrane/auto" and got["asked"]["stack"] == ["robot"]


def test_suite(untrained_canvas, tmp_path):
    prompts, figures = tmp_path / "prompts.csv", tmp_path / "figures.json"
    prompts.write_text(CSV)
    run(
        "evaluate",
        "canvas",
        "--suite",
        "--concept",
        "robot",
        "--concept",
        "dotted",
        "--prompts",
        prompts,
        "--json",
        figures,
    )
    got = json.loads(figures.read_text())
    methods = [
        "untouched", "closed_form/auto", "closed_form/always", "closed_form/paper", "uce/textbook", "negative_prompt",
    ]  # fmt: skip
    assert list(dict.fromkeys(row["method"] for row in got["rows"])) == methods
    assert {row["concept"] for row in got["rows"]} == {"robot", "dotted"}
    assert got["method"] == "closed_form/auto" and "ua" not in got  # an object and a style: no figure over both


def test_withheld_words(untrained_canvas, tmp_path):
    figures = tmp_path / "figures.json"
    run("evaluate", "canvas", "--suite", "--withhold", "--negative", "--concept", "robot", "--each", 1, "--repeats", 1,
        "--steps", 1, "--json", figures)  # fmt: skip
    rows = json.loads(figures.read_text())["rows"]
    assert {row["words"] for row in rows} == {"withheld"} and {row["n"] for row in rows} == {1}
    assert all(row["negative"][0] is not None for row in rows)


@pytest.mark.parametrize("source", ["render", "samples"])
def test_gallery(untrained_canvas, source, tmp_path, monkeypatch):
    from semiperm.canvas import captions

    monkeypatch.setattr(captions, "OBJECTS", {name: captions.OBJECTS[name] for name in ("robot", "star")})
    run("canvas", "gallery", *(["--samples"] if source == "samples" else []), "-o", tmp_path / "sheet.png")
    size = Image.open(tmp_path / "sheet.png").size
    assert size == (128 * len(captions.STYLES), 128 * len(captions.OBJECTS))


def test_bench_membranes(untrained_canvas, tmp_path, monkeypatch):
    from semiperm.benchmarks.membranes import run as membranes

    rows = [{"name": "membranes/cached", "k": 1, "ratio": 1.01, "spread": [0.99, 1.02], "model": "x", "machine": "m"}]
    monkeypatch.setattr(membranes, "run", lambda pipe, quick: rows if pipe is untrained_canvas and quick else None)
    result = run("bench", "membranes", "--quick", "--json", tmp_path / "rows.json")
    assert "1.010" in result.output and "0.990 to 1.020" in result.output
    assert json.loads((tmp_path / "rows.json").read_text()) == [{**rows[0], "model": "canvas"}]


def test_canvas_check(untrained_canvas, tmp_path, monkeypatch):
    from semiperm.canvas import check, pipeline

    monkeypatch.setattr(pipeline, "load_pipeline", lambda name, weights: untrained_canvas)
    monkeypatch.setattr(check, "check", lambda pipe, judge, **options: options)
    result = run("canvas", "check", "--marks", 7, "--json", tmp_path / "check.json")
    figures = json.loads((tmp_path / "check.json").read_text())
    assert figures == {"repeats": 2, "marks": 7, "guidance_scale": pipeline.DEFAULT_GUIDANCE}
    assert json.loads(result.output) == figures


def test_canvas_train_passes_its_options_on(tmp_path, monkeypatch):
    from semiperm.canvas import training

    given = {}
    monkeypatch.setattr(training, "train_canvas", lambda out, workdir, **options: given.update(options, out=out))
    run("canvas", "train", "--out", tmp_path, "--part", "judge", "--judge-steps", 3, "--no-compile")
    assert given["parts"] == ("judge",) and given["judge_steps"] == 3 and given["compile"] is False
    result = CliRunner().invoke(app, ["canvas", "train", "--out", str(tmp_path), "--part", "nose"])
    assert result.exit_code == 2 and "nose" in result.stderr
