"""Informed detection: a list of issued marks, and p-values that count it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from marks import gaussian_channel, key_of, seeded
from scipy import stats
from semiperm.methods.errors import WatermarkError
from semiperm.methods.watermark.content import bind
from semiperm.methods.watermark.issued import Issued, issued_in, load_issued, read_issued, save_issued
from semiperm.methods.watermark.mark import KeyedMark, Payload, read

SMALL, FULL = (4, 16, 16), (4, 64, 64)


def signed(count, shape=SMALL, key=1, form=3):
    return KeyedMark(key_of(key), form=form).sample((count, *shape), [Payload(i) for i in range(count)], seeded(3))


def test_each_picture_is_found_in_the_list_where_nobody_else_would_find_it():
    latents = signed(40)
    issued = issued_in(latents, key_of(1))
    weak = gaussian_channel(latents, 0.28)
    found = read_issued(weak, issued, [key_of(1)])
    named = [reading.payload.unique_id == i for i, reading in enumerate(found)]
    assert sum(r.log10_p < -3 and right for r, right in zip(found, named, strict=True)) >= 36
    assert sum(reading.log10_p < -3 for reading in read(weak, [key_of(1)], thorough=True)) <= 20


@pytest.mark.parametrize("shape, form", [(SMALL, 3), (FULL, 3), (FULL, 2)])
def test_the_signs_are_those_that_were_signed(shape, form):
    key, latents = replace(key_of(1), since=2), signed(2, shape, form=form)
    issued = issued_in(latents, key)
    assert [one.form for one in issued] == [form, form]
    for reading, i in zip(read_issued(latents, issued, [key]), range(2), strict=True):
        assert reading.bit_confidence == 1 and reading.payload.unique_id == i and reading.mac_ok


def test_p_values_are_uniform_and_count_the_list():
    key, plain = key_of(1), torch.randn(300, *SMALL, generator=seeded(4))
    one = [Issued(key.key_id, 5, Payload(6), SMALL)]
    p = np.array([reading.p_value for reading in read_issued(plain, one, [key])])
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    many = one + [Issued(key.key_id, nonce, Payload(6), SMALL) for nonce in range(6, 55)]
    p = np.array([reading.p_value for reading in read_issued(plain, many, [key])])
    assert (p < 0.05).mean() < 0.09
    elsewhere = [Issued(key.key_id, 5, Payload(6), FULL), Issued(77, 5, Payload(6), SMALL), replace(one[0], scope="x")]
    first, second = (read_issued(plain[:1], some, [key])[0].log10_p for some in (one, one + elsewhere))
    assert first == second  # entries that cannot be meant cost nothing
    assert read_issued(plain[:2], elsewhere, [key]) == [None, None]
    assert read_issued(plain[:2], one, [key.detector()]) == [None, None]


def test_bound_signs_are_not_compared():
    key = key_of(2)
    latents = KeyedMark(key).sample((2, *FULL), Payload(9), seeded(5), bound=True)
    bound = bind(latents, torch.randn(2, 30, generator=seeded(6)), key)
    issued = issued_in(bound, key)
    for reading in read_issued(bound, issued, [key]):
        assert reading.bound and reading.bit_confidence == 1 and (reading.evidence == 0).sum() == 1024


def test_a_list_is_kept_as_lines_and_damage_is_named(tmp_path):
    file, issued = tmp_path / "issued.jsonl", issued_in(signed(3), key_of(1))
    save_issued(issued[:2], file)
    save_issued(issued[2:], file)
    assert load_issued(file) == issued
    for bad in ("{", '{"key_id": 1}', "[]", '{"payload": 3, "shape": 4}'):
        file.write_text(bad + "\n")
        with pytest.raises(WatermarkError, match="line 1 of"):
            load_issued(file)
    with pytest.raises(WatermarkError, match="is no file"):
        load_issued(tmp_path)
    with pytest.raises(WatermarkError, match="number 0 carries no authentic mark"):
        issued_in(torch.randn(1, *SMALL, generator=seeded(7)), key_of(1))
    assert math.isfinite(read_issued(signed(1), issued, [key_of(1)])[0].log10_p)
