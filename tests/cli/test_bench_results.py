"""`semiperm bench results`: the page is written from the files, and known to be stale when they change."""

import json
import re
import shutil

import pytest
from semiperm.benchmarks.page.results import SECTIONS
from semiperm.cli import app
from typer.testing import CliRunner


@pytest.fixture
def clone(root, tmp_path, monkeypatch):
    """A folder with the figures' files, and nothing else."""
    shutil.copytree(root / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, ["bench", "results", *arguments])


def test_writes_and_checks(clone, root):
    missing = run("--check")
    assert missing.exit_code == 1 and "run: semiperm bench results" in missing.stderr
    assert run().exit_code == 0
    text = (clone / "docs" / "results.md").read_text(encoding="utf-8")
    assert text == (root / "docs" / "results.md").read_text(encoding="utf-8")
    assert all(f"(../benchmarks/results/{name}.json)" in text for name in SECTIONS)
    assert run("--check").exit_code == 0

    file = clone / "benchmarks" / "results" / "erasure.json"
    figures = json.loads(file.read_text(encoding="utf-8"))
    next(row for row in figures["rows"] if row["concept"] == "styles")["ua"][0] = 0.123
    file.write_text(json.dumps(figures), encoding="utf-8")
    stale = run("--check")
    assert stale.exit_code == 1 and "docs/results.md is stale" in stale.stderr
    assert (clone / "docs" / "results.md").read_text(encoding="utf-8") == text  # --check writes nothing
    assert run("--out", "page.md").exit_code == 0 and "| 12.3 (" in (clone / "page.md").read_text(encoding="utf-8")


def test_outside_a_clone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run()
    assert result.exit_code == 2 and "folder of a clone" in result.stderr


def test_needs_nothing_heavy(root):
    for file in (root / "benchmarks").glob("results_*.py"):
        assert not re.search(
            r"^\s*(from|import) (torch|numpy|diffusers)", file.read_text(encoding="utf-8"), re.MULTILINE
        )
