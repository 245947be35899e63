"""The payload code: decoding, its gain over belief propagation, and its errors."""

import itertools

import numpy as np
import pytest
from semiperm.methods.errors import WatermarkError
from semiperm.methods.watermark.code import Code, code_for


def channel(bits, rho, rng):
    z = np.abs(rng.standard_normal(len(bits))) * (1 - 2.0 * bits)
    return rho * z + np.sqrt(1 - rho**2) * rng.standard_normal(len(bits))


@pytest.mark.parametrize(("payload", "size"), [(1, 104), (5, 137), (48, 768), (192, 12288), (192, 250000)])
def test_clean_codewords_decode(payload, size):
    rng, code = np.random.default_rng(0), code_for(payload, size)
    bits = rng.integers(0, 2, payload)
    coded = code.encode(bits)
    assert coded.shape == (size,) and coded.dtype == np.uint8
    decoded, confidence = code.decode(1 - 2.0 * coded)
    assert (decoded == bits).all() and confidence == pytest.approx(1)


def test_decoding_is_maximum_likelihood():
    rng, code = np.random.default_rng(1), code_for(6, 144)
    words = np.array([code.encode(bits) for bits in itertools.product((0, 1), repeat=6)])
    for _ in range(50):
        llr = rng.standard_normal(144)
        scores = (1 - 2.0 * words) @ llr
        decoded, confidence = code.decode(llr)
        assert (words[scores.argmax()] == code.encode(decoded)).all()
        assert confidence == pytest.approx(0.5 + scores.max() / np.abs(llr).sum() / 2, abs=1e-5)


@pytest.mark.parametrize(("payload", "size", "rho"), [(48, 768, 0.588), (100, 3072, 0.42), (192, 12288, 0.3)])
def test_low_rate_channels_decode(payload, size, rho):
    rng, code, exact = np.random.default_rng(2), code_for(payload, size), 0
    for _ in range(60):
        bits = rng.integers(0, 2, payload)
        exact += (code.decode(channel(code.encode(bits), rho, rng))[0] == bits).all()
    assert exact >= 58


def test_codewords_are_far_apart():
    """A single input bit reaches 13 steps of every generator; random pairs differ in about half of the channel."""
    rng, code = np.random.default_rng(3), code_for(48, 768)
    for bit in range(48):
        assert code.encode(np.eye(48, dtype=int)[bit]).sum() > 60
    distances = [(code.encode(a) ^ code.encode(b)).mean() for a, b in rng.integers(0, 2, (50, 2, 48))]
    assert 0.4 < min(distances) and max(distances) < 0.6


def test_wrong_sizes_are_refused_and_silence_is_no_evidence():
    code = code_for(5, 137)
    with pytest.raises(WatermarkError, match="larger latent"):
        code_for(48, 400)
    with pytest.raises(WatermarkError, match="expected \\(5,\\)"):
        code.encode([0, 1])
    with pytest.raises(WatermarkError, match="expected \\(137,\\)"):
        code.decode(np.zeros(5))
    assert code.decode(np.zeros(137))[1] == 0.5 and code == Code(5, 137)


def test_candidates_come_in_the_order_of_all_payloads():
    code, chance = code_for(8, 160), np.random.default_rng(3)
    llr = chance.normal(size=160).astype(np.float32)
    words = [np.array([i >> b & 1 for b in range(8)], np.uint8) for i in range(256)]
    fits = sorted((float(llr @ (1 - 2.0 * code.encode(word))) for word in words), reverse=True)
    found = list(code.candidates(llr))
    assert len(found) == 256 == len({tuple(word) for word in found})
    assert np.allclose([llr @ (1 - 2.0 * code.encode(word)) for word in found], fits, atol=1e-3)
    assert (found[0] == code.decode(llr)[0]).all()
