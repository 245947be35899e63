"""Whole files or nothing, strengths, and the demo's grid."""

import json
import re

import pytest
from PIL import Image
from semiperm.canvas.world import Shown
from semiperm.cli import common
from semiperm.cli.demo import COLUMNS, PICTURES, entry
from semiperm.cli.grid import demo_grid, stacked


def test_png_keeps_its_record(tmp_path):
    path = common.write_png(tmp_path / "a.png", Image.new("RGB", (2, 2)), {"seed": 3})
    assert json.loads(Image.open(path).text["semiperm"]) == {"seed": 3}


def test_split_strength(tmp_path):
    file = tmp_path / "a.safetensors"
    file.touch()
    odd = tmp_path / "b:0.5"
    odd.touch()
    assert common.split_strength(str(file)) == (file, 1.0)
    assert common.split_strength(f"{file}:0.25") == (file, 0.25)
    assert common.split_strength(str(odd)) == (odd, 1.0)
    with pytest.raises(common.CliError, match="strength"):
        common.split_strength(f"{file}:much")
    for strength in ("-2", "1.5", "nan"):
        with pytest.raises(common.CliError, match="expected 0"):
            common.split_strength(f"{file}:{strength}")
    with pytest.raises(common.CliError, match="there is no"):
        common.split_strength(f"{file}x:0.5")


def test_one_line():
    assert common.one_line(ValueError("first\nsecond")) == "first"
    assert common.one_line(FileNotFoundError(2, "No such file", "x")) == "No such file: x"
    assert common.one_line(KeyboardInterrupt()) == "KeyboardInterrupt"


@pytest.mark.parametrize("model", list(COLUMNS))
def test_demo_prompts_say_what_they_ask_for_in_words_that_methods_may_know(model):
    from semiperm.canvas.editions import world_of

    world = world_of(model)
    for column in COLUMNS[model]:
        words = f" {re.sub('[^a-z]+', ' ', column.prompt.lower())} "
        for name in column.asked:
            assert any(f" {phrase} " in words for phrase in world.phrases(name))
            if model == "canvas-flow":
                assert not any(f" {phrase} " in words for phrase in world.reserved(name))
        assert all(world.resolve(name)[0] == name for name in column.erased)


def test_demo_entry_says_what_is_as_wanted():
    name, neighbour = COLUMNS["canvas"][0], COLUMNS["canvas"][2]
    robot, ghost = Shown(("robot",), "dotted"), Shown(("ghost",), "striped")
    gone = Shown((), "dotted")
    assert entry(name, [robot, gone], False)["as_wanted"] == [True, False]
    assert entry(name, [robot, gone, ghost], True)["as_wanted"] == [False, True, False]
    assert entry(neighbour, [ghost, gone], True)["as_wanted"] == [True, False]
    assert entry(name, [gone], True)["seen"] == ["nothing, dotted"]


def test_demo_grids_hold_every_picture():
    columns = COLUMNS["canvas"]

    def side(colour):
        row = {"seen": ["robot, flat"] * PICTURES, "as_wanted": [True] * PICTURES}
        return {c.title: ([Image.new("RGB", (128, 128), colour)] * PICTURES, row) for c in columns}

    grid = demo_grid("canvas", columns, side((200, 10, 10)), side((10, 10, 200)))
    counts = {colour: n for n, colour in grid.getcolors(1 << 20)}
    cells = len(columns) * PICTURES * 160 * 160
    assert counts[(200, 10, 10)] == counts[(10, 10, 200)] == cells
    assert grid.width < 1400 and stacked([grid, grid]).size == (grid.width, 2 * grid.height)


@pytest.mark.parametrize("name", ["KernelError", "MembraneError", "ModelError", "TokenMergingError", "WatermarkError"])
def test_every_error_of_ours_is_one_line(name, monkeypatch):
    from semiperm import cli
    from semiperm.methods import errors
    from typer.testing import CliRunner

    def fail(*_, **__):
        raise getattr(errors, name)("first line\nsecond line")

    monkeypatch.setattr(common, "load_model", fail)
    result = CliRunner().invoke(cli.app, ["bench", "membranes"])
    assert result.exit_code == 2 and result.stderr == "error: first line\n"


def test_errors_of_python_keep_their_traceback(monkeypatch):
    from semiperm import cli
    from typer.testing import CliRunner

    monkeypatch.setattr(common, "load_model", lambda *_, **__: int("x"))
    assert isinstance(CliRunner().invoke(cli.app, ["bench", "membranes"]).exception, ValueError)


def test_a_forced_kernel_that_cannot_run_is_one_line(untrained_canvas, monkeypatch, tmp_path):
    from semiperm import cli
    from typer.testing import CliRunner

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("SEMIPERM_KERNELS", "nonsense")
    erased, out = tmp_path / "e.safetensors", tmp_path / "o.png"
    runner = CliRunner()
    assert not runner.invoke(cli.app, ["erase", "canvas", "--concept", "robot", "-o", str(erased)]).exit_code
    generate = ["generate", "canvas", "a robot", "--membrane", str(erased), "--gate", "always", "-o", str(out)]
    result = runner.invoke(cli.app, generate)
    assert result.exit_code == 2 and result.stderr.strip().startswith("error: SEMIPERM_KERNELS='nonsense'")
    assert len(result.stderr.strip().splitlines()) == 1
    assert not out.exists()
