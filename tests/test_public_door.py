"""The public door: what `semiperm` itself names, how light it is, what type checkers see, and what docstrings say."""

import ast
import doctest
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import semiperm

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest brings tomli
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DOOR = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
PROGRAM = ROOT / "tests" / "data" / "user_program.py"
NAMES = sorted(semiperm.__all__)
FUNCTIONS = [name for name in NAMES if name.islower()]
CLASSES = [name for name in NAMES if not name.islower() and not name.endswith(("Error", "Pipeline"))]
ERRORS = {name for name in NAMES if name.endswith("Error")} | {"OSError"}


def for_editors() -> dict[str, str]:
    """Name -> module, as the TYPE_CHECKING block has it."""
    (block,) = (node for node in DOOR.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    assert all(isinstance(node, ast.ImportFrom) and node.level == 1 for node in block.body)
    return {alias.asname or alias.name: node.module for node in block.body for alias in node.names}


def test_three_lists_name_the_same():
    assert for_editors() == semiperm._EXPORTS
    assert len(NAMES) == len(set(NAMES)) and set(NAMES) == set(semiperm._EXPORTS)


def test_public_names_resolve():
    for name in NAMES:
        assert getattr(semiperm, name).__name__ == name and name in dir(semiperm)
    with pytest.raises(AttributeError, match="no_such_name"):
        semiperm.no_such_name  # noqa: B018


def test_nothing_is_imported_at_module_level():
    """ComfyUI runs the door under a module name that is a file path, where a relative import fails."""
    found = [node for node in DOOR.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [ast.unparse(node) for node in found] == ["import importlib"]


def test_importing_loads_nothing(tmp_path):
    """No wall clock: it is fast because nothing but the one file is read."""
    (tmp_path / "semiperm").symlink_to(ROOT, target_is_directory=True)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import importlib; before = set(sys.modules); import semiperm;"
        "print(*[name for name in sys.modules if name not in before])"
    )
    command = [sys.executable, "-I", "-c", code, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["semiperm"]


# ---- types ---------------------------------------------------------------------------------------------------------


def test_annotations_are_shipped():
    assert (ROOT / "py.typed").read_bytes() == b""
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["semiperm"]


def test_mypy_judges_every_public_module():
    (judged,) = (
        part["module"] for part in PROJECT["tool"]["mypy"]["overrides"] if part.get("follow_imports") == "normal"
    )
    assert judged == sorted({"semiperm", *(f"semiperm.{module}" for module in semiperm._EXPORTS.values())})


def test_the_user_program_uses_every_name():
    used = {node.id for node in ast.walk(ast.parse(PROGRAM.read_text())) if isinstance(node, ast.Name)}
    assert set(NAMES) <= used


def test_mypy_is_content(tmp_path):
    """With the public modules, and with a user's program that asserts what everything returns."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed: pip install -c constraints.txt '.[test]'")
    (tmp_path / "semiperm").symlink_to(ROOT, target_is_directory=True)  # whatever the folder of the clone is called
    program = tmp_path / PROGRAM.name  # inside of the clone mypy takes our files for the program's
    program.write_bytes(PROGRAM.read_bytes())
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), program.name]
    result = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert result.stdout.strip() == "Success: no issues found in 1 source file", result.stdout + result.stderr


def public_parts(name: str) -> list[tuple[str, inspect.Signature]]:
    """(name, signature) of a function, or of the constructor and the public methods of a class."""
    thing = getattr(semiperm, name)
    if inspect.isfunction(thing):
        return [(name, inspect.signature(thing))]
    found = []
    for attribute, value in vars(thing).items():
        value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if inspect.isfunction(value) and (attribute == "__init__" or not attribute.startswith("_")):
            found.append((f"{name}.{attribute}", inspect.signature(value)))
    return found


@pytest.mark.parametrize("name", FUNCTIONS + CLASSES)
def test_everything_public_is_annotated(name):
    for part, signature in public_parts(name):
        parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
        assert all(p.annotation is not p.empty for p in parameters), part
        assert part.endswith("__init__") or signature.return_annotation is not signature.empty, part


# ---- functions and methods -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_pipeline_comes_first(name):
    parameters = list(inspect.signature(getattr(semiperm, name)).parameters)
    assert "pipe" not in parameters[1:]


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("Mixin")])
def test_a_method_is_the_function_of_its_name(name):
    mixin = getattr(semiperm, name)
    shared = {key: value for key, value in vars(mixin).items() if key in FUNCTIONS}
    assert shared and all(value is getattr(semiperm, key) for key, value in shared.items())
    others = {key for key in vars(mixin) if not key.startswith("_")} - set(shared)
    assert others <= {"membranes", "membrane_handle", "to_json_string"}


def test_mixins_offer_every_function_of_a_pipeline():
    offered = {key for name in NAMES if name.endswith("Mixin") for key in vars(getattr(semiperm, name))}
    wanted = {name for name in FUNCTIONS if "pipe" in inspect.signature(getattr(semiperm, name)).parameters}
    assert wanted <= offered


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name.startswith(("save_", "write_", "export_"))])
def test_what_writes_returns_the_path(name):
    assert inspect.signature(getattr(semiperm, name)).return_annotation == "Path"


# ---- docstrings ----------------------------------------------------------------------------------------------------


def section(doc: str, title: str) -> str:
    found = re.search(rf"^{title}:\n((?:    .*\n|\n)+)", doc + "\n", re.MULTILINE)
    return found[1] if found else ""


@pytest.mark.parametrize("name", FUNCTIONS + CLASSES)
def test_docstrings_say_it_all(name):
    thing = getattr(semiperm, name)
    doc = inspect.getdoc(thing)
    assert doc.split("\n\n")[0].rstrip().endswith("."), "the first paragraph is a sentence"
    if is_dataclass(thing):
        given = [field.name for field in fields(thing)]
    elif inspect.isfunction(thing) or "__init__" in vars(thing):
        given = [p.lstrip("*") for p in inspect.signature(thing).parameters]
    else:
        given = []
    if given not in ([], ["pipe"]):
        lines = re.findall(r"^    ([\w*]+(?:, [\w*]+)*): ", section(doc, "Args"), re.MULTILINE)
        described = {word.lstrip("*") for line in lines for word in line.split(", ")}
        assert described == set(given)
    raised = re.findall(r"^    (\w+): ", section(doc, "Raises"), re.MULTILINE)
    assert set(raised) <= ERRORS and len(raised) == len(set(raised))


WITH_EXAMPLE = [name for name in NAMES if ">>>" in (getattr(semiperm, name).__doc__ or "")]


@pytest.fixture(scope="module")
def canvas():
    pipe = semiperm.load_pipeline("canvas")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def membranes(canvas):
    return semiperm.erase_concepts(canvas, ["robot", "ghost|phantom"])


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_examples_run(name, canvas, membranes, tmp_path, monkeypatch):
    import torch
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    picture = Image.new("RGB", (128, 128), "teal")
    picture.save("picture.png")
    space = {public: getattr(semiperm, public) for public in NAMES}
    space |= {"torch": torch, "pipe": canvas, "picture": picture, "picture_path": "picture.png"}
    space |= {"membranes": membranes, "key": semiperm.WatermarkKey("studio", 3, "", bytes(range(32)), bytes(32))}
    (test,) = doctest.DocTestFinder(recurse=False).find(getattr(semiperm, name), name, globs=space)
    said = []
    doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert not said, "".join(said)


def test_the_main_functions_have_an_example():
    assert set(FUNCTIONS) - set(WITH_EXAMPLE) <= {
        "load_membranes",  # in the example of what saves or applies
        "load_keyring",
        "import_membranes",
        "read_provenance",
        "remove_membranes",
        "remove_negative_token_merging",
        "load_detectors",
        "remove_safe_guidance",
        "generate_bound",  # draws 25 steps twice or more: docs/python.md, whose blocks run
    }
