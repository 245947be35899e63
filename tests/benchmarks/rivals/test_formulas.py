"""The rivals' closed forms, against the equations of their papers in float64."""

import pytest
import torch
from semiperm.benchmarks.erasure.methods import Told
from semiperm.benchmarks.rivals import RIVALS, casteer, gloce, neurons, shared
from semiperm.benchmarks.rivals.double_projections import dp_edit
from semiperm.benchmarks.rivals.rece import rece_edit
from semiperm.benchmarks.rivals.speed import _centres, speed_edit
from semiperm.methods.errors import SemipermError
from semiperm.methods.membranes.image_site import ImageSite
from semiperm.pipelines.text import encode_text, text_projections
from tiny_models import build

D = 24


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def applied(weight, edit):
    return weight + weight @ edit[0] @ edit[1]


def uce(weight, concept, target, preserve, ridge=0.5):
    square = ridge * torch.eye(D).double() + concept.T @ concept + preserve.T @ preserve
    return (weight @ (ridge * torch.eye(D).double() + target.T @ concept + preserve.T @ preserve)) @ torch.linalg.inv(
        square
    )


@pytest.mark.parametrize("epochs", [1, 3])
def test_rece_is_uce_attacked_and_repeated(epochs):
    concept, target, preserve = drawn(2, D), drawn(1, D, seed=1).expand(2, D), drawn(5, D, seed=2)
    first = [drawn(10, D, seed=3), drawn(7, D, seed=4)]
    ridge, now, rows = 0.1, first, concept
    for epoch in range(epochs + 1):
        if epoch:
            square = sum(w.T @ w for w in now) + ridge * torch.eye(D).double()
            answer = sum(w.T @ old for w, old in zip(now, first, strict=True))
            rows = torch.linalg.solve(square, answer @ concept.T).T
        now = [uce(w, rows, target, preserve) for w in now]
    gram = sum(w.T @ w for w in first)
    edit = rece_edit(concept, target, preserve, gram, epochs, ridge)
    assert edit[0].shape == (D, 2 * (epochs + 1))
    for weight, wanted in zip(first, now, strict=True):
        torch.testing.assert_close(applied(weight, edit), wanted, rtol=1e-8, atol=1e-8)


def test_speed_is_the_papers_closed_form():
    """W (C* - C) C^T P Q M with M = (C C^T P + I)^-1, Q = I - M C_2 (C_2^T P M C_2)^-1 C_2^T P, in columns."""
    concept, target, kept, held = drawn(3, D), drawn(3, D, seed=1), drawn(8, D, seed=2), drawn(2, D, seed=3)
    weight, c, two = drawn(10, D, seed=4), concept.T, held.T
    values, vectors = torch.linalg.eigh(kept.T @ kept)
    p = vectors[:, values < 1.0] @ vectors[:, values < 1.0].T
    m = torch.linalg.inv(c @ c.T @ p + torch.eye(D).double())
    q = torch.eye(D).double() - m @ two @ torch.linalg.inv(two.T @ p @ m @ two) @ two.T @ p
    wanted = weight @ (target - concept).T @ c.T @ p @ q @ m
    found = applied(weight, speed_edit(concept, target, kept, held, 1.0, 1.0)) - weight
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found @ two, torch.zeros(10, 2).double(), rtol=0, atol=1e-9)


def test_speed_refuses_a_full_space():
    with pytest.raises(SemipermError, match="keep fewer"):
        speed_edit(drawn(1, D), drawn(1, D, seed=1), drawn(99, D, seed=2), drawn(2, D, seed=3), 1.0, 1e-6)
    with pytest.raises(SemipermError, match="above 0"):
        speed_edit(drawn(1, D), drawn(1, D, seed=1), drawn(9, D, seed=2), drawn(2, D, seed=3), 1.0, 0.0)


def test_clusters_have_their_means():
    rows = torch.cat([drawn(5, D, seed=k) * 0.01 + 10 * k for k in range(3)])
    wanted = torch.stack([rows[5 * k : 5 * k + 5].mean(0) for k in range(3)])
    torch.testing.assert_close(_centres(rows, 3), wanted)


def test_double_projections_with_one_concept_is_rank_one():
    concept, kept, weight = drawn(1, D), drawn(6, D, seed=1), drawn(10, D, seed=2)
    left, _, _ = torch.linalg.svd(kept.T, full_matrices=True)
    u1, u2, c = left[:, :6], left[:, 6:], concept.T
    x = u2.T @ c
    wanted = weight @ (u1 @ u1.T @ c - c) @ x.T @ u2.T / x.square().sum()
    torch.testing.assert_close(applied(weight, dp_edit(concept, kept)) - weight, wanted, rtol=1e-9, atol=1e-9)


def test_double_projections_sends_each_to_its_own_and_keeps_the_rest():
    concept, kept, weight = drawn(3, D), drawn(6, D, seed=1), drawn(10, D, seed=2)
    new = applied(weight, dp_edit(concept, kept))
    safe = torch.linalg.pinv(kept) @ kept
    torch.testing.assert_close(new @ kept.T, weight @ kept.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(new @ concept.T, weight @ safe @ concept.T, rtol=1e-9, atol=1e-9)
    with pytest.raises(SemipermError, match="keep fewer"):
        dp_edit(kept[:1] + kept[1:2], kept)


def test_casteer_takes_twice_the_positive_part():
    on, off, tokens = drawn(2, D), drawn(2, D, seed=1), drawn(2, 9, D, seed=2).float()
    vectors = casteer.steering(on, off)
    torch.testing.assert_close(vectors[0], (on - off)[0] / (on - off)[0].norm())
    side = casteer.VisualSide((0.25, 0.75), {"layer": casteer._site("layer", vectors)}, 2.0)
    site = ImageSite("layer", [(0, side)], 1, after_text=False)
    for share, s in zip((0.25, 0.75), vectors.float(), strict=True):
        edited = site.edit(tokens, site.packed_at(share, tokens.dtype), torch.ones(2, 1), 0)[0]
        wanted = tokens - 2 * (tokens @ s).clamp_min(0)[..., None] * s
        torch.testing.assert_close(edited, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(SemipermError, match="same"):
        casteer._site("layer", casteer.steering(on, on))


def test_casteer_counts_means():
    means, tokens = casteer.Means(), drawn(3, 4, D)
    means.take("layer", tokens[:1], 0.5, 0)
    means.take("layer", tokens[1:], 0.5, 0)
    shares, found = means.of()
    assert shares == (0.5,)
    torch.testing.assert_close(found["layer"][0], tokens.mean((0, 1)))


def test_gloce_opens_for_the_concept_and_leaves_the_others():
    shift = 6 * torch.nn.functional.normalize(drawn(D, seed=9), dim=0)
    other, concept = drawn(400, D), drawn(400, D, seed=1) + shift
    part = gloce.replacement(concept, other)
    gates = [part.opening(rows)[:, 0] for rows in (concept, other)]
    assert gates[0].mean() > 0.4 and float(gates[1].quantile(0.98)) < 0.011
    basis = torch.linalg.svd(concept - concept.mean(0), full_matrices=False)[2][:2]
    rest = torch.linalg.svd(other - other.mean(0), full_matrices=False)[2][:16]
    x = concept - concept.mean(0)
    wanted = other.mean(0) + (x - x @ basis.T @ basis) @ rest.T @ rest
    torch.testing.assert_close(part.mapped(concept), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        gloce.replaced(concept, [part]), torch.lerp(concept, part.mapped(concept), part.opening(concept))
    )


def test_gloce_lets_the_widest_gate_act_alone():
    other = drawn(200, D)
    concepts = [drawn(200, D, seed=k) + 6 * torch.eye(D).double()[k] for k in (1, 2)]
    parts = [gloce.replacement(concept, other) for concept in concepts]
    both, tokens = gloce.replaced(concepts[0], parts), concepts[0]
    first, second = (part.opening(tokens) for part in parts)
    wanted = torch.where(first >= second, gloce.replaced(tokens, parts[:1]), gloce.replaced(tokens, parts[1:]))
    torch.testing.assert_close(both, wanted)
    with pytest.raises(SemipermError, match="differ"):
        gloce.replacement(other, other)


def test_outliers_are_z_scores():
    usual, own = drawn(30, 5).abs(), drawn(2, 5, seed=1).abs()
    wanted = torch.stack([(own[:, i] - usual[:, i].mean()).max() / usual[:, i].std() for i in range(5)])
    torch.testing.assert_close(neurons.outliers(own, usual), wanted)


def test_masked_rows_are_zero_and_the_others_stay():
    pipe = build("sd15")
    key = next(iter(shared.cross_attention(pipe, "attn2.to_v", "it")))
    module = text_projections(pipe)[0][key]
    mask = torch.zeros(module.weight.shape[0], dtype=torch.bool)
    mask[3] = True
    before = module.weight.clone()
    with shared.in_place(pipe, neurons._masked(pipe, {key: mask})):
        assert not module.weight[3].any() and torch.equal(module.weight[~mask], before[~mask])
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
def test_last_tokens_are_those_of_every_stretch(family):
    pipe, texts = build(family), ["robot", "a cat and a dog", ""]
    found, hidden = shared.last_tokens(pipe, texts), encode_text(pipe, texts).hidden
    if family in ("sd15", "sdxl"):
        wanted = [hidden[0, 1], hidden[1, 5], hidden[2, 0]]
    elif family == "sd3":  # CLIP's 40 positions, then T5's, which has no begin-of-text
        wanted = [hidden[0, 1], hidden[1, 5], hidden[2, 0], hidden[0, 40], hidden[1, 44], hidden[2, 40]]
    else:
        wanted = [hidden[0, 0], hidden[1, 4], hidden[2, 0]]
    assert torch.equal(found, torch.stack(wanted))


def test_weights_put_in_place_are_checked():
    pipe = build("sd15")
    name = "unet.conv_in.weight"
    weight = pipe.unet.conv_in.weight
    for value, said in ((weight.clone(), "nothing"), (weight[:1], "values"), (weight * float("nan"), "finite")):
        with pytest.raises(SemipermError, match=said), shared.in_place(pipe, {name: value}):
            pass
    with pytest.raises(SemipermError, match="missing"), shared.in_place(pipe, {"unet.conv_in.no": weight}):
        pass


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("rece", {"epochs": 0}, "epochs"),
        ("casteer", {"pairs": 0}, "pairs"),
        ("casteer", {"beta": 0.0}, "beta"),
        ("gloce", {"pictures": 0}, "pictures"),
        ("gloce", {"pictures": 1, "steps": 1}, "steps"),
        ("neurons", {"seeds": 1}, "seeds"),
        ("spm", {"steps": 0}, "steps"),
    ],
)
def test_bad_options(name, options, said):
    told = Told({"robot": ("robot",)}, ("cat",))
    with pytest.raises(SemipermError, match=said), RIVALS[name](build("sd15"), told, **options):
        pass
