"""Tree-Ring as a baseline: Hermitian patterns, exact p-values, power over noise, turns, and its known weakness."""

import math

import numpy as np
import pytest
import torch
from marks import gaussian_channel, key_of, seeded
from scipy import stats
from semiperm.methods.errors import WatermarkError
from semiperm.methods.watermark.peers.tree_ring import TreeRing, cosine_p_values, half_plane

SMALL, MEDIUM, FULL = (4, 16, 16), (4, 32, 32), (4, 64, 64)


@pytest.mark.parametrize("size", [(64, 64), (16, 16), (33, 47), (96, 64)])
def test_the_half_plane_counts_every_pair_once(size):
    plane = half_plane(*size, 0, 10)
    points = list(zip(plane.u.tolist(), plane.v.tolist(), strict=True))
    both = set(points) | {(-u, -v) for u, v in points}
    assert len(both) == 2 * len(points) and (0, 0) not in both
    every = np.hypot(np.fft.fftfreq(size[0])[:, None], np.fft.fftfreq(size[1])) <= 10 / 64
    assert len(both) == every.sum() - 1
    if size == (64, 64):
        assert len(both) == 316  # the released mask's 317 without the mean


@pytest.mark.parametrize("shape", [SMALL, FULL, (4, 33, 47), (16, 96, 64)])
@pytest.mark.parametrize("channels", [(0,), (3, 1), None])
def test_the_pattern_lies_in_its_frequencies_and_nowhere_else(shape, channels):
    mark = TreeRing(key_of(1), channels=channels)
    latents, plain = mark.sample((2, *shape), seeded(0)), torch.randn((2, *shape), generator=seeded(0))
    assert latents.shape == (2, *shape) and latents.dtype == torch.float32
    change = torch.fft.fft2((latents - plain).double()).abs()
    radius = 64 * torch.hypot(*torch.meshgrid(*(torch.fft.fftfreq(n).double() for n in shape[1:]), indexing="ij"))
    outside = (radius > 10 + 1e-9) | (radius == 0)
    marked = sorted(range(shape[0]) if channels is None else channels)
    assert change[..., outside].max() < 1e-3
    assert (change[:, marked][..., ~outside].mean() > 10) and change.sum(
        (0, 2, 3)
    ).nonzero().flatten().tolist() == marked
    spectrum = torch.fft.fft2(latents[:, marked].double())[..., ~outside]
    assert (spectrum[0] - spectrum[1]).abs().max() < 1e-3  # the same in every picture
    assert (mark.p_values(latents) < 1e-15).all()


def test_noise_is_normal_and_white_over_keys():
    latents = torch.cat([TreeRing(key_of(i), channels=None).sample((1, *SMALL), seeded(i)) for i in range(400)])
    latents = latents.flatten(1)
    p = np.array([stats.kstest(column, "norm").pvalue for column in latents.T.numpy()])
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    assert (latents.T @ latents / 400 - torch.eye(1024)).abs().max() < 6 / math.sqrt(400)


def test_pictures_of_one_key_share_the_pattern():
    mark, plane = TreeRing(key_of(1)), half_plane(64, 64, 0, 10)
    average = mark.sample((50, *FULL), seeded(0)).mean(0, keepdim=True)
    assert (np.abs(plane.read(average[:, 0])) ** 2).mean() == pytest.approx(1, abs=0.2)  # not 1 / 50
    assert mark.p_values(average)[0] < 1e-15


def test_the_cosine_has_its_law():
    """In the plane the angle is uniform; in three dimensions the cosine is; elsewhere a simulation tells."""
    angle = np.array([0.1, 1.0, 2.5])
    rows = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    assert np.allclose(cosine_p_values(rows, np.array([2.0, 0.0])), angle / np.pi)
    rows = np.array([[0.3, 0.4, 0.0], [-1.0, 0.0, 1.0]])
    assert np.allclose(cosine_p_values(rows, np.array([5.0, 0.0, 0.0])), [0.2, 0.5 + 0.5 / math.sqrt(2)])
    p = [cosine_p_values(np.ones((1, 20)), np.random.default_rng(i).normal(size=20))[0] for i in range(4000)]
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    assert cosine_p_values(np.zeros((1, 20)), np.ones(20))[0] == 1


@pytest.mark.parametrize("kind", ["gaussian", "fixed", "signs"])
@pytest.mark.parametrize(("pattern", "shape"), [("rand", SMALL), ("rand", MEDIUM), ("ring", MEDIUM)])
def test_null_p_values_are_uniform_over_keys(kind, pattern, shape):
    """Whatever the latent: one fixed, smooth and skewed picture, or one of equal magnitudes, as well as noise."""
    trials, fixed = 1000, torch.randn(1, *shape, generator=seeded(1)).cumsum(-1) + 2
    p = []
    for i in range(trials):
        row = {"gaussian": torch.randn(1, *shape, generator=seeded(i)), "fixed": fixed, "signs": fixed.sign()}[kind]
        p.append(TreeRing(key_of(i), pattern).p_values(row)[0])
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    assert (np.array(p) < 1e-2).sum() <= stats.binom.ppf(0.9995, trials, 1e-2)


def test_detection_over_the_gaussian_channel():
    for shape, channels, rho in ((SMALL, None, 0.75), (MEDIUM, (0,), 0.75), (FULL, (0,), 0.4)):
        rows = []
        for i in range(40):
            mark = TreeRing(key_of(i), channels=channels)
            rows.append(mark.p_values(gaussian_channel(mark.sample((1, *shape), seeded(i)), rho, 1000 + i))[0])
        assert (np.array(rows) < 1e-6).mean() > 0.95


def test_rings_survive_turns_and_rand_patterns_do_not():
    ring, rand = TreeRing(key_of(1), "ring", channels=(0, 1)), TreeRing(key_of(1), channels=(0, 1))
    for mark, survives in ((ring, True), (rand, False)):
        latents = mark.sample((1, *FULL), seeded(0))
        for turned in (latents.rot90(1, (-2, -1)), latents.flip(-1)):
            assert (mark.p_values(turned)[0] < 1e-6) == survives
        assert mark.p_values(latents.roll((1, 1), (-2, -1)))[0] < 1e-6  # low frequencies hardly see one element


def test_neither_offset_nor_scale_matters_and_wrong_keys_find_nothing():
    mark = TreeRing(key_of(1))
    latents = gaussian_channel(mark.sample((1, *FULL), seeded(0)), 0.3)
    assert mark.p_values(5 * latents + 3)[0] == pytest.approx(mark.p_values(latents)[0], rel=1e-3)
    for other in (TreeRing(key_of(2)), TreeRing(key_of(1), scope="model"), TreeRing(key_of(1), channels=(1,))):
        assert other.p_values(mark.sample((1, *FULL), seeded(0)))[0] > 1e-4
    assert mark.p_values(torch.zeros(1, *FULL))[0] == 1 and mark.p_values(torch.full((1, *FULL), 3.0))[0] > 1e-4


def test_errors_say_what_was_given():
    for options, said in (
        ({"pattern": "zeros"}, "'zeros'"),
        ({"radius": 40}, "radius of 40"),
        ({"channels": ()}, r"channels \(\)"),
        ({"channels": (1, 1)}, r"channels \(1, 1\)"),
    ):
        with pytest.raises(WatermarkError, match=said):
            TreeRing(key_of(1), **options)
    with pytest.raises(WatermarkError, match="'ring' pattern of radius 10 holds 3 numbers"):
        TreeRing(key_of(1), "ring").sample((1, *SMALL))
    with pytest.raises(WatermarkError, match="'rand' pattern of radius 10 holds"):
        TreeRing(key_of(1)).sample((1, 4, 8, 8))
    for shape in ((1, 256, 64), (1, 16, 3, 8, 8)):
        with pytest.raises(WatermarkError, match=r"needs \(B, C, H, W\)"):
            TreeRing(key_of(1)).sample(shape)
    with pytest.raises(WatermarkError, match="more than 4 channels"):
        TreeRing(key_of(1), channels=(4,)).sample((1, *FULL))
    with pytest.raises(WatermarkError, match="NaN"):
        TreeRing(key_of(1)).p_values(torch.full((1, *FULL), math.nan))
