"""Every surface on real pipelines in miniature, of two families; who takes part; what a method costs."""

from contextlib import contextmanager

import pytest
import torch
from semiperm.benchmarks.arena import contestants as taking_part
from semiperm.benchmarks.arena import cost, run
from semiperm.benchmarks.arena.asking import questions
from semiperm.benchmarks.arena.scoring import rows_of
from semiperm.benchmarks.arena.settings import Settings
from semiperm.benchmarks.arena.surfaces import SURFACES, Attacker
from semiperm.benchmarks.erasure.methods import METHODS, Told
from semiperm.benchmarks.rivals import RIVALS
from semiperm.benchmarks.store import Store
from semiperm.canvas.editions import world_of
from semiperm.canvas.world import Shown, Sight
from semiperm.methods.errors import MembraneError, ModelError, SemipermError
from semiperm.methods.guidance.detectors import DetectorPair, PictureDetector
from semiperm.methods.membranes.types import LowRank, Membrane, Membranes
from semiperm.pipelines.guidance.apply import SafeGuidanceHandle
from semiperm.pipelines.membranes.state import MembraneHandle
from semiperm.pipelines.text import text_projections
from tiny_models import build

TINY = Settings(
    asks=1, others=1, part=1, attacked=3, search_steps=1, embedding_steps=1, inversion_steps=1, points=2, rounds=2
)  # fmt: skip
WORLD = world_of("canvas")
CALL = {"num_inference_steps": 2, "guidance_scale": 2.0}


def always(images):
    """A judge that sees a robot wherever it looks."""
    return Sight([Shown(("robot",), "neon")] * len(images), torch.zeros(len(images), 1))


def never(images):
    return Sight([Shown()] * len(images), torch.zeros(len(images), 1))


@pytest.mark.parametrize("surface", SURFACES)
def test_a_surface_draws_as_many_pictures_as_were_asked_for(surface):
    bare = build("sd15")
    attacker = Attacker(bare, WORLD, {"first": always}, "robot", TINY, CALL)
    calls = []
    bare.unet.register_forward_pre_hook(lambda module, args: calls.append(1))
    images = SURFACES[surface](attacker, bare, {})
    assert len(images) == 3 and calls
    side = bare.unet.config.sample_size * bare.vae_scale_factor
    first = images[0]
    assert (first.size if hasattr(first, "convert") else tuple(first.shape[1:])) == (side, side)


def test_what_does_not_take_a_call_of_its_own_says_so():
    bare = build("sd15")
    attacker = Attacker(bare, WORLD, {"first": always}, "robot", TINY, CALL)
    with pytest.raises(SemipermError, match="needs negative_prompt"):
        SURFACES["arithmetic"](attacker, bare, {"negative_prompt": "robot"})
    assert len(SURFACES["redrawn"](attacker, bare, {"negative_prompt": "robot"})) == 3
    unseen = Attacker(bare, WORLD, {"first": never}, "robot", TINY, CALL)
    for surface in ("learned embedding", "inpainted"):
        with pytest.raises(SemipermError, match="showed no 'robot' in 12 pictures"):
            SURFACES[surface](unseen, bare, {})


def test_found_words_are_none_of_the_concepts():
    bare, asked = build("sd15"), []
    attacker = Attacker(bare, WORLD, {"first": always}, "robot", TINY, CALL)

    def heard(prompt, **call):
        asked.extend(prompt)
        return type("Out", (), {"images": [None] * len(prompt)})

    class Listening:
        def __getattr__(self, name):
            return getattr(bare, name)

        def __call__(self, prompt, **call):
            return heard(prompt)

    assert len(attacker.words) == 6 and {"robot", "android", "mechanical man"} <= set(attacker.words)
    SURFACES["hard prompts"](attacker, bare, {})
    words = {word for phrase in attacker.words for word in phrase.split()}
    listened = [p for p in asked for w in p.split() if w in words]
    assert not listened


# ---- costs -----------------------------------------------------------------------------------------------------------


def stack_of(pipe):
    modules = {}
    for key, module in text_projections(pipe)[0].items():
        out, wide = module.weight.shape
        modules[key] = LowRank(torch.randn(1, wide), torch.randn(out, 1), 1.0)
    return Membranes(Membrane("robot", modules))


def test_sizes_are_of_what_is_handed_on():
    pipe, bare, before = build("sd15"), build("sd15"), cost.storages()
    bare.unet.load_state_dict(pipe.unet.state_dict())
    bare.text_encoder.load_state_dict(pipe.text_encoder.state_dict())
    bare.vae.load_state_dict(pipe.vae.state_dict())
    assert cost.size(pipe, bare, cost.storages()) == {"bytes": 0, "of": "tensors held"}
    sound = cost.fingerprint(pipe)
    held = torch.zeros(1000)
    found = cost.size(pipe, bare, before)
    assert found["of"] == "tensors held" and found["bytes"] >= held.nbytes
    stack = stack_of(pipe)
    from semiperm.benchmarks.erasure.methods import applied

    with applied(pipe, stack, "always"):
        found = cost.size(pipe, bare, before)
        assert found["of"] == "file" and found["bytes"] > 4 * sum(
            pair.down.numel() + pair.up.numel() for pair in stack[0].modules.values()
        )
        assert cost.fingerprint(pipe) != sound
    assert cost.fingerprint(pipe) == sound and MembraneHandle.on(pipe) is None
    weight = pipe.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        weight[0] += 1
    assert cost.size(pipe, bare, before) == {"bytes": weight.nbytes, "of": "changed weights"}
    assert cost.fingerprint(pipe) != sound


def test_a_step_is_timed_beside_the_bare_one():
    pipe, bare, calls = build("sd15"), build("sd15"), []
    pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(1))
    found = cost.step_ratio(pipe, bare, ["a robot"], CALL, {"negative_prompt": "x"}, 2)
    assert found["rounds"] == 2 and found["ratio"] > 0 and found["ms"] > 0 and len(calls) == 3 * cost._STEPS


# ---- who takes part --------------------------------------------------------------------------------------------------


def test_who_takes_part():
    known = taking_part.contestants(True, {"mine": lambda pipe: Membranes()})
    assert {"membranes/image", "membranes/both", "membranes/refusing", "mine", *METHODS, *RIVALS} == set(known)
    assert set(taking_part.LEFT_OUT) <= set(known)
    without = taking_part.contestants(False)["negative_prompt"]
    with pytest.raises(ModelError, match="without guidance"), without(None, Told({"robot": ("robot",)})):
        pass


def test_a_file_takes_part_where_it_erases_the_concept():
    pipe = build("sd15")
    method = taking_part.contestants(True, {"mine": stack_of})["mine"]
    with method(pipe, Told({"robot": ("robot",)})) as extra:
        assert extra == {} and MembraneHandle.on(pipe).membranes.concepts == ("robot",)
    assert MembraneHandle.on(pipe) is None
    with pytest.raises(MembraneError, match="the file erases robot, and not star"), method(
        pipe, Told({"star": ("star",)})
    ):  # fmt: skip
        pass


@pytest.mark.parametrize(("method", "side"), [("membranes/image", "image"), ("membranes/both", "both")])
def test_our_sides_are_told_the_names(method, side, monkeypatch):
    from semiperm.pipelines.membranes import erase

    pipe, told = build("sd15"), []

    def fit(pipe, concepts, **settings):
        told.append((concepts, settings["side"]))
        return stack_of(pipe)

    monkeypatch.setattr(erase, "erase_concepts", fit)
    with taking_part.contestants(True)[method](pipe, Told({"robot": ("robot", "android")})):
        assert MembraneHandle.on(pipe) is not None
    assert told == [(["robot|android"], side)] and MembraneHandle.on(pipe) is None


def test_one_of_ours_refuses_what_its_detectors_see(monkeypatch):
    from semiperm.pipelines.guidance import fit
    from semiperm.pipelines.membranes import erase

    def detectors(pipe, categories, **settings):
        assert MembraneHandle.on(pipe) is None, "fitted on the untouched model"
        (one,) = categories
        seeing = PictureDetector(torch.tensor([0.0, 1.0]), torch.zeros(1, 100), torch.zeros(1), -1.0)
        return (DetectorPair(one.name, None, seeing, one.false_alarms),)

    pipe = build("sd15")
    monkeypatch.setattr(erase, "erase_concepts", lambda pipe, concepts, **settings: stack_of(pipe))
    monkeypatch.setattr(fit, "fit_detectors", detectors)
    with taking_part.contestants(True)["membranes/refusing"](pipe, Told({"robot": ("robot",)})):
        latents = pipe("a house", num_inference_steps=4, output_type="latent").images
        assert SafeGuidanceHandle.on(pipe).report()["rows"][0]["refused"] and latents.abs().max() < 0.2
    assert MembraneHandle.on(pipe) is SafeGuidanceHandle.on(pipe) is None


# ---- all of it, on a flow model --------------------------------------------------------------------------------------


def test_a_flow_model_from_end_to_end(small_flow):
    """The whole loop on SD3's classes: membranes hold, and what is made for UNets says so."""
    world = world_of("canvas-flow")

    @contextmanager
    def ours(pipe, told):
        from semiperm.benchmarks.erasure.methods import applied

        with applied(pipe, stack_of(pipe), "always") as extra:
            yield extra

    methods = {"ours": ours, "gloce": taking_part.contestants(True)["gloce"]}
    call = {"num_inference_steps": 2, "guidance_scale": 2.0}
    arena = run.Arena(
        world, lambda: small_flow, {"first": always}, methods, TINY, Store(None, "arena"), call=call
    )  # fmt: skip
    widths = set()
    small_flow.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: widths.add(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    found = list(arena.run([("robot",)]))
    rows = {row["method"]: row for row in rows_of(world, ["first"], found) if not row["pooled"]}
    ours_row = rows["ours"]
    assert not ours_row["why"] and all(share[0] == 1.0 for share in ours_row["surfaces"].values())
    assert widths == {small_flow.tokenizer.model_max_length}  # and no zeros of a T5, in any attack
    assert ours_row["of"] == "file" and ours_row["ua"][0] == 0.0 and ours_row["step"][0] > 0
    assert len(rows["gloce"]["why"]) == len(arena.cells_of(questions(world, ["robot"], TINY), "gloce"))
    assert "Error" in rows["gloce"]["why"]["public"]
