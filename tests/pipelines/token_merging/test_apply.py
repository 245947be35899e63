"""What each mode of token merging promises, on small real pipelines; tests/test_contracts.py has the rest."""

import dataclasses

import pytest
import torch
import torch._dynamo.testing
from diffusers import FluxKontextPipeline
from PIL import Image
from semiperm.methods.errors import ModelError, TokenMergingError
from semiperm.methods.token_merging.config import NegativeTokenMergingConfig
from semiperm.pipelines.family import denoiser_of
from semiperm.pipelines.token_merging.apply import apply_negative_token_merging, remove_negative_token_merging
from tiny_models import FAMILIES, build, build_wan, call

PICTURE = torch.rand(3, 24, 20, generator=torch.Generator().manual_seed(3))
PROMPTS = ["a photo of a robot", "a painting of a house"]
ALWAYS = {"end": 1.0, "threshold": -1.0, "blocks": ("",)}
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def config(**options):
    return NegativeTokenMergingConfig(**({"reference": PICTURE} | ALWAYS | options))


def run(pipe, prompts=PROMPTS, **kwargs):
    return call(pipe, prompts, negative_prompt=[""] * len(prompts), **kwargs)


@pytest.fixture(scope="module", params=[*FAMILIES, "wan"])
def shared(request):
    pipe = build_wan() if request.param == "wan" else build(request.param)
    return pipe, run(pipe)


@pytest.fixture
def pipe(shared):
    yield shared[0]
    remove_negative_token_merging(shared[0])


@pytest.fixture
def untouched(shared):
    return shared[1]


# words under which no two reference tokens match nearly alike: rounding may choose either of such a pair
@pytest.mark.parametrize("options", [{}, {"reference_prompt": "a dog"}], ids=["own prompt", "reference prompt"])
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


def test_no_layer_is_an_error(pipe):
    with pytest.raises(TokenMergingError, match="let in 0 of"):
        apply_negative_token_merging(pipe, config(blocks=("nowhere",)))


# ---- what does not depend on the family ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd():
    return build("sd15")


def test_each_reference_has_its_own_strength(sd, caplog):
    both = [PICTURE, 1 - PICTURE]
    outputs = {}
    for strength in (0.9, (0.9, 0.9), (0.9, 0.0), (0.0, 0.9), (0.0, 0.0)):
        with apply_negative_token_merging(sd, config(reference=both, strength=strength)) as handle:
            outputs[strength] = run(sd)
            report = handle.report()
            shares = [row["pushed"] for row in report["rows"] if row["kind"] == "positive"]
            assert report["strength"] == (
                list(strength)
                if strength in ((0.9, 0.0), (0.0, 0.9))
                else outputs and (0.0 if strength == (0.0, 0.0) else 0.9)
            )
            if strength in ((0.9, 0.0), (0.0, 0.9)):
                assert all(0 < share < 1 for share in shares), "what is like the other reference is left alone"
    assert torch.equal(outputs[0.9], outputs[0.9, 0.9]) and torch.equal(outputs[0.0, 0.0], run(sd))
    assert not torch.allclose(outputs[0.9, 0.0], outputs[0.0, 0.9], **CLOSE)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_what_lies_under_alpha_0_has_no_say(sd, fit):
    """Two references that differ where they are transparent alone."""
    alpha = torch.zeros(1, 24, 20)
    alpha[:, 4:20, 4:16] = 1
    seen = []
    for hidden in (0.0, 1.0):
        picture = torch.where(alpha > 0, PICTURE, hidden)
        with apply_negative_token_merging(sd, config(reference=torch.cat([picture, alpha]), fit=fit)):
            seen.append(run(sd))
    assert torch.equal(*seen)
    with apply_negative_token_merging(sd, config(fit=fit)):
        assert not torch.allclose(run(sd), seen[0], **CLOSE)


def test_a_mask_in_the_part_that_is_cut_off_is_an_error(sd):
    picture, mask = torch.rand(3, 16, 64), torch.zeros(16, 64)
    mask[:, :8] = 1
    with apply_negative_token_merging(sd, config(reference=picture, mask=mask)):
        with pytest.raises(TokenMergingError, match="a mask has nothing white.*fit='pad'"):
            run(sd)
    with apply_negative_token_merging(sd, config(reference=picture, mask=mask, fit="pad")) as handle:
        run(sd)
    assert handle.report()["rows"][0]["pushed"] == 1


def test_a_run_that_pushed_nothing_says_so(sd, caplog):
    with apply_negative_token_merging(sd, config(threshold=1.0, strength=0.5)) as handle:
        run(sd)
    assert "no token of any picture was like the reference" in caplog.text
    assert not any(row["pushed"] for row in handle.report()["rows"])
    caplog.clear()
    with apply_negative_token_merging(sd, config(strength=0.0)) as handle:
        run(sd)
    report = handle.report()
    assert not caplog.text and [step["active"] for step in report["steps"]] == [False] * len(report["steps"]) != []


def test_another_strength_or_threshold_compiles_nothing():
    pipe = build("sd15")
    with apply_negative_token_merging(pipe, config(reference_prompt="a dog")) as handle:
        eager = run(pipe)
        handle.set(strength=0.4, threshold=0.1)
        other = run(pipe)
        handle.set(strength=0.9, threshold=-1.0)
        assert torch.equal(run(pipe), eager) and not torch.allclose(other, eager, **CLOSE)
        with pytest.raises(TokenMergingError, match="threshold=3"):
            handle.set(threshold=3)
        handle.prepare(16, 16)
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend=counter)
        torch.testing.assert_close(run(pipe), eager, **CLOSE)
        graphs = counter.frame_count
        handle.set(strength=0.4, threshold=0.1)
        torch.testing.assert_close(run(pipe), other, **CLOSE)
        assert counter.frame_count == graphs
        with pytest.raises(TokenMergingError, match="another graph"):
            handle.set(strength=0)
    torch._dynamo.reset()


def test_kontext_pushes_the_picture_and_not_its_context():
    """An editing model's input picture stands behind the picture's tokens: it is neither pushed nor pushed from."""
    pipe = FluxKontextPipeline(**build("flux").components)
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    options = {"height": 16, "width": 16, "max_area": 256, "_auto_resize": False, "num_images_per_prompt": 2}

    def draw():
        noise = torch.Generator().manual_seed(0)
        return pipe(picture, PROMPTS[0], num_inference_steps=2, generator=noise, output_type="latent", **options).images

    untouched = draw()
    for mode in ({}, {"reference": None}):
        with apply_negative_token_merging(pipe, config(**mode)) as handle:
            merging, pushed = handle.merging, []
            push = merging._push
            merging._push = lambda x, call, push=push, pushed=pushed: (
                pushed.append((x.shape[1], call.image_tokens, call.sequence)) or push(x, call)
            )
            assert not torch.equal(draw(), untouched)
        assert set(pushed) == {(16, 16, 32)}
    assert torch.equal(draw(), untouched)


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


def test_a_compiled_model_needs_only_what_prepare_encodes(sd):
    """The first call of all is the compiled one: no tokenizer and no encoder is left for the graph."""
    torch._dynamo.reset()
    with apply_negative_token_merging(sd, config(reference_prompt="a cat")) as handle:
        sd.unet.compile(backend="eager", fullgraph=True)
        try:
            with pytest.raises(Exception, match="handle.prepare"):
                run(sd, [PROMPTS[0]])
            torch._dynamo.reset()
            handle.prepare(16, 16)
            compiled = run(sd, [PROMPTS[0]])
        finally:
            sd.unet._compiled_call_impl = None
            torch._dynamo.reset()
        torch.testing.assert_close(compiled, run(sd, [PROMPTS[0]]), **CLOSE)
