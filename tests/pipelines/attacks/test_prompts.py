"""Attacks on small real models of every family: through text encoders, gates and membranes."""

import pytest
import tiny_models
import torch
from semiperm.methods.attacks.prompts import PromptSearch
from semiperm.methods.errors import SemipermError
from semiperm.methods.membranes.config import MembraneConfig
from semiperm.methods.membranes.types import GateProbe, LowRank, Membrane
from semiperm.pipelines.attacks.context import draw_arithmetic, inpaint, redraw_inverted
from semiperm.pipelines.attacks.encoding import OpenEncoder
from semiperm.pipelines.attacks.prompts import find_prompts, learn_embedding, prompt_loss, ring_a_bell
from semiperm.pipelines.attacks.targets import targets_from_model, targets_from_pictures
from semiperm.pipelines.membranes.apply import apply_membranes
from semiperm.pipelines.text import encode_text, reader_of, text_projections
from semiperm.pipelines.weights import weights_of

SIZE = {"height": tiny_models.SIZE, "width": tiny_models.SIZE}
SEARCH = PromptSearch(tokens=3, steps=4, kept=2)


@pytest.fixture(scope="module")
def pipes():
    return {family: tiny_models.build(family) for family in tiny_models.FAMILIES}


def membrane(pipe, probe=None):
    """A strong edit of what reads text."""
    modules, noise = {}, torch.Generator().manual_seed(0)
    for key, weight in weights_of(pipe, text_projections(pipe)[0]).items():
        down = torch.randn(2, weight.shape[1], generator=noise) * 0.2
        modules[key] = LowRank(down, torch.randn(weight.shape[0], 2, generator=noise) * 0.2, 2.0)
    return Membrane("robot", modules, probe=probe)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_open_encoder_says_what_the_words_say(pipes, family):
    """Given a word's own embedding, it is the pipeline's encoding of that word; and gradients come back."""
    pipe = pipes[family]
    encoder = OpenEncoder(pipe, 2, "by the river")
    named = {word: i for i, word in encoder._words.items()}
    ids = torch.tensor([[named["robot"], named["cat"]]])
    assert encoder.text_of(ids[0].tolist()) == "robot cat by the river"
    embeddings = encoder.table[ids].clone().requires_grad_()
    hidden, pooled = encoder.encode(ids, embeddings)
    expected = encode_text(pipe, ["robot cat by the river"])
    torch.testing.assert_close(hidden, expected.hidden, atol=1e-5, rtol=1e-4)
    assert (pooled is None) == (expected.pooled is None)
    if pooled is not None:
        torch.testing.assert_close(pooled, expected.pooled, atol=1e-5, rtol=1e-4)
    (grad,) = torch.autograd.grad(hidden.square().sum(), embeddings)
    assert grad.shape == embeddings.shape and all(part.abs().sum() > 0 for part in grad.split(encoder.widths, dim=2))
    assert not reader_of(pipe)[0].get_input_embeddings()._forward_hooks


def test_words_that_are_left_out_are_not_found_in_any_form(pipes):
    encoder = OpenEncoder(pipes["sd15"], 1)
    left = {encoder.text_of([i]) for i in encoder.allowed(["robot", "two cats"]).tolist()}
    assert "dog" in left and not left & {"robot", "cat", "two"}


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_prompts_are_found_through_a_membrane_in_every_family(pipes, family):
    pipe = pipes[family]
    targets = targets_from_model(pipe, "a photo of a robot", count=4, **SIZE)
    untouched = prompt_loss(pipe, targets, ["a photo of a robot"])[0]
    assert untouched < 1e-9  # the untouched model's own prediction
    with apply_membranes(pipe, membrane(pipe), MembraneConfig(gate="always")):
        assert prompt_loss(pipe, targets, ["a photo of a robot"])[0] > 1e-8
        found = find_prompts(pipe, targets, "by the river", SEARCH, without=["robot"])
        again = prompt_loss(pipe, targets, [one.prompt for one in found])
    assert [one.loss for one in found] == pytest.approx(again, rel=1e-4) == sorted(again)
    assert all(one.prompt.endswith("by the river") and "robot" not in one.prompt for one in found)
    assert len({one.prompt for one in found}) == len(found)


def test_the_gate_is_differentiated_too(pipes):
    """A probe that is half open: the same search with the gate's gradient cut off goes elsewhere."""
    pipe = pipes["sd15"]
    targets = targets_from_model(pipe, "a photo of a robot", count=2, **SIZE)
    encoder = OpenEncoder(pipe, 2)
    ids = encoder.allowed()[:2][None]
    from semiperm.pipelines.prediction import Predictor

    def grad(probe):
        point = encoder.table[ids].clone().requires_grad_()
        with apply_membranes(pipe, membrane(pipe, probe), MembraneConfig(gate="probe")):
            loss = targets.loss(Predictor(pipe), *encoder.encode(ids, point))
            return torch.autograd.grad(loss.sum(), point)[0]

    weight = torch.randn(32, generator=torch.Generator().manual_seed(0))
    response = float((encoder.encode(ids, encoder.table[ids])[0] @ weight).max())
    # both are half open for these words, and one opens further with every change
    steep, flat = GateProbe(weight, response - 1, response + 1), GateProbe(weight, response - 1e6, response + 1e6)
    assert not torch.allclose(grad(steep), grad(flat), rtol=1e-2)


def test_pictures_are_targets_too(pipes):
    pipe = pipes["sd15"]
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    targets = targets_from_pictures(pipe, pictures, 5)
    assert targets.latents.shape == targets.wanted.shape == (5, 4, 8, 8)
    assert torch.equal(targets.drawn(2, 3).timesteps, targets.drawn(2, 3).timesteps)
    assert len(targets.drawn(2, 3).latents) == 2 and targets.drawn(9, 0) is targets
    with pytest.raises(SemipermError, match="0 points"):
        targets_from_pictures(pipe, pictures, 0)


@pytest.mark.parametrize("scope", ["tokens", "hidden"])
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
def test_embeddings_are_learned_through_a_membrane_and_drawn(pipes, family, scope):
    pipe = pipes[family]
    targets = targets_from_model(pipe, "a photo of a robot", count=2, **SIZE)
    with apply_membranes(pipe, membrane(pipe), MembraneConfig(gate="always")):
        learned = learn_embedding(pipe, targets, scope=scope, tokens=2, steps=12, learning_rate=0.1, points=2)
        assert min(learned.losses[1:]) < learned.losses[0]
        if family in ("sd15", "sd3"):
            latents = pipe(**learned.inputs(), **SIZE, num_inference_steps=1, output_type="latent").images
            assert torch.isfinite(latents).all()
    with pytest.raises(SemipermError, match="scope='words'"):
        learn_embedding(pipe, targets, scope="words")


def test_ring_a_bell_asks_no_denoiser(pipes, monkeypatch):
    pipe = pipes["sd15"]
    monkeypatch.setattr(type(pipe.unet), "forward", None)
    config = PromptSearch(search="genetic", tokens=4, steps=15, population=24, kept=2)
    pairs = [("a photo of a robot", "a photo of a"), ("a drawing of a robot", "a drawing of a")]
    found = ring_a_bell(pipe, "a photo", pairs, config, without=["robot"])
    first = ring_a_bell(pipe, "a photo", pairs, PromptSearch(search="genetic", tokens=4, steps=1, population=24))
    assert found[0].loss <= first[0].loss and "robot" not in found[0].prompt
    with pytest.raises(SemipermError, match="no pairs"):
        ring_a_bell(pipe, "a photo", [])


# ---- pictures in place of words --------------------------------------------------------------------------------------


def test_inverted_latents_draw_the_picture_again(pipes):
    """Without a membrane and with the same steps the picture comes back, roughly; through one it does not."""
    pipe = pipes["sd15"]
    drawn = pipe("a robot", num_inference_steps=8, guidance_scale=1.0, height=16, width=16, output_type="pt",
                 generator=torch.Generator().manual_seed(0)).images  # fmt: skip
    call = {"num_inference_steps": 20, "guidance_scale": 1.0}
    given = {"prompt": "a robot", "inversion_prompt": "a robot", "inversion_steps": 20}
    same = redraw_inverted(pipe, drawn, **given, **call)
    other = redraw_inverted(pipe, drawn.flip(3), **given, **call)
    assert same.shape == drawn.shape
    assert (same - drawn).abs().mean() < (other - drawn).abs().mean()
    with pytest.raises(SemipermError, match="2 prompts for 1 pictures"):
        redraw_inverted(pipe, drawn, ["a", "b"])


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
def test_inpainting_keeps_the_membrane_at_work(pipes, family):
    pipe = pipes[family]
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    call = {"num_inference_steps": 2, "guidance_scale": 2.0}

    def finished():
        return inpaint(pipe, picture, mask, "a robot", generator=torch.Generator().manual_seed(1), **call)

    before = finished()
    with apply_membranes(pipe, membrane(pipe), MembraneConfig(gate="always")):
        through = finished()
    assert before.shape == picture.shape and not torch.equal(before, through)
    assert torch.equal(finished(), before)
    with pytest.raises(SemipermError, match="1 somewhere"):
        inpaint(pipe, picture, mask * 0)


def test_arithmetic_is_the_pipelines_own_guidance_for_one_term_and_gates_hear_its_words(pipes):
    pipe = pipes["sd15"]
    one = draw_arithmetic(pipe, [(1.0, "a robot")], 2, steps=2, guidance_scale=3.0)
    less = draw_arithmetic(pipe, [(1.0, "a robot"), (-1.0, "a cat")], 2, steps=2, guidance_scale=3.0)
    assert one.shape == (2, 3, 16, 16) and not torch.equal(one, less)
    shut = GateProbe(torch.zeros(32), 1.0, 2.0)  # never opens: the words alone can
    with apply_membranes(pipe, membrane(pipe, shut)) as handle:
        through = draw_arithmetic(pipe, [(1.0, "a robot"), (1.0, "a cat")], 1, steps=2)
        gates = [row["gamma"]["robot"] for row in handle.report()["rows"]]
        kept = draw_arithmetic(pipe, [(1.0, "a cat")], 1, steps=2)
    assert gates == [0.0, 1.0, 0.0] and torch.isfinite(through).all()
    assert torch.equal(kept, draw_arithmetic(pipe, [(1.0, "a cat")], 1, steps=2))
    with pytest.raises(SemipermError, match="0 terms"):
        draw_arithmetic(pipe, [])
