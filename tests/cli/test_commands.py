"""The commands as a user types them: help, mistakes, and a run on a small real model from a folder."""

import json
import os
import subprocess
import sys

import pytest
import torch
from semiperm.cli import common
from terminal import fails, run

COMMANDS = ("demo", "erase", "generate", "detect", "provenance", "attack", "inspect", "evaluate", "arena")
COMMANDS += ("guard fit", "guard list")
COMMANDS += tuple(f"keys {name}" for name in ("new", "list", "export-detector"))
COMMANDS += tuple(
    f"bench {name}"
    for name in (
        "membranes",
        "kernels",
        "sampling",
        "token-merging",
        "watermark",
        "comfyui",
        "guidance",
        "guidance-cost",
        "composition",
    )
)
COMMANDS += tuple(f"canvas {name}" for name in ("render", "gallery", "train", "check", "worlds train", "worlds export"))


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_an_example(command):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0, result.output
    assert f"semiperm {command}".strip() in result.output
    assert ("Example: semiperm" if command else "Start with: semiperm demo") in result.output


def test_help_is_quick_and_light(root):
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('semiperm', {str(root / '__init__.py')!r},"
        f" submodule_search_locations=[{str(root)!r}])\n"
        "sys.modules['semiperm'] = package = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(package)\n"
        "from semiperm.cli import app\n"
        "try:\n    app(['--help'])\n"
        "finally:\n    heavy = {'torch', 'diffusers', 'numpy', 'PIL'} & set(sys.modules)\n"
        "    sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    before = os.times()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd="/")
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 1, f"semiperm --help took {spent:.2f} s of processor time"


@pytest.mark.parametrize(
    "arguments", [("inspect", "FILE"), ("generate", "canvas", "x", "--membrane", "FILE", "-o", "x.png")]
)
def test_a_missing_file_is_one_line(arguments, tmp_path):
    missing = tmp_path / "missing.safetensors"
    line = fails(*[missing if argument == "FILE" else argument for argument in arguments])
    assert "missing.safetensors" in line


def test_a_pickle_is_refused(tmp_path):
    file = tmp_path / "erased.pt"
    torch.save({"a": torch.zeros(1)}, file)
    assert "pickle" in fails("inspect", file)


def test_an_unknown_model_is_one_line(tmp_path):
    line = fails("erase", tmp_path / "no-such-model", "--concept", "robot", "-o", tmp_path / "x.safetensors")
    assert "no-such-model" in line and "canvas" in line
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("erase", "canvas", "--concept", "robot", "-o", "x.pt"), "safetensors"),
        (("erase", "canvas", "--concept", "robot", "-o", "x.safetensors", "--dtype", "int8"), "int8"),
        (("generate", "canvas", "a", "b", "-o", "x.png"), "2 prompts"),
        (("generate", "canvas", "a", "-o", "x.jpg"), ".png"),
        (("generate", "canvas", "a", "-o", "x.png", "--device", "tpu9"), "--device tpu9"),
        (("generate", "canvas", "a", "-o", "x.png", "--device", "cuda:77"), "there is cpu"),
        (("evaluate", "canvas"), "--membrane"),
        (("evaluate", "canvas", "--suite", "--concept", "elephant"), "elephant"),
        (("evaluate", "canvas", "--suite", "--prompts", "none.csv"), "none.csv"),
        (("canvas", "render", "--object", "elephant", "-o", "x.png"), "elephant"),
    ],
)
def test_mistakes_are_one_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in fails(*arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--steps", "1001", "less than or equal to 1000"),
        ("--seed", "99999999999999999999", "less than or equal to"),
        ("--guidance", "nan", "nan is not a finite number"),
        ("--guidance", "inf", "inf is not a finite number"),
    ],
)
def test_numbers_out_of_range_are_told(option, value, says, tmp_path):
    result = run("generate", "canvas", "a", "-o", tmp_path / "x.png", option, value)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert says in result.output and option in result.output
    assert not list(tmp_path.iterdir())


def test_our_own_bugs_keep_their_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "existing_file", lambda *_: (_ for _ in ()).throw(ValueError("a bug")))
    result = run("inspect", tmp_path / "x")
    assert isinstance(result.exception, ValueError)


def test_render_and_gallery_of_the_world(tmp_path):
    from PIL import Image

    result = run("canvas", "render", "--object", "robot", "--style", "sketch", "-o", tmp_path / "robot.png")
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "robot.png").size == (128, 128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tiny_models import build

    path = tmp_path_factory.mktemp("models") / "sd15"
    build("sd15").save_pretrained(path, safe_serialization=True)
    return path


def test_erase_inspect_generate_on_a_folder(folder, tmp_path):
    import numpy as np
    from PIL import Image

    file = tmp_path / "made" / "erased.safetensors"
    result = run("erase", folder, "--concept", "robot|android", "--concept", "cat", "-o", file, "--preserve", "a dog")
    assert result.exit_code == 0, result.output
    assert "robot, cat" in result.output

    result = run("inspect", file, "--json")
    assert result.exit_code == 0, result.output
    described = json.loads(result.stdout)
    assert [m["concept"] for m in described["membranes"]] == ["robot", "cat"]
    assert described["membranes"][0]["phrases"] == ["robot", "android"]
    assert described["membranes"][0]["norm"] > 0 and described["bytes"] == file.stat().st_size
    shown = run("inspect", file)
    assert shown.exit_code == 0 and "android" in shown.output and "closed_form" in shown.output

    options = ("--steps", 2, "--seed", 3)
    prompts = ("a photo of a robot", "a painting of a cat")
    for out, extra in {
        "bare": (),
        "half": ("--membrane", f"{file}:0.5", "--gate", "always"),
        "full": ("--membrane", file, "--gate", "always"),
        "none": ("--membrane", f"{file}:0"),
    }.items():
        result = run("generate", folder, *prompts, *extra, *options, "-o", tmp_path / out)
        assert result.exit_code == 0, result.output
    names = ["000-a-photo-of-a-robot.png", "001-a-painting-of-a-cat.png"]
    assert sorted(os.listdir(tmp_path / "full")) == names
    pictures = {
        out: np.stack([np.asarray(Image.open(tmp_path / out / name)) for name in names])
        for out in ("bare", "half", "full", "none")
    }
    assert (pictures["none"] == pictures["bare"]).all()
    assert (pictures["full"] != pictures["bare"]).any() and (pictures["full"] != pictures["half"]).any()
    record = json.loads(Image.open(tmp_path / "full" / names[1]).text["semiperm"])
    assert record["seed"] == 4 and record["membranes"] == ["robot", "cat"] and record["fired"]["rows"]

    result = run("generate", folder, prompts[1], "--steps", 2, "--seed", 4, "-o", tmp_path / "one.png")
    assert result.exit_code == 0, result.output
    assert (np.asarray(Image.open(tmp_path / "one.png")) == pictures["bare"][1]).all()


def test_a_full_disk_is_one_line(folder, tmp_path, monkeypatch):
    import safetensors.torch
    from safetensors import SafetensorError

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    assert "No space left" in fails("erase", folder, "--concept", "robot", "-o", tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_single_file_without_a_network_says_what_to_do_at_once(tmp_path, monkeypatch):
    from huggingface_hub import constants
    from safetensors.torch import save_file
    from semiperm.pipelines import loaders

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loaders, "hub_answers", lambda: False)
    file = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3)}, file)
    line = fails("generate", file, "a star", "-o", tmp_path / "x.png")
    assert "does not answer" in line and "diffusers folder" in line
    assert not constants.HF_HUB_OFFLINE


def test_whether_the_hub_answers_is_known_in_time(monkeypatch):
    import socket
    import time

    from huggingface_hub import constants
    from semiperm.pipelines import loaders

    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(loaders, "_PATIENCE", 0.2)

    def no_answer(*_, **__):
        time.sleep(30)
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", no_answer)
    assert not loaders.hub_answers(), "a look-up that hangs is no answer"
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.undo()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr("urllib.request.getproxies", dict)
        assert loaders.hub_answers()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not loaders.hub_answers()
