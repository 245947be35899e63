"""The pseudorandom code as a baseline: its algebra, exact p-values, recovery, noise that gives nothing away."""

import itertools
import math

import numpy as np
import pytest
import torch
from marks import gaussian_channel, key_of, seeded
from scipy import stats
from semiperm.methods.errors import WatermarkError
from semiperm.methods.watermark.peers.pseudorandom_code import PseudorandomCode, belief_propagation, first_basis

SMALL, MEDIUM, FULL = (4, 16, 16), (4, 32, 32), (4, 64, 64)


# The code


@pytest.mark.parametrize("shape", [SMALL, FULL])
def test_every_codeword_has_even_parity_on_independent_triples(shape):
    code = PseudorandomCode(key_of(1)).code(shape)
    n = math.prod(shape)
    assert len(code.triples) == n - code.width - code.secrecy
    third = code.parents[:, 2]
    assert (np.diff(third) == 1).all() and (
        code.parents[:, :2] < third[:, None]
    ).all()  # so the triples are independent
    assert (code.parents[:, 0] != code.parents[:, 1]).all() and code.parents.min() >= 0
    pairs = [tuple(sorted(pair)) for triple in code.triples for pair in itertools.combinations(triple.tolist(), 2)]
    assert len(set(pairs)) == len(pairs)
    assert (np.sort(code.place) == np.arange(n)).all()
    payload = np.random.default_rng(0).integers(0, 2, code.width).astype(np.uint8)
    word = code.encode(payload) ^ code.pad
    assert (word[code.triples].sum(axis=1) % 2 == 0).all() and 0.4 < word.mean() < 0.6
    rows = np.unpackbits(code.generator, axis=1)[:, : code.width].astype(np.int64)
    assert (rows @ payload % 2 == word).all()


def test_secrecy_and_noise_are_the_papers():
    found = {shape: PseudorandomCode(key_of(1)).code(shape) for shape in (SMALL, FULL, (4, 128, 128))}
    assert [code.secrecy for code in found.values()] == [27, 39, 45]
    assert found[FULL].noise == pytest.approx(0.0176, abs=1e-4)


def test_belief_propagation_is_exact_on_a_tree():
    triples, n = np.array([[0, 1, 2], [2, 3, 4], [4, 5, 6], [1, 7, 8]]), 9
    expected = np.random.default_rng(0).uniform(-0.9, 0.9, n)
    weights = np.zeros((n, 2))
    for word in itertools.product((0, 1), repeat=n):
        if all(sum(word[i] for i in triple) % 2 == 0 for triple in triples):
            weight = math.prod((1 + expected[i] * (1 - 2 * bit)) / 2 for i, bit in enumerate(word))
            weights[np.arange(n), word] += weight
    # Two rounds reach element 2 from all of the tree, the others only from a part of it.
    assert belief_propagation(expected, triples)[2] == pytest.approx(np.log(weights[2, 0] / weights[2, 1]))


def test_the_first_basis_is_greedy_and_inverts():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 2, (60, 21)).astype(np.uint8)
    rows[3], rows[7] = rows[1] ^ rows[2], 0
    basis, inverse = first_basis(rows)
    assert len(basis) == 21 and 3 not in basis and 7 not in basis and (basis[:3] == [0, 1, 2]).all()
    assert (inverse.astype(int) @ rows[basis].T % 2 == np.eye(21)).all()
    assert len(first_basis(rows[:9])[0]) == 7


# Marks


@pytest.mark.parametrize(
    ("shape", "bits"), [(SMALL, None), (SMALL, 100), (FULL, None), ((16, 3, 6, 10), 64), ((64, 64), 7)]
)
def test_round_trip(shape, bits):
    mark = PseudorandomCode(key_of(1), bits)
    count = mark.capacity(shape)
    assert count == (bits or math.prod(shape) // 32)
    message = np.random.default_rng(0).integers(0, 2, (2, count))
    latents = mark.sample((2, *shape), seeded(0), bits=message)
    assert latents.shape == (2, *shape) and latents.dtype == torch.float32
    assert (np.stack(mark.decode(latents)) == message).all() and (mark.p_values(latents) < 1e-30).all()
    assert torch.equal(latents, mark.sample((2, *shape), seeded(0), bits=message))
    assert (np.stack(mark.decode(mark.sample((1, *shape), seeded(1)))) == 0).all()
    for other in (PseudorandomCode(key_of(2), bits), PseudorandomCode(key_of(1), bits, scope="model")):
        assert (other.p_values(latents) > 1e-4).all() and other.decode(latents) == [None, None]


@pytest.mark.parametrize(("shape", "rho", "trials"), [(SMALL, 0.7, 60), (MEDIUM, 0.62, 30), (FULL, 0.55, 8)])
def test_recovery_over_the_gaussian_channel(shape, rho, trials):
    mark = PseudorandomCode(key_of(1))
    message = np.random.default_rng(0).integers(0, 2, (trials, mark.capacity(shape)))
    noisy = gaussian_channel(mark.sample((trials, *shape), seeded(0), bits=message), rho)
    read = mark.decode(noisy)
    assert all(bits is None or (bits == row).all() for bits, row in zip(read, message, strict=True))
    assert np.mean([bits is not None for bits in read]) > 0.95 and (mark.p_values(noisy) < 1e-6).mean() > 0.95


def test_weak_marks_are_refused_and_not_read_wrongly():
    mark = PseudorandomCode(key_of(1))
    noisy = gaussian_channel(mark.sample((60, *SMALL), seeded(0)), 0.4)
    assert all(bits is None or not bits.any() for bits in mark.decode(noisy))
    assert sum(bits is None for bits in mark.decode(noisy)) > 30


@pytest.mark.parametrize("kind", ["gaussian", "fixed", "signs"])
def test_null_p_values_are_exact(kind):
    """Over keys, whatever the latent: one fixed and skewed picture, or one of equal magnitudes, as well as noise."""
    trials, fixed = 800, torch.randn(1, *SMALL, generator=seeded(1)).cumsum(-1) + 2
    p = []
    for i in range(trials):
        row = {"gaussian": torch.randn(1, *SMALL, generator=seeded(i)), "fixed": fixed, "signs": fixed.sign()}[kind]
        p.append(PseudorandomCode(key_of(i)).p_values(row)[0])
    p = np.array(p)
    for level in (0.003, 0.01, 0.1, 0.5):
        low, high = stats.binom.interval(0.999, trials, level)
        # Equal magnitudes make a coarse lattice: no p-value just below the level.
        assert (p <= level).sum() <= high and ((p <= level).sum() >= low or kind == "signs")


def test_marked_noise_is_normal_and_white_over_pictures_of_one_key():
    latents = PseudorandomCode(key_of(1)).sample((400, *SMALL), seeded(0)).flatten(1)
    assert stats.kstest(latents.flatten().numpy(), "norm").pvalue > 1e-3
    p = np.array([stats.kstest(column, "norm").pvalue for column in latents.T.numpy()])
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    covariance = latents.T @ latents / 400 - torch.eye(1024)
    assert covariance.abs().max() < 6 / math.sqrt(400)
    signs = latents.sign()
    assert (signs.T @ signs / 400 - torch.eye(1024)).abs().max() < 6 / math.sqrt(400)
    assert (signs @ signs.T / 1024 - torch.eye(400)).abs().max() < 0.2


def test_erased_and_constant_latents_are_no_mark():
    mark = PseudorandomCode(key_of(1))
    for rows in (torch.zeros(1, *SMALL), torch.full((1, *SMALL), 3.0), torch.eye(32).reshape(1, *SMALL)):
        assert mark.p_values(rows)[0] > 1e-4 and mark.decode(rows) == [None]


def test_errors_say_what_was_given():
    with pytest.raises(WatermarkError, match="0 bits"):
        PseudorandomCode(key_of(1), 0)
    with pytest.raises(WatermarkError, match=r"shape \(4, 8, 8\), 256 elements"):
        PseudorandomCode(key_of(1)).sample((1, 4, 8, 8))
    with pytest.raises(WatermarkError, match="message of 500 bits"):
        PseudorandomCode(key_of(1), 500).capacity(SMALL)
    with pytest.raises(WatermarkError, match=r"expected \(32,\) or \(2, 32\)"):
        PseudorandomCode(key_of(1)).sample((2, *SMALL), bits=np.zeros(31))
    with pytest.raises(WatermarkError, match="NaN"):
        PseudorandomCode(key_of(1)).p_values(torch.full((1, *SMALL), math.nan))
