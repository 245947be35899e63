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

    def erase_in(model, clip, concepts, surrogate=""):
        seen.append(("erase", model, clip, concepts, surrogate))
        return membranes(*concepts)

    def apply_membranes_to(model, stack, config, clip):
        seen.append(("apply", model, stack.concepts, config, clip))
        return f"patched {model}"

    def report_of(model):
        rows = [{"kind": "positive", "prompt": None, "source": "embeds", "gamma": {"robot": 1.0}}]
        bank = SimpleNamespace(concepts=["robot"], kinds=["probe"])
        steps = [{"share": 0.0, "sigma": 1.0, "active": True}]
        return membrane_report(bank, MembraneConfig(), rows, steps, modules=2)

    surgery = SimpleNamespace(apply_membranes_to=apply_membranes_to, report_of=report_of)
    monkeypatch.setitem(sys.modules, "semiperm.nodes.membranes.patch", surgery)
    monkeypatch.setitem(sys.modules, "semiperm.nodes.membranes.concept_text", SimpleNamespace(erase_in=erase_in))
    return seen


CONTROL = {"strength": 0.5, "gate": "probe", "start": 0.1, "end": 0.9}


def test_erase_concept_makes_and_applies(nodes, calls):
    model, made = nodes.SemipermEraseConcept.execute("M", "C", "robot|android\nghost", "a tree", **CONTROL).args
    assert model == "patched M" and made.concepts == ("robot|android", "ghost")
    assert calls == [
        ("erase", "M", "C", ["robot|android", "ghost"], "a tree"),
        ("apply", "M", ("robot|android", "ghost"), MembraneConfig(**CONTROL), "C"),
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
    def refuse(model):
        raise MembraneError("given, expected, next")

    monkeypatch.setattr(sys.modules["semiperm.nodes.membranes.patch"], "report_of", refuse)
    with pytest.raises(MembraneError, match="^given, expected, next$"):
        nodes.SemipermMembraneReport.execute("M", {})
