"""The tests import `semiperm` exactly as users do, from every door, and never our folders by their bare names.

The repository root is the package, so it must not lie on sys.path: there our `nodes` and `kernels` would shadow
ComfyUI's and Hugging Face's. `tests` itself lies at the end of the path, so that a test can write
`from tiny_models import ...`; so does `tests/nodes`, for `comfy_server`. ComfyUI itself never comes into this process.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: kernels run on the CPU
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for what the tests start; workers take a core each,
    torch.set_num_threads(1)  # and threads of several torch processes slow one another tenfold

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent


def _is_root(entry: str) -> bool:
    try:
        return Path(entry or os.getcwd()).resolve() == ROOT
    except OSError:
        return False


sys.path[:] = [entry for entry in sys.path if not _is_root(entry)]
sys.path += [str(TESTS), str(TESTS / "nodes")]

if "semiperm" not in sys.modules and importlib.util.find_spec("semiperm") is None:
    _spec = importlib.util.spec_from_file_location(
        "semiperm", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules["semiperm"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["semiperm"])

from comfy_server import why_no_comfyui  # noqa: E402  from tests/nodes

ON_REQUEST = ("slow", "training", "bench")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root."""
    return ROOT


@pytest.fixture(scope="session")
def untrained_worlds(tmp_path_factory) -> Path:
    """A folder of the second edition's weights, untrained."""
    from untrained_worlds import write_untrained_worlds

    return write_untrained_worlds(tmp_path_factory.mktemp("worlds-work"), tmp_path_factory.mktemp("worlds"))


@pytest.fixture
def small_flow(monkeypatch, tmp_path):
    """MODEL `canvas-flow` in miniature: two steps a picture, and two judges that guess."""
    import dataclasses

    from semiperm.canvas import examining, judges, models, pipeline
    from untrained_worlds import small_flow

    pipe = small_flow()
    model = dataclasses.replace(models.MODELS["canvas-flow"], steps=2, folder=tmp_path / "weights")
    model.folder.mkdir()
    for part in (*model.parts, "judge-first", "judge-second"):
        (model.folder / f"{part}.safetensors").write_bytes(part.encode())  # for digests alone
    guessing = {which: judges.Judge(net()) for which, net in judges.JUDGES.items()}
    monkeypatch.setitem(models.MODELS, "canvas-flow", model)
    other = pipeline.load_pipeline

    def load(name, dtype, device):
        return pipe.to(device, dtype) if name == "canvas-flow" else other(name, dtype=dtype, device=device)

    monkeypatch.setattr(pipeline, "load_pipeline", load)
    monkeypatch.setattr(examining, "load_judges", lambda folder: guessing)
    return pipe


def pytest_collection_modifyitems(config, items):
    asked = config.option.markexpr or ""
    no_comfyui = why_no_comfyui()
    for item in items:
        for mark in ON_REQUEST:
            if item.get_closest_marker(mark) and mark not in asked:
                item.add_marker(pytest.mark.skip(reason=f"{mark}: runs only when asked for, with `pytest -m {mark}`"))
        if item.get_closest_marker("comfy") and no_comfyui:
            item.add_marker(pytest.mark.skip(reason=f"comfy: {no_comfyui}"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="gpu: torch finds no CUDA device"))
