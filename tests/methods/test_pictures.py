"""One reading of pictures and masks for everybody."""

import numpy as np
import pytest
import torch
from PIL import Image
from semiperm.methods.errors import SemipermError
from semiperm.methods.pictures import fit_to, from_pil, mask_of, picture_and_alpha, picture_of, to_aspect

RGB = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10
EXPECTED = torch.from_numpy(RGB).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize(
    "given",
    [Image.fromarray(RGB), RGB, RGB.astype(np.float32) / 255, EXPECTED, EXPECTED.double()],
    ids=["PIL", "uint8", "float array", "tensor", "double"],
)
def test_the_same_picture_however_it_is_given(given):
    torch.testing.assert_close(picture_of(given), EXPECTED)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_mode_of_pil_becomes_rgb(mode):
    picture = picture_of(Image.fromarray(RGB).convert(mode))
    assert picture.shape == (3, 2, 4) and picture.dtype == torch.float32


def test_rounding_beyond_the_range_is_cut_and_more_is_refused():
    assert picture_of(EXPECTED + 5e-4 - 2 * 5e-4 * (EXPECTED < 0.1)).amin() >= 0
    for wrong in (EXPECTED * 2 - 1, EXPECTED * 255, EXPECTED / 0, torch.zeros(3, 0, 4), (EXPECTED * 255).byte()):
        with pytest.raises(SemipermError, match="in 0..1, none NaN"):
            picture_of(wrong)


@pytest.mark.parametrize("wrong", [None, "cat.png", torch.rand(2, 4), torch.rand(1, 3, 2, 4), torch.rand(4, 2, 4)])
def test_what_is_no_picture_is_refused(wrong):
    with pytest.raises(SemipermError, match="a picture is"):
        picture_of(wrong)


def test_masks():
    white = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    for given in (white, white.bool(), white.byte() * 255, Image.fromarray((white.byte() * 255).numpy())):
        torch.testing.assert_close(mask_of(given), white)
    for wrong in (torch.rand(1, 2, 2), "mask", None):
        with pytest.raises(SemipermError, match="a mask is"):
            mask_of(wrong)
    with pytest.raises(SemipermError, match="in 0..1"):
        mask_of(white * 255)


def test_pil_keeps_its_channels():
    assert from_pil(Image.fromarray(RGB).convert("L")).shape == (1, 2, 4)
    assert from_pil(Image.fromarray(RGB).convert("RGBA")).shape == (4, 2, 4)


def test_pictures_are_cut_or_padded_and_stretched_only_when_asked():
    wide = torch.zeros(3, 4, 12)
    wide[:, :, 4:8] = 1
    assert torch.equal(fit_to(wide, 4, 4), torch.ones(3, 4, 4)), "the middle that has the shape"
    padded = fit_to(wide, 12, 12, "pad", 0.5)
    assert torch.equal(padded[:, 4:8], wide) and (padded[:, :4] == 0.5).all() and (padded[:, 8:] == 0.5).all()
    assert torch.equal(fit_to(wide, 4, 12, "stretch"), wide)
    for fit in ("crop", "pad", "stretch"):
        assert fit_to(torch.rand(3, 5, 7), 16, 9, fit).shape == (3, 16, 9)
        assert fit_to(torch.rand(2, 3, 5, 7), 3, 11, fit).shape == (2, 3, 3, 11)
    assert to_aspect(wide, 1, 1).shape == (3, 4, 4) and to_aspect(wide, 1, 1, "pad").shape == (3, 12, 12)
    with pytest.raises(SemipermError, match="fit='fill'; expected one of crop, pad, stretch"):
        to_aspect(wide, 4, 4, "fill")


@pytest.mark.parametrize("kind", ["pil", "palette", "tensor", "array", "bytes"])
def test_alpha_hides_what_lies_under_it(kind):
    pixels = np.zeros((4, 6, 4), np.uint8)
    pixels[..., 0], pixels[:2, :, 3] = 255, 255  # red, of which the upper half is seen
    pixels[2:, :, 1] = 255  # yellow that is not
    given = {
        "pil": Image.fromarray(pixels, "RGBA"),
        "palette": Image.fromarray(pixels, "RGBA").quantize(8),
        "tensor": torch.from_numpy(pixels).permute(2, 0, 1).float() / 255,
        "array": pixels.astype(np.float32) / 255,
        "bytes": pixels,
    }[kind]
    picture, alpha = picture_and_alpha(given)
    assert picture.shape == (3, 4, 6) and torch.equal(alpha, torch.tensor([1.0, 1, 0, 0])[:, None].expand(4, 6))
    assert torch.allclose(picture, torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 4, 6), atol=0.02)


def test_opaque_pictures_have_no_alpha_and_transparent_ones_are_refused():
    opaque = Image.new("RGBA", (3, 2), (9, 9, 9, 255))
    assert picture_and_alpha(opaque)[1] is picture_and_alpha(opaque.convert("RGB"))[1] is None
    with pytest.raises(SemipermError, match="every pixel of a picture is transparent"):
        picture_and_alpha(Image.new("RGBA", (3, 2), (9, 9, 9, 0)))
