"""The rivals that are trained: what is trained, towards what, and the bits back afterwards."""

import pytest
import torch
from semiperm.benchmarks.erasure.methods import Told, applied
from semiperm.benchmarks.rivals import RIVALS, esd, few_shot, hirm, training
from semiperm.benchmarks.rivals.shared import paired_captions
from semiperm.benchmarks.rivals.training import Pictures
from semiperm.methods.errors import SemipermError
from semiperm.methods.membranes.types import LowRank, Membrane
from semiperm.methods.sampling import KINDS, parts_of
from semiperm.methods.training.objectives import erasing_loss
from semiperm.pipelines.membranes.watch import drawn
from semiperm.pipelines.prediction import Predictor
from semiperm.pipelines.text import encode_text
from tiny_models import build, call

TOLD = {"robot": ("robot", "android")}
QUICK = {
    "esd_x": {"steps": 2},
    "esd_u": {"steps": 2},
    "hirm": {"steps": 2},
    "few_shot": {"pictures": 1, "passes": 1, "steps": 2},
    "advunlearn": {"steps": 2, "attack": 1},
}


def fit(name, pipe):
    """What a rival trained, by name of parameter."""
    told = Told(TOLD)
    with RIVALS[name](pipe, told, **QUICK[name]):
        pass
    return next(value for key, value in told.kept.items())


@pytest.mark.parametrize(
    ("name", "part", "belongs"),
    [
        ("esd_x", "unet", lambda path: ".attn2." in path),
        ("esd_u", "unet", lambda path: ".attn2." not in path),
        ("hirm", "text_encoder", lambda path: "layers.0." in path),
        ("few_shot", "text_encoder", lambda path: ".mlp.fc" in path or "layers.1.self_attn." in path),
        ("advunlearn", "text_encoder", lambda path: "embedding" not in path),
    ],
)
def test_what_is_trained(name, part, belongs):
    pipe = build("sd15")
    own = {f"{part}.{path}": p for path, p in getattr(pipe, part).named_parameters()}
    made = fit(name, pipe)
    assert set(made) == {path for path in own if belongs(path)}
    moved = [path for path, value in made.items() if not torch.equal(value, own[path])]
    assert len(moved) > len(made) / 2  # a bias of keys has no gradient, nor has what comes after the last layer


@pytest.mark.parametrize("name", ["hirm", "few_shot", "advunlearn"])
@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_every_clip_text_encoder_is_trained(name, family):
    pipe = build(family)
    made = fit(name, pipe)
    wanted = {"sdxl": {"text_encoder", "text_encoder_2"}, "sd3": {"text_encoder", "text_encoder_2"}}
    assert {path.split(".")[0] for path in made} == wanted.get(family, {"text_encoder"})
    kwargs = {"negative_prompt": ""} if family == "flux" else {}
    bare = call(pipe, "a robot", **kwargs)
    with RIVALS[name](pipe, Told(TOLD), **QUICK[name]):
        assert not torch.equal(call(pipe, "a robot", **kwargs), bare)
    assert torch.equal(call(pipe, "a robot", **kwargs), bare)


@pytest.mark.parametrize(("part", "rate"), [("x", 2e-6), ("u", 4e-7)])
def test_esd_comes_nearer_to_its_target(part, rate):
    pipe = build("sd15")
    predictor, texts = Predictor(pipe), encode_text(pipe, ["robot", ""])
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    times = torch.full((4,), 999.0)
    concept, empty = (training.rows_of(texts, 4, row) for row in (0, 1))

    def made(text):
        with torch.no_grad():
            return predictor(latents, times, *text)

    asked, free = made(concept), made(empty)
    target = free - 1.5 * (asked - free)
    with RIVALS[f"esd_{part}"](pipe, Told({"robot": ("robot",)}), steps=40, rate=rate, eta=1.5):
        after = made(concept)
    assert erasing_loss(after, target).mean() < 0.8 * erasing_loss(asked, target).mean()
    assert torch.equal(made(concept), asked)


def test_hirm_turns_the_phrase_away_and_keeps_the_rest_nearer():
    pipe, told = build("sd15"), Told({"robot": ("robot",)})
    before = encode_text(pipe, ["robot", "two people reading books"]).hidden
    with RIVALS["hirm"](pipe, told, steps=60, rate=2e-4):
        after = encode_text(pipe, ["robot", "two people reading books"]).hidden
    direction = hirm.misdirected(before[0, 1:2], torch.Generator().manual_seed(0))[0]
    old, new = (torch.cosine_similarity(h[0, 1], direction, dim=0) for h in (before, after))
    assert new > old + 0.3
    moved = (after - before).norm(dim=-1) / before.norm(dim=-1)
    assert moved[0, 1] > moved[1, 1:5].mean()
    assert torch.equal(after[:, 0], before[:, 0]) or moved[:, 0].max() < moved[0, 1]


def test_misdirection_is_a_relative_distance():
    states, targets = torch.randn(5, 8), torch.randn(5, 8)
    wanted = sum(((s - t) @ (s - t)) / (t @ t) for s, t in zip(states, targets, strict=True)) / 5
    torch.testing.assert_close(hirm.misdirection_loss(states, targets), wanted)
    aims = hirm.misdirected(states, torch.Generator().manual_seed(1))
    torch.testing.assert_close(aims.norm(dim=1), states.norm(dim=1))
    assert torch.linalg.matrix_rank(aims) == 1


def test_few_shot_makes_the_denoiser_worse():
    pipe, generator = build("sd15"), torch.Generator().manual_seed(5)
    predictor, caption = Predictor(pipe), paired_captions(["robot"], 1)[0]
    image = drawn(pipe, caption, 2, 1, 0, lambda count: None, {})
    noise, times = torch.randn(16, *image.shape[1:], generator=generator), torch.linspace(50, 950, 16).round()
    a, s = predictor.levels(times)

    def error():
        with torch.no_grad():
            text = training.rows_of(encode_text(pipe, caption), 16)
            return erasing_loss(predictor(a * image + s * noise, times, *text), noise).mean()

    before = error()
    options = {"pictures": 1, "passes": 40, "rate": 2e-4, "steps": 2}
    with RIVALS["few_shot"](pipe, Told({"robot": ("robot",)}), **options):
        assert error() > before
    assert error() == before


def test_few_shot_parameters():
    chosen = [
        path
        for path in ("layers.0.mlp.fc1.weight", "layers.0.self_attn.q_proj.weight", "layers.2.self_attn.q_proj.weight")
        if few_shot.few_shot_parameters(f"encoder.{path}", 3)
    ]
    assert chosen == ["layers.0.mlp.fc1.weight", "layers.2.self_attn.q_proj.weight"]


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_those_that_parts_are_read_from(kind):
    image, noise = torch.randn(2, 3).double(), torch.randn(2, 3).double()
    a, s = (torch.tensor(x).double() for x in ((0.4, 0.6) if kind == "flow" else (0.6, 0.8)))
    made = training.prediction_of(kind, image, noise, (a, s))
    for found, wanted in zip(parts_of(kind, a * image + s * noise, made, a, s), (image, noise), strict=True):
        torch.testing.assert_close(found, wanted)


def test_pictures_take_the_samplers_way():
    pipe = build("sd15")
    predictor, text = Predictor(pipe), encode_text(pipe, ["a robot"])
    pictures = Pictures(predictor, 2, 4, 0)
    first, _ = pictures.now()
    wanted = predictor.sample(first[:1], lambda z, t: predictor(z, t, *training.rows_of(text, 1)), 4)
    seen = []
    pictures._begin = lambda begin=pictures._begin: (seen.append(pictures.latents.clone()), begin())
    for step in range(4):
        latents, now = pictures.now()
        assert now.tolist() == [pictures.times[step], pictures.times[max(0, step - 2)]]
        with torch.no_grad():
            pictures.move(predictor(latents, now, *training.rows_of(text, 2)))
    torch.testing.assert_close(seen[-1][:1], wanted, rtol=1e-4, atol=1e-4)
    again, now = pictures.now()
    assert now.tolist() == [pictures.times[0], pictures.times[2]]
    assert not torch.equal(again[0], first[0]) and not torch.equal(again[0], seen[-1][0])


def test_the_untouched_model_is_there_while_another_is_trained():
    pipe = build("sd15")
    weight = pipe.unet.conv_in.weight
    before, kept, storage = weight.clone(), weight.requires_grad, weight.data_ptr()
    with training.trained(pipe, ["unet.conv_in.weight"], 0.1) as trainee:
        trainee.step(weight.square().sum())
        after = weight.detach().clone()
        with trainee.untouched():
            assert torch.equal(weight, before) and not torch.is_grad_enabled()
        assert torch.equal(weight, after) and not torch.equal(after, before)
        with pytest.raises(SemipermError, match="finite"):
            trainee.step(weight.sum() * float("inf"))
    assert torch.equal(weight, before) and weight.data_ptr() == storage
    assert weight.requires_grad is kept and weight.grad is None


def test_rates_go_with_the_width():
    pipe = build("sd15")
    assert training.unet_rate(pipe, 1e-5) == pytest.approx(1e-5 * 320 / 16)
    assert training.clip_rate(pipe, 1e-5) == pytest.approx(1e-5 * 768 / 32)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("esd_x", {"steps": 0}, "steps"),
        ("esd_x", {"part": "z"}, "part"),
        ("esd_u", {"eta": float("nan")}, "eta"),
        ("esd_u", {"rate": 0.0}, "rate"),
        ("hirm", {"steps": 0}, "steps"),
        ("few_shot", {"pictures": 0}, "pictures"),
        ("advunlearn", {"attack": 0}, "attack"),
        ("advunlearn", {"gamma": -1.0}, "gamma"),
    ],
)
def test_bad_options(name, options, said):
    with pytest.raises(SemipermError, match=said), RIVALS[name](build("sd15"), Told(TOLD), **options):
        pass


def test_no_training_around_membranes():
    pipe = build("sd15")
    key = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    membrane = Membrane("robot", {key: LowRank(torch.ones(1, 32), torch.ones(32, 1), 1.0)})
    with applied(pipe, [membrane], "always"):
        for name in QUICK:
            with pytest.raises(SemipermError, match="membranes"), RIVALS[name](pipe, Told(TOLD), **QUICK[name]):
                pass


def test_a_model_without_clip_is_refused():
    pipe = build("sd3")
    pipe.text_encoder = pipe.text_encoder_2 = None
    with pytest.raises(SemipermError, match="CLIP"):
        training.clip_parameters(pipe, lambda path, layers: True, "it")
    with pytest.raises(SemipermError, match="joint|cross"):
        esd._names(build("flux"), "x")
