"""Search for edits on a toy whose latents are means of 4 x 4 pixels, and on the canvas."""

import math

import pytest
import torch
import torch.nn.functional as F
from semiperm.methods.attacks.pictures import attack
from semiperm.methods.errors import WatermarkError
from semiperm.methods.watermark.edits import ROUNDS, Edit, crops, shifts, turns, without_flats
from semiperm.methods.watermark.keys import WatermarkKey
from semiperm.methods.watermark.mark import KeyedMark, Payload
from semiperm.methods.watermark.search import Search, run

KEY, OTHER = WatermarkKey.new("k", 1), WatermarkKey.new("o", 2)
SIZE = 128, 128


class Means:
    """Cells of 8 x 8 pixels; the four channels are the means of their quarters."""

    multiple = 8

    def __init__(self):
        self.encoded = self.inverted = 0

    def encode(self, pixels):
        self.encoded += len(pixels)
        return F.pixel_unshuffle(F.avg_pool2d(torch.stack(pixels).mean(1, keepdim=True) - 0.5, 4), 2)

    def invert(self, latents, steps):
        self.inverted += len(latents) * steps
        return latents


def _picture(size=SIZE, key=KEY, unique_id=77, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = KeyedMark(key).sample((1, 4, size[0] // 8, size[1] // 8), Payload(unique_id), generator)
    grey = F.interpolate(F.pixel_shuffle(noise, 2), scale_factor=4) * 0.12 + 0.5
    texture = torch.randn(3, *size, generator=generator) * 0.05
    return (grey[0] + texture).clamp(0, 1)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ("flip", "mirrored"),
        ("flip-vertical", "mirrored, turned by 180 degrees"),
        ("rotate:90", "turned by 90 degrees"),
        ("rotate:180", "turned by 180 degrees"),
        ("rotate:270", "turned by 270 degrees"),
        ("translate:13", "shifted by (13, 13) pixels"),
        ("translate:-21", "shifted by (-21, -21) pixels"),
        ("translate:8+jpeg:75", "shifted by (8, 8) pixels"),
        ("flip+translate:11", "mirrored, shifted by"),
        ("crop:0.75", "111 x 111 pixels cut out at"),
        ("crop-rescale:0.75", "and scaled"),
        ("flip+crop-rescale:0.8", "mirrored, 1"),
        ("rotate:7", "turned by"),
        ("rotate:-14.6", "turned by -1"),
        ("crop-pad:0.8", "plain areas filled"),
    ],
)
def test_edits_are_found_and_undone(edit, said):
    picture = _picture()
    edited = attack(picture[None], edit, torch.Generator().manual_seed(3))[0]
    found = run(edited, Means(), [OTHER, KEY], Search(), size=SIZE)
    reading = found.reading
    assert reading.log10_p + math.log10(2 * found.tries) < -6 and reading.payload.unique_id == 77 and reading.mac_ok
    assert said in found.transform and found.noise.shape == (4, 16, 16)
    assert found.picture.shape == picture.shape and found.evaluations <= 256
    blurred, original = (F.avg_pool2d(x[:, 32:96, 32:96], 8) for x in (found.picture, picture))
    assert torch.corrcoef(torch.stack([blurred.flatten(), original.flatten()]))[0, 1] > 0.7


def test_sizes_other_than_square_and_the_signed_one():
    picture = _picture((96, 192))
    found = run(picture.rot90(1, (1, 2)), Means(), [KEY], Search())
    assert found.transform == "turned by 90 degrees" and found.picture.shape == (3, 96, 192)
    small = attack(picture[None], "crop:0.8", torch.Generator().manual_seed(0))[0]
    found = run(small, Means(), [KEY], Search(), size=(96, 192))
    assert found.reading.payload.unique_id == 77 and "cut out" in found.transform
    double = F.interpolate(picture[None], scale_factor=2, mode="bicubic")[0].clamp(0, 1)
    found = run(double, Means(), [KEY], Search(), size=(96, 192))
    assert found.reading.payload.unique_id == 77 and found.transform == "as given"


@pytest.mark.parametrize("seed", range(3))
def test_other_keys_and_their_p_values(seed):
    inverter = Means()
    found = run(_picture(seed=seed), inverter, [OTHER], Search(budget=100), size=SIZE)
    assert found.reading.log10_p + math.log10(found.tries) > -2 and found.reading.payload is None
    assert found.evaluations == inverter.inverted <= 100
    found = run(_picture(seed=seed), inverter, [OTHER], Search(budget=1), size=SIZE)
    assert found.evaluations == 1 and found.reading.payload is None


def test_steps_are_counted():
    inverter = Means()
    found = run(_picture().flip(2), inverter, [KEY], Search(steps=3))
    assert found.evaluations == inverter.inverted == 24
    assert run(_picture().flip(2), Means(), [KEY], Search(steps=0)).evaluations == 0
    assert run(_picture(), Means(), [KEY], Search(steps=5, budget=3)) is None


@pytest.mark.parametrize(("cell", "phases"), [(8, 3), (8, 2), (16, 2)])
@pytest.mark.parametrize("size", [(128, 128), (96, 160)])
def test_tries_cover_all_that_finer_moves_can_reach(size, cell, phases):
    """The correction of the p-value: reachable places, whatever the search's choices, are no more than are counted."""
    for given in (size, (size[0] - 16, size[1] - 24), (144, 176)):
        families = (
            shifts(Edit(*given), size, 0.05, cell, phases),
            crops(Edit(*given), size, 0.9, cell, phases),
            turns(Edit(*size), size, 5, cell, phases),
        )
        for family in filter(None, families):  # some have not the proportions of any crop of .9
            starts = {edit.moved(down * cell, right * cell) for edit, moves in family.coarse for down, right in moves}
            assert family.tries == family.fine + sum(len(moves) for _, moves in family.coarse)
            reached, ring = set(starts), starts
            for number in range(ROUNDS):
                ring = {near for edit in ring for near in family.moves(edit, number)} - reached
                reached |= ring
            assert len(starts) <= len(reached) <= family.fine


@pytest.mark.parametrize("edit", [Edit(128, 128, degrees=9.0), Edit(128, 128, -9, 6), Edit(111, 111, 4, 13)])
def test_undo_inverts(edit):
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    picture = torch.stack([x, y, x + y / 2]) / 256  # linear: interpolation is exact
    if edit.degrees:
        given = attack(picture[None], "rotate:9")[0]
    elif edit.rows == 128:
        given = torch.roll(picture, (9, -6), (1, 2))
    else:
        given = F.interpolate(picture[None, :, 4:115, 13:124], size=SIZE, mode="bilinear")[0]
    undone, inside = edit.undo(given, torch.ones(SIZE), SIZE)
    well = -F.max_pool2d(-inside.float()[None], 17, 1, 8)[0] > 0
    if edit.top < 0:
        well[-20:], well[:, :20] = False, False  # what rolled over
        well[:20] = False
    if edit.degrees:
        well &= (y - 63.5) ** 2 + (x - 63.5) ** 2 < 55**2
    assert well.sum() > 2000 and (undone - picture).abs()[:, well].max() < 0.004


def test_plain_areas():
    picture = _picture()
    same, valid = without_flats(picture)
    assert same is picture and valid.all()
    barred = picture.clone()
    barred[:, :12], barred[:, 60:80, 40:90] = 0, 0.9
    filled, valid = without_flats(barred)
    assert not valid[:12].any() and not valid[60:80, 40:90].any() and valid.sum() == 128 * 128 - 12 * 128 - 20 * 50
    assert torch.equal(filled[:, 11], picture[:, 12]) and torch.equal(filled[:, valid > 0], picture[:, valid > 0])
    blank = torch.zeros(3, *SIZE)
    assert without_flats(blank)[0] is blank  # nothing to fill it with
    assert run(blank, Means(), [KEY], Search(budget=8)).reading.payload is None


@pytest.mark.parametrize(
    "wrong", [{"translation": 1}, {"crop": 0}, {"rotation": 50}, {"steps": -1}, {"budget": 0}, {"steps": 0.5}]
)
def test_search_says_what_is_wrong(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(WatermarkError, match=f"{name}={value}"):
        Search(**wrong)


def test_pictures_too_small():
    with pytest.raises(WatermarkError, match=r"sides of 8 pixels"):
        run(torch.rand(3, 4, 128), Means(), [KEY], Search())


@pytest.mark.slow
@pytest.mark.parametrize("edit", ["flip", "rotate:180", "translate:11", "crop-rescale:0.8", "rotate:-6"])
def test_on_the_canvas(edit):
    from semiperm.canvas import DEFAULT_GUIDANCE, load_pipeline
    from semiperm.pipelines.watermark.detect import PipelineInverter

    pipe = load_pipeline()
    noise = KeyedMark(KEY).sample((1, 4, 16, 16), Payload(5), torch.Generator().manual_seed(1))
    prompt = "an eared mascot in striped style on sky"
    (image,) = pipe(prompt, latents=noise, guidance_scale=DEFAULT_GUIDANCE, output_type="pt").images
    edited = attack(image[None], edit, torch.Generator().manual_seed(2))[0]
    found = run(edited, PipelineInverter(pipe), [KEY], Search(), size=SIZE)
    assert found.reading.log10_p + math.log10(2 * found.tries) < -6 and found.reading.payload.unique_id == 5
