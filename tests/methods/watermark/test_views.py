"""A finder who knows neither size nor orientation: what is looked at, and that p-values pay for it."""

import math

import pytest
import torch
from semiperm.methods.watermark.config import DetectionConfig
from semiperm.methods.watermark.detection import detect_in
from semiperm.methods.watermark.edits import within_margin
from semiperm.methods.watermark.keys import WatermarkKey
from semiperm.methods.watermark.mark import KeyedMark, Payload, read
from semiperm.methods.watermark.search import Search
from semiperm.methods.watermark.views import signed_sizes, views


class Glass:
    """Pictures of 64 x 64 are their own noise, cell by cell of 2 x 2 pixels."""

    multiple = 2

    def __init__(self, native=64):
        self.native, self.seen = native, []

    def encode(self, pixels):
        self.seen += [tuple(one.shape[-2:]) for one in pixels]
        return torch.nn.functional.avg_pool2d(torch.stack(pixels), 2) * 8 - 4

    def invert(self, latents, steps):
        return latents


@pytest.fixture(scope="module")
def key():
    return WatermarkKey("studio", 3, "", bytes(range(32)), bytes(range(32, 64)), bytes(range(64, 96)))


@pytest.fixture(scope="module")
def signed(key):
    (noise,) = KeyedMark(key).sample((1, 3, 32, 32), Payload(9), torch.Generator().manual_seed(1))
    return (noise / 8 + 0.5).clamp(0, 1).repeat_interleave(2, -1).repeat_interleave(2, -2)


def scaled(picture, size):
    return torch.nn.functional.interpolate(picture[None], size=size, mode="bicubic", antialias=True).clamp(0, 1)[0]


def look(pictures, key, native=64, **settings):
    settings = {"ladder": (0,)} | settings
    return detect_in(pictures, Glass(native), [key], DetectionConfig(**settings))


def test_resized_pictures_are_found_without_their_size(key, signed):
    as_it_was = look([signed], key)[0]
    large = [scaled(signed, size) for size in ((128, 128), (96, 96), (300, 300))]
    for result in look(large, key):
        assert result.verdict == "valid" and result.transform == "resized to 64 x 64"
    # The same pixels as at their own size, at most four times as likely by chance.
    known = look([large[0]], key, size=(64, 64))[0]
    assert look([large[0]], key)[0].log10_p == pytest.approx(known.log10_p + math.log10(2))
    assert as_it_was.transform == "as given" and as_it_was.log10_p == look([signed], key, None)[0].log10_p
    assert look([large[0]], key, None)[0].verdict == "absent"


def test_both_readings_of_an_orientation(key, signed):
    turned = signed.rot90(1, (-2, -1))
    for readings in ((signed, turned), (turned, signed)):
        (result,) = look([readings], key)
        assert result.verdict == "valid"
        assert result.log10_p == pytest.approx(look([signed], key)[0].log10_p + math.log10(2))
    assert result.transform == "turned as its EXIF says"
    four = scaled(turned, (128, 128)), scaled(signed, (128, 128))
    (result,) = look([four], key)
    assert result.verdict == "valid" and result.transform == "turned as its EXIF says, resized to 64 x 64"
    assert result.log10_p == pytest.approx(look([four[1]], key, size=(64, 64))[0].log10_p + math.log10(4))  # 2 bits


def paged(picture, margin=(6, 9, 4, 12), color=0.96):
    left, right, top, bottom = margin
    page = torch.full((3, picture.shape[1] + top + bottom, picture.shape[2] + left + right), color)
    page[:, top : top + picture.shape[1], left : left + picture.shape[2]] = picture
    return page


def test_pictures_on_a_page_are_found_without_their_place(key, signed):
    """Screenshots: enlarged by 5 / 4, with a margin of the page around them, or on two sides alone."""
    shown = scaled(signed, (80, 80))
    known = look([shown], key, size=(64, 64))[0]
    for margin in ((6, 9, 4, 12), (30, 30, 0, 0)):
        (result,) = look([paged(shown, margin)], key)
        assert result.verdict == "valid" and result.transform == "cut out of its margin, resized to 64 x 64"
        assert result.log10_p == pytest.approx(known.log10_p + math.log10(4))  # two sizes of each
    turned = paged(shown).rot90(1, (-2, -1))
    (result,) = look([(turned, paged(shown))], key)
    assert result.verdict == "valid" and result.transform.startswith("turned as its EXIF says, cut out of its margin")
    assert look([paged(shown)], key, None)[0].verdict == "absent"  # the size that it had is not known


def test_what_is_no_margin():
    drawn = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(within_margin(paged(drawn)), drawn)
    noisy = paged(drawn) + 0.02 * torch.randn(3, 56, 55, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    assert within_margin(noisy).shape == drawn.shape  # as JPEG leaves it
    for other in (drawn, paged(drawn, (5, 0, 0, 5)), paged(drawn, (70, 70, 70, 70)), torch.full((3, 8, 8), 0.5)):
        assert within_margin(other) is None


def test_a_picture_is_only_looked_at_until_it_is_found(key, signed):
    glass = Glass()
    detect_in([(signed, signed.flip(-1))], glass, [key], DetectionConfig(ladder=(0,)))
    assert glass.seen == [(64, 64)]


@pytest.mark.parametrize("native", [64, None])
@pytest.mark.parametrize("size", [(2, 2), (1, 40), (8, 8), (30, 34)])
def test_small_pictures_are_enlarged(key, size, native):
    for search in (None, Search(budget=8)):
        (result,) = look([torch.rand(3, *size)], key, native, search=search if native else None)
        assert result.verdict == "absent" and 0 < result.p_value <= 1


def test_a_small_copy_is_found_where_the_size_is_the_models():
    """Shrunk by 3 / 4: too small for a latent of its own."""
    key = WatermarkKey("studio", 3, "", bytes(range(32)), bytes(range(32, 64)))
    (noise,) = KeyedMark(key).sample((1, 3, 20, 20), Payload(9), torch.Generator().manual_seed(1))
    picture = (noise / 8 + 0.5).clamp(0, 1).repeat_interleave(2, -1).repeat_interleave(2, -2)
    (result,) = look([scaled(picture, (30, 30))], key, 40)
    assert result.verdict != "absent" and result.log10_p < -6 and result.transform == "resized to 40 x 40"


@pytest.mark.parametrize("count", [12, pytest.param(60, marks=pytest.mark.slow)])
def test_null_p_values_are_not_too_small(signed, count):
    keys = [
        WatermarkKey("guess", 1, "", torch.randint(256, (32,)).to(torch.uint8).numpy().tobytes()) for _ in range(count)
    ]
    readings = (scaled(signed, (128, 128)), scaled(signed.flip(-1), (128, 128)))
    p = torch.tensor([look([readings], key)[0].p_value for key in keys])
    for level in (0.2, 0.5):
        assert (p <= level).float().mean() <= level + 3 * (level * (1 - level) / len(p)) ** 0.5


def test_a_search_knows_the_models_size(key, signed):
    cut = signed[:, 2:60, 4:62]
    (plain,) = look([cut], key)
    (found,) = look([cut], key, search=Search(rotation=0, steps=0, budget=64))
    assert plain.verdict == "absent" and found.verdict == "valid" and "58 x 58" in found.transform
    (known,) = look([cut], key, search=Search(rotation=0, steps=0, budget=64), size=(64, 64))
    assert known.log10_p < found.log10_p <= known.log10_p + 2  # two sizes, and a coarser grid on half the budget


def test_which_sizes():
    assert (
        signed_sizes((512, 512), None, 8)
        == signed_sizes((512, 512), 512, 8)
        == signed_sizes((517, 512), 512, 8)
        == [None]
    )
    assert signed_sizes((1024, 1024), 512, 8) == [None, (512, 512)]
    assert signed_sizes((1536, 1024), 512, 8) == [None, (768, 512)]
    assert signed_sizes((3000, 4000), 512, 8) == [(512, 680)]  # a photo: its own size would take minutes
    assert signed_sizes((1792, 2304), 1024, 8) == [None, (896, 1152)]  # as SDXL is trained
    assert signed_sizes((832, 1216), 1024, 8) == [None]
    assert len(views((torch.rand(3, 128, 128),) * 2, 2, 64, None, lambda pixels: 4096)) == 4


def test_a_grey_copy_of_the_usual_size_is_found(key):
    """What grey copies leave on the canvas (right signs of .53, .515, .66 and .69 in its four channels), at 4x64x64.

    At the canvas's own 4x16x16 the same leaves 2 of 8.
    """
    noise = KeyedMark(key).sample((2, 4, 64, 64), Payload(9), torch.Generator().manual_seed(1))
    rho = torch.tensor([math.sin(math.pi * (share - 0.5)) for share in (0.53, 0.515, 0.66, 0.69)])[:, None, None]
    seen = rho * noise + (1 - rho**2).sqrt() * torch.randn(noise.shape, generator=torch.Generator().manual_seed(2))
    assert all(reading.mac_ok and reading.log10_p < -50 for reading in read(seen, [key]))
