"""Training on small real models of every family: what is drawn, resumed, shared by processes, and given back."""

import json

import pytest
import tiny_models
import torch
from semiperm.methods.errors import MembraneError
from semiperm.methods.membranes.config import MembraneConfig
from semiperm.methods.membranes.file import load_membranes, save_membranes
from semiperm.methods.training.config import TrainingConfig
from semiperm.methods.training.run import CHECKPOINT, LOG
from semiperm.pipelines.family import denoiser_of
from semiperm.pipelines.membranes.adapters import export_lora, import_membranes
from semiperm.pipelines.membranes.apply import apply_membranes
from semiperm.pipelines.training import train as training
from semiperm.pipelines.training.layers import trained_layers
from semiperm.pipelines.training.train import train_membranes

PRESERVE = ["a photo of a dog", "a house", "a drawing of a tree", "an old car", "two people reading", "a bowl of fruit"]
QUICK = dict(
    steps=4,
    learning_rate=0.02,
    warmup=1,
    batch_size=2,
    anchors=2,
    sampling_steps=4,
    validate_every=2,
    checkpoint_every=2,
    height=tiny_models.SIZE,
    width=tiny_models.SIZE,
    max_sequence_length=tiny_models.LENGTH,
)


@pytest.fixture(autouse=True)
def no_fit(monkeypatch):
    """The closed form that everything begins from takes seconds: one detector-less stand-in, a real membrane."""
    from semiperm.methods.membranes.closed_form import closed_form_membrane
    from semiperm.methods.membranes.types import Membranes
    from semiperm.pipelines.text import text_projections
    from semiperm.pipelines.weights import weights_of

    def closed_form(pipe, concepts, surrogate="", *args, **kwargs):
        tokens, _ = (weights_of(pipe, group) for group in text_projections(pipe))
        width = next(iter(tokens.values())).shape[1]
        made = []
        for text in concepts:
            generator = torch.Generator().manual_seed(len(text))
            edit = [torch.randn(*s, generator=generator).double() * 0.05 for s in ((width, 2), (2, width))]
            phrases = tuple(text.split("|"))
            made.append(closed_form_membrane(tokens, edit, phrases[0], phrases=phrases, surrogate=surrogate))
        return Membranes(made)

    monkeypatch.setattr(training, "erase_concepts", closed_form)


def built(family):
    pipe = tiny_models.build(family)
    if family == "sd2":
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type="v_prediction")
    return pipe


def run(pipe, concepts=("robot|android",), surrogate="tree", progress=None, workdir=None, **settings):
    config = TrainingConfig(**(QUICK | settings))
    return train_membranes(pipe, list(concepts), surrogate, PRESERVE, config=config, progress=progress, workdir=workdir)


def same(first, second, **tolerance):
    assert first.keys() == second.keys()
    for key, pair in first.items():
        one, two = (p.up.flatten(1) @ p.down.flatten(1) * p.scale for p in (pair, second[key]))
        if tolerance:
            torch.testing.assert_close(one, two, **tolerance)
        else:
            assert torch.equal(pair.down, second[key].down) and torch.equal(pair.up, second[key].up)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family_learns_and_is_left_as_it_was(family, tmp_path):
    pipe, rows = built(family), []
    denoiser, _ = denoiser_of(pipe)
    before = {name: t.clone() for name, t in denoiser.state_dict().items()}
    untouched = tiny_models.call(pipe, "a robot")
    rate = 0.005 if denoiser_of(pipe)[1] == "transformer" else 0.0005  # the random UNets hardly hear their text
    settings = dict(warm_start="none", steps=8, learning_rate=rate, anchor_weight=1.0, patience=0)
    (membrane,) = run(pipe, progress=rows.append, workdir=tmp_path / "run", **settings)
    assert len(rows) == 8 and rows[-1]["steps"] == 8
    first = json.loads((tmp_path / "run" / LOG).read_text().splitlines()[0])["validation"]["robot"]
    assert first["erased"] == pytest.approx(1.0, rel=1e-3) and first["moved"] < 1e-6  # the untouched model
    assert float(membrane.metadata["validation_loss"]) < 0.99 * first["loss"], family  # on wordings that it never saw

    assert all(torch.equal(t, before[name]) for name, t in denoiser.state_dict().items())
    assert not any(hasattr(module, "_semiperm_calls") for module in denoiser.modules())
    assert torch.equal(tiny_models.call(pipe, "a robot"), untouched)
    assert membrane.method == "latent_anchoring" and membrane.phrases == ("robot", "android")
    assert json.loads(membrane.metadata["training"])["steps"] == 8

    (loaded,) = load_membranes(save_membranes(membrane, tmp_path / "m.safetensors"))
    same(loaded.modules, membrane.modules)
    with apply_membranes(pipe, loaded, MembraneConfig(gate="always")) as handle:
        assert not torch.equal(tiny_models.call(pipe, "a robot"), untouched)
        assert not handle.report()["idle_modules"]
    (lora,) = import_membranes(pipe, export_lora(pipe, membrane, tmp_path / "lora.safetensors"), "robot")
    same(lora.modules, membrane.modules, atol=1e-5, rtol=1e-4)


def test_layers_grow_and_leave_norms_alone():
    for family in tiny_models.FAMILIES:
        pipe = tiny_models.build(family)
        text, cross, every = (trained_layers(pipe, layers) for layers in ("text", "cross", "all"))
        assert text.keys() < cross.keys() < every.keys(), family
        assert not any("norm" in key for key in every)
        assert all(set(getattr(module, "kernel_size", (1,))) == {1} for module in every.values())
    spm = {key.rpartition("transformer_blocks_0_")[2] for key in trained_layers(tiny_models.build("sd15"), "all")}
    wanted = {f"attn{n}_to_{p}" for n in "12" for p in ("q", "k", "v", "out_0")} | {"ff_net_0_proj", "ff_net_2"}
    assert wanted <= spm and {key.rpartition("_attentions_0_")[2] for key in spm} >= {"proj_in", "proj_out"}


def test_several_at_once_are_each_as_if_alone():
    """Also in one batch: the packed form is the sum of single ones, and so is its gradient."""
    pipe, names = built("sd15"), ("robot|android", "cat", "house")
    # the other concepts are anchors, too; here they are not, so that nothing differs
    words = training.Words

    class Alone(words):
        @property
        def _pool(self):
            captions = ["", *PRESERVE]
            return *self.encode(captions), captions

    training.Words = Alone
    try:
        single = [run(pipe, [name], validate_every=0)[0] for name in names]
        together = run(pipe, names, concepts_per_batch=3, validate_every=0)
        begun = run(pipe, names, steps=1, learning_rate=1e-12, validate_every=0)
    finally:
        training.Words = words
    for one, other, start in zip(single, together, begun, strict=True):
        assert one.concept == other.concept == start.concept
        alone, beside, first = (
            torch.cat([t.flatten() for pair in m.modules.values() for t in (pair.down, pair.up)])
            for m in (one, other, start)
        )
        # Adam makes a step of either sign out of a gradient that is nearly 0: a few numbers differ by rounding alone
        assert (alone - beside).norm() < 0.05 * (alone - first).norm()


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    pipe = built("sd15")
    whole = run(pipe, ("robot", "cat"), steps=6, workdir=tmp_path / "whole")

    def kill(figures):
        if figures["step"] == 5:  # the checkpoint is of step 4
            raise Killed

    with pytest.raises(Killed):
        run(pipe, ("robot", "cat"), steps=6, workdir=tmp_path / "killed", progress=kill)
    assert not any(hasattr(module, "_semiperm_calls") for module in denoiser_of(pipe)[0].modules())
    again = run(pipe, ("robot", "cat"), steps=6, workdir=tmp_path / "killed")
    for one, other in zip(whole, again, strict=True):
        same(one.modules, other.modules)
        assert one.metadata == other.metadata

    def rows(name):
        read = map(json.loads, (tmp_path / name / LOG).read_text().splitlines())
        return [{key: value for key, value in row.items() if key != "seconds_per_step"} for row in read]

    assert rows("whole") == rows("killed") and [row["step"] for row in rows("whole")] == [0, 2, 4, 6]
    with pytest.raises(MembraneError, match="checkpoint of another run"):
        run(pipe, ("robot", "cat"), steps=7, workdir=tmp_path / "killed")
    finished = []  # nothing is left to do, and nothing is done
    run(pipe, ("robot", "cat"), steps=6, workdir=tmp_path / "killed", progress=finished.append)
    assert not finished and (tmp_path / "killed" / CHECKPOINT).exists()


def test_a_concept_stops_when_it_no_longer_gets_better_and_its_best_is_given_back():
    pipe, rows = built("sd15"), []
    # steps so large that nothing after the start is better
    stopped = run(pipe, ("robot",), steps=40, learning_rate=0.1, validate_every=1, patience=3, progress=rows.append)
    assert len(rows) == 3 and stopped[0].metadata["step"] == "0"
    start = training.erase_concepts(pipe, ["robot"], "tree")[0]
    for key, pair in start.modules.items():
        got = stopped[0].modules[key]
        torch.testing.assert_close(got.up @ got.down * got.scale, pair.up @ pair.down * pair.scale)
    assert stopped[0].modules["lora_unet_mid_block_attentions_0_proj_in"].is_conv  # as SPM's files have it


def test_gradient_checkpointing_changes_memory_alone():
    pipe = built("sd15")
    plain, kept = run(pipe)[0], run(pipe, gradient_checkpointing=True)[0]
    same(plain.modules, kept.modules, atol=1e-6, rtol=1e-4)
    assert not denoiser_of(pipe)[0].is_gradient_checkpointing


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_an_adversary_adds_texts_that_let_more_of_the_concept_through(family, monkeypatch):
    from semiperm.methods.training import trainer

    seen, search = [], trainer.adversarial_texts

    def watched(loss_of, hidden, *rest):
        found = search(loss_of, hidden, *rest)
        with torch.no_grad():
            seen.append((loss_of(hidden), loss_of(found)))
        return found

    monkeypatch.setattr(trainer, "adversarial_texts", watched)
    pipe, plain, hard = built(family), [], []
    settings = dict(steps=1, validate_every=0, layers="text")
    run(pipe, progress=plain.append, **settings)
    run(pipe, progress=hard.append, adversary_steps=4, adversary_radius=0.01, **settings)
    ((before, after),) = seen
    assert (after <= before).all() and (after < before).any()
    assert 0 <= hard[0]["opened"] <= 1 and "opened" not in plain[0]
    assert hard[0]["erasing"] != plain[0]["erasing"]  # a mean over them, too
    assert hard[0]["anchoring"] == pytest.approx(plain[0]["anchoring"], rel=1e-3)


@pytest.mark.parametrize("gate", ["auto", "always"])
def test_the_adversary_sees_the_gate(gate, monkeypatch):
    """A text that the gate stays shut for meets the untouched model; with the gate "always", the membrane."""
    from dataclasses import replace

    from semiperm.methods.membranes.types import GateProbe, Membranes
    from semiperm.methods.training import trainer

    closed_form, pipe, asked = training.erase_concepts, built("sd15"), {}
    width = denoiser_of(pipe)[0].config.cross_attention_dim
    probe = GateProbe(torch.eye(width)[0], 50.0, 60.0, separation=1.0, false_closed=0.0, false_open=0.0, checked=1)

    def solve(*args, **kwargs):
        return Membranes(replace(m, probe=probe) for m in closed_form(*args, **kwargs))

    def search(loss_of, hidden, *rest):
        opened = hidden.clone()
        opened[:, 0, 0] = 70.0  # beyond the detector's upper threshold
        between = hidden.clone()
        between[:, 0, 0] = 55.0
        between.requires_grad_()
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(loss_of(between).sum(), between)
        asked["grad"] = grad[:, 0, 0].clone()
        with torch.no_grad():
            asked["shut"], asked["open"] = loss_of(hidden), loss_of(opened)
            membranes, trained.packed.parameters = (
                trained.packed.parameters,
                [{name: torch.zeros_like(p) for name, p in own.items()} for own in trained.packed.parameters],
            )
            asked["untouched"] = [loss_of(t) for t in (hidden, opened)]
            trained.packed.parameters = membranes
        return hidden

    made = trainer.Trainer.__init__

    def watched(self, *args, **kwargs):
        nonlocal trained
        made(self, *args, **kwargs)
        trained = self

    trained, rows = None, []
    monkeypatch.setattr(training, "erase_concepts", solve)
    monkeypatch.setattr(trainer, "adversarial_texts", search)
    monkeypatch.setattr(trainer.Trainer, "__init__", watched)
    run(pipe, progress=rows.append, steps=1, validate_every=0, adversary_steps=1, adversary_gate=gate)
    shut, opened = asked["untouched"]
    assert (asked["open"] != opened).any(), "the membrane acts where its gate is open"
    assert torch.equal(asked["shut"], shut) == (gate == "auto")
    assert rows[0]["opened"] == (0.0 if gate == "auto" else 1.0)
    assert (asked["grad"] != 0).any()


def test_whole_trajectories_are_an_objective_too(tmp_path):
    """The concept's way comes nearer to the surrogate's; resumed to the bit, log Z included."""
    pipe, rows = built("sd3"), []
    settings = dict(objective="trajectory", warm_start="none", steps=10, learning_rate=0.002, batch_size=1, patience=0)
    settings |= dict(anchor_weight=0.0, sampling_guidance=1.0)
    (membrane,) = run(pipe, progress=rows.append, workdir=tmp_path / "whole", **settings)
    assert rows[0]["erasing"] == pytest.approx(2.5**2, rel=1e-3), "log Z is 0, and the two ways hardly differ"
    first = json.loads((tmp_path / "whole" / LOG).read_text().splitlines()[0])["validation"]["robot"]
    assert first["erased"] == pytest.approx(1.0, rel=1e-3)
    assert rows[-1]["validation"]["robot"]["erased"] < 0.95 and membrane.metadata["step"] == "10"
    assert rows[-1]["erasing"] < rows[0]["erasing"], "log Z comes to log beta"
    assert membrane.method == "latent_anchoring/trajectory"

    def kill(figures):
        if figures["step"] == 7:
            raise Killed

    with pytest.raises(Killed):
        run(pipe, workdir=tmp_path / "killed", progress=kill, **settings)
    same(run(pipe, workdir=tmp_path / "killed", **settings)[0].modules, membrane.modules)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_parameters_in_full(precision):
    rows = []
    membrane = run(built("sd15"), progress=rows.append, precision=precision, steps=2)[0]
    assert all(pair.down.dtype == torch.float32 for pair in membrane.modules.values())
    assert all(row["loss"] < 1.0 for row in rows)


def _two(folder):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # a fork has its parent's
    pipe = built("sd15")
    membranes = run(pipe, ("robot", "cat"), workdir=folder)
    from accelerate import PartialState

    if PartialState().is_main_process and PartialState().num_processes == 2:
        save_membranes(membranes, f"{folder}/two.safetensors")


def test_two_processes_come_to_what_one_does(tmp_path, no_fit):
    from accelerate import debug_launcher

    debug_launcher(_two, (str(tmp_path),), num_processes=2)
    one = run(built("sd15"), ("robot", "cat"))
    for single, shared in zip(one, load_membranes(tmp_path / "two.safetensors"), strict=True):
        same(single.modules, shared.modules, atol=2e-5, rtol=1e-3)
    log = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [row["step"] for row in log] == [0, 2, 4]
    # and one process goes on from the checkpoint of two
    assert run(built("sd15"), ("robot", "cat"), workdir=tmp_path).concepts == ("robot", "cat")


def test_what_cannot_be_trained_is_refused(monkeypatch):
    pipe = built("sd15")
    with apply_membranes(pipe, training.erase_concepts(pipe, ["robot"])), pytest.raises(MembraneError, match="at work"):
        run(pipe)
    with pytest.raises(MembraneError, match="no concepts"):
        run(pipe, ())
    with pytest.raises(MembraneError, match="exactly one '{}'"):
        train_membranes(pipe, "robot", templates=["no place"], config=TrainingConfig(**QUICK))
    monkeypatch.setattr("semiperm.methods.training.trainer.erasing_loss", lambda a, b: (a - b).flatten(1).mean(1) / 0)
    with pytest.raises(MembraneError, match="expected a finite number"):
        run(pipe, validate_every=0)
