"""RingID as a baseline: two-level rings beside a noise pattern, exact p-values, power over noise and turns."""

import math

import numpy as np
import pytest
import torch
from marks import gaussian_channel, key_of, seeded
from scipy import stats
from semiperm.methods.errors import WatermarkError
from semiperm.methods.watermark.peers.ring_id import RingID, sign_tail

SMALL, MEDIUM, FULL = (4, 16, 16), (4, 32, 32), (4, 64, 64)


@pytest.mark.parametrize(
    ("shape", "rings"), [(SMALL, 3), (MEDIUM, 6), (FULL, 11), ((16, 128, 128), 11), ((4, 33, 47), 6)]
)
def test_rings_hold_two_levels(shape, rings):
    mark = RingID(key_of(1))
    layout = mark.layout((1, *shape))
    image, plane, members = layout.image, layout.rings, layout.members
    assert len(members) == rings and (members.sum(axis=0) == 1).all() and (members.sum(axis=1) >= 4).all()
    latents, plain = mark.sample((2, *shape), seeded(0)), torch.randn((2, *shape), generator=seeded(0))
    assert latents.shape == (2, *shape) and latents.dtype == torch.float32
    found = plane.read(latents[:, 3])
    assert np.abs(found.imag).max() < 1e-3 and np.allclose(np.abs(found.real), 1, atol=1e-3)
    levels = found.real * (1 - 2.0 * ((plane.u + plane.v) % 2)) @ members.T / members.sum(axis=1)
    assert np.allclose(levels, mark.signs(image, rings), atol=1e-3)
    changed = (latents - plain).abs().amax((0, 2, 3)) > 1e-4
    assert changed.nonzero().flatten().tolist() == [0, 3]
    assert (mark.p_values(latents) < 1e-15).all()


def test_the_rings_centre_is_the_middle():
    """Without the time shift it would be the corner, which rotation and cropping move or cut."""
    mark = RingID(key_of(1))
    only = (mark.sample((400, *FULL), seeded(0))[:, 3]).mean(0)
    peak = divmod(int(only.abs().argmax()), 64)
    assert peak == (32, 32) or only[28:37, 28:37].abs().max() == only.abs().max()


def test_the_tail_over_all_signs_is_the_enumeration():
    values = np.random.default_rng(0).normal(size=(5, 4))
    signs = np.array([1.0, -1.0, -1.0, 1.0])
    every = np.array(np.meshgrid(*[[1, -1]] * 4)).reshape(4, -1).T
    expected = [(every @ row >= row @ signs - 1e-12).mean() for row in values]
    assert np.allclose(sign_tail(values, signs), expected)
    assert sign_tail(np.ones((1, 11)), np.ones(11))[0] == 2.0**-11
    assert (sign_tail(np.zeros((1, 4)), signs) == 1).all()


@pytest.mark.parametrize("kind", ["gaussian", "fixed", "signs"])
@pytest.mark.parametrize("shape", [SMALL, FULL])
def test_null_p_values_are_uniform_over_keys(kind, shape):
    """Whatever the latent: one fixed, smooth and skewed picture, or one of equal magnitudes, as well as noise."""
    trials, fixed = 800, torch.randn(1, *shape, generator=seeded(1)).cumsum(-1) + 2
    p = []
    for i in range(trials):
        row = {"gaussian": torch.randn(1, *shape, generator=seeded(i)), "fixed": fixed, "signs": fixed.sign()}[kind]
        p.append(RingID(key_of(i)).p_values(row)[0])
    p = np.array(p)
    for level in (0.003, 0.01, 0.1, 0.5):
        low, high = stats.binom.interval(0.999, trials, level)
        assert low <= (p <= level).sum() <= high
    assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_detection_over_the_gaussian_channel():
    for shape, rho in ((SMALL, 0.9), (MEDIUM, 0.5), (FULL, 0.25)):
        rows = []
        for i in range(40):
            mark = RingID(key_of(i))
            rows.append(mark.p_values(gaussian_channel(mark.sample((1, *shape), seeded(i)), rho, 1000 + i))[0])
        assert (np.array(rows) < 1e-6).mean() > 0.9


def test_turns_leave_the_rings():
    """At a half turn the noise pattern is gone, all eleven rings are right: p1 = 1 / 2048 for nearly every key."""
    p = []
    for i in range(20):
        mark = RingID(key_of(i))
        p.append(mark.p_values(mark.sample((1, *FULL), seeded(i)).rot90(2, (-2, -1)))[0])
    assert np.median(p) < 0.01


def test_wrong_keys_and_empty_latents_find_nothing():
    latents = RingID(key_of(1)).sample((1, *FULL), seeded(0))
    for other in (RingID(key_of(2)), RingID(key_of(1), scope="model"), RingID(key_of(1), ring_channel=2)):
        assert other.p_values(latents)[0] > 1e-4 or other.ring_channel == 2  # the noise channel is still there
    assert RingID(key_of(1)).p_values(torch.zeros(1, *FULL))[0] == 1
    assert RingID(key_of(1)).p_values(torch.full((1, *FULL), 3.0))[0] > 1e-4


def test_errors_say_what_was_given():
    with pytest.raises(WatermarkError, match="two different channels"):
        RingID(key_of(1), ring_channel=1, noise_channel=1)
    with pytest.raises(WatermarkError, match="room for 1 rings"):
        RingID(key_of(1)).sample((1, 4, 8, 8))
    with pytest.raises(WatermarkError, match="more than 3 channels"):
        RingID(key_of(1)).sample((1, 3, 64, 64))
    with pytest.raises(WatermarkError, match="NaN"):
        RingID(key_of(1)).p_values(torch.full((1, *FULL), math.nan))
