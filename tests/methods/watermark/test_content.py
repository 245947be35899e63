"""Content in the signs of the noise: written, found again, and an exact p-value for anything else."""

import math

import numpy as np
import pytest
import torch
from marks import seeded
from scipy import stats
from semiperm.methods.errors import WatermarkError
from semiperm.methods.watermark.content import (
    bind,
    content_agreement,
    content_bits,
    content_p_value,
    draw_bound,
    perceptual_hash,
)
from semiperm.methods.watermark.keys import WatermarkKey
from semiperm.methods.watermark.mark import KeyedMark, Payload, read

SHAPE = (4, 16, 16)


@pytest.fixture(scope="module")
def key():
    return WatermarkKey.new("studio", 3)


@pytest.mark.parametrize("shape", [SHAPE, (4, 32, 32), (4, 64, 64), (256, 64)])
def test_binding_leaves_payload_and_magnitudes_and_is_found(key, shape):
    latents = KeyedMark(key).sample((2, *shape), Payload(5), seeded(1), bound=True)
    features = torch.randn(2, 64, generator=seeded(2))
    bound = bind(latents, features, key)
    assert bound.abs().equal(latents.abs()) and not bound.equal(latents)
    changed = (bound.sign() != latents.sign()).flatten(1).float().mean(1)
    assert (changed < 0.1).all()  # half of an eighth at most
    for row, values, reading in zip(bound, features, read(bound, [key]), strict=True):
        assert reading.mac_ok and reading.bound and reading.payload.unique_id == 5
        assert content_p_value(row, reading, values, key) < 1e-9
        assert content_p_value(row, reading, -values, key) > 0.999
    assert bind(bound, features, key).equal(bound)


def test_what_is_not_bound_says_so(key):
    latents = KeyedMark(key).sample((1, *SHAPE), Payload(5), seeded(1))
    assert read(latents, [key])[0].bound is False
    with pytest.raises(WatermarkError, match="bound=True"):
        bind(latents, torch.randn(1, 64), key)
    marked = KeyedMark(key).sample((2, *SHAPE), Payload(5), seeded(1), bound=True)
    with pytest.raises(WatermarkError, match="1 embeddings were given for 2 latents"):
        bind(marked, torch.randn(1, 64), key)
    with pytest.raises(WatermarkError, match="one vector of finite"):
        bind(marked, torch.full((2, 64), math.nan), key)


def test_unrelated_features_give_uniform_p_values(key):
    latents = KeyedMark(key).sample((400, *SHAPE), None, seeded(1), bound=True)
    generator = seeded(2)
    bound = bind(latents, torch.randn(400, 512, generator=generator), key)
    other = torch.randn(400, 512, generator=generator)
    p_values = [
        content_p_value(row, reading, values, key)
        for row, reading, values in zip(bound, read(bound, [key]), other, strict=True)
    ]
    # The lattice tail P(T >= t) is a little conservative, and random vectors of 512 numbers are not quite orthogonal.
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3
    assert np.mean(np.array(p_values) < 0.05) < 0.09


def test_bits_agree_by_the_angle(key):
    first, second = torch.randn(2, 256, generator=seeded(3))
    mixed = 0.9 * first + 0.1 * second
    one, other = (content_bits(key, 7, values, 4000) for values in (first, mixed))
    assert np.mean(one == other) == pytest.approx(float(content_agreement(first[None], mixed[None])), abs=0.02)
    assert np.mean(one == content_bits(key, 8, first, 4000)) == pytest.approx(0.5, abs=0.04)  # directions of the nonce


def test_the_hash_sees_what_is_where_and_not_how_bright_or_how_large():
    picture = torch.rand(1, 3, 4, 4, generator=seeded(4))
    picture = torch.nn.functional.interpolate(picture, size=128, mode="bicubic").clamp(0, 1)
    other = torch.rand(1, 3, 4, 4, generator=seeded(5))
    other = torch.nn.functional.interpolate(other, size=128, mode="bicubic").clamp(0, 1)
    seen = perceptual_hash(picture)
    assert seen.shape == (1, 189)
    noisy = (picture + 0.05 * torch.randn(picture.shape, generator=seeded(6))).clamp(0, 1)
    small = torch.nn.functional.interpolate(picture, size=(64, 96), mode="area")
    for same in (noisy, small, picture * 0.7):
        assert content_agreement(seen, perceptual_hash(same)) > 0.9
    assert content_agreement(seen, perceptual_hash(other)) < 0.65
    assert content_agreement(seen, perceptual_hash(picture.flip(-1))) < 0.65


def test_draws_go_on_until_each_picture_stays_and_the_best_is_kept():
    key = WatermarkKey.new("studio", 1)
    noise = KeyedMark(key).sample((3, 4, 16, 16), Payload(1), bound=True)
    given, axes = noise.clone(), torch.eye(8)
    near = torch.nn.functional.normalize(axes[2] + 0.6 * axes[3], dim=0)
    looks = [  # what the pictures show that are drawn in each round
        [axes[0], axes[1], axes[2]],
        [axes[0], axes[4], near],  # the first stays, the second changed, the third nearly stays
        [axes[4], axes[5]],  # the second stays; the third's earlier draw was the better one
        [axes[5]],
    ]
    seen = iter(torch.stack(part) for part in looks)
    drawn = []

    def draw(noise, rows):
        drawn.append(list(rows))
        return [(len(drawn), i) for i in rows], torch.zeros(len(rows), 3, 8, 8)

    def found(**options):
        return draw_bound(draw, noise, key, advice="try again", embedding=lambda _: next(seen), **options)

    first, second, third = found(rounds=3)
    assert drawn == [[0, 1, 2], [0, 1, 2], [1, 2], [2]] and torch.equal(noise, given)
    assert [one.draws for one in (first, second, third)] == [2, 3, 4]
    assert first.picture == (2, 0) and second.picture == (3, 1) and third.picture == (4, 2)
    assert min(one.content_agreement for one in (first, second, third)) > 0.99
    assert not torch.equal(first.noise, noise[0]) and torch.equal(first.noise.abs(), noise[0].abs())
    drawn.clear()
    seen = iter(torch.stack(part) for part in ([axes[0], axes[1], near], [axes[0], axes[1], axes[2]], [axes[6]]))
    kept = found(rounds=2)[2]  # .83 of its bits stayed, and then none
    assert kept.picture == (2, 2) and kept.draws == 3 and 0.7 < kept.content_agreement < 0.88
    seen = iter([axes[:3], axes[3:6]])
    with pytest.raises(WatermarkError, match=r"3 of 3 pictures \(the first: number 1\).*at best 50%.*try again"):
        found(rounds=1)
