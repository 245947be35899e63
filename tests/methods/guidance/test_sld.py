"""Safe latent diffusion against loops of the paper's formula in float64."""

import pytest
import torch
from semiperm.methods.errors import GuidanceError
from semiperm.methods.guidance.algorithm import Momentum
from semiperm.methods.guidance.branches import Branches
from semiperm.methods.guidance.sld import PRESETS, SLD, alignment, best_aligned

SHAPE = (2, 4, 6, 5)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def predictions(step, shape=SHAPE):
    """u, t, s of one step, near enough to each other that every branch of the formula is taken."""
    u = normal(*shape, seed=step)
    near = (u + 0.02 * normal(*shape, seed=seed + step) for seed in (1000, 2000))
    return tuple(p.float().double() for p in (u, *near))  # so that float32 is given the same numbers


def paper(steps, warmup, s_S, lam, s_m, beta, count, w):
    """Equations 3 to 8 in diffusers' order; w guides. -> the guided predictions of all steps."""
    m, found = torch.zeros(SHAPE, dtype=torch.float64), []
    for i in range(steps):
        u, t, s = predictions(i)
        d = t - s
        mu = torch.where(d >= lam, torch.zeros_like(d), (d.abs() * s_S).clamp(max=1.0))
        gamma = (s - u) * mu + s_m * m
        m = beta * m + (1 - beta) * gamma
        found.append(u + w * (t - u - (gamma if i / count >= warmup else 0.0)))
    return found


def guide(algorithm, u, t, s, momentum, level, *, unit=1.0, update=True, active=None, strength=1.0):
    active = torch.ones(len(t), dtype=torch.bool) if active is None else active
    return algorithm.guide(u, t, s, momentum, unit=unit, active=active, level=level, update=update, strength=strength)


@pytest.mark.parametrize("preset", PRESETS)
def test_fifty_steps_are_the_papers(preset):
    algorithm, momentum, w = SLD(preset), Momentum(), 7.5
    expected = paper(50, *PRESETS[preset], count=50, w=w)
    for i, right in enumerate(expected):
        u, t, s = (p.float() for p in predictions(i))
        active = torch.full((2,), i / 50 >= algorithm.window())
        found = guide(algorithm, u, t, s[None], momentum, float(50 - i), active=active).prediction
        torch.testing.assert_close((u + w * (found - u)).double(), right, atol=2e-5, rtol=1e-5)
        # what it gives to the pipeline is exact to float32's rounding of u + (t - u)
        torch.testing.assert_close(found.double(), u.double() + (right - u.double()) / w, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("unit", [0.37, -2.5])
def test_other_predictions_are_the_same_in_units_of_noise(unit):
    """v and flow predictions differ from noise by a factor, and by what all three share."""
    algorithm, one, other, shared = SLD("strong"), Momentum(), Momentum(), normal(*SHAPE, seed=9).float()
    for i in range(5):
        u, t, s = (p.float() for p in predictions(i))
        noise = guide(algorithm, u, t, s[None], one, float(9 - i)).prediction
        found = guide(
            algorithm,
            *((p - shared) / unit for p in (u, t)),
            ((s - shared) / unit)[None],
            other,
            float(9 - i),
            unit=unit,
        )
        torch.testing.assert_close(found.prediction * unit + shared, noise, atol=2e-5, rtol=1e-4)


def test_a_flow_model_at_pure_noise_is_left_alone():
    u, t, s = (p.float() for p in predictions(0))
    momentum = Momentum()
    found = guide(SLD("max"), u, t, s[None], momentum, 1.0, unit=0.0)
    assert torch.equal(found.prediction, t) and momentum.after is None


def test_one_category_acts_the_best_aligned():
    u = normal(*SHAPE, seed=1).float()
    harm = 0.1 * normal(3, *SHAPE, seed=2).float()
    t = u + torch.stack([harm[2, 0], harm[1, 1]])  # image 0 goes towards category 2, image 1 towards 1
    found = guide(SLD("max"), u, t + 0.001, u + harm, Momentum(), 1.0)
    assert found.category.tolist() == best_aligned(u, t, u + harm).tolist() == [2, 1]
    for image, category in enumerate((2, 1)):
        alone = guide(SLD("max"), u, t + 0.001, (u + harm)[category : category + 1], Momentum(), 1.0)
        assert torch.equal(found.prediction[image], alone.prediction[image])


def test_a_second_order_sampler_updates_the_momentum_once_a_step():
    algorithm = SLD("strong")
    u, t, s = (p.float() for p in predictions(0))
    v, q, r = (p.float() for p in predictions(1))
    euler = Momentum()
    guide(algorithm, u, t, s[None], euler, 2.0)
    guide(algorithm, v, q, r[None], euler, 1.0)
    marked = Momentum()  # the face says which calls begin a step
    guide(algorithm, u, t, s[None], marked, 2.0)
    guide(algorithm, u, q, r[None], marked, 1.5, update=False)
    guide(algorithm, v, q, r[None], marked, 1.0)
    heun = Momentum()  # or a level is called again, as Heun's corrector and the next step do
    guide(algorithm, u, t, s[None], heun, 2.0)
    guide(algorithm, u, q, r[None], heun, 1.0)
    guide(algorithm, v, q, r[None], heun, 1.0)
    assert torch.equal(euler.after, marked.after) and torch.equal(euler.after, heun.after)


def test_momentum_is_float32_and_acts_where_all_branches_are_silent():
    algorithm, momentum = SLD("strong"), Momentum()
    u, t, s = (p.half() for p in predictions(0))
    found = guide(algorithm, u, t, s[None], momentum, 2.0)
    assert found.prediction.dtype == torch.float16 and momentum.after.dtype == torch.float32
    m = momentum.after.clone()
    found = guide(algorithm, u, t, s[None][:0], momentum, 1.0)
    torch.testing.assert_close(found.prediction.float(), (t.float() - 0.5 * m), atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(momentum.after, 0.7 * m + 0.3 * 0.5 * m)
    assert not found.scale.any()


def test_strength_is_a_factor_on_the_change():
    u, t, s = (p.float() for p in predictions(3))
    full = guide(SLD("max"), u, t, s[None], Momentum(), 1.0).prediction
    half = guide(SLD("max"), u, t, s[None], Momentum(), 1.0, strength=0.5).prediction
    torch.testing.assert_close(half, (t + full) / 2)


@pytest.mark.parametrize("wrong", [{"preset": "huge"}, {"momentum_beta": 1.0}, {"safety_scale": -1.0}, {"patience": 0}])
def test_settings_are_checked(wrong):
    with pytest.raises(GuidanceError, match="expected"):
        SLD(**wrong)


# ---- dynamic mode ----------------------------------------------------------------------------------------------------


def test_a_silent_branch_does_nothing_and_a_loud_one_all():
    """The first image follows the category's direction, the second one is at right angles to it."""
    u = normal(*SHAPE, seed=1).float()
    harm, other = (0.1 * normal(*SHAPE, seed=seed).float() for seed in (2, 3))
    text = u + torch.stack([harm[0] + 0.1 * other[0], other[1]])
    safety = (u + harm)[None]
    cosines = alignment(u, text, safety)
    assert cosines.shape == (1, 2) and cosines[0, 0] > 0.9 and abs(cosines[0, 1]) < 0.2
    plain = guide(SLD("max"), u, text, safety, Momentum(), 9.0)
    found = guide(SLD("max", patience=1, silent=0.5), u, text, safety, Momentum(), 9.0)
    assert torch.equal(found.prediction[0], plain.prediction[0]) and plain.scale[1] > 0.1
    torch.testing.assert_close(found.prediction[1], text[1], atol=1e-6, rtol=0)
    assert found.loud.tolist() == [[True, False]] and found.scale[1] == 0 and plain.loud is None


def test_a_branch_that_is_not_there_changes_nothing_and_is_not_chosen():
    u, text = (normal(*SHAPE, seed=seed).float() for seed in (1, 2))
    safety = torch.stack([u, u - 0.5 * (text - u)])  # the second, the only one that is there, leads the other way
    evaluated = torch.tensor([[False, False], [True, False]])
    found = SLD("max").guide(
        u, text, safety, Momentum(), unit=1.0, active=torch.ones(2, dtype=torch.bool), level=9.0, update=True,
        strength=1.0, evaluated=evaluated,
    )  # fmt: skip
    alone = guide(SLD("max"), u, text, safety[1:], Momentum(), 9.0)
    assert torch.equal(found.prediction[0], alone.prediction[0]) and found.category[0] == 1
    torch.testing.assert_close(found.prediction[1], text[1], atol=1e-6, rtol=0)
    assert found.scale[0] > 0 and found.scale[1] == 0


def test_branches_wait_and_are_looked_at_again_image_by_image():
    branches, seen = Branches(2, patience=2, probe=3), []
    for step in range(12):
        wanted = branches.wanted(2)
        seen.append(wanted.int().tolist())
        loud = torch.tensor([[True, False], [False, False]]) if step < 8 else torch.zeros(2, 2, dtype=torch.bool)
        branches.heard(wanted, loud & wanted)
    first, second = ([step[0][image] for step in seen] for image in (0, 1))
    assert first == [1] * 10 + [0, 0], "loud up to step 7, then silent for as long as patience lasts"
    assert second == [1, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0], "silent from the start: every third step"
    assert [step[1][0] for step in seen] == second, "each category by itself"
    assert Branches(1, None, 8).wanted(3).all()
