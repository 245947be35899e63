"""Weights of channels: p-values stay exact whatever they are, weak channels cost nothing, a file names its model."""

import numpy as np
import pytest
import torch
from marks import gaussian_channel, key_of, seeded
from scipy import stats
from semiperm.methods.errors import WatermarkError
from semiperm.methods.files import save_safetensors
from semiperm.methods.watermark.aids import aids_of_model
from semiperm.methods.watermark.channels import (
    ChannelWeights,
    as_read,
    correlation,
    load_channels,
    save_channels,
)
from semiperm.methods.watermark.config import DetectionConfig
from semiperm.methods.watermark.content import bind
from semiperm.methods.watermark.detection import detect_in
from semiperm.methods.watermark.mark import KeyedMark, Payload, read
from semiperm.methods.watermark.search import Search
from semiperm.methods.watermark.statistics import levelled

SHAPE = (16, 16, 16)
RHO = torch.tensor([0.65] * 4 + [0.1] * 12)  # about what canvas-flow gives back after five steps
MODEL = "0123456789abcdef"


def weights(rho=RHO) -> ChannelWeights:
    return ChannelWeights({0: rho / 2, 1: rho}, MODEL)


def worn(latents: torch.Tensor, seed: int = 9) -> torch.Tensor:
    """What a model of such channels gives back."""
    rho = RHO[:, None, None]
    return rho * latents + (1 - rho**2).sqrt() * torch.randn(latents.shape, generator=seeded(seed))


def test_strong_channels_count():
    given = worn(KeyedMark(key_of(1)).sample((6, *SHAPE), Payload(5), seeded(2)))
    plain = read(levelled(given), [key_of(1)], thorough=True)
    weighed = read(as_read(given, None, weights(), 1), [key_of(1)], votes=True, thorough=True)
    found, before = (sum(one.log10_p < -6 for one in some) for some in (weighed, plain))
    assert found >= 5 and found >= before + 3, (found, before)


def test_equal_channels_are_weighed_alike_and_zeros_stay():
    noise = torch.randn(2, 4, 8, 8, generator=seeded(3)) * torch.tensor([1.0, 5.0, 0.2, 1.0])[:, None, None]
    noise[:, :, :2] = 0
    votes = ChannelWeights({1: torch.full((4,), 0.5)}).votes(noise, 1)
    rms = votes.square().mean((-2, -1)).sqrt()
    assert torch.allclose(rms, rms[0, 0].expand_as(rms)) and torch.equal(votes == 0, noise == 0)
    assert torch.equal(votes.sign(), noise.sign()) and torch.isfinite(weights().votes(torch.zeros(1, *SHAPE), 1)).all()


def test_the_nearest_number_of_steps_counts():
    assert torch.equal(weights().weights(25), weights().weights(1)) and not torch.equal(
        weights().weights(0), weights().weights(1)
    )


def test_what_is_measured_is_the_correlation():
    noise = torch.randn(8, *SHAPE, generator=seeded(4))
    measured = correlation(noise, worn(noise))
    assert (measured - RHO).abs().max() < 0.1
    assert torch.allclose(correlation(noise, 7 * noise), torch.ones(16), atol=1e-5)


@pytest.mark.parametrize("kind", ["strong", "one channel", "of another model"])
@pytest.mark.parametrize("count", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_p_values_stay_exact_whatever_the_weights(kind, count):
    """One odd latent and fixed weights, a new random key each time: small p-values come no more often than they say."""
    rho = {
        "strong": RHO,
        "one channel": torch.tensor([0.9] + [0.0] * 15),
        "of another model": torch.rand(16, generator=seeded(5)),
    }[kind]
    latent = torch.randn(1, *SHAPE, generator=seeded(6)) ** 3 + 0.5
    votes = as_read(latent, None, weights(rho), 1)
    p = np.array([read(votes, [key_of(3000 + i)], votes=True)[0].p_value for i in range(count)])
    for rate in (0.02, 0.1, 0.3):
        assert (p < rate).sum() <= stats.binom.ppf(0.9999, count, rate), rate


class Worn:
    """A model whose latents are its pictures' cells; its inversion gives back what such channels give back."""

    multiple, native = 4, None

    def encode(self, pixels):
        cells = torch.stack(list(pixels))[:, 0].unfold(1, 4, 4).unfold(2, 4, 4)
        return cells.flatten(3).permute(0, 3, 1, 2) * 8 - 4  # 4 x 4 pixels are 16 channels

    def invert(self, latents, steps):
        return worn(latents) if steps else torch.zeros_like(latents) + 1e-3 * latents


def drawn(latents):
    pixels = torch.nn.functional.pixel_shuffle(latents / 8 + 0.5, 4).clamp(0, 1)
    return [row.expand(3, -1, -1) for row in pixels]


def test_detection_weighs_channels():
    key = key_of(7)
    pictures = drawn(KeyedMark(key).sample((4, *SHAPE), Payload(3), seeded(8)))
    found = [
        detect_in(pictures, Worn(), [key], DetectionConfig(ladder=(1,), channels=channels))
        for channels in (None, weights())
    ]
    plain, weighed = (sum(one.verdict == "valid" for one in results) for results in found)
    assert weighed >= 3 and weighed > plain


def test_a_search_weighs_channels():
    key = key_of(7)
    picture = drawn(KeyedMark(key).sample((1, *SHAPE), Payload(3), seeded(12)))[0].flip(-1)
    flips = Search(translation=0, crop=1, rotation=0)
    (plain,) = detect_in([picture], Worn(), [key], DetectionConfig(ladder=(1,), search=flips))
    (undone,) = detect_in([picture], Worn(), [key], DetectionConfig(ladder=(1,), search=flips, channels=weights()))
    assert plain.verdict == "absent" and undone.verdict != "absent" and undone.transform != "as given"


def test_bound_content_is_read_in_weighed_channels():
    key = key_of(9)
    features = torch.randn(1, 64, generator=seeded(10))
    latents = bind(KeyedMark(key).sample((1, *SHAPE), Payload(9), seeded(11), bound=True), features, key)
    config = DetectionConfig(ladder=(1,), channels=weights(), embedding=lambda _: features)
    (same,) = detect_in(drawn(latents), Worn(), [key], config)
    other = DetectionConfig(ladder=(1,), channels=weights(), embedding=lambda _: -features)
    (moved,) = detect_in(drawn(latents), Worn(), [key], other)
    assert (same.verdict, moved.verdict) == ("valid", "content differs") and same.content_p_value < 1e-3


def test_a_file_names_its_model(tmp_path):
    file = tmp_path / "channels.safetensors"
    save_channels(weights(), file, {"pictures": 4})
    kept = load_channels(file)
    assert kept.model == MODEL and torch.equal(kept.weights(1), weights().weights(1))
    assert aids_of_model({"channels": file}, lambda: "0123456789abcdee").keys() == {"channels"}
    assert aids_of_model({"channels": file}, lambda: "fedcba9876543210") == {}
    assert aids_of_model({}, lambda: pytest.fail("nobody asked")) == {}
    save_safetensors({"1": torch.zeros(1)}, file, {"format": "other"})
    with pytest.raises(WatermarkError, match="holds no weights of channels"):
        load_channels(file)


@pytest.mark.parametrize(
    "correlations, words",
    [
        ({}, "expected"),
        ({0: torch.zeros(4, 1)}, "expected"),
        ({0: torch.ones(4), 1: torch.ones(3)}, "expected"),
        ({0: torch.tensor([0.5, float("nan")])}, "-1..1"),
        ({0: torch.zeros(4)}, "no channel's estimate agrees"),
    ],
)
def test_what_is_no_correlation_is_refused(correlations, words):
    with pytest.raises(WatermarkError, match=words):
        ChannelWeights(correlations)


def test_another_models_latents_are_refused():
    with pytest.raises(WatermarkError, match="weights of 16 channels were given for latents of 4"):
        weights().votes(gaussian_channel(torch.randn(1, 4, 8, 8), 0.5), 1)
