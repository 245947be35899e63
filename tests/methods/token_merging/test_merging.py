"""Negative token merging against loops in float64, the released code's formula, and its options."""

import math

import pytest
import torch
from PIL import Image
from semiperm.methods.errors import SemipermError, TokenMergingError
from semiperm.methods.token_merging.config import NegativeTokenMergingConfig
from semiperm.methods.token_merging.merging import (
    diversity_rows,
    fitted_masks,
    grid_of,
    merge_tokens,
    reference_rows,
    token_mask,
)
from semiperm.methods.token_merging.record import MergeRecord

IMAGE = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def oracle(x, reference, gate, pairs, alpha, threshold, mask=None):
    """The definition, token by token, in float64."""
    x, reference, out = x.double(), reference.double(), x.double().clone()
    for b in range(x.shape[0]):
        for n in range(x.shape[1]):
            best, match = -math.inf, None
            for r in range(reference.shape[0]):
                for j in range(reference.shape[1]):
                    if gate[b] and pairs[b, r] and (mask is None or mask[r, j]):
                        cosine = float(torch.cosine_similarity(x[b, n], reference[r, j], dim=0))
                        if cosine > best:
                            best, match = cosine, reference[r, j]
            if best > threshold:
                out[b, n] = x[b, n] + alpha * (x[b, n] - match)
    return out


@pytest.mark.parametrize("alpha", [0.9, -0.5])
@pytest.mark.parametrize("threshold", [-1.0, 0.2])
def test_reference_mode_is_the_definition(alpha, threshold):
    x, reference = tokens(4, 9, 6), tokens(4, 7, 6, seed=1)
    rows = reference_rows([-1, 0, 1, 1], 2)
    assert rows.gate.tolist() == [0, 1, 1, 1]
    assert rows.pairs.tolist() == [[False] * 4, [True, True, False, False], *[[False, False, True, True]] * 2]
    mask = torch.rand(4, 7, generator=torch.Generator().manual_seed(2)) > 0.5
    config = NegativeTokenMergingConfig(IMAGE, strength=alpha, threshold=threshold)
    for used in (None, mask):
        merged, pushed = merge_tokens(x, reference, rows, config, used)
        expected = oracle(x, reference, rows.gate, rows.pairs, alpha, threshold, used)
        torch.testing.assert_close(merged.double(), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(merged[0], x[0])
        assert torch.equal(pushed, (expected != x.double()).any(-1))


@pytest.mark.parametrize("kind", ["symmetric", "first"])
def test_diversity_mode_is_the_definition(kind):
    x = tokens(5, 6, 4)
    rows = diversity_rows([-1, -1, 2, 2, 2], kind)
    config = NegativeTokenMergingConfig(threshold=0.1, diversity=kind)
    merged, _ = merge_tokens(x, x, rows, config)
    expected = oracle(x, x, rows.gate, rows.pairs, 0.9, 0.1)
    torch.testing.assert_close(merged.double(), expected, atol=1e-5, rtol=1e-5)
    if kind == "first":
        assert torch.equal(merged[:3], x[:3]) and not torch.equal(merged[3:], x[3:])
    else:
        assert torch.equal(merged[:2], x[:2])
        assert not rows.pairs.diagonal().any() and torch.equal(rows.pairs, rows.pairs.T)


def released(x, alpha, threshold):
    """What the released code computes for a batch whose row 0 is the reference (argmax over the output tokens)."""
    unit = torch.nn.functional.normalize(x, dim=-1)
    score, index = (unit @ unit[:1].mT).max(dim=-2)
    taken = x[:1].expand_as(x).gather(1, index[..., None].expand_as(x))
    return torch.where((score > threshold)[..., None], (1 + alpha) * x - alpha * taken, x)


def test_official_reproduces_the_released_code():
    x = tokens(3, 12, 5)
    config = NegativeTokenMergingConfig(compat="official", threshold=0.3)
    assert (config.matching, config.diversity, config.rows) == ("output", "first", "all")
    merged, _ = merge_tokens(x, x, diversity_rows([0, 0, 0], "first"), config)
    expected = released(x, 0.9, 0.3)
    torch.testing.assert_close(merged[1:], expected[1:], atol=1e-5, rtol=1e-5)
    assert torch.equal(merged[0], x[0])
    ours, _ = merge_tokens(x, x, diversity_rows([0, 0, 0], "first"), NegativeTokenMergingConfig(diversity="first"))
    assert not torch.allclose(ours[1:], expected[1:], atol=1e-2), "the released axis is another one"


def test_official_mask_switches_output_positions_off():
    x, reference = tokens(1, 6, 4), tokens(1, 6, 4, seed=1)
    mask = torch.tensor([[True, False, True, False, True, False]])
    config = NegativeTokenMergingConfig(IMAGE, compat="official", threshold=-1.0)
    merged, pushed = merge_tokens(x, reference, reference_rows([0], 1), config, mask)
    assert torch.equal(pushed, mask) and torch.equal(merged[~mask], x[~mask])
    with pytest.raises(TokenMergingError, match="as many reference tokens"):
        merge_tokens(x, reference[:, :5], reference_rows([0], 1), config)


@pytest.mark.parametrize("matching", ["reference", "output"])
def test_neutral_alpha_keeps_every_bit(matching):
    x = tokens(2, 6, 4)
    config = NegativeTokenMergingConfig(IMAGE, strength=0.0, threshold=-1.0, matching=matching)
    merged, _ = merge_tokens(x, tokens(1, 6, 4, seed=1), reference_rows([0, 0], 1), config)
    assert torch.equal(merged, x)


def test_one_image_has_nothing_to_be_pushed_from():
    with pytest.raises(TokenMergingError, match="at least two images"):
        diversity_rows([-1, 0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strength": math.inf}, "finite"),
        ({"strength": [1, 2]}, "2 strengths for 0 references"),
        ({"reference": IMAGE, "strength": [1, 2]}, "2 strengths for 1 references"),
        ({"reference": []}, "no image in it"),
        ({"reference": IMAGE, "fit": "zoom"}, "fit='zoom'"),
        ({"threshold": 1.5}, "cosine"),
        ({"start": 0.5, "end": 0.5}, "0 <= start < end <= 1"),
        ({"max_downscale": 0}, "full resolution"),
        ({"rows": "some"}, "rows='some'"),
        ({"compat": "other"}, "compat='other'"),
        ({"matching": "none"}, "matching='none'"),
        ({"blocks": "up_blocks"}, "sequence of path prefixes"),
        ({"mask": torch.ones(4, 4)}, "without a reference"),
        ({"reference_prompt": "a cat"}, "without a reference"),
        ({"reference": IMAGE, "mask": [torch.ones(4, 4)] * 2}, "2 masks for 1 references"),
        ({"reference": IMAGE, "mask": torch.zeros(4, 4)}, "black everywhere"),
        ({"reference": torch.rand(8, 8)}, r"a picture is shape \(8, 8\)"),
        ({"reference": IMAGE * 255}, "in 0..1, none NaN"),
        ({"reference": "cat.png"}, "a picture is str"),
    ],
)
def test_config_refuses(options, words):
    with pytest.raises(SemipermError, match=words):
        NegativeTokenMergingConfig(**options)


def test_config_takes_images_as_people_have_them():
    picture = Image.new("RGB", (6, 4), (255, 0, 51))
    config = NegativeTokenMergingConfig([picture, IMAGE[None]], mask=Image.new("L", (6, 4), 255))
    assert config.mode == "reference" and len(config.reference) == len(config.mask) == 2
    assert config.reference[0].shape == (3, 4, 6)
    torch.testing.assert_close(config.reference[0][:, 0, 0], torch.tensor([1.0, 0.0, 0.2]))
    assert config.mask[0].shape == (4, 6)
    assert NegativeTokenMergingConfig().mode == "diversity"


def test_alpha_masks_and_strengths_of_references():
    half = torch.cat([IMAGE, torch.ones(1, 8, 8)])
    half[3, :4] = 0
    config = NegativeTokenMergingConfig([half, IMAGE], strength=[2, -1])
    assert config.strength == config.strengths == (2.0, -1.0)
    assert config.mask[0].sum() == 32 and config.mask[1].min() == 1
    dot = torch.zeros(64, 64)
    dot[60, 60] = 1
    small = NegativeTokenMergingConfig(half, mask=dot).mask[0]
    assert small.shape == (8, 8) and small.nonzero().tolist() == [[7, 7]], "stretched onto its image, no dot lost"
    assert NegativeTokenMergingConfig([IMAGE, IMAGE], strength=(1, 1)).strength == 1.0
    (shown,) = fitted_masks(NegativeTokenMergingConfig(torch.rand(3, 4, 8), fit="pad"), 8, 8)
    assert shown.shape == (8, 8) and shown[2:6].min() == 1 and shown.sum() == 32, "the borders are no picture"
    assert fitted_masks(NegativeTokenMergingConfig(IMAGE), 8, 8) == []


def test_a_still_reference_is_matched_frame_by_frame():
    x, still = tokens(2, 3 * 5, 4), tokens(2, 5, 4, seed=1).repeat(1, 3, 1)
    rows, config = reference_rows([0, 0], 2), NegativeTokenMergingConfig([IMAGE, IMAGE], threshold=0.2)
    whole, pushed = merge_tokens(x, still, rows, config)
    cut, also = merge_tokens(x, still, rows, config, frames=3)
    torch.testing.assert_close(cut, whole)
    assert torch.equal(pushed, also)
    moving = still.clone()
    moving[:, :5] = -moving[:, 5:10]
    cut, _ = merge_tokens(x, moving, rows, config, frames=3)
    expected = oracle(x[:, :5], moving[:, :5], rows.gate, rows.pairs, 0.9, 0.2)
    torch.testing.assert_close(cut[:, :5].double(), expected, atol=1e-5, rtol=1e-5)


def test_grids_and_masks():
    assert grid_of(64, 8, 8) == (1, 8, 8) and grid_of(15, 10, 6) == (1, 5, 3) and grid_of(4, 7, 5) == (1, 2, 2)
    assert grid_of(128, 8, 8) == (2, 8, 8)
    with pytest.raises(TokenMergingError, match="does not fit"):
        grid_of(7, 8, 8)
    mask = torch.zeros(8, 8)
    mask[0, 7] = 1
    assert token_mask([mask], 64, 8, 8).nonzero().tolist() == [[0, 7]]
    assert token_mask([mask], 4, 8, 8).nonzero().tolist() == [[0, 1]], "one white pixel marks its whole patch"
    assert token_mask([mask], 8, 4, 4).nonzero().tolist() == [[0, 1], [0, 5]], "in every frame"


def test_record():
    record = MergeRecord()
    record.step(0.0, 10.0, True, 2)
    rows = (("positive", 0), ("positive", 1))
    record.add(rows, torch.tensor([[True, True], [True, False], [False, False]]))
    record.add(rows, torch.tensor([[False, True], [False, False], [True, True]]))
    record.step(0.0, 10.0, True, 2)
    record.step(0.5, 1.0, False)
    config = NegativeTokenMergingConfig(IMAGE, strength=0.5, threshold=0.25, start=0.1, end=0.4)
    report = record.report(config, layers=2)
    assert report["extra_rows"] == 4 and [s["active"] for s in report["steps"]] == [True, False]
    assert report["rows"] == [
        {"kind": "positive", "image": 0, "pushed": 0.75},
        {"kind": "positive", "image": 1, "pushed": 0.25},
    ]
    assert record.outcomes == 2
    record.clear()
    assert record.report(config, 2) == {
        "mode": "reference", "references": 1, "strength": 0.5, "threshold": 0.25, "window": [0.1, 0.4], "layers": 2,
        "rows": [], "steps": [], "extra_rows": 0,
    }  # fmt: skip
