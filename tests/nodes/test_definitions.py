"""What ComfyUI users see, checked without ComfyUI: definitions, help pages, workflows, file names, the report."""

import ast
import asyncio
import dataclasses
import importlib
import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import comfy_stub
import pytest
import torch
from semiperm.methods.membranes.config import MembraneConfig
from semiperm.methods.membranes.record import membrane_report
from semiperm.methods.token_merging.config import NegativeTokenMergingConfig

ROOT = Path(__file__).resolve().parents[2]
IDS = {
    "SemipermLoadCanvas",
    "SemipermLoadMembrane",
    "SemipermEraseConcept",
    "SemipermSolveMembranes",
    "SemipermSolveImageMembranes",
    "SemipermApplyMembranes",
    "SemipermSaveMembrane",
    "SemipermMembraneReport",
    "SemipermTrainMembranes",
    "SemipermNegativeTokenMerging",
    "SemipermNegativeTokenMergingAdvanced",
    "SemipermTokenMergingReport",
    "SemipermSafeGuidance",
    "SemipermSafeGuidanceAdvanced",
    "SemipermSafeGuider",
    "SemipermPromptFilter",
    "SemipermValueDecomposer",
    "SemipermNAG",
    "SemipermGuidanceDetector",
    "SemipermGuidanceReport",
    "SemipermKeyring",
    "SemipermWatermarkNoise",
    "SemipermWatermarkModel",
    "SemipermDetectWatermark",
    "SemipermAttackSuite",
    "SemipermSaveWithProvenance",
}
CATEGORIES = (
    "semiperm/loaders",
    "semiperm/membranes",
    "semiperm/negative token merging",
    "semiperm/safe guidance",
    "semiperm/watermark",
)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """{node id: (class, schema)} of everything that the extension lists."""
    with comfy_stub.stand_in(tmp_path_factory.mktemp("models")):
        extension = importlib.import_module("semiperm.nodes.extension").SemipermExtension()
        classes = asyncio.run(extension.get_node_list())
        yield {schema.node_id: (cls, schema) for cls in classes for schema in [cls.define_schema()]}


@pytest.fixture(scope="module")
def files(nodes):
    return importlib.import_module("semiperm.nodes.membranes.files")


@pytest.fixture(scope="module")
def plot(nodes):
    return importlib.import_module("semiperm.nodes.membranes.report_plot")


# ---- definitions ----------------------------------------------------------------------------------------------------


def test_ids(nodes):
    assert set(nodes) == IDS


@pytest.mark.parametrize("node_id", sorted(IDS))
def test_every_socket_explains_itself(nodes, node_id):
    _, schema = nodes[node_id]
    assert schema.category in CATEGORIES
    assert schema.display_name and len(schema.description) > 40
    for socket in [*schema.inputs, *schema.outputs]:
        assert socket.tooltip and len(socket.tooltip) > 20, (socket.id, socket.tooltip)
    ids = [socket.id for socket in [*schema.inputs, *schema.outputs] if socket.id]
    assert len(ids) == len(set(ids)), "ComfyUI wants ids unique over inputs and outputs together"
    assert all(socket.display_name for socket in schema.outputs)


def test_control_inputs(nodes):
    erase, apply = ({s.id: s for s in nodes[f"Semiperm{n}"][1].inputs} for n in ("EraseConcept", "ApplyMembranes"))
    for inputs in (erase, apply):
        assert inputs["strength"].options == {"default": 1.0, "min": -2.0, "max": 4.0, "step": 0.05}
    for name, default in (("start", 0.0), ("end", 1.0)):
        assert apply[name].options == {"default": default, "min": 0.0, "max": 1.0, "step": 0.001}
    assert apply["gate"].options["default"] == "auto" and "official" in apply["gate"].options["options"]
    assert apply["clip"].optional and not erase["clip"].optional


def test_solving_has_the_defaults_of_its_config(nodes):
    from semiperm.methods.membranes.closed_form import METHODS, ClosedFormConfig

    inputs = {s.id: s for s in nodes["SemipermSolveMembranes"][1].inputs}
    given = {name: inputs[name].options["default"] for name in ("method", "rank", "push", "preserve_scale")}
    assert ClosedFormConfig(**given) == ClosedFormConfig() and inputs["method"].options["options"] == list(METHODS)


def test_training_has_the_defaults_of_its_config(nodes):
    from semiperm.methods.training.config import LAYERS, OBJECTIVES, TrainingConfig

    inputs = {s.id: s for s in nodes["SemipermTrainMembranes"][1].inputs}
    names = {field.name for field in dataclasses.fields(TrainingConfig)} & set(inputs)
    given = {name: inputs[name].options["default"] for name in names}
    assert len(names) > 10 and TrainingConfig(**given) == TrainingConfig(height=512, width=512)
    assert inputs["layers"].options["options"] == list(LAYERS)
    assert inputs["objective"].options["options"] == list(OBJECTIVES)


@pytest.mark.parametrize("node_id", sorted(IDS))
def test_every_node_is_found_by_other_words(nodes, node_id):
    words = nodes[node_id][1].options["search_aliases"]
    assert len(words) >= 2 and len(set(words)) == len(words)


def test_token_merging_has_the_defaults_of_its_config(nodes):
    defaults = {field.name: field.default for field in dataclasses.fields(NegativeTokenMergingConfig)}
    other = {"strength": "strength", "start": "start", "end": "end", "reference_seed": "seed"}
    for node_id in ("SemipermNegativeTokenMerging", "SemipermNegativeTokenMergingAdvanced"):
        given = {s.id: s.options["default"] for s in nodes[node_id][1].inputs if "default" in s.options}
        given.pop("strengths", None)  # strength's list, empty unless it is used
        expected = {name: defaults[other.get(name, name)] for name in given}
        assert given == {name: {None: ""}.get(value, value) for name, value in expected.items()} | {
            name: "none" for name in given if name == "compat"
        }
    taken = {other.get(name, name) for name in given} | {"reference", "mask", "reference_prompt"}
    assert taken == set(defaults)


def test_execute_is_thin():
    seen = 0
    for path in sorted((ROOT / "nodes").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name == "execute":
                lines = node.body[-1].end_lineno - node.body[0].lineno + 1
                assert lines <= 10, f"{path.name}:{node.lineno} has {lines} lines"
                seen += 1
    assert seen == len(IDS)


def test_new_files_show_without_a_restart(nodes, files):
    import folder_paths

    cls, _ = nodes["SemipermLoadMembrane"]
    path = Path(folder_paths.models_dir) / "semiperm" / "new.safetensors"
    path.touch()
    try:
        assert "semiperm/new.safetensors" in cls.define_schema().inputs[0].options["options"]
    finally:
        path.unlink()
    assert "semiperm/new.safetensors" not in cls.define_schema().inputs[0].options["options"]


# ---- other languages ------------------------------------------------------------------------------------------------


def texts(schema) -> dict:
    """What the page shows of a node, as a language's nodeDefs.json has it."""
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {s.id: {"name": s.display_name or s.id, "tooltip": s.tooltip} for s in schema.inputs},
        "outputs": {
            str(i): {"name": s.display_name, "tooltip": s.tooltip} for i, s in enumerate(schema.outputs)
        },
    }  # fmt: skip


def locale(language: str, name: str = "nodeDefs") -> dict:
    return json.loads((ROOT / "locales" / language / f"{name}.json").read_text(encoding="utf-8"))


def test_english_is_complete_and_what_the_nodes_say(nodes):
    """Written by workflows/build.py."""
    assert locale("en") == {node_id: texts(schema) for node_id, (_, schema) in nodes.items()}
    parts = {part for category in CATEGORIES for part in category.split("/")}
    assert set(locale("en", "main")["nodeCategories"]) == parts


@pytest.mark.parametrize("language", sorted(path.name for path in (ROOT / "locales").iterdir() if path.name != "en"))
def test_another_language_has_every_text(language):
    def keys(value, path=()):
        if isinstance(value, dict):
            return {key for name, item in value.items() for key in keys(item, (*path, name))}
        assert isinstance(value, str) and value.strip(), path
        return {path}

    for name in ("nodeDefs", "main"):
        assert keys(locale(language, name)) == keys(locale("en", name))
    same = [key for key in locale("en") if locale(language)[key]["description"] == locale("en")[key]["description"]]
    assert same == []
    for node_id, node in locale("en").items():  # choices and file names stay as the node has them
        for name, text in node["inputs"].items():
            words = set(re.findall(r"\b[a-z]+_[a-z_]+\b|\b[a-z]+/[a-z/_]+", text["tooltip"]))
            missing = [word for word in words if word not in locale(language)[node_id]["inputs"][name]["tooltip"]]
            assert missing == [], (node_id, name)


# ---- help pages and the browser part --------------------------------------------------------------------------------


@pytest.mark.parametrize("node_id", sorted(IDS))
def test_help_page(nodes, node_id):
    _, schema = nodes[node_id]
    page = (ROOT / "web/docs" / node_id / "en.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {schema.display_name}\n")
    for heading in ("## Parameters", "## Where it goes", "## Limits", "## Tip"):
        assert heading in page
    for socket in schema.inputs:
        assert re.search(rf"^\| .*\b{socket.id}\b", page, re.MULTILINE), f"{node_id}: input {socket.id} not in a table"
    for socket in schema.outputs:
        assert re.search(rf"^\| {socket.display_name} \|", page, re.MULTILINE), f"{node_id}: {socket.display_name}"


def test_no_page_and_no_script_without_a_node():
    assert {path.name for path in (ROOT / "web/docs").iterdir()} == IDS
    named = re.findall(r"\bSemiperm[A-Z]\w+", (ROOT / "web/js/show_text.js").read_text(encoding="utf-8"))
    assert named and set(named) <= IDS


# ---- workflows ------------------------------------------------------------------------------------------------------


def _workflows() -> list[Path]:
    return sorted((ROOT / "workflows/api").glob("*.json"))


def test_workflows_are_there():
    names = {path.stem for path in _workflows()}
    assert {"Erase by text", "Erase by file", "Stack and compare", "Save and reload"} <= names


@pytest.mark.parametrize("path", _workflows(), ids=lambda path: path.stem)
def test_workflow_uses_what_exists(nodes, files, path):
    graph, ours = json.loads(path.read_text(encoding="utf-8")), 0
    for key, node in graph.items():
        if not node["class_type"].startswith("Semiperm"):
            continue
        ours += 1
        inputs = {socket.id: socket for socket in nodes[node["class_type"]][1].inputs}
        given, required = set(node["inputs"]), {name for name, socket in inputs.items() if not socket.optional}
        assert given <= set(inputs), f"node {key}: unknown inputs {sorted(given - set(inputs))}"
        assert required <= given, f"node {key}: missing inputs {sorted(required - given)}"
        for name, value in node["inputs"].items():
            options = inputs[name].options.get("options")
            assert options is None or isinstance(value, list) or value in options, f"node {key}: {name}={value!r}"
    assert ours >= 2


# ---- file names -----------------------------------------------------------------------------------------------------

ESCAPES = [
    "../secret.safetensors",
    "semiperm/../../secret.safetensors",
    "semiperm/..\\..\\secret.safetensors",
    "/etc/passwd",
    "/etc/x.safetensors",
    "C:\\x.safetensors",
    "checkpoints/x.safetensors",
    "x.safetensors",
    "",
]


@pytest.mark.parametrize("name", ESCAPES)
def test_names_outside_the_folders_are_refused(nodes, files, name):
    with pytest.raises(ValueError, match="outside the models folders"):
        files.membrane_path(name)
    answer = nodes["SemipermLoadMembrane"][0].validate_inputs(name)
    assert isinstance(answer, str) and "outside the models folders" in answer


def test_other_names_are_refused(nodes, files):
    with pytest.raises(ValueError, match="pickles .* refused"):
        files.membrane_path("loras/x.pt")
    with pytest.raises(ValueError, match=r"no membrane file 'loras/x.safetensors'; expected one of the \d+"):
        files.membrane_path("loras/x.safetensors")
    assert nodes["SemipermLoadMembrane"][0].validate_inputs(None) is True  # wired: not known yet


def test_links_are_followed_only_by_their_listed_name(files, tmp_path):
    import folder_paths

    folder = Path(folder_paths.models_dir) / "semiperm"
    (tmp_path / "store.safetensors").touch()
    (folder / "linked.safetensors").symlink_to(tmp_path / "store.safetensors")
    (folder / "dangling.safetensors").symlink_to(tmp_path / "gone.safetensors")
    try:
        assert files.membrane_path("semiperm/linked.safetensors").read_bytes() == b""
        with pytest.raises(ValueError, match="leads nowhere"):
            files.membrane_path("semiperm/dangling.safetensors")
        with pytest.raises(ValueError, match="outside"):
            files.membrane_path(str(tmp_path / "store.safetensors"))
    finally:
        (folder / "linked.safetensors").unlink()
        (folder / "dangling.safetensors").unlink()


def test_registering_keeps_what_others_registered(files, monkeypatch):
    import folder_paths

    ours = folder_paths.get_folder_paths("semiperm")[0]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "semiperm", (["/elsewhere", ours], set()))
    files.register()
    files.register()
    expected = ([ours, "/elsewhere", str(files.EXAMPLES), str(files.ZOO)], {".safetensors"})
    assert folder_paths.folder_names_and_paths["semiperm"] == expected


# ---- the report -----------------------------------------------------------------------------------------------------


def made_up(concepts: int, rows: int = 2, steps: int = 20, gamma=None) -> dict:
    """A report by the function that makes real ones; `gamma`: row -> gates."""
    names = [f"concept {k}" for k in range(concepts)]
    gamma = gamma or (lambda r: {c: 0.75 * (r % 2) * (k % 2 == 0) for k, c in enumerate(names)})
    return membrane_report(
        SimpleNamespace(concepts=names, kinds=["probe"] * concepts),
        MembraneConfig(start=0.1, end=0.6),
        [
            {"kind": ("negative", "positive")[r % 2], "prompt": None, "source": "embeds", "gamma": gamma(r)}
            for r in range(rows)
        ],
        [{"share": i / 20, "sigma": 14.6 - i / 2, "active": 2 <= i < 12} for i in range(steps)],
        modules=32,
    )


def test_report_text(plot):
    text = plot.report_text(made_up(3))
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == "3 concepts on 32 modules, strength 1".split()
    assert "active in 10 of 20 steps, sigma 14.6 to 5.1" in text
    assert ["concept", "0", "probe", "0.000", "0.750"] in lines
    assert text.endswith("never fired (below 0.01 in every row): concept 1")
    assert plot.report_text(made_up(1)).endswith("every membrane fired")


def test_report_text_says_when_the_window_was_missed(plot):
    report = made_up(1) | {"steps": [{"share": 0.9, "sigma": 1.0, "active": False}]}
    assert "nothing was erased" in plot.report_text(report)


def test_a_membrane_that_pushes_towards_its_concept_has_fired(plot):
    report = made_up(1, gamma=lambda row: {"concept 0": -float(row)})
    assert plot.report_text(report).endswith("every membrane fired")


@pytest.mark.parametrize(("concepts", "rows", "steps"), [(1, 2, 20), (100, 2, 50), (35, 8, 1000), (1, 0, 0)], ids=str)
def test_report_plot(plot, concepts, rows, steps):
    image = plot.report_plot(made_up(concepts, rows, steps))
    assert image.dtype == torch.float32 and image.shape[0] == 1 and image.shape[3] == 3
    assert image.min() >= 0 and image.max() == 1
    assert image.shape[1] <= 1300 and image.shape[2] <= 2048, "fits a screen"
    assert bool((image == torch.tensor(plot.ACTIVE) / 255).all(-1).any()) == (steps > 2)


def test_report_plot_shows_the_gates(plot):
    shut, opened = made_up(2, gamma=lambda row: {"": 0.0}), made_up(2)
    full = torch.tensor(plot.shade(0.75)) / 255
    count = [int((plot.report_plot(r) == full).all(-1).sum()) for r in (shut, opened)]
    assert count[0] == 0 and count[1] > 500
