"""The watermark's benchmark without a model: what its rows say, and that it goes on where it was stopped."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from scipy import stats
from semiperm.benchmarks.watermark import run as bench
from semiperm.benchmarks.watermark import statistics as statistics
from semiperm.benchmarks.watermark.classifiers import CLASSIFIERS, hits
from semiperm.benchmarks.watermark.marks import BASELINES, CARRIERS, MARKS, OURS, RELEASED, key_of, seeded
from semiperm.methods.watermark import mark as watermark
from semiperm.methods.watermark.statistics import level_counts, log_tail, quantise

SMALL = statistics.SMALL


def null(mark=OURS, latents=statistics.EACH, shape=SMALL, start=0, count=6):
    return dict(task="null", mark=mark, latents=latents, shape=list(shape), start=start, count=count)


def channel(mark=OURS, shape=SMALL, rho=0.9, bits=49, start=0, count=3):
    return dict(task="channel", mark=mark, shape=list(shape), rho=rho, bits=bits, start=start, count=count)


def test_the_score_law_is_the_one_of_all_signs_and_of_the_exact_tail():
    weights = np.array([1, 2, 3, 5, 5, 8, 13, 14, 14, 7])
    mass = statistics.score_law(weights)
    sums = np.array([np.dot(weights, signs) for signs in itertools.product((-1, 1), repeat=len(weights))])
    for score in range(-72, 73):
        assert mass[len(mass) // 2 + score] == pytest.approx((sums == score).mean(), abs=1e-12)
    row = quantise(torch.randn(1, 700, generator=seeded(0)))[0]
    mass, counts = statistics.score_law(row), level_counts(row)
    for score in (-90, 0, 41, 300):
        assert mass[len(mass) // 2 + score :].sum() == pytest.approx(math.exp(log_tail(counts, score)), rel=1e-8)


def test_p_values_of_one_nonce_are_exactly_uniform():
    """The tie-breaking is on trial: with u = 0 and u = 1 the p-values of one score touch those of the next."""
    row = quantise(torch.randn(1, *SMALL, generator=seeded(1)))[0][:256]
    mass = statistics.score_law(row)
    above = np.concatenate([mass[::-1].cumsum()[::-1], [0]])
    assert above[0] == pytest.approx(1) and (mass > -1e-12).all()
    units = [null(start=start, count=60) for start in (0, 60)]
    results = [statistics.compute(unit) for unit in units]
    assert len(set(results[0]["single"]) | set(results[1]["single"])) == 120
    assert statistics.rows(units, results)[0]["ks_single"][1] > 1e-4


def test_null_rows_count_false_positives_beside_their_interval():
    p = np.concatenate([np.linspace(0.011, 1, 985), np.full(15, 5e-4)])
    row = statistics.rows([null(count=1000)], [{"p": p.tolist(), "single": (p[:500]).tolist()}])[0]
    assert [rate["count"] for rate in row["rates"]] == [15 + (p[:985] < 0.1).sum(), 15, 15, 0]
    assert row["rates"][2]["interval"] == [0, 4] and row["n"] == 1000 and row["shape"] == [4, 16, 16]
    assert row["ks_tail"][1] < 1e-4  # they all sit at one place
    assert row["ks_small"][1] < 0.9
    too_small = statistics.rows([null()], [{"p": (np.linspace(0, 1, 1000) ** 2).tolist(), "single": []}])[0]
    assert too_small["ks_small"][1] < 1e-4 and too_small["ks_single"] is None
    too_large = statistics.rows([null()], [{"p": (np.linspace(0, 1, 1000) ** 0.5).tolist(), "single": []}])[0]
    assert too_large["ks_small"][1] > 0.9


@pytest.mark.parametrize("mark", [OURS, *BASELINES])
def test_every_mark_has_null_p_values_and_is_found(mark):
    result = statistics.compute(null(mark, count=4))
    assert len(result["p"]) == 4 and all(0 < p <= 1 for p in result["p"])
    one = MARKS[mark](key_of(5))
    found = one.find(one.sample((2, 4, 32, 32), seeded(0))[1:])
    assert found.p_value < 1e-3 and found.exact in (None, True)
    wrong = MARKS[mark](key_of(6)).find(one.sample((1, 4, 32, 32), seeded(0)))
    assert wrong.p_value > 1e-4


def test_the_released_p_value_of_tree_ring_is_too_small():
    unit = null(RELEASED, shape=statistics.FULL, count=1200)
    p = np.array(statistics.compute(unit)["p"])
    assert (p < 0.01).sum() > stats.binom.ppf(0.999, 1200, 0.01)


@pytest.mark.parametrize("mark", [OURS, *CARRIERS])
def test_the_channel_counts_exact_messages(mark):
    clear, drowned = (statistics.compute(channel(mark, rho=rho)) for rho in (0.95, 0.02))
    assert clear["exact"] == clear["detected"] == clear["trials"] == 3
    assert drowned["exact"] == drowned["detected"] == 0
    row = statistics.rows([channel(mark)], [clear])[0]
    assert row["exact"][0] == 1 and 0.4 < row["exact"][1] < 0.5 and (row["right"] == 1 or mark == OURS)


@pytest.mark.parametrize("bits", [30, 49, 64])
def test_the_mark_can_be_measured_with_other_numbers_of_bits(bits):
    mark, before = MARKS[OURS](key_of(1), bits), watermark.capacity
    latents = mark.sample((1, *SMALL), seeded(2))
    assert mark.find(latents).exact is True and watermark.capacity is before
    if bits != watermark.capacity(SMALL).total:
        assert MARKS[OURS](key_of(1)).find(latents).exact is False


def test_classifiers_find_what_is_there_and_nothing_else():
    plain, other = (torch.randn(900, 4, 8, 8, generator=seeded(i)) for i in range(2))
    shifted = other + 0.3 * torch.randn(4, 8, 8, generator=seeded(2))
    coins = torch.randint(0, 2, (900, 1, 1, 8), generator=seeded(3)) * 2 - 1
    tied = other.abs() * coins * torch.randn(4, 8, 8, generator=seeded(4)).sign()  # columns share their signs
    assert hits("logistic", shifted, plain, 600)[0] > 500
    assert hits("convolutional", shifted, plain, 600)[0] > 500
    assert hits("pairs", tied, plain, 600)[0] > 590 > 350 > hits("logistic", tied, plain, 600)[0]
    kinds = torch.randn(60, 4, 8, 8, generator=seeded(5)).sign()
    kinds[:, :, 4:] = 0  # one of 60 patterns in a half of each latent, as a nonce lays it, and nothing in the means
    pattern = kinds[torch.randint(0, 60, (900,), generator=seeded(6))]
    linked = torch.where(pattern == 0, other, other.abs() * pattern)
    assert hits("nearest", linked, plain, 600)[0] > 550
    for name in CLASSIFIERS:
        right, asked = hits(name, other, plain, 600)
        assert asked == 600 and 240 < right < 360


def test_a_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch):
    units, file, computed = [null(start=start, count=2) for start in range(0, 8, 2)], tmp_path / "units.jsonl", []

    def compute(unit):
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(unit["start"])
        return {"p": [unit["start"] / 10]}

    monkeypatch.setattr(bench, "compute", compute)
    with pytest.raises(KeyboardInterrupt):
        bench.computed(units, 1, file, lambda n: None)
    file.write_text(file.read_text() + '{"unit": {"task": "nu')  # killed while it wrote
    monkeypatch.setattr(bench, "compute", lambda unit: computed.append(unit["start"]) or {"p": [unit["start"] / 10]})
    told = []
    found = bench.computed(units, 1, file, told.append)
    assert computed == [0, 2, 4, 6] and told == [2, 1, 1]
    assert [result["p"] for result in found] == [[0.0], [0.2], [0.4], [0.6]]
    assert bench.computed(units, 1, file, told.append) == found and computed == [0, 2, 4, 6]


def test_units_do_not_depend_on_the_process():
    units = [null(start=0, count=2), null(start=2, count=2)]
    assert bench.computed(units, 2, None, lambda n: None) == [statistics.compute(unit) for unit in units]


def test_plans_are_plain_values_and_the_full_one_has_a_hundred_thousand():
    for quick in (True, False):
        units = statistics.plan(quick)
        assert json.loads(json.dumps(units)) == units
        assert len({json.dumps(unit, sort_keys=True) for unit in units}) == len(units)
    for shape in (statistics.SMALL, statistics.MEDIUM, statistics.FULL):
        some = [u for u in units if u["task"] == "null" and u["mark"] == OURS and u["shape"] == list(shape)]
        assert sum(u["count"] for u in some if u["latents"] == statistics.EACH) == 100_000
        covered = sorted((u["start"], u["count"]) for u in some if u["latents"] == statistics.EACH)
        assert all(a + n == b for (a, n), (b, _) in zip(covered, covered[1:], strict=False))


def test_speed_is_taken_in_a_process_of_its_own():
    row = bench.in_own_process("sign", (4, 16, 16), 1, 3)
    assert row["what"] == "sign" and row["shape"] == [4, 16, 16] and row["rounds"] == 3 and row["threads"] == 1
    assert 0 < row["best_ms"] <= row["ms"] < 1000 and row["peak_mb"] > 50 > row["extra_mb"]
    with pytest.raises(bench.TimingError, match="at least 1024"):
        bench.in_own_process("sign", (4, 8, 8), 1, 3)


def test_a_bank_of_keys_is_searched(monkeypatch):
    monkeypatch.setattr(bench, "KEYS", 40)
    row = bench.timed("bank", (4, 16, 16), 1)
    assert row["keys"] == 40 and row["ms"] == row["best_ms"] > 0
