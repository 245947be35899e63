"""The keyed payload mark: exact noise, exact p-values, recovery over noisy channels, and its speed."""

import itertools
import math
import resource
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from marks import gaussian_channel, key_of, seeded
from scipy import stats
from semiperm.kernels.keyed_correlation import walsh_scores
from semiperm.methods.errors import WatermarkError
from semiperm.methods.watermark.fields import best_patterns, fields_of, first_field, first_field_bytes, symbols_of
from semiperm.methods.watermark.keys import WatermarkKey
from semiperm.methods.watermark.mark import KeyedMark, Payload, capacity, read
from semiperm.methods.watermark.statistics import LARGEST, corrected, level_counts, log_chernoff, log_tail, quantise

SMALL, MEDIUM, FULL = (4, 16, 16), (4, 32, 32), (4, 64, 64)


def exact_and_detected(shape, trials, channel):
    marked = torch.cat([KeyedMark(key_of(i)).sample((1, *shape), Payload(i), seeded(i)) for i in range(trials)])
    readings = [read(row[None], [key_of(i)])[0] for i, row in enumerate(channel(marked))]
    exact = [r.mac_ok is True and r.payload == Payload(i) for i, r in enumerate(readings)]
    return np.mean(exact), np.mean([r.log10_p < -6 for r in readings])


@pytest.fixture
def one_core():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Round trips


@pytest.mark.parametrize(
    "shape",
    [SMALL, MEDIUM, FULL, (4, 24, 56), (5, 31, 33), (16, 4, 16, 16), (16, 3, 10, 14), (256, 64), (16, 64, 48)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_layout_and_dtype_reads_back(shape, dtype):
    key = key_of(7)
    payloads = [Payload(5, time=0), Payload(2**24 - 1, time=0)]
    latents = KeyedMark(key).sample((2, *shape), payloads, seeded(0), dtype=dtype)
    assert latents.shape == (2, *shape) and latents.dtype == dtype
    readings = read(latents, [key_of(6), key, key_of(8)])
    assert [r.payload for r in readings] == payloads and all(r.mac_ok for r in readings)
    assert all(r.log10_p < -150 and r.key_name == "key 7" and r.key_id == 7 for r in readings)
    assert all(r.bit_confidence == pytest.approx(1) for r in readings)
    alone = [read(latents[i : i + 1], [key_of(6), key, key_of(8)])[0] for i in range(2)]
    assert alone == readings


def test_the_full_payload_is_192_bits_and_smaller_ones_say_what_they_carry():
    payload = Payload(2**64 - 3, time=2**32 - 1, model=0xDEADBEEF, version=7)
    assert KeyedMark(key_of(1)).read(KeyedMark(key_of(1)).sample((1, *FULL), payload))[0].payload == payload
    assert [capacity(s).total for s in (SMALL, MEDIUM, FULL)] == [49, 100, 192]
    with pytest.raises(WatermarkError, match="24 bits of unique_id"):
        KeyedMark(key_of(1)).sample((1, *SMALL), Payload(1 << 24))
    with pytest.raises(WatermarkError, match="0 of version"):
        KeyedMark(key_of(1)).sample((1, *SMALL), Payload(1, version=2))


def test_nonces_are_fresh_and_generators_reproduce():
    mark = KeyedMark(key_of(1))
    fresh = mark.sample((8, *FULL), Payload(1))
    assert len({r.nonce for r in mark.read(fresh)}) == 8
    signs = fresh.sign().flatten(1)
    assert (signs @ signs.T / signs.shape[1] - torch.eye(8)).abs().max() < 0.05  # one payload, unrelated signs
    first, second = (mark.sample((2, *SMALL), Payload(1), seeded(3)) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, mark.sample((2, *SMALL), Payload(1), seeded(4)))
    unnamed = mark.read(mark.sample((2, *FULL)))
    assert unnamed[0].payload.unique_id != unnamed[1].payload.unique_id
    assert abs(unnamed[0].payload.time - time.time()) < 60


def test_a_wrong_key_or_scope_or_shape_finds_nothing():
    latents = KeyedMark(key_of(1), "model a").sample((4, *FULL))
    for readings in (
        read(latents, [key_of(2)], scope="model a"),
        read(latents, [key_of(1)], scope="model b"),
        read(latents.reshape(4, 64, 256), [key_of(1)], scope="model a"),
    ):
        assert all(r.p_value > 1e-4 and r.payload is None and r.mac_ok is None for r in readings)
    assert all(r.mac_ok for r in read(latents, [key_of(1)], scope="model a"))


def test_a_detector_reads_without_authenticating_and_a_forged_mac_fails():
    key = key_of(1)
    latents = KeyedMark(key).sample((1, *SMALL), Payload(9))
    reading = read(latents, [key.detector()])[0]
    assert reading.payload == Payload(9) and reading.mac_ok is None and reading.log10_p < -100
    other = WatermarkKey(key.name, key.key_id, "", key.stream_key, b"x" * 32)
    reading = read(latents, [other])[0]
    assert reading.mac_ok is False and reading.log10_p < -100
    with pytest.raises(WatermarkError, match="without its MAC"):
        KeyedMark(key.detector()).sample((1, *SMALL))


def test_a_weak_mark_gives_a_detector_no_wrong_payload():
    """At rho .2 nearly every mark is detected and many decode to a neighbour; without a MAC none of these is told."""
    marked = torch.cat([KeyedMark(key_of(i)).sample((1, *FULL), Payload(i), seeded(i)) for i in range(12)])
    rows = gaussian_channel(marked, 0.2)
    readings = [read(row[None], [key_of(i).detector()])[0] for i, row in enumerate(rows)]
    assert all(r.payload in (None, Payload(i)) for i, r in enumerate(readings))
    assert sum(r.log10_p < -6 for r in readings) >= 10


def test_input_errors_say_what_to_do():
    mark = KeyedMark(key_of(1))
    for shape, text in (((1, 4, 8, 8), "at least 1024"), ((4096,), "expected"), ((0, 4, 16, 16), "expected")):
        with pytest.raises(WatermarkError, match=text):
            mark.sample(shape)
    with pytest.raises(WatermarkError, match="3 payloads"):
        mark.sample((2, *SMALL), [Payload(1)] * 3)
    with pytest.raises(WatermarkError, match="no keys"):
        read(torch.zeros(1, *SMALL), [])
    with pytest.raises(WatermarkError, match="NaN"):
        mark.read(torch.full((1, *SMALL), math.nan))
    with pytest.raises(WatermarkError, match="floating point"):
        mark.read(torch.zeros(1, *SMALL, dtype=torch.int64))
    with pytest.raises(WatermarkError, match="unique_id=-1"):
        Payload(-1)
    assert mark.read(torch.zeros(1, *SMALL))[0].p_value == 1


# Statistics


def test_tails_are_exact_and_chernoff_is_above_them():
    weights = [1, 1, 2, 3, 5, 5, 8, 13, 14, 14, 7]
    counts = level_counts(np.array(weights))
    sums = np.array([np.dot(weights, signs) for signs in itertools.product((-1, 1), repeat=len(weights))])
    for score in range(-75, 76):
        exact = (sums >= score).mean()
        assert math.exp(log_tail(counts, score)) == pytest.approx(exact, rel=1e-9, abs=1e-300)
        assert exact <= math.exp(log_chernoff(counts, score)) * (1 + 1e-9)
    level = np.zeros(LARGEST + 1, int)
    level[3] = 2048
    for score in (0, 90, 3000, 6000):  # tails down to exp(-1400)
        expected = stats.binom.logsf((score // 3 + 2048 + 1) // 2 - 1, 2048, 0.5)
        if np.isfinite(expected):
            assert log_tail(level, score) == pytest.approx(expected, rel=1e-9)
    assert corrected(math.log(1e-3), 1000)[0] == pytest.approx(1 - 0.999**1000)
    assert corrected(-2000, 10)[1] == pytest.approx(-2000 / math.log(10) + 1)


def test_scores_are_those_of_the_definition():
    fields, row = fields_of(SMALL), quantise(torch.randn(1, *SMALL, generator=seeded(0)))[0]
    firsts = [first_field(fields, key_of(i), "") for i in (1, 2)]
    positions, signs = (np.stack(part) for part in zip(*((f.positions, f.signs[0]) for f in firsts), strict=True))
    assert all(len(set(p)) == fields.length for p in positions)
    eights = first_field_bytes(fields, [key_of(1), key_of(2)], "")[1]
    scores = walsh_scores(torch.from_numpy(row[positions]), torch.from_numpy(eights))
    for walsh, key, coset in ((0, 0, 0), (5, 1, 3), (255, 0, 511)):
        walsh_bits = np.array([bin(j & walsh).count("1") & 1 for j in range(fields.length)])
        flips = 1 - 2 * (signs[key, coset] ^ walsh_bits).astype(int)
        assert scores[walsh, coset, key] == row[positions[key]].astype(int) @ flips


def null_rows(kind, count, shape):
    """Latents of no key: Gaussian, and a fixed one that no Gaussian model describes."""
    if kind == "gaussian":
        return torch.randn(count, *shape, generator=seeded(11))
    fixed = torch.linspace(-1, 3, math.prod(shape)).pow(5).reshape(shape)
    return fixed.expand(count, *shape)


def false_positives(kind, shape, trials):
    values = []
    for i, row in enumerate(null_rows(kind, trials, shape)):
        values.append(read(row[None], [key_of(100000 + i)])[0].p_value)
    return np.array(values)


def uncorrected(kind, shape, trials):
    """The p-value of one pattern fixed beforehand, which has no correction and should be uniform."""
    fields, values = fields_of(shape), []
    for i, row in enumerate(quantise(null_rows(kind, trials, shape))):
        positions, signs = first_field_bytes(fields, [key_of(200000 + i)], "")
        field = row[positions]
        score = int(walsh_scores(torch.from_numpy(field), torch.from_numpy(signs))[3, 1, 0])
        values.append(math.exp(log_tail(level_counts(field), score)))
    return np.array(values)


def check_null(kind, shape, trials):
    p = false_positives(kind, shape, trials)
    for alpha in (1e-3, 1e-2):
        low, high = stats.binom.interval(0.99, trials, alpha)
        # At 1e-2 the union bound over nonces is already a little conservative: only the upper end is claimed.
        assert (p < alpha).sum() <= high and ((p < alpha).sum() >= low or alpha > 1e-3)
    single = uncorrected(kind, shape, trials)
    # The middle of the lattice carries steps of some thousandths, half of a step is added in the comparison.
    assert stats.kstest(single, "uniform").statistic < 1.63 / math.sqrt(trials) + 2e-3


@pytest.mark.parametrize("kind", ["gaussian", "fixed"])
def test_null_p_values(kind):
    check_null(kind, SMALL, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gaussian", "fixed"])
def test_null_p_values_of_many_latents(kind):
    check_null(kind, SMALL, 10000)
    check_null(kind, MEDIUM, 2000)


def test_p_values_stay_valid_over_a_bank_of_keys():
    p = np.array([r.p_value for r in read(null_rows("gaussian", 300, SMALL), [key_of(i) for i in range(40)])])
    assert (p < 0.1).sum() <= stats.binom.ppf(0.999, 300, 0.1) and (p < 1e-3).sum() <= 3


def test_marked_noise_is_normal_and_white():
    latents = KeyedMark(key_of(1)).sample((400, *SMALL), Payload(1), seeded(0)).flatten(1)
    p = np.array([stats.kstest(column, "norm").pvalue for column in latents.T.numpy()])
    assert stats.kstest(p, "uniform").pvalue > 1e-3  # each element over the images of one key and one payload
    assert stats.kstest(latents.flatten().numpy(), "norm").pvalue > 1e-3
    covariance = latents.T @ latents / 400 - torch.eye(1024)
    assert covariance.abs().max() < 6 / math.sqrt(400)  # no pair of positions is tied
    assert abs(float(covariance.triu(1).square().sum() * 400 / (1024 * 1023 / 2)) - 1) < 0.02


@pytest.mark.parametrize("hidden", [0, 64])
def test_no_classifier_tells_marked_from_plain_noise(hidden):
    """Logistic regression and an MLP on 3,000 images of each kind under one key, tested on 2,000 others."""
    marked = KeyedMark(key_of(1)).sample((2500, *SMALL), Payload(1), seeded(0)).flatten(1)
    x = torch.cat([marked, torch.randn(2500, 1024, generator=seeded(1))])
    y = torch.arange(5000).ge(2500).float()
    order = torch.randperm(5000, generator=seeded(2))
    train, test = order[:3000], order[3000:]
    torch.manual_seed(0)
    layers = [torch.nn.Linear(1024, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 1)] if hidden else None
    model = torch.nn.Sequential(*(layers or [torch.nn.Linear(1024, 1)]))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.1)
    for _ in range(5):
        for rows in train.split(100):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(model(x[rows])[:, 0], y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    right = int((model(x[test])[:, 0].gt(0) == y[test].bool()).sum())
    low, high = stats.binom.interval(0.999, len(test), 0.5)
    assert low <= right <= high


# Channels


def test_small_latents_survive_the_agreement_of_the_canvas():
    for agreement in (0.70, 0.76):
        rho = math.cos(math.pi * (1 - agreement))
        exact, detected = exact_and_detected(SMALL, 200, lambda z, rho=rho: gaussian_channel(z, rho))
        assert exact >= 0.99 and detected >= 0.99


def test_signs_alone_carry_the_payload():
    """A channel that keeps only signs, 72 % of them right, and one of uninformative magnitudes at 76 %."""

    def hard(z, agreement, magnitudes):
        kept = torch.rand(z.shape, generator=seeded(5)) < agreement
        size = torch.randn(z.shape, generator=seeded(6)).abs() if magnitudes else torch.ones(())
        return torch.where(kept, 1.0, -1.0) * z.sign() * size

    for agreement, magnitudes in ((0.72, False), (0.76, True)):
        exact, detected = exact_and_detected(SMALL, 100, lambda z, a=agreement, m=magnitudes: hard(z, a, m))
        assert exact >= 0.95 and detected >= 0.97


def test_full_latents_survive_rho_of_a_third():
    exact, detected = exact_and_detected(FULL, 40, lambda z: gaussian_channel(z, 0.3))
    assert exact >= 0.97 and detected == 1


@pytest.mark.slow
def test_full_latents_survive_rho_of_a_third_in_200_trials():
    exact, detected = exact_and_detected(FULL, 200, lambda z: gaussian_channel(z, 0.3))
    assert exact >= 0.99 and detected == 1


# Speed


@pytest.mark.bench
def test_signing_is_fast_on_one_core(one_core):
    for shape, limit in ((FULL, 2e-3), ((16, 128, 128), 30e-3)):
        mark, taken = KeyedMark(key_of(1)), []
        for _ in range(20):
            start = time.perf_counter()
            mark.sample((1, *shape))
            taken.append(time.perf_counter() - start)
        assert np.median(taken) < limit


@pytest.mark.bench
def test_ten_thousand_keys_take_less_than_a_minute():
    keys, latents = [key_of(i) for i in range(10000)], KeyedMark(key_of(4321)).sample((1, *FULL), Payload(1))
    latents, taken = gaussian_channel(latents, 0.3), []
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        start = time.perf_counter()
        reading = read(latents, keys)[0]
        taken.append(time.perf_counter() - start)
    assert reading.key_name == "key 4321" and reading.mac_ok and min(taken) < 60
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024 < 500


# Who can link pictures


def largest_agreement(latents):
    """Of all pairs, either way round, in standard deviations of chance."""
    signs = latents.flatten(1).sign()
    return float((signs @ signs.T).fill_diagonal_(0).abs().amax()) / math.sqrt(signs.shape[1])


@pytest.mark.slow
def test_large_latents_of_one_key_are_not_linked_by_their_signs():
    """Of 2,000; chance alone reaches 5.2 standard deviations in as many pairs."""
    assert largest_agreement(KeyedMark(key_of(4)).sample((2000, *FULL), generator=seeded(4))) < 6


def test_the_linked_pairs_of_format_2_are_gone():
    made = [KeyedMark(key_of(4), form=form).sample((400, *FULL), generator=seeded(4)) for form in (2, 3)]
    old, new = map(largest_agreement, made)
    assert old > 14 and new < 6


@pytest.mark.parametrize("shape, bits", [(SMALL, 18), (MEDIUM, 18), (FULL, 28), ((16, 64, 64), 28)])
def test_how_many_patterns_a_first_field_has(shape, bits):
    fields = fields_of(shape)
    assert fields.first_nonces == 2**bits and len(set(first_field(fields, key_of(1), "").positions)) == fields.length


def test_two_words_of_the_first_field_share_one_block_at_most():
    fields, generator = fields_of(FULL), np.random.default_rng(0)
    drawn = generator.integers(0, fields.symbols, (200, 2))
    words = {(int(a), int(b)): symbols_of(fields, int(a + fields.symbols * b)) for a, b in drawn}
    near = [symbols_of(fields, int(a + fields.symbols * b)) for a in (0, 1, 77) for b in (0, 1, 77)]
    for some in (list(words.values()), near):
        for i, one in enumerate(some):
            assert all(sum(s == t for s, t in zip(one, other, strict=True)) <= 1 for other in some[:i])
            assert len(one) == fields.blocks and all(0 <= s < fields.symbols for s in one)


def test_the_best_word_is_found_where_no_block_alone_says_it():
    """At 11 standard deviations over 16 blocks; the decoder's word is then the one that was signed."""
    key, fields = key_of(5), fields_of(FULL)
    latents = KeyedMark(key).sample((8, *FULL), generator=seeded(5))
    sent = [reading.nonce for reading in read(latents, [key])]
    rows = quantise(gaussian_channel(latents, 0.2))
    found = [best_patterns(fields, key, "", row, 1)[0] for row in rows]
    assert sum(word == nonce for (_, word), nonce in zip(found, sent, strict=True)) >= 7
    first = first_field(fields, key, "")
    for (score, word), row in zip(found, rows, strict=True):  # the score is that of the definition
        assert score == row[first.positions].astype(int) @ (1 - 2 * first.bits(word).astype(int))


def test_many_keys_are_told_apart_in_large_latents():
    keys = [key_of(i) for i in range(40)]
    latents = gaussian_channel(KeyedMark(keys[33]).sample((2, *FULL), generator=seeded(6)), 0.3)
    assert [reading.key_name for reading in read(latents, keys)] == [keys[33].name] * 2


def test_keys_that_may_have_signed_in_an_older_format_count_twice():
    latents = torch.randn(1, *SMALL, generator=seeded(8))
    one, old = key_of(7), replace(key_of(7), since=2)
    alone, both = read(latents, [one])[0], read(latents, [old])[0]
    assert both.p_value <= 1 - (1 - alone.p_value) ** 2 + 1e-12
    signed = KeyedMark(one).sample((1, *SMALL), generator=seeded(9))
    assert read(signed, [old])[0].log10_p == pytest.approx(read(signed, [one])[0].log10_p + math.log10(2))
