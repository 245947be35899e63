"""The house rules that no linter knows: who imports whom, and what is shipped. The pages: test_docs.py."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest brings tomli
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
OUTSIDE = {"tests", "build", "dist", "docs", "shared", "venv", "web", "workflows"}  # no packages of ours
COMFY = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "node_helpers", "nodes", "server"}

# folder -> (our folders it may import, foreign modules it must not)
MAY_IMPORT = {
    "kernels": ({"kernels"}, COMFY | {"diffusers", "transformers"}),
    "methods": ({"methods", "kernels"}, COMFY | {"diffusers", "transformers"}),
    "canvas": ({"canvas", "methods"}, COMFY),
    "pipelines": ({"pipelines", "methods", "kernels", "canvas"}, COMFY),
    "nodes": ({"nodes", "methods", "kernels", "canvas"}, {"diffusers"}),
    "benchmarks": ({"benchmarks", "pipelines", "methods", "kernels", "canvas"}, COMFY),
    "cli": ({"cli", "benchmarks", "pipelines", "methods", "kernels", "canvas"}, COMFY),
}
HEAVY = {"torch", "diffusers", "transformers", "numpy", "PIL", "safetensors"}


def in_comfyui(path: Path) -> bool:
    """A script that ComfyUI's own Python runs in a process of its own: our package is a foreign one there."""
    return path.relative_to(ROOT).parts[0] == "benchmarks" and "comfyui" in path.stem


def _sources() -> list[Path]:
    files = [ROOT / "__init__.py", ROOT / "__main__.py"]
    for folder in sorted(p for p in ROOT.iterdir() if p.is_dir()):
        if folder.name not in OUTSIDE and not folder.name.startswith((".", "_")) and folder.suffix != ".egg-info":
            files += sorted(folder.rglob("*.py"))
    return files


SOURCES = _sources()
IDS = [str(path.relative_to(ROOT)) for path in SOURCES]


def _imports(path: Path, module_level: bool = False) -> tuple[set[str], set[str]]:
    """(our folders, foreign top-level modules) that a file imports, anywhere in it or at module level only."""
    ours, foreign = set(), set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = path.relative_to(ROOT).parent.parts
    for node in tree.body if module_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            foreign |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            foreign.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - (node.level - 1)] + tuple(filter(None, (node.module or "").split(".")))
            ours |= {base[0]} if base else {alias.name for alias in node.names}
    return ours, foreign


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_imports_run_one_way(path):
    relative = path.relative_to(ROOT)
    ours, foreign = _imports(path)
    if in_comfyui(path):
        return
    if "custom" not in relative.parts:  # diffusers runs a custom pipeline's file on its own
        assert "semiperm" not in foreign, f"{relative} must import its own package relatively"
    if len(relative.parts) > 1:
        allowed, forbidden = MAY_IMPORT[relative.parts[0]]
        assert ours <= allowed, f"{relative} imports {sorted(ours - allowed)}"
        assert not foreign & forbidden, f"{relative} imports {sorted(foreign & forbidden)}"


def _files_imported(path: Path) -> set[Path]:
    """Our files that a file imports, anywhere in it."""
    found, package = set(), path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = ROOT.joinpath(*package[: len(package) - (node.level - 1)], *filter(None, (node.module or "").split(".")))
        for name in (alias.name for alias in node.names):
            module, package_of = base / f"{name}.py", base / name / "__init__.py"
            own = base.with_suffix(".py") if base.with_suffix(".py").exists() else base / "__init__.py"
            found.add(next(file for file in (module, package_of, own) if file.exists()))
    return found


def test_no_circles():
    """Also not between the files of one folder, and not by imports inside functions."""
    arrows = {path: _files_imported(path) for path in SOURCES}
    state: dict[Path, str] = {}

    def visit(path: Path, way: list[Path]) -> None:
        assert state.get(path) != "open", " -> ".join(str(p.relative_to(ROOT)) for p in [*way, path])
        if path in state:
            return
        state[path] = "open"
        for target in sorted(arrows.get(path, ())):
            visit(target, [*way, path])
        state[path] = "done"

    for path in SOURCES:
        visit(path, [])


GROUND = {
    "methods": {
        "errors",
        "schedule",
        "text_space",
        "modules",
        "packages",
        "pictures",
        "files",
        "sampling",
        "composition",
    },
    "pipelines": {
        "family",
        "text",
        "latents",
        "scheduler",
        "hooks",
        "rows",
        "handle",
        "loaders",
        "weights",
        "prediction",
    },
    "nodes": {
        *("extension", "installation", "sockets", "root_patch", "extra_rows", "private", "progress"),
        *("base_weights", "run_reports"),
    },
    "benchmarks": {"store", "timing", "memory", "launch", "run_in_comfyui"},
}


@pytest.mark.parametrize("layer", GROUND)
def test_the_root_of_a_layer_is_shared_ground(layer):
    """Every other file belongs to a family, which has a folder of its own."""
    assert {path.stem for path in (ROOT / layer).glob("*.py")} <= GROUND[layer] | {"__init__"}


def test_a_family_has_one_name_in_every_layer():
    families = {path.name for path in (ROOT / "methods").iterdir() if (path / "__init__.py").exists()}
    beside = {
        "nodes": {"canvas"},
        "benchmarks": {"kernels", "erasure", "arena", "page", "results", "rivals"},
        "pipelines": {"custom"},
    }
    for layer, others in beside.items():
        found = {path.name for path in (ROOT / layer).iterdir() if path.is_dir() and not path.name.startswith("_")}
        assert found <= families | others, layer
    for layer in ("methods", "pipelines", "nodes", "benchmarks", "kernels", "canvas", "cli"):
        known = {path.name for path in (ROOT / layer).iterdir() if path.is_dir()}
        tested = {path.name for path in (ROOT / "tests" / layer).iterdir() if path.is_dir()}
        assert {name for name in tested if not name.startswith("_")} <= known, layer


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_imports_are_declared(path):
    extras = {"peft", "triton"} if path.is_relative_to(ROOT / "benchmarks") else set()
    extras |= {"triton"} if path == ROOT / "kernels" / "dispatch.py" else set()  # guarded: the references need none
    extras |= {"c2pa"} if path == ROOT / "methods" / "provenance" / "c2pa.py" else set()  # guarded: an extra
    declared = {re.split(r"[<>=;\s]", line)[0] for line in PROJECT["project"]["dependencies"]}
    declared = {{"pillow": "PIL"}.get(name, name) for name in declared}
    ours = {"semiperm"} | (COMFY if path.is_relative_to(ROOT / "nodes") else set())
    ours |= COMFY | {"comfyui_version"} if in_comfyui(path) else set()
    assert _imports(path)[1] <= declared | extras | ours | sys.stdlib_module_names


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_house_style(path):
    text = path.read_text(encoding="utf-8")
    relative = path.relative_to(ROOT)
    assert len(text.splitlines()) <= 400, f"{relative} is longer than 400 lines: split it"
    for node in ast.walk(ast.parse(text)):
        where = f"{relative}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Assert), f"{where}: no assert outside tests"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{where}: bare except"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print" or in_comfyui(path), f"{where}: print"
    assert "pickle" not in _imports(path)[1]
    assert "block_ptr" not in text, f"{relative}: block pointers are gone from newer Triton"


def test_the_root_holds_no_code():
    """What the door itself may import: test_public_door.py."""
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("path", sorted((ROOT / "cli").glob("*.py")), ids=lambda path: path.name)
def test_the_command_line_starts_light(path):
    if path.name != "grid.py":  # imported by the demo when it has run
        assert not _imports(path, module_level=True)[1] & HEAVY


def test_packages_match_the_disk():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    found = {"semiperm"} | {
        ".".join(("semiperm", *path.relative_to(ROOT).parent.parts)) for path in SOURCES if path.parent != ROOT
    }
    data = PROJECT["tool"]["setuptools"]["package-data"]
    as_data = {
        ".".join(("semiperm", *path.relative_to(ROOT).parent.parts))
        for package, patterns in data.items()
        for pattern in patterns
        for path in (ROOT / package.partition(".")[2].replace(".", "/")).glob(pattern)
        if path.suffix == ".py"
    }
    assert listed == found - as_data
    missing = [
        name for name in listed if not (ROOT / name.partition(".")[2].replace(".", "/") / "__init__.py").exists()
    ]
    assert not missing, f"no __init__.py in {missing}"


def test_the_comfyui_registry_finds_what_it_reads():
    about = PROJECT["tool"]["comfy"]
    assert about["PublisherId"] == about["DisplayName"] == "semiperm" and about["requires-comfyui"] == ">=0.3.64"
    assert (ROOT / about["Icon"]).read_text(encoding="utf-8").startswith("<svg")


@pytest.mark.parametrize("name", ["load_pipeline", "Judge", "render", "captions"])
def test_canvas_names_resolve(name):
    canvas = importlib.import_module("semiperm.canvas")
    assert getattr(canvas, name, None) is not None or importlib.import_module(f"semiperm.canvas.{name}")


def test_constraints_cover_every_dependency():
    pinned = {re.split(r"[=;\s]", line)[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    wanted = PROJECT["project"]["dependencies"] + sum(PROJECT["project"]["optional-dependencies"].values(), [])
    assert {re.split(r"[<>=;\s]", line)[0] for line in wanted} <= pinned
