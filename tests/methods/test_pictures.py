"""One reading of pictures and masks for everybody."""

import numpy as np
import pytest
import torch
from PIL import Image
from semiperm.methods.errors import SemipermError
from semiperm.methods.pictures import from_pil, mask_of, picture_of

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
