"""Every kernel's default configs compile for every GPU generation and spill no register; no GPU is needed."""

import json

import pytest
from semiperm.benchmarks.kernels import resources as kernel_resources
from semiperm.benchmarks.kernels.resources import KERNELS, TARGETS, WITHOUT_PRODUCTS, ResourceError
from semiperm.kernels import dispatch

# What a program may take at most: 64 KiB of AMD's LDS and of Turing, 99 of consumer GPUs, the others' more.
SHARED_BYTES = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}
SHARED_BYTES |= dict.fromkeys(("sm_75", "gfx90a", "gfx942", "gfx1100"), 64 << 10)

needs_triton = pytest.mark.skipif(dispatch.triton is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def recorded():
    """What one process found out about all kernels, once a test has started it: {} before that."""
    return {}


@needs_triton
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_compile_everywhere_without_spills(python, tmp_path, kernel, recorded):
    if not recorded:  # starting Python costs more than compiling
        path = tmp_path / "resources.json"
        asked = [word for name in KERNELS for word in ("--kernel", name)]
        python("-m", "semiperm.benchmarks.kernels.resources", "--json", path, *asked)
        recorded["files"] = [path.name for path in tmp_path.glob("*.json*")]
        recorded["rows"] = json.loads(path.read_text())
    assert recorded["files"] == ["resources.json"]  # no temporary file left
    rows = [row for row in recorded["rows"] if row["name"].startswith(kernel)]
    assert rows and {row["target"] for row in rows} >= set(TARGETS) - set(WITHOUT_PRODUCTS)
    if kernel in ("normalized_attention_guidance", "safe_guidance_step"):  # elementwise: everywhere
        assert {row["target"] for row in rows} == set(TARGETS)
    assert [(row["name"], row["target"], row["spills"]) for row in rows if row["spills"]] == []
    for row in rows:
        assert 0 < row["registers"] <= 512
        assert row["shared_bytes"] <= SHARED_BYTES[row["target"]], row
        assert row["config"] and row["versions"]["triton"] and row["versions"]["ptxas"]
    assert len({(row["name"], row["target"]) for row in rows}) == len(rows)
    assert all(row["name"].startswith(tuple(KERNELS)) for row in recorded["rows"])


def test_every_kernel_file_is_recorded(root):
    files = {path.stem for path in (root / "kernels").glob("*.py") if "def compile_cases" in path.read_text()}
    assert files == set(KERNELS)


def test_one_clear_error_without_triton(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(dispatch, "triton", None)
    assert kernel_resources.main(["--json", str(tmp_path / "rows.json")]) == 1
    assert capsys.readouterr().err.startswith("error: Triton is not installed")
    assert not list(tmp_path.iterdir())


@needs_triton
def test_refuses_an_unknown_target_and_the_interpreter(monkeypatch):
    monkeypatch.setattr(dispatch.triton.knobs.runtime, "interpret", False)
    with pytest.raises(ResourceError, match="no target sm_70; expected some of sm_75"):
        kernel_resources.resources(["sm_70"])
    monkeypatch.setattr(dispatch.triton.knobs.runtime, "interpret", True)
    with pytest.raises(ResourceError, match="TRITON_INTERPRET is set"):
        kernel_resources.resources(["sm_90"])
