"""Negative token merging on small real pipelines of every family: the contracts, and what each mode promises."""

import dataclasses

import pytest
import torch
import torch._dynamo.testing
from PIL import Image
from semiperm.methods.errors import ModelError, TokenMergingError
from semiperm.methods.membranes.config import MembraneConfig
from semiperm.methods.token_merging.config import NegativeTokenMergingConfig
from semiperm.pipelines.family import denoiser_of
from semiperm.pipelines.membranes.apply import apply_membranes, remove_membranes
from semiperm.pipelines.membranes.erase import erase_concepts
from semiperm.pipelines.token_merging.apply import apply_negative_token_merging, remove_negative_token_merging
from semiperm.pipelines.token_merging.reference import cover
from tiny_models import FAMILIES, LENGTH, build, build_wan, call

PICTURE = torch.rand(3, 24, 20, generator=torch.Generator().manual_seed(3))
PROMPTS = ["a photo of a robot", "a painting of a house"]
ALWAYS = {"end": 1.0, "threshold": -1.0, "blocks": ("",)}
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def config(**options):
    return NegativeTokenMergingConfig(**({"reference": PICTURE} | ALWAYS | options))


def run(pipe, prompts=PROMPTS, **kwargs):
    return call(pipe, prompts, negative_prompt=[""] * len(prompts), **kwargs)


@pytest.fixture(scope="module", params=[*FAMILIES, "wan"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def shared(family):
    pipe = build_wan() if family == "wan" else build(family)
    return pipe, run(pipe)


@pytest.fixture
def pipe(shared):
    yield shared[0]
    remove_negative_token_merging(shared[0])


@pytest.fixture
def untouched(shared):
    return shared[1]


def test_neutral_alpha_and_removal_restore_the_bits(pipe, untouched):
    forwards = {name: module.__dict__.get("forward") for name, module in denoiser_of(pipe)[0].named_modules()}
    apply_negative_token_merging(pipe, config(strength=0.0))
    assert torch.equal(run(pipe), untouched)
    apply_negative_token_merging(pipe, config())
    once = run(pipe)
    apply_negative_token_merging(pipe, config())
    assert torch.equal(run(pipe), once), "applying twice is applying once"
    assert not torch.allclose(once, untouched, **CLOSE)
    remove_negative_token_merging(pipe)
    remove_negative_token_merging(pipe)
    assert torch.equal(run(pipe), untouched)
    after = {name: module.__dict__.get("forward") for name, module in denoiser_of(pipe)[0].named_modules()}
    assert after == forwards, "no trace is left"


@pytest.mark.parametrize("options", [{}, {"reference_prompt": "a cat"}], ids=["own prompt", "reference prompt"])
def test_reference_mode_repeats_and_judges_every_image_by_itself(pipe, options):
    with apply_negative_token_merging(pipe, config(**options)) as handle:
        together = run(pipe)
        assert torch.equal(run(pipe), together), "nothing is carried from one run to the next"
        report = handle.report()
        for i, prompt in enumerate(PROMPTS):
            torch.testing.assert_close(run(pipe, [prompt], seed=i), together[i : i + 1], **CLOSE)
    assert together.shape[0] == len(PROMPTS), "the reference row is not an image"
    positive = [row for row in report["rows"] if row["kind"] == "positive"]
    assert [row["image"] for row in positive] == [0, 1] and all(row["pushed"] == 1.0 for row in positive)
    assert not [row for row in report["rows"] if row["kind"] == "negative" and row["pushed"]]
    assert [step["active"] for step in report["steps"]] == [True] * len(report["steps"])
    groups = 1 if options else 2
    assert report["extra_rows"] == groups * len(report["steps"])


def test_one_prompt_costs_one_row_and_outside_the_window_none(pipe):
    denoiser, _ = denoiser_of(pipe)
    rows = []
    first = next(m for n, m in denoiser.named_modules() if n.endswith(("attn1", "attn")))
    prompts = [PROMPTS[0]] * 2
    hook = first.register_forward_hook(lambda *a: rows.append((a[2][0] if isinstance(a[2], tuple) else a[2]).shape[0]))
    try:
        run(pipe, prompts, steps=4)
        bare, rows[:] = list(rows), []
        with apply_negative_token_merging(pipe, config(end=0.4)) as handle:
            run(pipe, prompts, steps=4)
            steps = handle.report()["steps"]
    finally:
        hook.remove()
    active = [step["active"] for step in steps]
    assert any(active) and not all(active)
    calls = len(bare) // len(steps)  # guidance by separate calls: the unconditional one needs no reference
    extra = [r - b for r, b in zip(rows, bare, strict=True)]
    assert [sum(extra[i * calls : (i + 1) * calls]) for i in range(len(steps))] == [int(a) for a in active]


def test_negative_alpha_pulls(pipe, untouched):
    """Towards the reference at -1: the tokens become the reference's, wherever they match."""
    seen = {}
    for alpha in (-1.0, 0.9):
        with apply_negative_token_merging(pipe, config(strength=alpha)):
            seen[alpha] = run(pipe)
    assert not torch.allclose(seen[-1.0], seen[0.9], **CLOSE)
    assert not torch.allclose(seen[-1.0], untouched, **CLOSE)


def test_mask_and_several_references(pipe, untouched):
    mask = torch.zeros(24, 20)
    mask[:12] = 1
    outputs = []
    for options in ({}, {"mask": mask}, {"mask": torch.ones(24, 20)}, {"reference": [PICTURE, 1 - PICTURE]}):
        with apply_negative_token_merging(pipe, config(**options)):
            outputs.append(run(pipe))
    assert torch.equal(outputs[0], outputs[2]), "a white mask is no mask"
    assert not torch.allclose(outputs[0], outputs[1], **CLOSE)
    assert not torch.allclose(outputs[0], outputs[3], **CLOSE)


def test_diversity_pushes_images_apart_and_refuses_one(pipe, untouched):
    prompts = [PROMPTS[0]] * 2
    diverse = NegativeTokenMergingConfig(**ALWAYS)
    remove_negative_token_merging(pipe)
    bare = run(pipe, prompts)
    with apply_negative_token_merging(pipe, diverse) as handle:
        pushed = run(pipe, prompts)
        assert handle.report()["extra_rows"] == 0
        with pytest.raises(TokenMergingError, match="at least two images"):
            run(pipe, prompts[:1])
    assert not torch.allclose(pushed[0], bare[0], **CLOSE) and not torch.allclose(pushed[1], bare[1], **CLOSE)
    with apply_negative_token_merging(pipe, dataclasses.replace(diverse, diversity="first", rows="all")):
        first = run(pipe, prompts)
    torch.testing.assert_close(first[0], bare[0], **CLOSE)  # image 0 is the one they are pushed from
    assert not torch.allclose(first[1], bare[1], **CLOSE)


def test_official_compatibility_runs(pipe, untouched):
    for options in ({"compat": "official"}, {"compat": "official", "reference": None}):
        with apply_negative_token_merging(pipe, config(**options)):
            output = run(pipe, [PROMPTS[0]] * 2)
        assert output.isfinite().all() and output.shape[0] == 2


def test_half_precision(shared):
    pipe, _ = shared
    pipe.to(torch.bfloat16)
    try:
        with apply_negative_token_merging(pipe, config()):
            output = run(pipe)
    finally:
        pipe.to(torch.float32)
    assert output.isfinite().all()


@pytest.mark.parametrize(
    ("family", "mode"),
    [  # every family once, and both modes on a UNet, an MMDiT and a video model; the rest of the pairs on request
        *((family, "reference") for family in (*FAMILIES, "wan")),
        *((family, "diversity") for family in ("sd15", "sd3", "wan")),
        *(pytest.param(family, "diversity", marks=pytest.mark.slow) for family in ("sd2", "sdxl", "flux")),
    ],
)
def test_compiled_denoiser_computes_the_same(family, mode):
    pipe = build_wan() if family == "wan" else build(family)
    options = {"reference_prompt": "a cat"} if mode == "reference" else {"reference": None}
    denoiser, attribute = denoiser_of(pipe)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    try:
        handle = apply_negative_token_merging(pipe, config(end=0.5, **options))
        expected = run(pipe, steps=4)
        handle.prepare(*[32 if "Wan" in type(pipe).__name__ else 16] * 2)
        setattr(pipe, attribute, torch.compile(denoiser, fullgraph=True, backend=counter))
        compiled = run(pipe, steps=4)
        frames = counter.frame_count
        torch.testing.assert_close(compiled, expected, **CLOSE)
        run(pipe, steps=6)
        assert counter.frame_count == frames, "another step does not recompile"
    finally:
        setattr(pipe, attribute, denoiser)
        remove_negative_token_merging(pipe)
        torch._dynamo.reset()


def test_no_layer_or_no_attention_is_an_error(pipe):
    with pytest.raises(TokenMergingError, match="let in 0 of"):
        apply_negative_token_merging(pipe, config(blocks=("nowhere",)))
    handle = apply_negative_token_merging(pipe, config())
    for module, _ in handle.hooks[:-1]:  # somebody replaced the layers
        module._diffusers_hook.remove_hook(handle.NAME, recurse=False)
    with pytest.raises(TokenMergingError, match="nothing was pushed"):
        run(pipe)


# ---- what does not depend on the family ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd():
    return build("sd15")


@pytest.mark.parametrize("order", ["membranes first", "membranes last"])
def test_membranes_beside_it_in_any_order(sd, order):
    options = {"surrogate": "cat", "templates": ("a photo of {}",), "preserve": ("a dog", "a house")}
    erased = erase_concepts(sd, ["robot"], max_sequence_length=LENGTH, **options)
    outputs = {}
    applied = [
        lambda: apply_membranes(sd, erased, MembraneConfig(gate="always")),
        lambda: apply_negative_token_merging(sd, config()),
    ]
    for name, steps in (("there", applied), ("back", applied[::-1]), ("merging", applied[1:])):
        for step in steps:
            step()
        outputs[name] = run(sd)
        remove_membranes(sd)
        remove_negative_token_merging(sd)
    assert torch.equal(outputs["there"], outputs["back"])
    assert not torch.allclose(outputs["there"], outputs["merging"], **CLOSE)
    outputs["removed"] = run(sd)
    assert torch.equal(outputs["removed"], run(build("sd15")))


def test_pictures_are_cut_not_stretched():
    wide = torch.zeros(3, 4, 12)
    wide[:, :, 4:8] = 1
    assert torch.equal(cover(wide, 4, 4), torch.ones(3, 4, 4))
    assert cover(torch.rand(3, 5, 7), 16, 16).shape == (3, 16, 16)


def test_a_pil_image_is_a_reference(sd):
    picture = Image.new("RGB", (10, 30), (200, 30, 30))
    with apply_negative_token_merging(sd, config(reference=picture)):
        assert run(sd).shape[0] == 2


def test_another_model_is_refused():
    class Other(torch.nn.Module):
        pass

    class Pipe:
        unet = Other()

    with pytest.raises(ModelError, match="not supported"):
        apply_negative_token_merging(Pipe())


def test_report_before_a_run_is_an_error(sd):
    with apply_negative_token_merging(sd, config()) as handle, pytest.raises(TokenMergingError, match="no report yet"):
        handle.report()
