"""Each kernel test names the path it takes. Without a GPU, Triton runs in its interpreter (see tests/conftest.py)."""

import os
import subprocess
import sys

import pytest
import torch
from semiperm.kernels import dispatch


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def triton_path(monkeypatch):
    """Force the Triton path: on the GPU where there is one, else in the interpreter."""
    if dispatch.triton is None:
        pytest.skip("Triton is not installed")
    if not torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("no CUDA device, and TRITON_INTERPRET says no")
    if not torch.cuda.is_available() and not dispatch.interpreted():
        pytest.fail("semiperm.kernels was imported before TRITON_INTERPRET=1 was set; tests/conftest.py has to set it")
    monkeypatch.setenv("SEMIPERM_KERNELS", "triton")


@pytest.fixture
def reference_path(monkeypatch):
    """Force the torch reference."""
    monkeypatch.setenv("SEMIPERM_KERNELS", "reference")


@pytest.fixture(params=["reference", "triton"])
def each_path(request):
    """Once on either path; the value is its name."""
    request.getfixturevalue(f"{request.param}_path")
    return request.param


@pytest.fixture
def poisoned(monkeypatch):
    """Fill what torch.empty and its kin return with NaN, so that an output lane nobody wrote shows."""

    def poison(make):
        def filled(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return filled

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def launched(monkeypatch):
    """`launched(module, name)` counts the calls of a launcher: what ran, rather than what was asked for."""

    def count(module, name):
        calls, launch = [], getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: calls.append(name) or launch(*args))
        return calls

    return count


@pytest.fixture
def compiled():
    """`compiled(function)` compiles it whole; the result's `.graphs` counts the graphs that took."""
    import torch._dynamo.testing

    torch._dynamo.reset()

    def compile_whole(function):
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        run = torch.compile(function, fullgraph=True, backend=counter)

        def call(*args, **kwargs):
            result = run(*args, **kwargs)
            call.graphs = counter.frame_count
            return result

        return call

    yield compile_whole
    torch._dynamo.reset()


@pytest.fixture
def python(root, tmp_path):
    """`python(*arguments, **environment)`: what a new Python prints that knows this `semiperm`, and no interpreter."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "semiperm").symlink_to(root, target_is_directory=True)
    ours = ("TRITON_INTERPRET", "SEMIPERM_KERNELS")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment["PYTHONPATH"] = str(tmp_path / "path")

    def run(*arguments, **more):
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], env=environment | more, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run
