"""`semiperm train` and `semiperm attack-prompts` as a user runs them."""

import json

import pytest
import torch
from PIL import Image
from semiperm.cli import app
from semiperm.methods.membranes.file import load_membranes, save_membranes
from semiperm.methods.membranes.types import LowRank, Membrane
from semiperm.pipelines.text import text_projections
from typer.testing import CliRunner

QUICK = ["--set", "batch_size=1", "--set", "anchors=1", "--set", "layers=text", "--set", "sampling_steps=2"]
CAPTIONS = [word for text in ("a star", "a heart on sky", "a moon", "a red ring") for word in ("--preserve", text)]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def one_line(result) -> str:
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_a_run_is_written_goes_on_and_shows_what_it_did(untrained_canvas, tmp_path):
    config, out = tmp_path / "run.toml", tmp_path / "robot.safetensors"
    config.write_text('concepts = ["robot|android"]\n[training]\nsteps = 9\nvalidate_every = 1\nlearning_rate = 0.01\n')
    command = ["train", "canvas", "--config", config, "--steps", 2, "-o", out, "--samples", 1, *QUICK, *CAPTIONS]
    result = run(*command)
    assert result.exit_code == 0, result.output
    said = "".join(result.stdout.split())  # the terminal's width breaks lines, and long paths in the middle
    assert "robot:erasedto" in said and "robot.safetensors:robot;14modules" in said
    (membrane,) = load_membranes(out)
    settings = json.loads(membrane.metadata["training"])
    assert membrane.phrases == ("robot", "android") and settings["steps"] == 2 and settings["learning_rate"] == 0.01
    folder = tmp_path / "robot.training"
    assert {p.name for p in folder.iterdir()} == {"checkpoint.safetensors", "log.jsonl", "training.png", "samples.png"}
    for name in ("training.png", "samples.png"):
        assert Image.open(folder / name).width > 200
    assert run(*command).exit_code == 0  # finished: nothing is done again
    (again,) = load_membranes(out)
    assert again.metadata == membrane.metadata
    for key, pair in membrane.modules.items():
        assert torch.equal(pair.down, again.modules[key].down) and torch.equal(pair.up, again.modules[key].up)


def test_what_cannot_be_trained_is_one_line(untrained_canvas, tmp_path):
    out = tmp_path / "a.safetensors"
    assert "no concept" in one_line(run("train", "canvas", "-o", out))
    assert "name it a.safetensors" in one_line(run("train", "canvas", "--concept", "robot", "-o", tmp_path / "a.pt"))
    for text, match in (("rate=1", "no such setting"), ("rank=0", "rank=0"), ("rank", "expected NAME=VALUE")):
        assert match in one_line(run("train", "canvas", "--concept", "robot", "-o", out, "--set", text))


@pytest.mark.parametrize("method", ["unlearndiff", "p4d", "gcg", "ring-a-bell", "embedding", "hidden"])
def test_an_attack_says_what_it_found(untrained_canvas, tmp_path, method):
    common = ["attack-prompts", "canvas", "--concept", "robot|android", "--method", method, "--search-steps", 2]
    small = ["--tokens", 2, "--count", 2]
    out = tmp_path / "found.json"
    extra = ["--draw", tmp_path / "drawn", "-o", out] if method in ("p4d", "hidden") else []
    result = run(*common, *small, *extra)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text() if extra else result.stdout)
    assert found["method"] == method and found["membranes"] == [] and found["left_out"] == ["robot", "android"]
    assert found["loss"]["untouched"] == found["loss"]["protected"]  # nothing protects it
    assert 1 <= len(found["found"]) <= 2
    for entry in found["found"]:
        assert entry["loss"] > 0 and not {"robot", "android"} & set(entry.get("prompt", "").split())
    if extra:
        assert (tmp_path / "drawn" / "00.png").exists() and found["found"][0]["picture"] == "00.png"


def test_an_attack_goes_through_membrane_and_gate(untrained_canvas, tmp_path):
    modules = {}
    for key, module in text_projections(untrained_canvas)[0].items():
        out, width = module.weight.shape
        modules[key] = LowRank(torch.randn(1, width) * 0.1, torch.randn(out, 1) * 0.1, 1.0)
    path, out = save_membranes(Membrane("robot", modules), tmp_path / "robot.safetensors"), tmp_path / "found.json"
    command = ["attack-prompts", "canvas", "--concept", "robot", "--method", "p4d", "--membrane", path]
    more = [
        "--gate",
        "always",
        "--search-steps",
        2,
        "--tokens",
        2,
        "--count",
        1,
        "-o",
        out,
        "--draw",
        tmp_path / "drawn",
    ]
    result = run(*command, *more)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["membranes"] == ["robot"] and found["gate"] == "always"
    assert found["loss"]["untouched"]["named"] < 1e-9 < found["loss"]["protected"]["named"]
    assert found["found"][0]["gates"] == {"robot": 1.0} and found["found"][0]["recovered"] is not None
    assert not hasattr(untrained_canvas.unet, "_semiperm_membranes")


def test_an_attack_that_is_none_is_one_line(untrained_canvas):
    assert "choose from unlearndiff" in one_line(run("attack-prompts", "canvas", "--concept", "robot", "--method", "x"))
    assert "--concept is empty" in one_line(run("attack-prompts", "canvas", "--concept", "|"))
