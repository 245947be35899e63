"""Gaussian Shading as a baseline: exact noise, exact thresholds and p-values, fair ties, and its known weakness."""

import math

import numpy as np
import pytest
import torch
from marks import gaussian_channel, key_of, seeded
from scipy import stats
from semiperm.methods.errors import WatermarkError
from semiperm.methods.watermark.peers.gaussian_shading import GaussianShading, threshold

SMALL, FULL = (4, 16, 16), (4, 64, 64)


def test_thresholds_are_exact():
    expected = {32: [24, 30, None], 64: [42, 51, 59], 128: [78, 92, 103], 256: [148, 167, 184], 512: [283, 311, 336]}
    for bits, row in expected.items():
        assert [threshold(bits, rate) for rate in (1e-2, 1e-6, 1e-12)] == row
    for bits in (7, 64, 255):
        for rate in (0.4, 1e-2, 1e-4):
            least = threshold(bits, rate)
            tail = lambda matched, bits=bits: sum(math.comb(bits, i) for i in range(matched, bits + 1)) / 2**bits  # noqa: E731
            assert (tail(least) <= rate < tail(least - 1)) if least else tail(bits) > rate


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("shape", "bits"), [(SMALL, None), (FULL, 256), ((4, 24, 56), 100), ((16, 3, 6, 10), 33)])
def test_round_trip_of_any_layout_and_message(shape, bits, soft):
    mark = GaussianShading(key_of(1), bits, soft=soft)
    count = mark.capacity(shape)
    assert count == (bits or math.prod(shape) // 64)
    message = np.random.default_rng(0).integers(0, 2, (2, count))
    latents = mark.sample((2, *shape), seeded(0), bits=message)
    assert latents.shape == (2, *shape) and latents.dtype == torch.float32
    assert (np.stack(mark.decode(latents)) == message).all() and (np.abs(mark.votes(latents)) == 1).all()
    assert (mark.p_values(latents, message) <= 2.0**-count).all()
    own = mark.sample((2, *shape), seeded(0))
    assert (np.stack(mark.decode(own)) == mark.message(shape)).all()
    assert torch.equal(own, mark.sample((2, *shape), seeded(0))) and torch.equal(own.abs(), latents.abs())


def test_a_wrong_key_nonce_or_scope_finds_nothing():
    latents = GaussianShading(key_of(1), 128, soft=True).sample((1, *FULL), seeded(0))
    for other in (
        GaussianShading(key_of(2), 128, soft=True),
        GaussianShading(key_of(1), 128, soft=True, nonce=1),
        GaussianShading(key_of(1), 128, soft=True, scope="model"),
    ):
        assert other.p_values(latents)[0] > 1e-4


def test_votes_over_the_gaussian_channel():
    """64 copies at rho .1, .2, .3: hard bits right in .69, .84, .94 of cases by the binomial; soft ones beyond that."""
    for rho in (0.1, 0.2, 0.3):
        share = []
        for soft in (False, True):
            mark = GaussianShading(key_of(1), 256, soft=soft)
            bits = np.stack(mark.decode(gaussian_channel(mark.sample((40, *FULL), seeded(0)), rho)))
            share.append((bits == mark.message(FULL)).mean())
        agree = 1 - math.acos(rho) / math.pi
        hard = stats.binom.sf(32, 64, agree) + stats.binom.pmf(32, 64, agree) / 2
        assert share[0] == pytest.approx(hard, abs=0.015) and share[1] > share[0] + 0.02


def test_ties_are_fair_over_keys():
    """2 copies of each bit, so half of all votes are ties: neither value may be favoured."""
    rows = torch.randn(1, *SMALL, generator=seeded(0))
    ones = np.mean([GaussianShading(key_of(i), 512).decode(rows)[0].mean() for i in range(200)])
    assert abs(ones - 0.5) < 4 * 0.5 / math.sqrt(200 * 512)
    tied = [(GaussianShading(key_of(i), 512).votes(rows) == 0).mean() for i in range(20)]
    assert np.mean(tied) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("kind", ["gaussian", "fixed", "signs"])
@pytest.mark.parametrize("soft", [False, True])
def test_null_p_values_are_exact(kind, soft):
    """Over keys, whatever the latent: one fixed and skewed picture, or one of equal magnitudes, as well as noise."""
    trials = 1000
    fixed = torch.randn(1, *SMALL, generator=seeded(1)).cumsum(-1) + 2
    p = []
    for i in range(trials):
        row = {"gaussian": torch.randn(1, *SMALL, generator=seeded(i)), "fixed": fixed, "signs": fixed.sign()}[kind]
        p.append(GaussianShading(key_of(i), 64, soft=soft).p_values(row)[0])
    p = np.array(p)
    levels = (0.001, 0.01, 0.1, 0.5)
    if not soft:  # the attainable levels of a binomial of 64 bits
        levels = [stats.binom.sf(matched - 1, 64, 0.5) for matched in (32, 36, 41, 44)]
    for level in levels:
        low, high = stats.binom.interval(0.999, trials, level)
        found = (p <= level * (1 + 1e-9)).sum()
        assert found <= high and (found >= low or kind == "signs")  # equal magnitudes make a coarse lattice


def test_each_picture_is_normal_but_pictures_of_a_key_share_their_signs():
    mark = GaussianShading(key_of(1))
    latents = mark.sample((200, *SMALL), seeded(0))
    assert stats.kstest(latents.abs().flatten().numpy(), "halfnorm").pvalue > 1e-3
    signs = latents.sign().flatten(1)
    assert (signs == signs[0]).all()
    fresh = torch.cat([GaussianShading(key_of(1), nonce=i).sample((1, *SMALL), seeded(i)) for i in range(50)])
    assert stats.kstest(fresh.flatten().numpy(), "norm").pvalue > 1e-3
    fresh = fresh.sign().flatten(1)
    assert (fresh @ fresh.T / 1024 - torch.eye(50)).abs().max() < 0.2


def test_erased_and_constant_latents_are_no_mark():
    mark = GaussianShading(key_of(1), 64)
    assert (mark.votes(torch.zeros(1, *SMALL)) == 0).all()
    for soft in (False, True):
        for rows in (torch.zeros(1, *SMALL), torch.full((1, *SMALL), 3.0)):
            assert GaussianShading(key_of(1), 64, soft=soft).p_values(rows)[0] > 1e-4


def test_errors_say_what_was_given():
    with pytest.raises(WatermarkError, match="0 bits"):
        GaussianShading(key_of(1), 0)
    with pytest.raises(WatermarkError, match="1024 elements; expected at least one for each of the 2000"):
        GaussianShading(key_of(1), 2000).sample((1, *SMALL))
    mark = GaussianShading(key_of(1), 64)
    for bits in (np.zeros(63), np.full(64, 2), np.zeros((3, 64))):
        with pytest.raises(WatermarkError, match=r"expected \(64,\) or \(2, 64\)"):
            mark.sample((2, *SMALL), bits=bits)
    with pytest.raises(WatermarkError, match="NaN"):
        mark.decode(torch.full((1, *SMALL), math.nan))
    with pytest.raises(WatermarkError, match="batch|layout"):
        mark.sample((64,))
