"""The pages tell the truth: links lead somewhere, code runs, commands exist, and figures come from files."""

import ast
import functools
import importlib
import random
import re
import shlex
import subprocess
from pathlib import Path
from urllib.parse import quote, unquote

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "canvas").rglob("*.md")),
    *sorted((ROOT / "web").rglob("*.md")),
]
OWN_TEST = {"extending.md"}  # its blocks are files of a method, which a test of its own puts together
STEPS = 4  # of every picture here: it need not look like anything
FENCE = re.compile(r"^```python(?P<info>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
FIGURE = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?:e-\d+)?")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, int, str]]:
    """(info, first line, code) of every Python block of a page."""
    text = page.read_text(encoding="utf-8")
    return [(m["info"].strip(), text[: m.start("code")].count("\n"), m["code"]) for m in FENCE.finditer(text)]


WITH_CODE = [page for page in PAGES if page.name not in OWN_TEST and blocks(page)]


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    slugs = (re.sub(r"[^\w\- ]", "", title.lower()) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE))
    return {slug.strip().replace(" ", "-") for slug in slugs}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / unquote(path)).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    assert not missing


def test_the_first_page_is_one_page():
    assert len(README.splitlines()) <= 160
    assert len(re.findall(r"^!\[", README, re.MULTILINE)) == 1 and README.count(".jpg)") == 4


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Few steps for every picture, and a folder of its own to write to."""
    import diffusers

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    # of pictures of so few steps one key in thirty is not found again
    monkeypatch.setattr("secrets.token_bytes", random.Random(0).randbytes)
    for cls in (diffusers.StableDiffusionPipeline, diffusers.StableDiffusionImg2ImgPipeline):

        def call(self, *args, _original=cls.__call__, **options):
            options["num_inference_steps"] = min(options.get("num_inference_steps") or STEPS, STEPS)
            return _original(self, *args, **options)

        monkeypatch.setattr(cls, "__call__", functools.wraps(cls.__call__)(call))


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_python_blocks_run(page, quick):
    from semiperm.canvas.render import random_scene, render

    scene = random_scene(random.Random(0), object="quibble", style="flat", hazard=False)
    space = {"__name__": page.stem.lower(), "picture": render(scene)}
    for info, line, code in blocks(page):
        compiled = compile("\n" * line + code, str(page), "exec")
        if "no-run" not in info.split():
            exec(compiled, space)


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_imports_of_every_block_resolve(page):
    for _, _, code in blocks(page):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "semiperm":
                module = importlib.import_module(node.module)
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


def test_the_first_page_imports_from_semiperm_alone():
    nodes = [node for _, _, code in blocks(ROOT / "README.md") for node in ast.walk(ast.parse(code))]
    assert len(blocks(ROOT / "README.md")) == 4 and not [node for node in nodes if isinstance(node, ast.Import)]
    assert {node.module for node in nodes if isinstance(node, ast.ImportFrom)} == {"semiperm"}


def commands(page: Path) -> list[list[str]]:
    """The words of every `semiperm ...` in the page's shell blocks."""
    text = page.read_text(encoding="utf-8")
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for start in [i for i, word in enumerate(words) if word == "semiperm" and (i == 0 or words[i - 1] == "&&")]:
                end = next((i for i in range(start, len(words)) if words[i] == "&&"), len(words))
                found.append(words[start + 1 : end])
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_commands_exist(page):
    import typer.main
    from semiperm.cli import app

    for words in commands(page):
        command, rest = typer.main.get_command(app), list(words)
        while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
            assert rest[0] in command.commands, words
            command = command.commands[rest.pop(0)]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert not [word for word in rest if word.startswith("-") and word not in known], words


def test_the_results_page_is_fresh():
    from semiperm.benchmarks.page.results import page, read

    text = page(read(ROOT / "benchmarks" / "results"))
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == text, "stale: run `semiperm bench results`"


def section(anchor: str) -> str:
    """The part of docs/results.md under a heading of the second level."""
    parts = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").split("\n## ")[1:]
    found = {re.sub(r"[^\w -]", "", part.splitlines()[0].lower()).replace(" ", "-"): part for part in parts}
    return found[anchor]


def test_figures_of_the_first_page_stand_in_the_results():
    table = README.split("| what | world | result | honest limits |\n")[1].split("\n\n")[0].splitlines()[1:]
    assert len(table) == 8
    for line in table:
        what, world, result, limits = (cell.strip() for cell in line.strip("|").split("|"))
        measured = FIGURE.findall(section(re.search(r"docs/results\.md#([\w-]+)", what)[1]))
        unknown = [figure for figure in FIGURE.findall(result) if figure not in measured]
        assert FIGURE.findall(result) and not unknown, what
        assert world and limits


def test_the_method_table():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    header = "| method | math | kernel | diffusers | node | workflow | test | paper |"
    rows = text.split(header)[1].split("\n\n")[0].strip().splitlines()[1:]
    assert rows and all(row.count("|") == 9 for row in rows)


def test_every_workflow_and_node_has_its_place():
    text = (ROOT / "docs" / "comfyui.md").read_text(encoding="utf-8")
    for file in (ROOT / "workflows").glob("*.json"):
        name = quote(file.stem)
        assert f"(../workflows/{name}.json)" in text and f"(../workflows/{name}.jpg)" in text
    for folder in (ROOT / "web" / "docs").iterdir():
        assert f"(../web/docs/{folder.name}/en.md)" in text


def set_up() -> list[str]:
    return [line for line in README.splitlines() if line.startswith("python3 -m venv")]


def test_two_commands_for_a_fresh_machine():
    lines = set_up()
    assert len(lines) == 2
    install = "python3 -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt torch==2.13.0"
    assert all(command.startswith(install) for command in lines)
    assert lines[0].endswith("&& semiperm demo") and lines[1].endswith("&& pytest -n auto")
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().splitlines()


def test_ci_runs_the_command_of_the_first_page():
    script = (ROOT / ".ci/run").read_text()
    extract = re.search(r"command=\$\((.+)\)\n", script)[1]
    result = subprocess.run(["bash", "-c", extract], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == set_up()[1]
    assert 'eval "${command% && pytest -n auto}"' in script
    assert script.rstrip().splitlines()[-1] == "pytest -n auto"
