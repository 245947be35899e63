"""Attacks through safe guidance, on small real models: what is differentiated is what a run predicts."""

import pytest
import tiny_models
import torch
from semiperm.methods.attacks.prompts import PromptSearch
from semiperm.methods.errors import GuidanceError
from semiperm.methods.guidance.category import Category
from semiperm.methods.guidance.config import SafeGuidanceConfig
from semiperm.methods.guidance.nag import NAG
from semiperm.methods.guidance.safree import SAFREE
from semiperm.methods.guidance.sld import SLD
from semiperm.pipelines.attacks.context import inpaint
from semiperm.pipelines.attacks.encoding import OpenEncoder
from semiperm.pipelines.attacks.guided import predictor_of
from semiperm.pipelines.attacks.pictures import regenerate
from semiperm.pipelines.attacks.prompts import find_prompts, learn_embedding, prompt_loss
from semiperm.pipelines.attacks.targets import targets_from_model
from semiperm.pipelines.guidance.apply import SafeGuidanceHandle, apply_safe_guidance
from semiperm.pipelines.prediction import Predictor
from semiperm.pipelines.text import encode_text
from tiny_models import call

HARM = Category("machines", ("a robot", "an android"))
SIZE = {"height": tiny_models.SIZE, "width": tiny_models.SIZE}
ALGORITHMS = {"sld": SLD("max"), "safree": SAFREE(alpha=0.0, adaptive=False), "adavd": "adavd", "nag": NAG()}


@pytest.fixture(scope="module")
def pipes():
    return {family: tiny_models.build(family) for family in tiny_models.FAMILIES}


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_gradients_come_through_every_seam(pipes, family, name):
    pipe, prompt = pipes[family], "a robot by the river"
    encoder = OpenEncoder(pipe, 1, "robot by the river")
    ids = torch.tensor([[next(i for i, word in encoder._words.items() if word == "a")]])
    point = encoder.table[ids].clone().requires_grad_()
    targets = targets_from_model(pipe, prompt, count=2, **SIZE)
    with apply_safe_guidance(pipe, SafeGuidanceConfig(HARM, ALGORITHMS[name])):
        guided = targets.loss(predictor_of(pipe), *encoder.encode(ids, point), [prompt])
        (grad,) = torch.autograd.grad(guided.sum(), point)
        assert targets.loss(predictor_of(pipe), *encoder.encode(ids, point), [prompt]).item() == guided.item()
    assert guided.item() > 1e-9, "it is not what the untouched model predicts"
    assert grad.isfinite().all() and grad.abs().sum() > 0
    assert type(predictor_of(pipe)) is Predictor, "and that is asked again"


def test_it_predicts_what_a_run_does(pipes):
    """The first step of a run, against the same latents asked of the attacker's predictor."""
    pipe, prompt = pipes["sd15"], "a photo of a robot"
    seen = []
    with apply_safe_guidance(pipe, SafeGuidanceConfig(HARM, SLD("max"))) as handle:
        true_finish = handle.root.finish

        def finish(run, call, prediction):
            guided = true_finish(run, call, prediction)
            seen.append((call.sample[1:], call.timestep, guided[list(call.positive)]))
            return guided

        handle.root.finish = finish
        call(pipe, [prompt], negative_prompt=[""], seed=0)
        latents, time, expected = seen[0]
        features = encode_text(pipe, [prompt])
        asked = predictor_of(pipe)(latents, time.reshape(1).float(), features.hidden, features.pooled, [prompt])
    torch.testing.assert_close(asked, expected.float(), atol=1e-5, rtol=1e-4)


def test_words_and_embeddings_are_found_through_it(pipes):
    pipe = pipes["sd15"]
    targets = targets_from_model(pipe, "a photo of a robot", count=2, **SIZE)
    with apply_safe_guidance(pipe, SafeGuidanceConfig(HARM, (SAFREE(alpha=0.0, adaptive=False), SLD("max")))):
        search = PromptSearch(tokens=2, steps=3, kept=2)
        found = find_prompts(pipe, targets, "by the river", search, without=["robot"])
        assert [one.loss for one in found] == pytest.approx(prompt_loss(pipe, targets, [one.prompt for one in found]))
        learned = learn_embedding(pipe, targets, "by the river", tokens=2, steps=6, learning_rate=0.1)
        assert len(learned.ids) == 2 == len(learned.tokens) and min(learned.losses[1:]) < learned.losses[0]
        with pytest.raises(GuidanceError, match="given embeddings instead of words"):
            learn_embedding_of_all(pipe, targets)
        call(pipe, ["a photo of a robot"], negative_prompt=[""])  # a run afterwards is a run of its own
        assert len(handle_steps(pipe)) == 2


def learn_embedding_of_all(pipe, targets):
    """Embeddings that no words stand for, where words are read."""
    features = encode_text(pipe, ["a robot"])
    return targets.loss(predictor_of(pipe), features.hidden, features.pooled)


def handle_steps(pipe) -> list:
    from semiperm.pipelines.guidance.apply import SafeGuidanceHandle

    return SafeGuidanceHandle.on(pipe).steps()


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_what_draws_from_pictures_is_guided_as_the_pipeline_is(pipes, family):
    pipe, pixels = pipes[family], torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1

    def drawn():
        seeds = [torch.Generator().manual_seed(i) for i in range(2)]
        redrawn = regenerate(pipe, pixels, 0.7, "a robot", 6, seeds[0], guidance_scale=3.0)
        return redrawn, inpaint(pipe, pixels, mask, "a robot", generator=seeds[1], num_inference_steps=4)

    bare = drawn()
    with apply_safe_guidance(pipe, SafeGuidanceConfig(HARM, "adavd")) as handle:
        guided = drawn()
        assert SafeGuidanceHandle.on(pipe) is handle, "and it goes on with its own"
        call(pipe, "a robot", steps=2)
        assert handle.report()["rows"][0]["fired"] > 0
    assert all(not torch.equal(one, other) for one, other in zip(bare, guided, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(bare, drawn(), strict=True))
