"""The membrane nodes at work, without ComfyUI: files for real, the model surgery replaced by notes of its calls."""

import importlib
import importlib.util
import os
import sys
from types import SimpleNamespace

import comfy_stub
import pytest
import torch
from semiperm.methods.errors import MembraneError, SemipermError
from semiperm.methods.membranes.closed_form import ClosedFormConfig
from semiperm.methods.membranes.config import MembraneConfig
from semiperm.methods.membranes.file import load_membranes, save_membranes
from semiperm.methods.membranes.record import membrane_report
from semiperm.methods.membranes.types import LowRank, Membrane, Membranes


@pytest.fixture
def models(tmp_path):
    return tmp_path / "models"


@pytest.fixture
def nodes(models):
    (models / "loras").mkdir(parents=True)
    with comfy_stub.stand_in(models):
        yield importlib.import_module("semiperm.nodes.membranes.node")


def membranes(*concepts: str) -> Membranes:
    pair = {"lora_unet_to_k": LowRank(torch.ones(1, 4), torch.ones(3, 1), 1.0)}
    return Membranes(Membrane(concept=concept, modules=pair) for concept in concepts)


# ---- Load Membrane --------------------------------------------------------------------------------------------------


def test_load_stacks_behind_what_comes_in(nodes, models):
    save_membranes(membranes("robot", "ghost"), models / "semiperm" / "two.safetensors")
    save_membranes(membranes("star"), models / "loras" / "art" / "one.safetensors")
    first = nodes.SemipermLoadMembrane.execute("semiperm/two.safetensors").args[0]
    assert first.concepts == ("robot", "ghost")
    stacked = nodes.SemipermLoadMembrane.execute("loras/art/one.safetensors", membranes=first).args[0]
    assert stacked.concepts == ("robot", "ghost", "star")
    assert first.concepts == ("robot", "ghost"), "the stack that came in stays as it is"


def test_load_reads_an_overwritten_file_again(nodes, models):
    path = save_membranes(membranes("robot"), models / "semiperm" / "a.safetensors")
    node, name = nodes.SemipermLoadMembrane, "semiperm/a.safetensors"
    before = node.fingerprint_inputs(name)
    assert node.fingerprint_inputs(name, membranes=None) == before
    save_membranes(membranes("ghost"), path)
    os.utime(path, ns=(1, 1))
    assert node.fingerprint_inputs(name) != before
    assert node.execute(name).args[0].concepts == ("ghost",)


def test_load_names_what_the_file_does_not_say(nodes, models):
    from safetensors.torch import save_file

    pair = {"lora_down.weight": torch.ones(1, 4), "lora_up.weight": torch.ones(3, 1)}
    tensors = {f"{where}.{part}": t.clone() for where in ("lora_unet_to_k", "lora_te_fc1") for part, t in pair.items()}
    save_file(tensors, models / "loras" / "my_export_v2.safetensors")
    node, name = nodes.SemipermLoadMembrane, "loras/my_export_v2.safetensors"
    with pytest.raises(MembraneError, match="also adapts a text encoder"):
        node.execute(name)
    (nameless,) = node.execute(name, text_encoder="drop").args[0]
    assert not nameless.named and nameless.phrases == () and list(nameless.modules) == ["lora_unet_to_k"]
    (membrane,) = node.execute(name, concept=" robot ", text_encoder="drop").args[0]
    assert membrane.named and membrane.phrases == ("robot",)


def test_load_refuses(nodes, models):
    node = nodes.SemipermLoadMembrane
    (models / "semiperm" / "evil.safetensors").write_bytes(b"\x80\x04K\x01.")
    (models / "loras" / "old.pt").write_bytes(b"\x80\x04K\x01.")
    assert node.validate_inputs("semiperm/evil.safetensors") is True
    with pytest.raises(SemipermError, match="pickle"):
        node.execute("semiperm/evil.safetensors")
    for name, words in (("loras/old.pt", "pickles"), ("semiperm/gone.safetensors", "no membrane file")):
        assert words in node.validate_inputs(name)
        with pytest.raises(SemipermError, match=words):
            node.execute(name)


def test_the_examples_are_listed_behind_the_models_folder(nodes, models):
    names = {f"semiperm/{path.name}" for path in nodes.new_membrane_file.__globals__["EXAMPLES"].glob("*.safetensors")}
    assert names <= set(nodes.membrane_names())
    for name in names:
        assert len(nodes.SemipermLoadMembrane.execute(name).args[0]) >= 1
        save_membranes(membranes("mine"), models / name)
        assert nodes.SemipermLoadMembrane.execute(name).args[0].concepts == ("mine",)


# ---- Save Membrane --------------------------------------------------------------------------------------------------


def test_save_counts_and_never_overwrites(nodes, models):
    node, folder = nodes.SemipermSaveMembrane, models / "semiperm"
    first, second = (node.execute(membranes(c), "semiperm/erased") for c in ("robot", "ghost"))
    assert first.args == ("semiperm/erased_00001.safetensors",)
    assert first.ui.as_dict() == {"text": ("semiperm/erased_00001.safetensors",)}
    assert second.args == ("semiperm/erased_00002.safetensors",)
    assert load_membranes(folder / "erased_00001.safetensors").concepts == ("robot",)
    (folder / "erased_00041.safetensors").touch()
    (folder / "erased_more_00099.safetensors").touch()
    assert node.execute(membranes("a"), "erased").args == ("semiperm/erased_00042.safetensors",)
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]


@pytest.mark.parametrize("prefix", ["semiperm/people/erased", "people/erased", "people\\erased", " people/erased "])
def test_save_into_a_subfolder_and_load_it_by_its_name(nodes, models, prefix):
    name = nodes.SemipermSaveMembrane.execute(membranes("robot"), prefix).args[0]
    assert name == "semiperm/people/erased_00001.safetensors"
    assert nodes.SemipermLoadMembrane.validate_inputs(name) is True
    assert nodes.SemipermLoadMembrane.execute(name).args[0].concepts == ("robot",)


@pytest.mark.parametrize(
    "prefix", ["../out", "semiperm/../../out", "/tmp/out", "\\\\host\\out", "C:\\out", "a//b", "a/", "", " ", ".hidden"]
)
def test_save_stays_in_its_folder(nodes, models, prefix):
    before = sorted(models.parent.rglob("*"))
    with pytest.raises(MembraneError, match="expected a name inside models/semiperm"):
        nodes.SemipermSaveMembrane.execute(membranes("robot"), prefix)
    assert sorted(models.parent.rglob("*")) == before


def test_save_refuses_an_empty_stack(nodes, models):
    with pytest.raises(MembraneError, match="no membranes to save"):
        nodes.SemipermSaveMembrane.execute(Membranes(), "semiperm/erased")
    assert not list((models / "semiperm").iterdir())


# ---- Erase Concept, Apply Membranes, Membrane Report ----------------------------------------------------------------


@pytest.fixture
def calls(nodes, monkeypatch):
    """What the nodes ask of the model surgery."""
    seen = []

    def erase_in(model, clip, concepts, surrogate, preserve, config):
        seen.append(("erase", model, clip, concepts, surrogate, preserve, config))
        return membranes(*concepts)

    def apply_membranes_to(model, stack, config, clip):
        seen.append(("apply", model, stack.concepts, config, clip))
        return f"patched {model}"

    def report_of(model, samples):
        assert samples.shape == (1, 4, 2, 2)
        rows = [{"kind": "positive", "prompt": None, "source": "embeds", "gamma": {"robot": 1.0}}]
        bank = SimpleNamespace(concepts=["robot"], kinds=["probe"])
        steps = [{"share": 0.0, "sigma": 1.0, "active": True}]
        return membrane_report(bank, MembraneConfig(), rows, steps, modules=2)

    surgery = SimpleNamespace(apply_membranes_to=apply_membranes_to, report_of=report_of, opening_maps_of=lambda *_: {})
    monkeypatch.setitem(sys.modules, "semiperm.nodes.membranes.patch", surgery)
    monkeypatch.setitem(sys.modules, "semiperm.nodes.membranes.concept_text", SimpleNamespace(erase_in=erase_in))
    return seen


CONTROL = {"strength": 0.5, "gate": "probe", "start": 0.1, "end": 0.9}


def test_erase_concept_is_solving_and_applying(nodes, monkeypatch):
    """Two nodes of their own, so that ComfyUI keeps what was solved while the strength changes."""
    graph = {}

    def node(self, kind, **inputs):
        graph[kind] = inputs
        return SimpleNamespace(out=lambda i: [kind, i])

    builder = type("GraphBuilder", (), {"node": node, "finalize": lambda self: graph})
    monkeypatch.setitem(sys.modules, "comfy_execution.graph_utils", SimpleNamespace(GraphBuilder=builder))
    schema = nodes.SemipermEraseConcept.define_schema()
    assert schema.options["enable_expand"] is True
    assert all(socket.options["extra_dict"] == {"rawLink": True} for socket in schema.inputs[:2])
    for preset, gate in (("selective", "auto"), ("strict", "always")):
        found = nodes.SemipermEraseConcept.execute(["1", 0], ["1", 1], "robot|android\nghost", "a tree", preset, 0.5)
        assert found.args == (["SemipermApplyMembranes", 0], ["SemipermSolveMembranes", 0]) and found.expand is graph
        shared = {"model": ["1", 0], "clip": ["1", 1]}
        assert graph["SemipermSolveMembranes"] == shared | {"concept": "robot|android\nghost", "surrogate": "a tree"}
        assert graph["SemipermApplyMembranes"] == shared | {
            "membranes": ["SemipermSolveMembranes", 0], "strength": 0.5, "gate": gate, "start": 0.0, "end": 1.0
        }  # fmt: skip


def test_solve_membranes_passes_everything_on(nodes, calls):
    solve = nodes.SemipermSolveMembranes.execute
    assert solve("M", "C", "robot|android\nghost", "a tree").args[0].concepts == ("robot|android", "ghost")
    options = {"method": "rece", "rank": 3, "push": 1.0, "preserve_scale": 2.0}
    solve("M", "C", "robot", "", "a fox\na cat", **options)
    assert calls == [
        ("erase", "M", "C", ["robot|android", "ghost"], "a tree", [], ClosedFormConfig()),
        ("erase", "M", "C", ["robot"], "", ["a fox", "a cat"], ClosedFormConfig(**options)),
    ]


def test_apply_membranes_passes_everything_on(nodes, calls):
    stack = membranes("robot")
    assert nodes.SemipermApplyMembranes.execute("M", stack, **CONTROL).args == ("patched M",)
    nodes.SemipermApplyMembranes.execute("M", stack, clip="C", **CONTROL)
    assert [call[3:] for call in calls] == [(MembraneConfig(**CONTROL), None), (MembraneConfig(**CONTROL), "C")]


def test_report_shows_text_and_plot_and_passes_the_latent_on(nodes, calls):
    latent = {"samples": torch.zeros(1, 4, 2, 2)}
    output = nodes.SemipermMembraneReport.execute("M", latent)
    samples, text, plot = output.args
    assert samples is latent and "robot" in text and "every membrane fired" in text
    assert plot.shape[0] == 1 and plot.shape[3] == 3
    assert output.ui["text"] == (text,) and output.ui["images"] == [tuple(plot.shape)]


def test_errors_reach_comfyui_as_they_are(nodes, calls, monkeypatch):
    def refuse(model, samples):
        raise MembraneError("given, expected, next")

    monkeypatch.setattr(sys.modules["semiperm.nodes.membranes.patch"], "report_of", refuse)
    with pytest.raises(MembraneError, match="^given, expected, next$"):
        nodes.SemipermMembraneReport.execute("M", {"samples": None})
