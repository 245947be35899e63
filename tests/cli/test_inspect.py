"""`semiperm inspect` and `--concept`: everything that `generate` reads, and what a file does not say."""

import json

import pytest
import torch
from contracts.membranes import look, strong
from file_layouts import LAYOUTS
from PIL import Image
from safetensors.torch import save_file
from semiperm.cli import app, common
from semiperm.methods.membranes.file import save_membranes
from tiny_models import build
from typer.testing import CliRunner


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_inspect_reads_what_generate_reads(layout, tmp_path):
    path = layout.build(build(layout.family), tmp_path / "file")
    result = run("inspect", path, "--json", "--concept", "cat")
    if layout.refused and not layout.options and not layout.says and result.exit_code:
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
        return
    shown = json.loads(result.stdout)
    (row,) = shown["membranes"]
    assert row["named"] and row["modules"] > 0
    if layout.says:
        assert shown["layout"] == layout.says
    if layout.options:
        assert any(next(iter(layout.options)).replace("_", "-") in line for line in shown["left_out"])
    assert run("inspect", path).exit_code == 0


def test_inspect_tells_rank_alpha_and_what_is_not_said(tmp_path):
    by_name = {layout.name: layout for layout in LAYOUTS}
    for name, alphas in (("PEFT folder", [16.0]), ("diffusers, with alpha in the header", [16.0]), ("SPM", [1.0])):
        path = by_name[name].build(build("sd15"), tmp_path / name)
        (row,) = json.loads(run("inspect", path, "--json").stdout)["membranes"]
        assert row["alphas"] == alphas and row["ranks"] == [1 if name == "SPM" else 4]
        assert row["named"] == (name == "SPM")
    assert "not said" in run("inspect", tmp_path / "PEFT folder").stdout


def test_names_go_to_the_files_that_do_not_say(tmp_path):
    by_name, pipe = {layout.name: layout for layout in LAYOUTS}, build("sd15")
    said = by_name["SPM"].build(pipe, tmp_path / "a")
    folder = by_name["PEFT folder"].build(build("sd15"), tmp_path / "b")
    kohya = by_name["kohya, SD 1.x"].build(pipe, tmp_path / "c")
    files = [str(said), f"{folder}:0.5", str(kohya)]
    stack = common.load_stack(pipe, files, ["cat", "dog"])
    assert stack.concepts == ("robot", "cat", "dog") and all(membrane.named for membrane in stack)
    assert next(iter(stack[1].modules.values())).scale == 0.5 * 16 / 4
    assert [membrane.named for membrane in common.load_stack(pipe, files, ["cat"])] == [True, False, False]


def test_an_image_side_says_what_it_promises(tmp_path):
    pipe = build("sd15")
    side = look(pipe, beta=2.0, false_open=0.01, calibrated=99, false_closed=0.125, checked=8)
    path = save_membranes([side, strong(pipe, concept="ghost")], tmp_path / "both.safetensors")
    image, text = json.loads(run("inspect", path, "--json").stdout)["membranes"]
    assert (image["kind"], text["kind"]) == ("visual", "low-rank") and text["visual"] is None
    assert image["visual"] == {
        "beta": 2.0, "shares": [0.1, 0.8], "false_open": 0.01, "calibrated": 99, "false_closed": 0.125, "checked": 8,
    }  # fmt: skip
    assert image["modules"] == len(side.keys) and image["ranks"] == [1] and image["alphas"] == []
    shown = " ".join(run("inspect", path).stdout.split())
    assert "12.5 % of 8" in shown and "at most 1 %, by 99" in shown
    half = common.load_stack(pipe, [f"{path}:0.5"])
    assert half[0].visual.beta == 1.0 and half[0].keys == side.keys


@pytest.mark.slow
def test_generate_names_a_file(tmp_path):
    pipe = common.load_model("canvas")
    path, module = next((p, m) for p, m in pipe.unet.named_modules() if p.endswith("attn2.to_k"))
    pair = {"lora_A": torch.zeros(1, module.in_features), "lora_B": torch.zeros(module.out_features, 1)}
    file = tmp_path / "my_export_v2.safetensors"
    save_file({f"unet.{path}.{part}.weight": tensor for part, tensor in pair.items()}, file)
    arguments = ("generate", "canvas", "a robot", "--membrane", file, "--steps", 1, "-o", tmp_path / "x.png")
    assert "1 names for" not in run(*arguments, "--concept", "robot").stderr
    with Image.open(tmp_path / "x.png") as image:
        assert json.loads(image.text["semiperm"])["membranes"] == ["robot"]
    result = run(*arguments, "--concept", "robot", "--concept", "ghost")
    assert result.exit_code == 2 and "2 names for 1 files" in result.stderr
