"""The way from pictures to verdicts, with a model that cannot be wrong: its pictures are their own noise."""

import pytest
import torch
from semiperm.methods.errors import WatermarkError
from semiperm.methods.watermark.config import DetectionConfig
from semiperm.methods.watermark.content import bind
from semiperm.methods.watermark.detection import detect_in
from semiperm.methods.watermark.keys import WatermarkKey
from semiperm.methods.watermark.mark import KeyedMark, Payload
from semiperm.methods.watermark.search import Search
from semiperm.methods.watermark.views import latent_mask, whole_cells


class Glass:
    """Latents are pictures of 3 channels, cell by cell of 2 x 2 pixels, in 0..1; inverting changes nothing."""

    multiple = 2

    def encode(self, pixels):
        return torch.stack(pixels)[..., ::2, ::2] * 8 - 4

    def invert(self, latents, steps):
        return latents


def draw(latents):
    return [(row / 8 + 0.5).clamp(0, 1).repeat_interleave(2, -1).repeat_interleave(2, -2) for row in latents]


@pytest.fixture(scope="module")
def key():
    return WatermarkKey.new("studio", 3)


def embed(pixels):
    """What the left edge shows."""
    return (pixels[..., :2] - pixels[..., :2].mean()).flatten(1)


def test_a_bound_picture_is_valid_and_a_transplant_is_not(key):
    mark = KeyedMark(key)
    latents = mark.sample((2, 3, 32, 32), Payload(9), torch.Generator().manual_seed(1), bound=True)
    features = torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
    pictures = draw(bind(latents, features, key))
    looks = iter(features[:, None])
    same = detect_in(pictures, Glass(), [key], DetectionConfig(embedding=lambda _: next(looks)))
    assert [r.verdict for r in same] == ["valid", "valid"]
    assert all(r.content_p_value < 1e-6 and r.payload.unique_id == 9 for r in same)
    other = detect_in(pictures, Glass(), [key], DetectionConfig(embedding=lambda _: -features[:1]))
    assert [r.verdict for r in other] == ["content differs", "content differs"]
    assert all(r.content_p_value > 0.01 and r.log10_p < -6 and r.payload.unique_id == 9 for r in other)
    reader = detect_in(pictures, Glass(), [WatermarkKey("studio", 3, key.created, key.stream_key)])
    assert [r.verdict for r in reader] == ["unverified", "unverified"]


def test_pictures_that_are_not_bound_have_no_content(key):
    found = detect_in(draw(KeyedMark(key).sample((1, 3, 32, 32), Payload(9))), Glass(), [key])[0]
    assert found.verdict == "valid" and found.content_p_value is None and found.transform == "as given"
    assert found.evidence.shape == (3, 32, 32) and (found.evidence >= 0).mean() > 0.95
    assert "evidence" not in repr(found)


def test_only_what_the_mask_holds_is_counted(key):
    picture = draw(KeyedMark(key).sample((1, 3, 32, 32), Payload(9)))[0]
    generator = torch.Generator().manual_seed(3)
    mask = torch.zeros(64, 64)
    mask[:, :40] = 1
    picture[..., 40:] = draw(torch.randn(1, 3, 32, 32, generator=generator))[0][..., 40:]
    found, whole = (detect_in([picture], Glass(), [key], mask=m)[0] for m in (mask, None))
    assert found.verdict == "valid" and found.log10_p < whole.log10_p
    assert not found.evidence[..., 20:].any() and found.evidence[..., :20].any()


@pytest.mark.parametrize("value, dtype", [(1, torch.float32), (255, torch.uint8), (1, torch.bool)])
def test_a_mask_takes_the_nearest_pixel(value, dtype):
    mask = torch.zeros(8, 8, dtype=dtype)
    mask[1:5, 0:4] = value
    assert latent_mask(mask, 4, 4).nonzero().tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]
    for wrong, words in ((torch.zeros(8, 8), "no cell"), (torch.zeros(1, 8, 8), "expected")):
        with pytest.raises(WatermarkError, match=words):
            latent_mask(wrong, 4, 4)


def test_resized_pictures_come_back_to_the_signed_size(key):
    picture = draw(KeyedMark(key).sample((1, 3, 32, 32), Payload(9)))[0]
    large = picture.repeat_interleave(2, -1).repeat_interleave(2, -2)
    found, without = (detect_in([large], Glass(), [key], DetectionConfig(size=size))[0] for size in ((64, 64), None))
    assert found.verdict == "valid" and without.verdict == "absent"


def test_what_cannot_be_looked_at(key):
    picture = torch.rand(3, 64, 64)
    with pytest.raises(WatermarkError, match="whole pictures"):
        detect_in([picture], Glass(), [key], DetectionConfig(search=Search()), mask=torch.ones(64, 64))
    with pytest.raises(WatermarkError, match="smaller"):
        whole_cells(torch.rand(3, 1, 8), 2)


def test_a_config_is_checked_and_made_plain():
    config = DetectionConfig(ladder=[0, 5], search=True, size=[64, 48])
    assert (config.ladder, config.search, config.size) == ((0, 5), Search(), (64, 48))
    assert DetectionConfig(search=False).search is None
    for wrong, words in (
        ({"false_positive_rate": 1.0}, "false positive rate is 1.0"),
        ({"ladder": (5, 5)}, "rising"),
        ({"batch_size": 0}, "at least 1"),
        ({"size": (64,)}, "height, width"),
    ):
        with pytest.raises(WatermarkError, match=words):
            DetectionConfig(**wrong)
