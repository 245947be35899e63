"""What is special to membranes, on small real pipelines of each family; tests/test_contracts.py has the rest."""

import dataclasses
import inspect
import logging

import pytest
import torch
from contracts.membranes import strong
from semiperm.methods.errors import MembraneError, SemipermError
from semiperm.methods.membranes.config import MembraneConfig
from semiperm.methods.membranes.types import GateProbe, Membranes
from semiperm.pipelines.family import denoiser_of
from semiperm.pipelines.membranes.apply import apply_membranes, remove_membranes
from semiperm.pipelines.membranes.erase import erase_concepts
from semiperm.pipelines.text import encode_text
from tiny_models import FAMILIES, LENGTH, build, call

TEMPLATES = ("a photo of a {}", "a painting of a {} in the garden", "a {} walks by the river")
PRESERVE = ("a photo of a cat", "a painting of a house", "two people reading books", "a dog by the river")
ERASE = {"surrogate": "cat", "templates": TEMPLATES, "preserve": PRESERVE, "max_sequence_length": LENGTH}
PROMPTS = ["a photo of a robot", "a painting of a house"]
CLOSE = {  # relative to the output's norm; two orders of summation differ by rounding
    torch.float32: 1e-5,
    torch.bfloat16: 5e-2,
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def shared(family):
    pipe = build(family)
    erased = erase_concepts(pipe, ["robot|android"], **ERASE)
    return pipe, erased, call(pipe, PROMPTS, negative_prompt=["", ""])


@pytest.fixture
def pipe(shared):
    yield shared[0]
    remove_membranes(shared[0])


@pytest.fixture
def erased(shared):
    return shared[1]


@pytest.fixture
def untouched(shared):
    return shared[2]


def run(pipe, prompts=PROMPTS, **kwargs):
    return call(pipe, prompts, negative_prompt=[""] * len(prompts), **kwargs)


def distance(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


def test_closed_gates_are_the_untouched_model(pipe, untouched):
    width = encode_text(pipe, ["a"]).hidden.shape[-1]
    shut = strong(pipe, probe=GateProbe(torch.zeros(width), 1.0, 2.0))
    handle = apply_membranes(pipe, shut, MembraneConfig(gate="probe"))
    assert torch.equal(run(pipe), untouched)
    assert {row["gamma"]["robot"] for row in handle.report()["rows"]} == {0.0}


def by_words_alone(pipe, erased):
    """The same membranes with a detector that sees nothing: gate "auto" is then the phrases."""
    blind = GateProbe(torch.zeros(encode_text(pipe, ["a"]).hidden.shape[-1]), 1.0, 2.0)
    return [dataclasses.replace(membrane, probe=blind) for membrane in erased]


def test_erasing_moves_the_concept_only(pipe, erased, untouched):
    handle = apply_membranes(pipe, by_words_alone(pipe, erased))
    image = run(pipe)
    by_prompt = {row["prompt"]: row["gamma"]["robot"] for row in handle.report()["rows"]}
    assert by_prompt == {"a photo of a robot": 1.0, "a painting of a house": 0.0, "": 0.0}
    assert not torch.equal(image[0], untouched[0])
    assert distance(image[1], untouched[1]) < 1e-6  # its rows ran in a batch with gated ones


@pytest.mark.parametrize(
    "prompt", ["ROBOT!", "two r\u00f3bots", "the android's (house:1.2), snow", "fog, droid, androids"]
)
def test_words_open_gates_in_any_form(pipe, erased, prompt):
    handle = apply_membranes(pipe, by_words_alone(pipe, erased))
    run(pipe, [prompt])
    assert [row["gamma"]["robot"] for row in handle.report()["rows"] if row["kind"] == "positive"] == [1.0]


@pytest.mark.parametrize("prompt", ["a robotic arm", "an and roid", "a house"])
def test_parts_of_words_open_none(pipe, erased, untouched, prompt):
    handle = apply_membranes(pipe, by_words_alone(pipe, erased))
    run(pipe, [prompt])
    assert {row["gamma"]["robot"] for row in handle.report()["rows"]} == {0.0}


def test_negative_rows_are_left_alone_unless_asked_for(pipe, erased):
    named = {"prompts": ["a house", "a cat"]}
    stack = by_words_alone(pipe, erased)
    untouched = call(pipe, named["prompts"], negative_prompt=["a robot", "robots"])
    handle = apply_membranes(pipe, stack)
    assert torch.equal(call(pipe, named["prompts"], negative_prompt=["a robot", "robots"]), untouched)
    rows = handle.report()["rows"]
    assert [row["kind"] for row in rows].count("negative") == 2 and {row["gamma"]["robot"] for row in rows} == {0.0}
    handle = apply_membranes(pipe, stack, MembraneConfig(negative_rows=True))
    assert not torch.equal(call(pipe, named["prompts"], negative_prompt=["a robot", "robots"]), untouched)
    gates = {row["prompt"]: row["gamma"]["robot"] for row in handle.report()["rows"]}
    assert gates == {"a robot": 1.0, "robots": 1.0, "a house": 0.0, "a cat": 0.0}
    always = apply_membranes(pipe, stack, MembraneConfig(gate="always"))
    call(pipe, ["a robot"], negative_prompt=["a robot"])  # the same embedding in both rows: never less than protected
    positive = [row["gamma"]["robot"] for row in always.report()["rows"] if row["kind"] == "positive"]
    assert positive and set(positive) == {1.0}


def test_any_prompt_of_a_picture_opens_its_gates(pipe, erased):
    handle = apply_membranes(pipe, by_words_alone(pipe, erased))
    for name in ("prompt_2", "prompt_3"):
        if name in inspect.signature(type(pipe).__call__).parameters:
            call(pipe, ["a house"], negative_prompt=[""], **{name: ["a robot"]})
            assert [r["gamma"]["robot"] for r in handle.report()["rows"] if r["kind"] == "positive"] == [1.0], name


def test_more_prompts_than_any_fixed_memory(sd15):
    erased = by_words_alone(sd15, erase_concepts(sd15, "robot", **ERASE))
    with apply_membranes(sd15, erased) as handle:
        call(sd15, [f"a robot {i}" for i in range(20)], negative_prompt=[f"fog {i}" for i in range(20)])
        gates = [row["gamma"]["robot"] for row in handle.report()["rows"]]
        assert gates == [0.0] * 20 + [1.0] * 20
        call(sd15, ["a cat"], negative_prompt=[""])
        assert len(handle.bank.recorded.entries) == 2  # what a call recorded ends with it


def test_embeddings_that_somebody_keeps_keep_their_words(sd15):
    erased = by_words_alone(sd15, erase_concepts(sd15, "robot", **ERASE))
    with apply_membranes(sd15, erased) as handle:
        embeds, negative = sd15.encode_prompt("a robot", torch.device("cpu"), 1, True)
        for _ in range(2):
            call(sd15, None, prompt_embeds=embeds, negative_prompt_embeds=negative)
            assert [row["gamma"]["robot"] for row in handle.report()["rows"]] == [0.0, 1.0]
            call(sd15, ["a cat"], negative_prompt=[""])
        del embeds, negative
        call(sd15, ["a cat"], negative_prompt=[""])
        assert len(handle.bank.recorded.entries) == 2


def test_a_detector_that_cannot_tell_leaves_its_membrane_on(sd15, caplog):
    width = encode_text(sd15, ["a"]).hidden.shape[-1]
    for fields in ({"separation": -0.1}, {"separation": 0.0}, {"separation": 0.5, "false_closed": 0.021}):
        caplog.clear()
        doubtful = strong(sd15, probe=GateProbe(torch.zeros(width), 1.0, 2.0, **fields))
        with caplog.at_level(logging.WARNING), apply_membranes(sd15, doubtful) as handle:
            run(sd15, ["a cat"])
        assert "cannot tell" in caplog.text and handle.bank.kinds == ["always"]
    sure = strong(sd15, probe=GateProbe(torch.zeros(width), 1.0, 2.0, separation=0.5, false_closed=0.02))
    with apply_membranes(sd15, sure) as handle:
        assert handle.bank.kinds == ["auto"]


def test_a_word_that_the_encoder_does_not_know_opens_for_itself_alone(sd15, caplog):
    width = encode_text(sd15, ["a"]).hidden.shape[-1]
    unknown = GateProbe(torch.zeros(width), -2.0, -1.0, separation=-0.5, meaning=0.1)  # its detector opens for all
    with caplog.at_level(logging.WARNING), apply_membranes(sd15, strong(sd15, probe=unknown)) as handle:
        run(sd15, ["a cat", "two Robots"])
        assert "hardly knows" in caplog.text and handle.bank.kinds == ["words"]
        assert [row["gamma"]["robot"] for row in handle.report()["rows"]] == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("gate", ["paper", "official", "always"])
def test_batch_of_two_equals_two_of_one(pipe, erased, gate):
    apply_membranes(pipe, erased, MembraneConfig(gate=gate))
    both = run(pipe)
    single = torch.cat([call(pipe, [prompt], negative_prompt=[""], seed=i) for i, prompt in enumerate(PROMPTS)])
    assert distance(both, single) < CLOSE[torch.float32]


@pytest.mark.parametrize("gate", ["paper", "official", "always"])
def test_modes_agree(pipe, gate):
    stack = [strong(pipe, 0), strong(pipe, 1, concept="cat and a dog")]
    prompts = PROMPTS if gate == "always" else PROMPTS[:1]
    images, used = {}, {}
    for mode in ("fused", "cached", "auto", *(["folded"] if gate == "always" else [])):
        handle = apply_membranes(pipe, stack, MembraneConfig(gate=gate, mode=mode, negative_rows=True))
        images[mode] = run(pipe, prompts)
        used[mode] = handle.report()["modes"]
    assert used["fused"] == ["fused"] and "cached" in used["cached"]
    if gate == "always":
        assert used["auto"] == ["cached", "folded"] and used["folded"] == ["folded"]
    for mode, image in images.items():
        assert distance(image, images["fused"]) < CLOSE[torch.float32], mode


def test_modes_agree_in_bfloat16(family):
    pipe = build(family, dtype=torch.bfloat16)
    images = {}
    for mode in ("fused", "auto"):
        apply_membranes(pipe, strong(pipe), MembraneConfig(gate="always", mode=mode))
        images[mode] = run(pipe)
    assert images["auto"].dtype == torch.bfloat16
    assert distance(images["auto"], images["fused"]) < CLOSE[torch.bfloat16]


def test_embeddings_passed_by_the_user(pipe, erased):
    features = encode_text(pipe, PROMPTS, max_sequence_length=LENGTH)
    negative = encode_text(pipe, ["", ""], max_sequence_length=LENGTH)
    given = {"prompt_embeds": features.hidden, "negative_prompt_embeds": negative.hidden}
    if features.pooled is not None and hasattr(pipe, "text_encoder_2"):
        given |= {"pooled_prompt_embeds": features.pooled, "negative_pooled_prompt_embeds": negative.pooled}
    if type(pipe).__name__.startswith("Flux"):
        given |= {"true_cfg_scale": 3.0}
    handle = apply_membranes(pipe, erased, MembraneConfig(gate="probe"))
    by_text = run(pipe)
    known = [row["gamma"]["robot"] for row in handle.report()["rows"]]
    by_embeds = call(pipe, None, **given)
    report = handle.report()
    if not type(pipe).__name__.startswith("Flux"):  # its guidance needs both calls; call() sets it by negative_prompt
        assert torch.equal(by_text, by_embeds)
        assert [row["gamma"]["robot"] for row in report["rows"]] == known
    apply_membranes(pipe, erased, MembraneConfig(gate="paper"))
    handle = apply_membranes(pipe, erased, MembraneConfig(gate="paper"))
    call(pipe, None, **given)
    assert {row["source"] for row in handle.report()["rows"]} == {"embeds"}


def test_window_of_the_schedule(pipe, untouched):
    stack = strong(pipe)
    images = {}
    for window in ((0.0, 1.0), (0.0, 0.5), (0.5, 1.0)):
        apply_membranes(pipe, stack, MembraneConfig(gate="always", start=window[0], end=window[1]))
        images[window] = run(pipe, steps=4)
    remove_membranes(pipe)
    bare = run(pipe, steps=4)
    assert len({image.sum().item() for image in (*images.values(), bare)}) == 4


def count_folds(monkeypatch):
    from semiperm.methods.membranes import sites

    folds, fold = [], sites.fold
    monkeypatch.setattr(sites, "fold", lambda *args: folds.append(args) or fold(*args))
    return folds


def test_folds_once_per_prompt(pipe, family, monkeypatch):
    folds = count_folds(monkeypatch)
    handle = apply_membranes(pipe, strong(pipe), MembraneConfig(gate="always", mode="folded", negative_rows=True))
    run(pipe, steps=3)
    run(pipe, ["a dog"], steps=3)
    assert len(folds) == len(handle.sites)


def test_alternating_gates_do_not_fold_at_every_step(monkeypatch):
    """Flux guides by separate calls; where their gates differ, one branch keeps the folded weights."""
    pipe = build("flux")
    folds = count_folds(monkeypatch)
    stack = strong(pipe)
    handle = apply_membranes(pipe, stack, MembraneConfig(gate="paper", negative_rows=True))
    image = run(pipe, PROMPTS[:1], steps=4)
    assert handle.report()["modes"] == ["cached", "folded", "fused"]
    assert len(folds) < 2 * len(handle.sites)
    apply_membranes(pipe, stack, MembraneConfig(gate="paper", mode="fused", negative_rows=True))
    assert distance(image, run(pipe, PROMPTS[:1], steps=4)) < CLOSE[torch.float32]


def test_inference_mode(pipe, erased):
    apply_membranes(pipe, [*erased, strong(pipe, concept="cat")])
    expected = run(pipe)
    with torch.inference_mode():
        assert distance(run(pipe), expected) < CLOSE[torch.float32]


def test_in_place_change_of_the_embeddings_is_seen(pipe):
    denoiser, _ = denoiser_of(pipe)
    handle = apply_membranes(pipe, strong(pipe), MembraneConfig(gate="always"))
    run(pipe)
    features = encode_text(pipe, PROMPTS)
    with torch.no_grad():
        plans = handle.run.record.plans
        _, new = handle._plan_of(handle.run, features.hidden, features.pooled)
        assert new and handle._plan_of(handle.run, features.hidden, features.pooled) == (plans[-1], False)
        features.hidden.mul_(2)
        _, new = handle._plan_of(handle.run, features.hidden, features.pooled)
    assert new


@pytest.mark.parametrize(
    ("family", "gate"),
    [("sd15", "probe"), pytest.param("sd15", "paper", marks=pytest.mark.slow), ("flux", "always")],
)
def test_compiled_in_place_in_one_graph(family, gate):
    torch._dynamo.reset()
    pipe = build(family)
    stack = erase_concepts(pipe, ["robot"], **ERASE)
    config = MembraneConfig(gate=gate, start=0.0, end=0.9)
    apply_membranes(pipe, stack, config)
    eager = call(pipe, PROMPTS, steps=3)
    graphs = []

    def capture(module, _):
        graphs.append(module)
        return module.forward

    denoiser, _ = denoiser_of(pipe)
    denoiser.compile(backend=capture, fullgraph=True)
    compiled = call(pipe, PROMPTS, steps=3)
    assert len(graphs) == 1
    assert distance(compiled, eager) < CLOSE[torch.float32]
    assert not torch.equal(compiled, call_without(pipe))
    torch._dynamo.reset()


@pytest.mark.parametrize("family", [pytest.param("sd15", marks=pytest.mark.slow), "flux"])
def test_blocks_compiled_one_by_one(family, caplog):
    torch._dynamo.reset()
    pipe = build(family)
    stack = [*erase_concepts(pipe, ["robot"], **ERASE), strong(pipe, concept="cat")]
    handle = apply_membranes(pipe, stack, MembraneConfig(gate="auto", end=0.9))
    eager = call(pipe, PROMPTS, steps=3)
    graphs = []

    def capture(module, _):
        graphs.append(module)
        return module.forward

    denoiser_of(pipe)[0].compile_repeated_blocks(backend=capture, fullgraph=True)
    compiled = call(pipe, PROMPTS, steps=3)
    count = len(graphs)
    assert distance(compiled, eager) < CLOSE[torch.float32]
    assert torch.equal(call(pipe, PROMPTS, steps=3), compiled) and len(graphs) == count
    assert handle.report()["silent"] == []
    torch._dynamo.reset()


def call_without(pipe):
    remove_membranes(pipe)
    return call(pipe, PROMPTS, steps=3)


# --- errors: a clear message, and nothing changed ---


@pytest.fixture(scope="module")
def sd15():
    return build("sd15")


def broken(membrane, **changes):
    key, pair = next(iter(membrane.modules.items()))
    return dataclasses.replace(membrane, modules={key: dataclasses.replace(pair, **changes)})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda m: [], "no membranes"),
        (lambda m: dataclasses.replace(m, modules={f"x{k}": v for k, v in m.modules.items()}), "matched 0 of"),
        (lambda m: broken(m, down=torch.zeros(2, 7, 1, 1)), "another base model"),
        (lambda m: dataclasses.replace(m, base_model="0123456789abcdef"), "0123456789abcdef"),
    ],
)
def test_wrong_membranes_change_nothing(sd15, make, says):
    good = strong(sd15)
    handle = apply_membranes(sd15, good, MembraneConfig(gate="always"))
    before = run(sd15)
    with pytest.raises(MembraneError, match=says):
        apply_membranes(sd15, make(good), MembraneConfig(gate="always"))
    assert torch.equal(run(sd15), before)
    assert handle.report()["modules"] == len(good.modules)
    remove_membranes(sd15)


def test_another_base_model_is_refused_unless_asked_for(sd15):
    erased = erase_concepts(sd15, "robot", **ERASE)
    other = build("sd15", seed=1)
    with pytest.raises(MembraneError, match=erased[0].base_model):
        apply_membranes(other, erased)
    apply_membranes(other, erased, MembraneConfig(check_base=False)).remove()


def test_probe_gate_needs_a_probe(sd15):
    with pytest.raises(MembraneError, match="has no probe"):
        apply_membranes(sd15, strong(sd15), MembraneConfig(gate="probe"))


@pytest.mark.parametrize(
    "wrong",
    [{"gate": "maybe"}, {"mode": "quick"}, {"start": 0.5, "end": 0.5}, {"end": 1.5}, {"strength": float("nan")}],
)
def test_config_is_validated(wrong):
    with pytest.raises(SemipermError, match="expected"):
        MembraneConfig(**wrong)


def test_folded_refuses_rows_that_differ(sd15):
    erased = erase_concepts(sd15, "robot", **ERASE)
    apply_membranes(sd15, erased, MembraneConfig(mode="folded"))
    with pytest.raises(MembraneError, match="mode='folded'"):
        run(sd15)
    remove_membranes(sd15)


def test_report_where_the_denoiser_is_bypassed(sd15, caplog):
    handle = apply_membranes(sd15, strong(sd15), MembraneConfig(gate="always"))
    sd15.encode_prompt("a robot", torch.device("cpu"), 1, False)
    sd15.maybe_free_model_hooks()  # by hand, to save memory: no run is over
    with pytest.raises(MembraneError, match="not protected"):
        handle.report()
    with caplog.at_level(logging.WARNING):
        handle.remove()
    assert "not protected" in caplog.text


def test_fused_projections_are_refused(sd15):
    erased = erase_concepts(sd15, "robot", **ERASE)
    with apply_membranes(sd15, erased, MembraneConfig(gate="always")):
        sd15.fuse_qkv_projections(vae=False)
        with pytest.raises(MembraneError, match="fuse_qkv_projections"):
            run(sd15)
        sd15.unfuse_qkv_projections(vae=False)


def test_context_manager_and_stacks(sd15):
    untouched = run(sd15)
    stack = Membranes(strong(sd15)) + strong(sd15, 1, concept="cat")
    with apply_membranes(sd15, [stack, strong(sd15, 2, concept="dog")], MembraneConfig(gate="always")) as handle:
        run(sd15)
        assert handle.report()["concepts"] == ["robot", "cat", "dog"]
    assert torch.equal(run(sd15), untouched)


def test_gradients_reach_the_prompt_through_the_gate(sd15):
    width = 32
    probe = GateProbe(torch.randn(width, generator=torch.Generator().manual_seed(0)), -50.0, 50.0)
    apply_membranes(sd15, strong(sd15, probe=probe), MembraneConfig(gate="probe"))
    hidden = encode_text(sd15, PROMPTS[:1]).hidden.clone().requires_grad_()
    sd15.unet(torch.randn(1, 4, 8, 8), 500, hidden).sample.square().mean().backward()
    assert hidden.grad.abs().sum() > 0
    remove_membranes(sd15)


@pytest.mark.parametrize("method", ["uce", "null_space", "rece"])
def test_closed_form_methods(sd15, method):
    from semiperm.methods.membranes.closed_form import ClosedFormConfig

    stack = erase_concepts(
        sd15,
        ["robot", "dog"],
        templates=TEMPLATES,
        preserve=PRESERVE,
        synonyms={"robot": ["machine android"]},
        config=ClosedFormConfig(method=method, rank=2),
    )
    assert stack.concepts == ("robot", "dog") and stack[0].phrases == ("robot", "machine android")
    assert all(pair.rank == 2 for m in stack for pair in m.modules.values())
    with apply_membranes(sd15, stack, MembraneConfig(gate="always")):
        assert run(sd15).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"concepts": []}, "no concepts"),
        ({"concepts": ["robot"], "templates": ["a photo"]}, "exactly one"),
        ({"concepts": ["robot"], "surrogate": "Robot"}, "itself"),
    ],
)
def test_erase_concepts_says_what_is_wrong(sd15, arguments, says):
    with pytest.raises(MembraneError, match=says):
        erase_concepts(sd15, **arguments)
