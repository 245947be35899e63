"""The contracts that every method keeps: one matrix, method x model family, on small real pipelines.

A method joins by one `Entry` in tests/contracts/ (docs/extending.md). What is special to one method is tested in the
folders of its family.
"""

import contextlib
import functools
import importlib
import itertools
import logging
from pathlib import Path

import comfy_stub
import pytest
import torch
import torch._dynamo.testing
from contracts.entry import ALL
from safetensors import safe_open
from semiperm.pipelines.family import denoiser_of, family_of
from semiperm.pipelines.hooks import uninstall
from tiny_models import build, build_wan, call

FOLDER = Path(__file__).resolve().parent / "contracts"
MODULES = [importlib.import_module(f"contracts.{p.stem}") for p in sorted(FOLDER.glob("*.py"))]
ENTRIES = [entry for module in MODULES for entry in getattr(module, "ENTRIES", ())]
CASES = [(entry, family) for entry in ENTRIES for family in entry.families]
ACTING = [(entry, family) for entry, family in CASES if entry.apply]
PROMPTS = ["a photo of a robot", "a painting of a house"]
MISSED = {"start": 0.2, "end": 0.3}  # between the two steps of every schedule here
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 0.2, torch.float16: 0.05}  # of the norm: rows are added up otherwise


def each(cases):
    return pytest.mark.parametrize("entry, family", [pytest.param(*c, id=f"{c[0].name}-{c[1]}") for c in cases])


@functools.cache
def pipeline(family: str, dtype=torch.float32):
    pipe = build_wan() if family == "wan" else build(family)
    return pipe if dtype == torch.float32 else pipe.to(dtype=dtype)


def run(pipe, *entries, prompts=PROMPTS, seed=0, **kwargs):
    """Latents of the prompts, with what these entries give to the call."""
    size = max([16, *(entry.size for entry in entries)])
    for entry in entries:
        if entry.inputs:
            scale = 2 if family_of(pipe).video else 1
            kwargs |= entry.inputs(pipe, len(prompts), seed, size * scale)
    return call(pipe, prompts, negative_prompt=[""] * len(prompts), seed=seed, size=kwargs.pop("size", size), **kwargs)


def working(entry, pipe, **settings):
    """The method at work on the pipeline: its handle, or nothing where it acts through the call's inputs."""
    return entry.apply(pipe, **settings) if entry.apply else contextlib.nullcontext()


def traces(pipe) -> dict:
    """Everything that a method could have left behind: names of attributes, of the pipeline and each module."""
    modules = {name: set(vars(module)) for name, module in denoiser_of(pipe)[0].named_modules()}
    return modules | {"pipeline": set(vars(pipe)), "scheduler": set(vars(pipe.scheduler))}


def distance(a, b) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@contextlib.contextmanager
def replaced(pipe, other):
    """The pipeline's denoiser is another for a while."""
    denoiser, attribute = denoiser_of(pipe)
    setattr(pipe, attribute, other)
    try:
        yield
    finally:
        setattr(pipe, attribute, denoiser)


# ---- 1: neutral is untouched, apply and remove restore the bits, twice is once ---------------------------------------


@each(CASES)
def test_1_neutral_twice_and_removed(entry, family):
    pipe = pipeline(family)
    denoiser, _ = denoiser_of(pipe)
    untouched, size = run(pipe, size=entry.size), entry.size
    weights, before = {k: v.clone() for k, v in denoiser.state_dict().items()}, traces(pipe)
    if entry.apply:
        with entry.apply(pipe, strength=0.0):
            assert torch.equal(run(pipe, size=size), untouched)
    working(entry, pipe)
    once = run(pipe, entry)
    with working(entry, pipe) as handle:
        assert torch.equal(run(pipe, entry), once), "applying twice is applying once"
    assert distance(once, untouched) > 1e-3
    if entry.apply:
        handle.remove()
    assert torch.equal(run(pipe, size=size), untouched)
    assert traces(pipe) == before, "nothing is left behind"
    after = denoiser.state_dict()
    assert weights.keys() == after.keys() and all(torch.equal(weights[key], after[key]) for key in weights)
    for name, module in denoiser.named_modules():
        assert "forward" not in vars(module) and (not name or not hasattr(module, "_diffusers_hook")), name


# ---- 2: a run carries nothing over; each image by itself -------------------------------------------------------------


class Interrupted(Exception):
    pass


@contextlib.contextmanager
def interrupted(pipe, at=2):
    """The denoiser fails in this call, when nearly all of it has run."""
    denoiser, _ = denoiser_of(pipe)
    calls = itertools.count(1)

    def fail(*_):
        if next(calls) == at:
            raise Interrupted

    last = getattr(denoiser, "conv_out", None) or denoiser.proj_out
    hook = last.register_forward_pre_hook(fail)
    try:
        with pytest.raises(Interrupted):
            yield
    finally:
        hook.remove()


@each(CASES)
def test_2_nothing_is_carried_over_and_rows_are_judged_by_themselves(entry, family):
    pipe = pipeline(family)
    with working(entry, pipe):
        first = run(pipe, entry)
        run(pipe, entry, prompts=["a drawing of a cat", "a dog", "a robot"], seed=7, steps=3)
        assert torch.equal(run(pipe, entry), first), "another run left something behind"
        with interrupted(pipe):
            run(pipe, entry, prompts=PROMPTS[::-1], seed=3)
        assert torch.equal(run(pipe, entry), first), "an exception left something behind"
        if not entry.cross_batch:
            single = torch.cat([run(pipe, entry, prompts=[prompt], seed=i) for i, prompt in enumerate(PROMPTS)])
            assert distance(single, first) < CLOSE[torch.float32]


# ---- 3: files round-trip bit for bit, and say what they are ----------------------------------------------------------


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.files], ids=lambda entry: entry.name)
def test_3_files(entry, tmp_path):
    made = entry.files(tmp_path)
    assert made.before.keys() == made.after.keys()
    for name, value in made.before.items():
        other = made.after[name]
        if isinstance(value, torch.Tensor):
            assert value.dtype == other.dtype and torch.equal(value, other), name
        else:
            assert value == other, name
    if any(isinstance(value, torch.Tensor) for value in made.before.values()):
        assert made.path.suffix == ".safetensors"
        with safe_open(made.path, "pt") as file:
            text = str(file.metadata())
    else:
        text = made.path.read_text(encoding="utf-8")
    assert not [word for word in made.says if word not in text]


# ---- 4: doing nothing is never silent --------------------------------------------------------------------------------


@each(ACTING)
def test_4_layers_hooks_or_a_denoiser_that_are_gone_are_an_error(entry, family):
    pipe = pipeline(family)
    with entry.apply(pipe) as handle:
        *layers, (root, _) = handle.hooks
        assert root is denoiser_of(pipe)[0], "by convention the hook on the denoiser comes last"
        for module, _ in layers:  # somebody put new layers in their place
            uninstall(module, handle.NAME)
        if layers:
            with pytest.raises(entry.error, match="replaced|again"):
                run(pipe, entry)
    with entry.apply(pipe) as handle:
        uninstall(root, handle.NAME)
        with pytest.raises(entry.error):
            run(pipe, entry)
    with entry.apply(pipe), replaced(pipe, pipeline(family, torch.float16).components[handle.attribute]):
        with pytest.raises(entry.error, match="was replaced"):
            run(pipe, entry)
    with entry.apply(pipe) as handle, pytest.raises(entry.error, match="no report yet"):
        handle.report()
    run(pipe, entry)


@each(ACTING)
def test_4_a_window_without_a_step_is_told(entry, family, caplog):
    pipe = pipeline(family)
    untouched = run(pipe, size=entry.size)
    with entry.apply(pipe, **MISSED) as handle, caplog.at_level(logging.WARNING, "semiperm"):
        assert torch.equal(run(pipe, entry), untouched)
        assert [step["active"] for step in handle.report()["steps"]] == [False, False]
    told = [record for record in caplog.records if "lay inside the window [0.2, 0.3]" in record.getMessage()]
    assert len(told) == 1
    caplog.clear()
    with entry.apply(pipe), caplog.at_level(logging.WARNING, "semiperm"):
        run(pipe, entry)
    assert not caplog.records


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.refuses], ids=lambda entry: entry.name)
def test_4_what_would_come_to_nothing_is_refused(entry):
    with pytest.raises(entry.error, match="expected|use"):
        entry.refuses(pipeline("sd15"))


# ---- 5: a record for each image, with the same keys in both faces ----------------------------------------------------


@each([(entry, family) for entry, family in ACTING if entry.record])
def test_5_the_report(entry, family):
    pipe, record = pipeline(family), entry.record
    with entry.apply(pipe) as handle:
        run(pipe, entry)
        report = handle.report()
    assert set(report) == record.keys
    assert report["rows"] and all(set(row) == record.rows for row in report["rows"])
    assert len(report["steps"]) == 2 and all(set(step) == {"share", "sigma", "active"} for step in report["steps"])
    kinds = [row["kind"] for row in report["rows"]]
    assert kinds.count("positive") == len(PROMPTS), "one for each image"


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.record], ids=lambda entry: entry.name)
def test_5_every_key_is_documented_and_the_same_in_comfyui(entry, tmp_path, caplog):
    record = entry.record
    for key in record.keys | record.rows | {"share", "sigma", "active"}:
        assert f'"{key}"' in record.documented.__doc__, key
    if record.in_comfyui is None:
        return
    with comfy_stub.stand_in(tmp_path), caplog.at_level(logging.WARNING, "semiperm"):
        report = record.in_comfyui(0.0, 1.0)
        assert not caplog.records
        missed = record.in_comfyui(MISSED["start"], MISSED["end"])
    assert set(report) == set(missed) == record.keys
    assert report["rows"] and all(set(row) == record.rows for row in report["rows"])
    assert [step["active"] for step in report["steps"]] == [True, True]
    assert all(set(step) == {"share", "sigma", "active"} for step in report["steps"])
    assert [step["active"] for step in missed["steps"]] == [False, False]
    assert "lay inside the window [0.2, 0.3]" in caplog.text


# ---- 6: precisions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each(CASES)
def test_6_half_precision(entry, family, dtype):
    pipe = pipeline(family, dtype)
    untouched = run(pipe, size=entry.size)
    with working(entry, pipe):
        found = run(pipe, entry)
    assert found.dtype == untouched.dtype and found.isfinite().all()
    assert not torch.equal(found, untouched) and torch.equal(run(pipe, size=entry.size), untouched)
    exact = pipeline(family)
    with working(entry, exact):
        assert distance(found, run(exact, entry)) < distance(untouched, run(exact, size=entry.size)) + CLOSE[dtype]


@each(ACTING)
def test_6_autocast(entry, family):
    pipe = pipeline(family)
    with torch.autocast("cpu", torch.bfloat16):
        untouched = run(pipe, size=entry.size)
        with entry.apply(pipe, strength=0.0):
            assert torch.equal(run(pipe, size=entry.size), untouched)
        with entry.apply(pipe):
            found = run(pipe, entry)
        assert torch.equal(run(pipe, size=entry.size), untouched)
    assert found.isfinite().all() and distance(found, untouched) > 1e-3


# ---- 7: one graph, whatever the step ---------------------------------------------------------------------------------


def compiled(entry, family):
    """torch.compile takes seconds a model: SD2 and SDXL have SD1.5's class, a second mode the first one's layers."""
    first = next(other for other in ENTRIES if other is entry or (other.slot and other.slot == entry.slot))
    slow = family in ("sd2", "sdxl") or (first is not entry and family in ("sd3", "flux"))
    return pytest.param(entry, family, id=f"{entry.name}-{family}", marks=[pytest.mark.slow] * slow)


@each([(entry, family) for entry, family in ACTING if not entry.compiles])
def test_7_what_no_graph_can_hold_is_refused(entry, family):
    pipe = pipeline(family)
    with entry.apply(pipe) as handle, replaced(pipe, torch.compile(handle.denoiser, backend="eager")):
        with pytest.raises(entry.error, match="wrapped by torch.compile"):
            run(pipe, entry)


@pytest.mark.parametrize("entry, family", [compiled(*case) for case in ACTING if case[0].compiles])
def test_7_compiles_in_one_graph_for_all_steps(entry, family):
    pipe = pipeline(family)
    one_call = {} if family_of(pipe).one_call or family == "flux" else {"guidance_scale": 1.0}
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    torch._dynamo.reset()

    def draw(steps):
        return call(pipe, PROMPTS, steps=steps, size=entry.size, **one_call)

    try:
        with entry.apply(pipe, start=0.0, end=0.6) as handle:
            expected = draw(4)
            if entry.ready:
                entry.ready(handle, entry.size * (2 if family_of(pipe).video else 1))
            with replaced(pipe, torch.compile(handle.denoiser, fullgraph=True, backend=counter)):
                found = draw(4)
                draw(3)
                with pytest.raises(entry.error, match="keeps no record"):
                    handle.report()
        assert counter.frame_count == 1, "one graph, and no other for another step or run"
        assert distance(found, expected) < CLOSE[torch.float32] < distance(found, draw(4))
    finally:
        torch._dynamo.reset()


# ---- 8: any two, in any order ----------------------------------------------------------------------------------------

PAIRS = [
    (one, other, family)
    for one, other in itertools.combinations(ENTRIES, 2)
    if not (one.slot and one.slot == other.slot) and (one.apply or other.apply)
    for family in ALL
    if family in one.families and family in other.families
]


@pytest.mark.parametrize("one, other, family", [pytest.param(*p, id=f"{p[0].name}-{p[1].name}-{p[2]}") for p in PAIRS])
def test_8_any_two_in_any_order(one, other, family):
    pipe = pipeline(family)
    size = max(one.size, other.size)
    untouched, before = run(pipe, size=size), traces(pipe)
    found = []
    for order in ((one, other), (other, one)):
        handles = [entry.apply(pipe) for entry in order if entry.apply]
        found.append(run(pipe, one, other))
        for handle in handles:  # the first one goes first
            handle.remove()
        assert torch.equal(run(pipe, size=size), untouched) and traces(pipe) == before
    assert torch.equal(*found)
    for alone in (one, other):
        with working(alone, pipe):
            assert distance(run(pipe, alone, size=size), found[0]) > 1e-3, f"beside {alone.name} the other must act"


# ---- nobody is left out ----------------------------------------------------------------------------------------------


def test_every_method_that_is_applied_has_an_entry():
    import semiperm

    public = {name for entry in ENTRIES for name in entry.public}
    assert all(hasattr(semiperm, name) for name in public)
    assert {name for name in semiperm.__all__ if name.startswith(("apply_", "remove_", "sign_"))} <= public
