"""`semiperm inspect` and `--concept`: everything that `generate` reads, and what a file does not say."""

import json

import pytest
from file_layouts import LAYOUTS
from semiperm.cli import app
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
