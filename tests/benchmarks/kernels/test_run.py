"""The kernel benchmark reports what it promises, and nothing at all when a kernel is wrong."""

import json
import subprocess
import types

import pytest
import torch
from semiperm.benchmarks.kernels import cases as kernel_cases
from semiperm.benchmarks.kernels import run as kernels
from semiperm.benchmarks.kernels.cases import (
    DualContextAttention,
    GatedLowRank,
    KernelBenchmarkError,
    KeyedCorrelation,
    NormalizedAttentionGuidance,
    SafeGuidanceStep,
    TokenMatchMerge,
)
from semiperm.benchmarks.kernels.resources import KERNELS
from semiperm.benchmarks.memory import peak_bytes
from semiperm.cli import app
from typer.testing import CliRunner

CPU = torch.device("cpu")
KEYS = {"name", "shape", "dtype", "path", "baseline", "ratio", "spread", "rounds", "ms", "baseline_ms", "peak_bytes"}
KEYS |= {"baseline_peak_bytes", "gbps", "machine", "environment", "versions"}
TINY = (
    TokenMatchMerge(3, 64, 32),
    GatedLowRank(2, 40, 16, 24, 3),
    KeyedCorrelation(2, 5, 256, 4),
    NormalizedAttentionGuidance(2, 40, 16),
    DualContextAttention(1, 2, 40, 16, 5),
    SafeGuidanceStep(2, 4, 8, 8),
)


@pytest.fixture
def tiny(monkeypatch):
    """Nothing but tiny cases, on the CPU, and compiled at once."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels, "timed_cases", lambda device, quick: list(TINY))
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", "kernels", *map(str, arguments)])


def test_rows(tiny, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    told = []
    rows = kernels.run(tell=told.append)
    assert json.loads(json.dumps(rows)) == rows
    assert [(row["name"], row["baseline"]) for row in rows] == [
        (case.name, baseline) for case in TINY for baseline in ("naive", *case.peers, kernels.COMPILED)
    ]
    for row in rows:
        assert row.keys() == KEYS
        assert row["spread"][0] <= row["ratio"] <= row["spread"][1] and row["rounds"] == 15
        assert row["ms"] > 0 and row["baseline_ms"] > 0 and row["gbps"] > 0
        for peak in ("peak_bytes", "baseline_peak_bytes"):
            assert (row[peak] is None) == (row["baseline"] == kernels.COMPILED)
        assert row["dtype"] == ("int8" if "keyed" in row["name"] else "float32")
        assert row["path"] == "reference" and "CPU" in row["machine"]
        assert row["environment"]["MALLOC_MMAP_MAX_"] == "0" and "torch" in row["versions"]
    assert rows[3]["shape"] == "B2 N40 in16 out24 R3"
    assert len(told) == 13 and "checking negative_token_merging" in told[0] and "B3 N64 C32" in told[7]


def test_quick_compiles_nothing_and_no_compiler_leaves_the_rows_out(tiny, monkeypatch):
    def no_compiler(function, dynamic):
        def fail(*inputs):
            raise torch._dynamo.exc.BackendCompilerFailed(function, RuntimeError("no g++"), None)

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    eager = {"naive", "naive, in chunks"}
    assert {row["baseline"] for row in kernels.run()} == eager
    monkeypatch.setattr(torch, "compile", None)
    rows = kernels.run(quick=True)
    assert {row["baseline"] for row in rows} == eager and {row["rounds"] for row in rows} == {5}


def test_what_is_too_large_for_the_naive_algorithm_has_its_memory_computed(tiny, monkeypatch):
    case = TokenMatchMerge(2, 128, 16, timed=False, dtype=torch.bfloat16)
    monkeypatch.setattr(kernels, "timed_cases", lambda device, quick: [case])
    (row,) = kernels.run()
    assert row["computed"] and row["dtype"] == "bfloat16"
    assert row["ratio"] is row["spread"] is row["baseline_ms"] is None and row["ms"] > 0
    assert row["baseline_peak_bytes"] == 2 * (128 * 128 + 128 * 16) * 2  # cosines and unit tokens
    monkeypatch.setattr(kernel_cases, "token_match_merge", off("token_match_merge"))
    monkeypatch.setattr(kernels, "small_cases", lambda: [])
    with pytest.raises(KernelBenchmarkError):
        kernels.run()


# torch's attention takes another path on the meta device than on a CPU
PLAIN = [case for case in TINY if not isinstance(case, DualContextAttention)]


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_computed_memory_is_what_is_measured(case):
    inputs = case.inputs(CPU, torch.float32)
    measured = peak_bytes(case.naive, *inputs)
    assert measured > 0 and peak_bytes(case.naive, *(t.to("meta") for t in inputs)) == measured


def test_every_kernel_is_measured_at_the_sizes_asked_for():
    for cases in (kernel_cases.small_cases(), *(kernel_cases.timed_cases(CPU, quick) for quick in (False, True))):
        names = {case.name for case in cases}
        assert len(names) == len(KERNELS) and all(any(kernel in name for name in names) for kernel in KERNELS)
    shapes = {
        device: [case.shape for case in kernel_cases.timed_cases(torch.device(device), False)]
        for device in ("cpu", "cuda")
    }
    assert {"B4 N4096 C640", "B4 N4096 C3072", "B2 N32760 C1536"} <= set(shapes["cuda"])
    assert {"B4 N4096 C640", "B4 N4096 C640 smooth", "B4 N1024 C1280", "B2 N32760 C1536"} <= set(shapes["cpu"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", kernel_cases.small_cases(), ids=lambda case: case.name)
def test_right_answers_pass_in_every_dtype(case, dtype):
    inputs = case.inputs(CPU, dtype)
    case.check(inputs, case.kernel(*inputs), case.naive(*inputs))
    moved, flops = case.work(dtype.itemsize)
    assert moved >= sum(t.nbytes for t in inputs[:4]) and (flops > 0) == (
        case.bound == "arithmetic" or "/gated_" in case.name
    )


def test_smooth_images_are_checked_too():
    case = TokenMatchMerge(3, 256, 64, smooth=True)
    inputs = case.inputs(CPU, torch.float32)
    case.check(inputs, case.kernel(*inputs), case.naive(*inputs))
    assert case.shape == "B3 N256 C64 smooth"
    near = torch.nn.functional.cosine_similarity(inputs[0][:, 1:], inputs[0][:, :-1], dim=-1)
    assert near.median() > 0.9, "neighbours are alike"


def off(name: str, output: int = 0):
    """The kernel, but for one wrong number."""
    kernel = getattr(kernel_cases, name)

    def wrong(*args, **kwargs):
        outputs = kernel(*args, **kwargs)
        one = outputs if isinstance(outputs, torch.Tensor) else outputs[output]
        one.view(-1)[len(one.view(-1)) // 2] += 40
        return outputs

    return wrong


WRONG = [("token_match_merge", 0), ("token_match_merge", 1), ("token_match_merge", 2), ("gated_low_rank", 0)]
WRONG += [("normalized_attention_guidance", 0), ("safe_guidance_step", 0), ("safe_guidance_step", 1)]


@pytest.mark.parametrize("where", ["small", "timed"])
@pytest.mark.parametrize(("name", "output"), WRONG)
def test_wrong_answers_have_no_speed(tiny, monkeypatch, tmp_path, name, output, where):
    monkeypatch.setattr(kernel_cases, name, off(name, output))
    monkeypatch.setattr(kernels, "small_cases" if where == "timed" else "timed_cases", lambda *_: [])
    result = bench("--quick", "--json", tmp_path / "rows.json")
    assert result.exit_code == 2 and not list(tmp_path.iterdir())
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and name in line and "differs" in line and "ratio" not in result.stdout


def test_a_kernel_that_answers_nan_is_wrong(tiny, monkeypatch):
    monkeypatch.setattr(kernel_cases, "gated_low_rank", lambda y, *_: y * torch.nan)
    with pytest.raises(KernelBenchmarkError, match="membranes/gated_low_rank .* nan"):
        kernels.run(quick=True)


def test_command(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "160")
    result = bench("--quick", "--json", tmp_path / "rows.json")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "rows.json").read_text())
    for row in rows:
        assert all(part in result.stdout for part in row["name"].split("/"))
        assert row["shape"] in result.stdout and f"{row['ratio']:.3f}" in result.stdout
    assert "Example: semiperm bench kernels" in bench("--help").output


def test_resources_are_compiled_in_a_process_without_the_interpreter(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    row = {"name": "k", "target": "sm_90", "config": "", "registers": 77, "spills": 0, "shared_bytes": 49152}
    rows = [row | {"versions": {}}]

    def child(command, env, **_):
        assert "TRITON_INTERPRET" not in env and command[1:3] == ["-m", "semiperm.benchmarks.kernels.resources"]
        with open(command[command.index("--json") + 1], "w") as file:
            json.dump(rows, file)
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", child)
    result = bench("--resources", "--json", tmp_path / "rows.json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert "sm_90" in result.stdout and "77" in result.stdout and "49.2 kB" in result.stdout

    failed = types.SimpleNamespace(returncode=1, stderr="noise\nerror: Triton is not installed\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    result = bench("--resources", "--json", tmp_path / "other.json")
    assert result.exit_code == 2 and not (tmp_path / "other.json").exists()
    assert result.stderr.strip() == "error: the kernels were not compiled: Triton is not installed"


def test_the_model_of_the_match(tmp_path):
    """Flux at 1024 pixels, one picture and one reference: at most .6 of eager; a model, and it says so."""
    result = bench("--model", "--json", tmp_path / "model.json")
    assert result.exit_code == 0 and "not measured" in result.stdout
    rows = json.loads((tmp_path / "model.json").read_text())
    flux = rows[0]
    assert "Flux 1024: B2 N4096 C3072" in flux["shape"] and (flux["programs"], flux["splits"]) == (128, 4)
    assert flux["ratio"] <= 0.6 and not any(row["measured"] for row in rows)
    flops, roof = 2 * 4096**2 * 3072, 989e12
    assert all(row["ms"] < row["chunks_ms"] * 2 and row["eager_ms"] > row["chunks_ms"] for row in rows)
    assert flux["ms"] / 1e3 > flops / roof, "no faster than the tensor cores"


@pytest.mark.gpu
def test_on_a_gpu():
    rows = kernels.run("cuda", quick=True)
    assert {row["path"] for row in rows} == {"triton"} and {row["dtype"] for row in rows} == {"bfloat16"}
    for row in rows:
        assert 0 < row.get("roofline", 0.5) < 1.1 and row["baseline_peak_bytes"] > 0
