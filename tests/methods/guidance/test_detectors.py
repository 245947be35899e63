"""Detectors: closed-form fits find what they were shown, and thresholds keep the rate of false alarms."""

import math

import pytest
import torch
from semiperm.methods.errors import GuidanceError
from semiperm.methods.guidance.detectors import (
    DetectorPair,
    Moments,
    PictureDetector,
    TextDetector,
    conformal_threshold,
    discriminant,
    load_detectors,
    save_detectors,
)
from semiperm.methods.guidance.examples import BENIGN, harmless

SHARES = (0.05, 0.3, 0.6, 0.9)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_discriminant_is_fishers():
    harm, benign = normal(30, 6, seed=1) + 1, normal(40, 6, seed=2)
    around = Moments(6)
    for rows in benign.split(7):  # the fit never needs all of them at once
        around.add(rows)
    spread = torch.cov(benign.double().T)
    assert torch.allclose(around.covariance, spread, atol=1e-12) and around.count == 40
    w, offset = discriminant(harm.double().mean(0), around, shrink=0.1)
    spread = 0.9 * spread + 0.1 * spread.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    expected = torch.linalg.inv(spread) @ (harm.double().mean(0) - benign.double().mean(0))
    assert torch.cosine_similarity(w.double(), expected, dim=0) > 1 - 1e-6
    scores = benign @ w - offset
    assert abs(scores.mean()) < 1e-5 and abs(scores.std() - 1) < 1e-5


@pytest.mark.parametrize("alarms", [0.05, 0.2])
def test_thresholds_are_conformal(alarms):
    """Over many calibrations the rate of new harmless examples above them is at most alarms, and not far below it."""
    generator, rates = torch.Generator().manual_seed(5), []
    for _ in range(300):
        scores = torch.rand(60, generator=generator)
        rates.append(1 - conformal_threshold(scores, alarms))  # of a uniform score, exactly
        assert conformal_threshold(scores, alarms) == scores.sort().values[math.ceil(61 * (1 - alarms)) - 1]
    assert alarms - 0.03 < sum(rates) / len(rates) < alarms + 0.002
    with pytest.raises(GuidanceError, match="at least 99"):
        conformal_threshold(torch.rand(60, generator=generator), 0.01)


def pictures(count, seed, thing=False):
    """Steps of a run: noise that clears, and in it, if there is one, a thing at any place."""
    x = normal(count, 4, 12, 12, seed=seed)
    if thing:
        pattern = torch.tensor([2.5, -2.5, 2.0, 0.0])[:, None, None].expand(4, 3, 3)
        for i in range(count):
            row, column = (3 * i) % 9, (5 * i) % 9
            x[i, :, row : row + 3, column : column + 3] += pattern
    return [(share, share * x + 0.3 * normal(*x.shape, seed=seed + 100 + i)) for i, share in enumerate(SHARES)]


@pytest.fixture(scope="module")
def picture():
    return PictureDetector.fit(pictures(16, 1, thing=True), pictures(32, 2), pictures(64, 3), alarms=0.05)


def highest(detector, steps):
    return torch.stack([detector.score(x, share) for share, x in steps]).amax(dim=0)


def test_pictures_are_told_from_a_few_of_them_wherever_the_thing_lies(picture):
    assert (highest(picture, pictures(40, 11, thing=True)) > picture.threshold).float().mean() > 0.9
    assert (highest(picture, pictures(200, 12)) > picture.threshold).float().mean() < 0.12


def test_what_shows_the_thing_unasked_sets_no_threshold():
    def fit(held_out):
        return PictureDetector.fit(pictures(16, 1, thing=True), pictures(32, 2), held_out, alarms=0.05)

    calm, shown = pictures(60, 3), pictures(40, 4, thing=True)
    few, many = (
        [(share, torch.cat([x, there[:count]])) for (share, x), (_, there) in zip(calm, shown, strict=True)]
        for count in (4, 40)
    )
    assert fit(few).threshold == fit(calm).threshold < fit(many).threshold / 2


def test_harmless_prompts_name_no_category():
    ours = harmless(None, 0.02, ["a robot", "a gun"])
    assert len(ours) == 109 and not any("robot" in prompt for prompt in ours), "98 for the rate, and a tenth to spare"
    assert len(harmless(None, 0.015, ["robots"])) == len(BENIGN) - 6, "or what there is"
    assert harmless(["a robot"], 0.02, ["a robot"]) == ["a robot"], "those given are the caller's"
    with pytest.raises(GuidanceError, match="398 harmless prompts are needed, and 138 come with the package"):
        harmless(None, 0.005, ["robot"])


def test_files_round_trip(picture, tmp_path):
    text = TextDetector.fit(normal(8, 6, seed=1) + 2, normal(30, 6, seed=2), normal(50, 6, seed=3), 0.05)
    pairs = [DetectorPair("gore", text, picture, 0.1, "abc"), DetectorPair("hate", text, None, 0.1)]
    found = load_detectors(save_detectors(pairs, tmp_path / "d.safetensors"))
    assert [p.category for p in found] == ["gore", "hate"] and found[1].picture is None and found[0].model == "abc"
    assert torch.equal(found[0].text.weight, text.weight) and found[0].text.threshold == text.threshold
    for name in ("edges", "weights", "offsets"):
        assert torch.equal(getattr(found[0].picture, name), getattr(picture, name))


def test_what_does_not_fit_is_told(picture, tmp_path):
    with pytest.raises(GuidanceError, match="fit it for this model"):
        picture.score(torch.zeros(1, 16, 8, 8), 0.5)
    with pytest.raises(GuidanceError, match="no step"):
        PictureDetector.fit(pictures(4, 1)[:1], pictures(8, 2), pictures(40, 3), 0.1)
    with pytest.raises(GuidanceError, match="expected one"):
        DetectorPair("gore", None, None, 0.1)
    from semiperm.methods.files import save_safetensors

    with pytest.raises(GuidanceError, match="no detectors"):
        load_detectors(save_safetensors({"x": torch.zeros(1)}, tmp_path / "x.safetensors"))
    old = save_safetensors({}, tmp_path / "old.safetensors", {"format": "semiperm-detectors", "version": "1"})
    with pytest.raises(GuidanceError, match="of version 1, and this release reads 2: fit them again"):
        load_detectors(old)
