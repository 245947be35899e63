"""docs/extending.md, followed to the letter: its blocks go into a copy of the package, and its tests run there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "extending.md"
BLOCK = re.compile(r"^```\w+ path=(?P<path>\S+)(?: after=(?P<after>[^\n]*))?\n(?P<text>.*?)^```$", re.M | re.S)
LEFT_OUT = (".git", "__pycache__", "*.egg-info", "*.pyc", "*.jpg", "*.png", ".*_cache", "build", "venv", ".venv")
# What docs/extending.md asks to be run, as far as it has to do with the new method.
CHOSEN = (
    "(contrast and not sd2 and not sdxl and not sd3 and not wan) or test_no_circles or test_the_root or test_a_family"
    " or test_packages or test_the_comfyui_registry or test_constraints or test_ids or is_thin or without_a_node"
    " or method_table or its_place or an_entry"
)


def follow(page: str, root: Path) -> list[str]:
    """Do what the page says; returns the paths that it touched.

    A block with `path=` is a whole file; with `after=` too, its lines go behind the first line that begins so.
    """
    touched = []
    for block in BLOCK.finditer(page):
        file = root / block["path"]
        if block["after"] is None:
            assert not file.exists(), f"{block['path']} is there already"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block["text"], encoding="utf-8")
        else:
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            (place, *_) = [n for n, line in enumerate(lines, 1) if line.startswith(block["after"])]
            file.write_text("".join([*lines[:place], block["text"], *lines[place:]]), encoding="utf-8")
        touched.append(block["path"])
    return touched


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    root = tmp_path_factory.mktemp("clone") / "semiperm"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return root, follow(PAGE.read_text(encoding="utf-8"), root)


def test_every_layer_has_a_file(copy):
    _, touched = copy
    layers = {path.partition("/")[0] for path in touched}
    assert layers == {"methods", "pipelines", "nodes", "tests", "web", "docs", "pyproject.toml", "__init__.py"}


def test_the_toy_passes_what_every_method_passes(copy):
    root, _ = copy
    tests = ["test_contracts.py", "test_layout.py", "test_docs.py", "nodes/test_definitions.py", "methods/contrast"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", CHOSEN]
    done = subprocess.run(
        [*command, *(f"tests/{name}" for name in tests)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root.parent), "COMFYUI_PATH": os.devnull},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed > 70 and "error" not in done.stdout.splitlines()[-1]


def test_the_toy_is_in_the_house_style(copy):
    root, touched = copy
    files = sorted({path for path in touched if path.endswith(".py")})
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "--config", str(root / "pyproject.toml")]
        done = subprocess.run([*ruff, *files], cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
