"""The learned reader: exact p-values whatever it says, a file tied to its model, and a rung of its own."""

import numpy as np
import pytest
import torch
from marks import gaussian_channel, key_of, seeded
from scipy import stats
from semiperm.methods.errors import WatermarkError
from semiperm.methods.files import save_safetensors
from semiperm.methods.watermark.config import DetectionConfig
from semiperm.methods.watermark.detection import detect_in
from semiperm.methods.watermark.mark import KeyedMark, Payload, read
from semiperm.methods.watermark.reader import STEPS, Reader, load_reader, save_reader
from semiperm.methods.watermark.statistics import LARGEST, quantise

SHAPE = (4, 16, 16)
MODEL = "0123456789abcdef"


def reader(seed=0, **shape):
    torch.manual_seed(seed)
    return Reader(4, model=MODEL, **{"width": 8, "blocks": 1, **shape}).eval()


def test_an_untrained_reader_says_what_inversion_says():
    estimates = [torch.randn(2, *SHAPE, generator=seeded(i)) for i in range(len(STEPS))]
    assert torch.equal(reader()(estimates), 0.5 * estimates[-1])
    with pytest.raises(WatermarkError, match="belongs to another model"):
        reader()([torch.zeros(1, 16, 8, 8)] * len(STEPS))
    with pytest.raises(WatermarkError, match="expected 3 with 4"):
        reader()(estimates[:2])


def test_a_file_names_its_model(tmp_path):
    file, made = tmp_path / "reader.safetensors", reader()
    with torch.no_grad():
        made.last.weight.normal_()
    save_reader(made, file, {"pictures": 3})
    kept = load_reader(file, "0123456789abcdee")  # a bit off: the same weights in another dtype
    estimates = [torch.randn(1, *SHAPE, generator=seeded(i)) for i in range(len(STEPS))]
    assert torch.allclose(kept(estimates), made(estimates), atol=0.02) and kept.model == MODEL
    with pytest.raises(WatermarkError, match="was trained with model 0123456789abcdef, this one is"):
        load_reader(file, "fedcba9876543210")
    save_safetensors({"a": torch.zeros(1)}, file, {"format": "other"})
    with pytest.raises(WatermarkError, match="no reader of marks"):
        load_reader(file)


def test_the_default_reader_is_small(tmp_path):
    save_reader(Reader(4, model=MODEL), tmp_path / "reader.safetensors")
    assert (tmp_path / "reader.safetensors").stat().st_size < 2_000_000


def test_votes_are_weights_in_proportion():
    votes = torch.tensor([[0.0, 0.1, -0.2, 0.4, -5.0]])
    assert quantise(votes / votes.abs().mean() * 7, votes=True).tolist() == [[0, 0, -1, 1, -LARGEST]]


@pytest.mark.parametrize("count", [20, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["constant", "few", "heavy"])
def test_p_values_are_valid_whatever_the_votes(kind, count):
    votes = {
        "constant": torch.ones(1, *SHAPE),
        "few": torch.zeros(1, *SHAPE).index_fill(3, torch.tensor([3]), 9.0),
        "heavy": torch.randn(1, *SHAPE, generator=seeded(1)) ** 5,
    }[kind]
    p = np.array([read(votes, [key_of(1000 + i)], votes=True, thorough=True)[0].p_value for i in range(count)])
    assert (p < 0.02).sum() <= stats.binom.ppf(0.9999, count, 0.02)


class Weak:
    """A model whose inversion finds little; the noise itself is hidden in what the reader alone makes use of."""

    multiple, native = 8, None

    def encode(self, pixels):
        return torch.stack([picture[0, ::8, ::8].expand(4, -1, -1).clone() for picture in pixels]).float() * 0

    def __init__(self, noise):
        self.noise, self.asked = noise, []

    def invert(self, latents, steps):
        self.asked.append(steps)
        return gaussian_channel(self.noise, 0.7 if steps == 2 else 0.05, seed=steps)


def test_the_reader_is_a_rung_that_counts():
    key, pictures = key_of(1), [torch.full((3, 128, 128), 0.5) + torch.rand(3, 128, 128, generator=seeded(2)) / 4]
    noise = KeyedMark(key).sample((1, *SHAPE), Payload(7), seeded(3))
    without = detect_in(pictures, Weak(noise), [key], DetectionConfig(ladder=(0, 1)))[0]
    model = Weak(noise)
    found = detect_in(pictures, model, [key], DetectionConfig(ladder=(0, 1, 5), reader=reader()))[0]
    assert without.verdict == "absent" and (found.verdict, found.payload.unique_id) == ("valid", 7)
    assert model.asked == [0, 1, *STEPS] and found.model_evaluations == 1 + sum(STEPS)
    alone = read(reader()([model.invert(None, n) for n in STEPS]), [key], votes=True, thorough=True)[0]
    assert found.log10_p == pytest.approx(alone.log10_p + np.log10(4), abs=1e-3)  # four rungs share the error


def test_seals_reach_further_than_codewords(monkeypatch):
    """Weak latents are found by the sealed statistic, and more of them by lists of codewords."""
    key = key_of(5)
    latents = KeyedMark(key).sample((16, *SHAPE), [Payload(i) for i in range(16)], seeded(6))
    weak = gaussian_channel(latents, 0.42)
    full = read(weak, [key], thorough=True)
    plain, detector = read(weak, [key]), read(weak, [key.detector()], thorough=True)
    assert sum(r.log10_p < -6 for r in full) >= sum(r.log10_p < -6 for r in plain)
    assert sum(r.log10_p < -6 for r in full) > sum(r.log10_p < -6 for r in detector)
    assert all(r.payload == Payload(i) for i, r in enumerate(full) if r.mac_ok)
