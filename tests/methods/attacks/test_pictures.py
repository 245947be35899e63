"""Each attack does what its name says, to every size, and repeats from its generator."""

import io

import numpy as np
import pytest
import torch
from marks import seeded
from PIL import Image
from semiperm.methods.attacks.pictures import ATTACKS, SUITE, attack, average_forgery, average_removal, parse_attack
from semiperm.methods.errors import SemipermError, WatermarkError


def pictures(batch=2, height=48, width=64):
    y, x = torch.meshgrid(torch.linspace(0.2, 0.8, height), torch.linspace(0.3, 0.7, width), indexing="ij")
    return torch.stack([torch.stack([x, y, (x + y) / 2]) * (1 - 0.1 * i) for i in range(batch)])


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_keeps_the_contract(name):
    one = ATTACKS[name]
    for pixels in (pictures(), pictures(1, 7, 5), torch.rand(2, 3, 1, 3, generator=seeded()).double(),
                   pictures().transpose(2, 3), torch.full((2, 3, 9, 9), 1.0)):  # fmt: skip
        before = pixels.clone()
        first, again = (attack(pixels, one.label(), seeded()) for _ in range(2))
        assert first.equal(again) and pixels.equal(before)
        assert first.dtype == pixels.dtype and 0 <= first.amin() and first.amax() <= 1
        assert first.shape[:2] == pixels.shape[:2]
        assert name == "crop" or first.shape == pixels.shape
        source = seeded()
        assert torch.cat([attack(row[None], one.label(), source) for row in pixels]).allclose(first, atol=1e-6)
    half = attack(pictures().half(), one.label(), seeded())
    assert half.dtype == torch.float16 and half.isfinite().all()
    changed = attack(torch.rand(2, 3, 32, 32, generator=seeded(4)), one.label(), seeded(1))
    assert name in ("none", "crop") or not changed.allclose(torch.rand(2, 3, 32, 32, generator=seeded(4)), atol=1e-3)
    if one.neutral is not None:
        assert attack(before, one.label(one.neutral), seeded()).equal(before)
    for end in {one.low, one.high} if one.strength is not None else ():
        assert attack(pictures(), one.label(end), seeded()).isfinite().all()


@pytest.mark.parametrize("name", ["noise", "crop", "crop-pad", "crop-rescale", "erase", "brightness-jitter"])
def test_chance_needs_no_generator(name):
    torch.manual_seed(5)
    one = attack(pictures(), name)
    torch.manual_seed(5)
    assert attack(pictures(), name).equal(one)
    assert name == "crop" or not attack(pictures(), name).equal(one)


def test_jpeg_is_pillows():
    pixels = torch.rand(1, 3, 33, 40, generator=seeded())
    array = (pixels[0].permute(1, 2, 0) * 255).round().byte().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=25)
    expected = np.asarray(Image.open(buffer).convert("RGB")) / 255
    assert np.allclose(attack(pixels, "jpeg:25")[0].permute(1, 2, 0), expected, atol=1e-6)
    errors = [(attack(pictures(), f"jpeg:{q}") - pictures()).abs().mean() for q in (5, 25, 95)]
    assert errors[0] > errors[1] > errors[2]


def test_crops_keep_the_share_they_say():
    pixels = torch.rand(4, 3, 80, 100, generator=seeded()) * 0.5 + 0.5
    assert attack(pixels, "crop:0.25", seeded()).shape == (4, 3, 40, 50)
    padded = attack(pixels, "crop-pad:0.25", seeded())
    kept = padded > 0
    assert kept.float().mean() == pytest.approx(0.25) and padded[kept].equal(pixels[kept])
    assert len({tuple(k[0].nonzero()[0].tolist()) for k in kept}) > 1  # each picture at a place of its own
    erased = attack(pixels, "erase:0.25", seeded())
    assert (erased == 0).float().mean() == pytest.approx(0.25) and erased[erased > 0].equal(pixels[erased > 0])
    # the same part as the crop's, enlarged: its middle stands in the middle
    small, large = (attack(pictures(1, 80, 80), f"{name}:0.25", seeded(3)) for name in ("crop", "crop-rescale"))
    assert large[..., 40, 40].allclose(small[..., 20, 20], atol=0.01)
    assert large.shape[-2:] == (80, 80) and small.shape[-2:] == (40, 40)


def test_resizing_and_blurring_lose_detail_only():
    checks = (torch.arange(64)[:, None] + torch.arange(64)[None]).remainder(2).float().expand(1, 3, 64, 64)
    for text in ("resize:0.25", "blur:2"):
        assert attack(checks, text).sub(0.5)[..., 8:-8, 8:-8].abs().max() < 0.1
        assert attack(pictures(), text).allclose(pictures(), atol=0.02)
    spot = torch.zeros(1, 3, 41, 41)
    spot[..., 20, 20] = 1
    row = attack(spot, "blur:3")[0, 0].sum(0)
    offsets = torch.arange(41) - 20
    assert row.sum() == pytest.approx(1, abs=1e-5)
    assert (row * offsets**2).sum().sqrt() == pytest.approx(3, abs=0.06)  # cut off at three deviations


def test_noise_is_float_and_clipped_and_its_legacy_wraps():
    grey, white = torch.full((1, 3, 128, 128), 0.5), torch.ones(1, 3, 128, 128)
    noise = attack(grey, "noise:0.05", seeded()) - grey
    assert noise.std() == pytest.approx(0.05, rel=0.02) and noise.mean().abs() < 1e-3
    assert attack(white, "noise:0.05", seeded()).amin() > 0.7
    wrapped = attack(white, "noise-legacy:0.05", seeded())
    assert wrapped.mul(255).allclose(wrapped.mul(255).round(), atol=1e-3)
    draws = np.trunc(torch.randn(3, 128, 128, generator=seeded()).numpy().astype(np.float64) * 0.05 * 255)
    as_bytes = np.full(draws.shape, 255, np.uint8) + draws.astype(np.int64).astype(np.uint8)  # what released codes do
    same = wrapped[0].mul(255).round().numpy() == as_bytes
    assert same.mean() > 0.999  # float32 may truncate another way where a draw is almost a whole number
    assert 0.4 < (wrapped < 0.5).float().mean() < 0.55  # half of white turned black


def test_light():
    pixels = pictures()
    assert attack(pixels, "brightness:0.5").allclose(pixels / 2)
    assert attack(pixels, "brightness:9").eq(1).any() and attack(pixels, "brightness:0").eq(0).all()
    assert attack(pixels, "contrast:0").std((1, 2, 3)).max() < 1e-6
    assert attack(pixels, "contrast:0.5").std() < pixels.std() < attack(pixels, "contrast:1.2").std()
    factors = attack(pixels[:1].repeat(200, 1, 1, 1) / 8, "brightness-jitter:6", seeded())[:, 0, 0, 0] / (0.3 / 8)
    assert factors.amin() < 0.3 and factors.amax() > 6.7 and factors.mean() == pytest.approx(3.5, abs=0.4)
    factors = attack(pixels[:1].repeat(99, 1, 1, 1), "brightness-jitter:0.2", seeded())[:, 0, 0, 0] / 0.3
    assert 0.79 < factors.amin() < factors.amax() < 1.21


def test_rotation_is_counter_clockwise_about_the_middle():
    square = pictures(1, 48, 48)
    assert attack(square, "rotate:90").equal(square.rot90(1, (2, 3)))
    assert attack(square, "rotate:-90").equal(square.rot90(-1, (2, 3)))
    assert attack(pictures(), "rotate:180").equal(pictures().flip(2, 3))
    assert attack(square, "rotate:89.999")[..., 4:-4, 4:-4].allclose(
        square.rot90(1, (2, 3))[..., 4:-4, 4:-4], atol=1e-3
    )
    wide = attack(torch.ones(1, 3, 40, 80), "rotate:90")
    assert wide.mean() == pytest.approx(0.5, abs=0.02) and wide[..., 40].amin() == 1 and wide[..., 5].amax() == 0
    there = attack(attack(pictures(1, 90, 90), "rotate:20"), "rotate:-20")
    assert there[..., 25:-25, 25:-25].allclose(pictures(1, 90, 90)[..., 25:-25, 25:-25], atol=0.01)
    expected = Image.fromarray((square[0].permute(1, 2, 0) * 255).round().byte().numpy())
    expected = np.asarray(expected.rotate(15, Image.Resampling.BILINEAR)) / 255
    assert np.abs(attack(square, "rotate:15")[0].permute(1, 2, 0).numpy() - expected)[8:-8, 8:-8].max() < 0.01


def test_flips_and_translations():
    pixels = pictures()
    assert attack(pixels, "flip").equal(pixels.flip(3)) and attack(pixels, "flip-vertical").equal(pixels.flip(2))
    moved = attack(pixels, "translate:5")
    assert moved[..., 5:, 5:].equal(pixels[..., :-5, :-5]) and not moved[..., :5, :].any() and not moved[..., :5].any()
    assert attack(pixels, "translate:-5")[..., :-5, :-5].equal(pixels[..., 5:, 5:])
    assert not attack(pixels, "translate:48").any()


def test_attacks_follow_one_another():
    pixels = pictures()
    assert attack(pixels, "flip + brightness:0.5").allclose(pixels.flip(3) / 2)
    source = seeded()
    one_by_one = attack(attack(pixels, "noise:0.1", source), "crop:0.5", source)
    assert attack(pixels, "noise:0.1+crop:0.5", seeded()).equal(one_by_one)
    assert [(a.name, s) for a, s in parse_attack("jpeg+blur:2")] == [("jpeg", 25), ("blur", 2)]


def test_the_suite_is_made_of_attacks():
    for text in SUITE:
        ((one, strength),) = parse_attack(text)
        assert text in (one.label(strength), one.name)
    assert {one.name for text in SUITE for one, _ in parse_attack(text)} >= {"jpeg", "noise", "noise-legacy", "rotate"}


def test_averaging_takes_a_fixed_pattern_off_and_puts_it_on():
    source = seeded()
    pattern = 0.05 * torch.randn(3, 16, 16, generator=source)
    plain = 0.3 + 0.4 * torch.rand(2 * 400 + 4, 3, 16, 16, generator=source)
    clean, marked, victims = plain[:400], plain[400:800] + pattern, plain[800:]
    residue = average_removal(victims + pattern, marked, clean) - victims
    assert residue.std() < 0.25 * pattern.std()
    forged = average_forgery(victims, marked, clean) - victims
    assert torch.corrcoef(torch.stack([forged.mean(0).flatten(), pattern.flatten()]))[0, 1] > 0.95
    assert average_removal(victims, marked, clean, 0).equal(victims)
    fresh = plain[400:800] + 0.05 * torch.randn(400, 3, 16, 16, generator=source)  # a mark that never repeats
    assert average_forgery(victims, fresh, clean).sub(victims).std() < 0.25 * pattern.std()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("jepg:25", "did you mean jpeg"),
        ("", "there is no attack ''"),
        ("melt", "choose a name from the list.*jpeg"),
        ("jpeg:high", "'high'.*not a strength; write jpeg:25"),
        ("jpeg:", "not a strength"),
        ("jpeg:0", "expected a whole number from 1 to 100"),
        ("jpeg:25.5", "whole number"),
        ("crop:0", "expected a number from 0.01 to 1"),
        ("noise:nan", "given the strength nan"),
        ("translate:inf", "given the strength inf"),
        ("flip:2", "it has none"),
        ("blur:1+nothing", "there is no attack 'nothing' in 'blur:1"),
    ],
)
def test_texts_that_name_no_attack(text, words):
    with pytest.raises(WatermarkError, match=words):
        attack(pictures(), text)


@pytest.mark.parametrize(
    "pixels",
    [
        torch.rand(3, 8, 8), torch.rand(1, 4, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.rand(0, 3, 8, 8),
        torch.rand(1, 3, 8, 8) * 255, torch.full((1, 3, 8, 8), float("nan")), -torch.rand(1, 3, 8, 8), "a.png",
    ],
)  # fmt: skip
def test_things_that_are_no_pictures(pixels):
    with pytest.raises(SemipermError, match=r"pictures? .*0\.\.1"):
        attack(pixels, "none")


def test_averages_need_pictures_of_one_size():
    for marked, clean in ((pictures(1, 8, 8), pictures()), (pictures(), pictures()[:0]), (pictures()[:0], pictures())):
        with pytest.raises(WatermarkError, match="of one size"):
            average_removal(pictures(), marked, clean)
