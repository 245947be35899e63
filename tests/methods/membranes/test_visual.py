"""Image-side membranes as mathematics: the edit, its two gates, knots, the fit, the calibration."""

import dataclasses

import pytest
import torch
from semiperm.methods.errors import MembraneError
from semiperm.methods.membranes.image_site import ImageSite, Openings, knot_weights, opened_row
from semiperm.methods.membranes.types import Membrane
from semiperm.methods.membranes.visual import VisualSide, VisualSite
from semiperm.methods.membranes.visual_drawing import LOOKED_AT
from semiperm.methods.membranes.visual_fit import VisualConfig, calibrated, fit_side, without_showing
from semiperm.methods.membranes.visual_words import fit_looks, wanted

CONFIG = VisualConfig(samples=8, background=8, steps=2, false_open=0.1, tokens=12)
SHARES = (0.25, 0.75)


def tokens(seed: int, pictures: int, shown: float = 0.0, where: int = 12, channels: int = 10) -> torch.Tensor:
    """(P, J, S, C): noise of unequal spread about a common mean; `shown` of a direction in the first `where` tokens."""
    noise = torch.Generator().manual_seed(seed)
    found = torch.randn(pictures, 2, 12, channels, generator=noise) * torch.linspace(0.2, 2.0, channels) + 3.0
    direction = torch.zeros(channels)
    direction[0], direction[-1] = 1.0, 2.0
    found[:, :, :where] += shown * direction
    return found


def fitted(config=CONFIG, where=12):
    return fit_side(
        "robot",
        {"a": tokens(0, 8, 4.0, where), "deaf": tokens(1, 8)},
        {"a": tokens(2, 8), "deaf": tokens(3, 8)},
        {"a": tokens(4, 8), "deaf": tokens(5, 8)},
        SHARES,
        config,
    )


def highest(side, pictures):
    """(P,): the count of each picture, over layers and knots."""
    site = ImageSite("a", [(0, side)], 1, after_text=False)
    scores = [site.scores(pictures[:, j], site.packed_at(s, torch.float32), 0)[:, 0] for j, s in enumerate(SHARES)]
    return torch.stack(scores).amax(dim=0)


def test_what_is_read_is_0_for_others_and_1_for_the_concept_and_writing_leads_back():
    side = fitted()
    assert list(side.sites) == ["a"], "a layer that tells nothing apart is left out"
    site = side.sites["a"]
    offset = site.gates[..., 0]
    shown, others = tokens(0, 8, 4.0), torch.cat([tokens(2, 8), tokens(4, 8)])
    for j in range(2):
        answer = [float(t[:, j].mean(dim=(0, 1)) @ site.read[j, 0] - offset[j, 0]) for t in (others, shown)]
        assert abs(answer[0]) < 1e-4 and abs(answer[1] - 1) < 0.2
        assert float(site.read[j, 0] @ site.write[j, 0]) == pytest.approx(1.0, abs=1e-4)
    # the discriminant reads the quiet channel, in which the concept is as plain as in the loud one
    assert abs(site.read[0, 0, 0]) > abs(site.read[0, 0, -1])


def test_rank_2_reads_are_biorthogonal_and_find_what_a_part_of_the_tokens_shows():
    side = fitted(dataclasses.replace(CONFIG, rank=2), where=4)
    site = side.sites["a"]
    gram = site.read @ site.write.transpose(1, 2)
    assert site.rank == 2 and torch.allclose(gram, torch.eye(2).expand(2, 2, 2), atol=1e-3)


def test_thresholds_hold_the_promised_rate_on_new_pictures():
    side = fitted()
    with pytest.raises(MembraneError, match="expected at least 9"):
        calibrated(side, torch.rand(8), CONFIG)
    # the quantile of n pictures is random itself: over many draws of them the rate is met on average
    rates = []
    for draw in range(20):
        set_ = calibrated(side, highest(side, tokens(100 + draw, 39)), CONFIG)
        rates.append(float((highest(set_, tokens(200 + draw, 200)) > 0).float().mean()))
    assert 0.03 < sum(rates) / len(rates) < 0.13
    assert bool((highest(set_, tokens(300, 20, 4.0)) > 0).all()), "and the concept's own pictures are seen"
    assert set_.false_open == 0.1 and set_.calibrated == 39


def test_pictures_that_show_the_concept_unasked_set_no_threshold():
    others, shown = torch.linspace(0, 2, 23), torch.linspace(8, 10, 8)
    config = VisualConfig(false_open=0.05)
    assert config.calibration == 19 and config.spare == 3
    assert torch.equal(without_showing(torch.cat([others, torch.tensor([9.0, 6.0])]), shown, config), others)
    few = torch.cat([others[:18], torch.tensor([9.0, 8.5, 9.5])])  # too few are left to promise the rate
    assert torch.equal(without_showing(few, shown, config), few)
    assert torch.equal(without_showing(few, shown[:0], config), few)
    assert VisualConfig(validation=0).spare == 0


class Drawn:
    """A model whose pictures of robots show 1 of one, less `effect` times beta."""

    def __init__(self, effect: float):
        self.effect = effect

    def tokens(self, prompts, keep):
        return list(SHARES), {"a": tokens(len(prompts[0]), len(prompts), 4.0 * ("robot" in prompts[0]))}

    def scores(self, sides, prompts):
        return torch.linspace(0, 1, len(prompts))[:, None] + 9.0 * ("robot" in prompts[0])

    def validate(self, side, prompts):
        return torch.tensor([1.0] * (len(prompts) - 1) + [-1.0]), [1.0] * len(prompts)

    def redraw(self, prompts, membrane):
        assert all("robot" in prompt for prompt in prompts) == (membrane is not None)
        return [0.0 if membrane is None else 1.0 - self.effect * membrane.visual.beta] * len(prompts)

    def look(self, pictures, captions):
        assert not any("robot" in caption for caption in captions), "the picture alone says it"
        looks = tokens(int(sum(pictures)), len(pictures), 4.0 * pictures[0])
        return {"self-attention": torch.cat([looks, looks[:, :1]], dim=1)}  # at three shares

    def seen(self, side, pictures, captions):
        assert list(side.sites) == ["self-attention"] and side.shares == LOOKED_AT
        return torch.tensor(pictures)


@pytest.mark.parametrize("effect, beta", [(0.9, 1.0), (0.3, 2.0), (0.15, 4.0), (0.05, 2.0)])
def test_the_smallest_beta_is_taken_with_which_pictures_drawn_again_no_longer_show_it(effect, beta):
    asked = wanted("robot", "", ["a cat", "a tree", "a house"], None, ["{} by day", "a {}"], CONFIG)
    made = fit_looks(Drawn(effect), asked, CONFIG)
    assert made[0].visual.beta == beta, "where none serves, the usual one stays"
    assert (made[0].visual.false_closed, made[0].visual.checked) == (0.125, 8)
    fixed = fit_looks(Drawn(effect), asked, dataclasses.replace(CONFIG, beta=1.5))
    assert fixed[0].visual.beta == 1.5


def test_the_edit_is_the_formula_and_leaves_other_pictures_alone():
    side = dataclasses.replace(calibrated(fitted(), highest(fitted(), tokens(100, 39)), CONFIG), beta=1.5)
    site, gamma = ImageSite("a", [(1, side)], 2, after_text=True), torch.tensor([[0.0, 1.0], [0.0, 0.5], [1.0, 0.0]])
    image = torch.cat([tokens(7, 2, 4.0)[:, 0], tokens(8, 1, 4.0)[:, 0]])
    text = torch.randn(3, 5, 10)
    out, gates = site.edit(torch.cat([text, image], dim=1), site.packed_at(0.25, torch.float32), gamma, 5)
    assert torch.equal(out[:, :5], text) and torch.equal(out[2, 5:], image[2])
    layer = side.sites["a"]
    offset, low, high, seen, sure = layer.gates[0, 0]
    for row, strength in ((0, 1.0), (1, 0.5)):
        a = image[row] @ layer.read[0, 0] - offset
        g = ((a - low) / (high - low)).clamp(0, 1) * ((a.max() - seen) / (sure - seen)).clamp(0, 1)
        expected = image[row] - (strength * 1.5 * g * a)[:, None] * layer.write[0, 0]
        assert torch.allclose(out[row, 5:], expected, atol=1e-4) and torch.allclose(gates[row, :, 0], g, atol=1e-4)
    other = tokens(9, 1)[:, 0]
    alone = ImageSite("a", [(0, side)], 1, after_text=False)
    out, gates = alone.edit(other, alone.packed_at(0.25, torch.float32), torch.ones(1, 1), 0)
    assert bool(gates.any()) == (not torch.equal(out, other))
    with pytest.raises(MembraneError, match="expected a multiple"):
        alone.edit(image, alone.packed_at(0.25, torch.float32), torch.ones(2, 1), 0)


def test_knots_are_interpolated_and_hold_outside():
    knots = torch.tensor([0.25, 0.75])
    assert knot_weights(knots, 0.0).tolist() == knot_weights(knots, 0.25).tolist() == [1.0, 0.0]
    assert knot_weights(knots, 1.0).tolist() == [0.0, 1.0] and knot_weights(knots, 0.5).tolist() == [0.5, 0.5]
    assert knot_weights(knots, torch.tensor(0.5)).tolist() == [0.5, 0.5]
    assert knot_weights(torch.tensor([0.3]), 0.9).tolist() == [1.0]
    side = fitted()
    site, layer = ImageSite("a", [(0, side)], 1, False), side.sites["a"]
    assert torch.allclose(site.packed_at(0.5, torch.float32)[0], layer.read.mean(dim=0))


def test_openings_are_the_widest_of_layers_and_steps():
    side = fitted()
    site = ImageSite("a", [(0, side), (1, side)], 2, after_text=False)
    seen = Openings()
    gates = torch.zeros(1, 4, 2)
    gates[0, 1, 0], gates[0, 2, 0] = 0.5, 0.25
    seen.add(gates, site, torch.tensor([[1.0, 1.0]]))
    fine = torch.zeros(1, 16, 2)
    fine[0, 15, 0] = 1.0
    seen.add(fine, site, torch.tensor([[1.0, 1.0]]))
    assert seen.widest.tolist() == [[1.0, 0.0]] and seen.tokens.tolist() == [[0.5, 0.0]]
    found = seen.map(0, 0, 4, 4)
    assert found[3, 3] == 1 and found[0, 3] == 0.5 and found[3, 0] == 0.25 and found[0, 0] == 0
    stack = [Membrane("robot", {}, visual=side), Membrane("ghost", {}, visual=side)]
    assert opened_row([1.0, 1.0], [(seen, 0)], stack, [0, 1]) == ([1.0, 0.0], {"robot": 0.5, "ghost": 0.0})
    assert opened_row([1.0, 1.0], [(Openings(), 0)], stack, [0, 1])[0] == [0.0, 0.0]
    shut = Openings()
    shut.add(gates, site, torch.tensor([[0.0, 1.0]]))
    assert shut.widest.tolist() == [[0.0, 0.0]], "a row in which nothing acts opens nothing"


def test_what_is_refused():
    layer = fitted().sites["a"]
    with pytest.raises(MembraneError, match="expected"):
        VisualSite(layer.read, layer.write[:, :, :-1], layer.gates)
    with pytest.raises(MembraneError, match="NaN"):
        VisualSite(layer.read * float("nan"), layer.write, layer.gates)
    for order in ([0, 2, 1, 3, 4], [0, 1, 2, 4, 3]):
        with pytest.raises(MembraneError, match="other order"):
            VisualSite(layer.read, layer.write, layer.gates[..., order])
    for shares in ((0.5,), (0.75, 0.25), (0.5, 1.5)):
        with pytest.raises(MembraneError, match="knots"):
            VisualSide(shares, {"a": layer})
    with pytest.raises(MembraneError, match="beta"):
        VisualSide(SHARES, {"a": layer}, beta=float("inf"))
    same = {"a": tokens(0, 8)}
    with pytest.raises(MembraneError, match="'robot': none of 1 layers tells"):
        fit_side("robot", same, {"a": tokens(1, 8)}, {"a": tokens(2, 8)}, SHARES, CONFIG)
    for wrong in ({"samples": 5}, {"rank": 3}, {"false_open": 0.0}, {"steps": 1}, {"shrinkage": 0.0}, {"beta": 1e400}):
        with pytest.raises(MembraneError, match="expected"):
            dataclasses.replace(CONFIG, **wrong)
