"""AdaVD and NAG against their formulas in float64."""

import pytest
import torch
from semiperm.methods.errors import GuidanceError
from semiperm.methods.guidance.adavd import AdaVD
from semiperm.methods.guidance.nag import NAG, PRESETS


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_gram_schmidt(values, harm, heads):
    """The paper's loop: one concept after another, each made orthogonal to those before it."""
    out = values.clone()
    width = values.shape[-1] // heads
    for h in range(heads):
        part, basis = slice(h * width, (h + 1) * width), []
        for concept in harm[:, part]:
            for other in basis:
                concept = concept - (concept @ other) / (other @ other) * other
            basis.append(concept)
        for other in basis:
            v = out[..., part]
            out[..., part] = v - (v @ other)[..., None] / (other @ other) * other
    return out


@pytest.mark.parametrize("concepts, heads", [(1, 1), (1, 4), (3, 4)])
def test_adavd_takes_away_what_lies_along_the_harm(concepts, heads):
    values, harm = normal(2, 7, 32, seed=1), normal(concepts, 32, seed=2)
    found, share = AdaVD().edit_values(values.float(), harm.float(), heads, 1.0)
    torch.testing.assert_close(found.double(), by_gram_schmidt(values, harm, heads), atol=1e-5, rtol=1e-5)
    removed = (values - by_gram_schmidt(values, harm, heads)).norm(dim=-1) / values.norm(dim=-1)
    torch.testing.assert_close(share.double(), removed.mean(1), atol=1e-5, rtol=1e-5)
    half, _ = AdaVD().edit_values(values.float(), harm.float(), heads, 0.5)
    torch.testing.assert_close(half, (values.float() + found) / 2)


def test_adavds_gate_is_the_released_codes():
    values, harm = normal(1, 5, 16, seed=3), normal(1, 16, seed=4)
    part = (values @ harm[0])[..., None] / (harm[0] @ harm[0]) * harm[0]
    cosine = part.norm(dim=-1, keepdim=True) / values.norm(dim=-1, keepdim=True)
    gate = 2 / (1 + torch.exp(-10 * (cosine - 0.2)))
    found, _ = AdaVD(centre=0.2, slope=10.0).edit_values(values.float(), harm.float(), 1, 1.0)
    torch.testing.assert_close(found.double(), values - gate * part, atol=1e-5, rtol=1e-5)


def test_adavd_of_dependent_concepts_and_of_too_many():
    values, harm = normal(1, 5, 16, seed=5), normal(1, 16, seed=6)
    twice = torch.cat([harm, 3 * harm])
    one, two = (AdaVD().edit_values(values.float(), h.float(), 2, 1.0)[0] for h in (harm, twice))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    many, _ = AdaVD(rank=2).edit_values(values.float(), normal(12, 16, seed=7).float(), 2, 1.0)
    assert many.norm() > 0.5 * values.norm(), "no more than two of eight directions are gone"


@pytest.mark.parametrize("preset", PRESETS)
def test_nag_is_the_papers(preset):
    positive, negative, nag = normal(2, 9, 24, seed=1), normal(2, 9, 24, seed=2), NAG(preset)
    extrapolated = positive + nag.scale * (positive - negative)
    ratio = extrapolated.abs().sum(-1, keepdim=True) / positive.abs().sum(-1, keepdim=True)
    expected = nag.alpha * extrapolated * ratio.clamp(max=nag.tau) / ratio + (1 - nag.alpha) * positive
    found = nag.combine(positive.float(), negative.float(), 1.0)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(nag.combine(positive.float(), negative.float(), 0.0), positive.float())


@pytest.mark.parametrize("wrong", [lambda: AdaVD(rank=0), lambda: NAG("sd9"), lambda: NAG(tau=0.5)])
def test_settings_are_checked(wrong):
    with pytest.raises(GuidanceError, match="expected"):
        wrong()


def test_a_seam_that_was_not_declared_is_an_error():
    with pytest.raises(GuidanceError, match="declares outputs"):
        NAG().edit_values(torch.zeros(1, 1, 4), torch.zeros(1, 4), 1, 1.0)
