"""keyed_correlation against dense Walsh matrices in float64, on both paths: exact peaks, patterns and energies."""

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard
from semiperm.benchmarks.memory import peak_bytes
from semiperm.kernels import keyed_correlation as module
from semiperm.kernels.errors import KernelError
from semiperm.kernels.keyed_correlation import keyed_correlation, keyed_correlation_reference, walsh_scores


def inputs(device="cpu", images=3, keys=5, length=256, cosets=3, n=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = n or length + 37
    values = torch.randint(-15, 16, (images, n), generator=g).to(torch.int8)
    positions = torch.stack([torch.randperm(n, generator=g)[:length] for _ in range(keys)]).int()
    signs = torch.randint(0, 256, (keys, cosets, length // 8), generator=g).to(torch.uint8)
    return tuple(t.to(device) for t in (values, positions, signs))


def plus_minus(signs):
    return 1 - 2 * np.unpackbits(signs.cpu().numpy(), axis=-1).astype(np.float64)


def all_scores(values, positions, signs):
    """(B, K, cosets, L) in float64, by the Walsh matrix as a Kronecker product of two."""
    field = values.cpu().numpy().astype(np.float64)[:, positions.cpu().long().numpy()]
    x = field[:, :, None] * plus_minus(signs)
    small, large = hadamard(16), hadamard(x.shape[-1] // 16)
    x = np.einsum("...ij,ik,jl->...kl", x.reshape(*x.shape[:-1], 16, -1), small, large, optimize=True)
    return x.reshape(*x.shape[:-2], -1), np.square(field).sum(-1)


def oracle(values, positions, signs):
    scores, energy = all_scores(values, positions, signs)
    both = np.stack((scores, -scores), -1).reshape(*scores.shape[:2], -1)  # pattern 2 (c L + w) + negative
    return both.max(-1), both.argmax(-1), energy


def assert_exact(got, expected):
    assert [t.dtype for t in got] == [torch.int32, torch.int64, torch.int32]
    for mine, wanted in zip(got, expected, strict=True):
        assert np.array_equal(mine.cpu().numpy(), wanted)


@pytest.fixture
def poisoned(monkeypatch):
    """What torch.empty returns is full of numbers that are no answer."""
    make = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: make(*args, **kwargs).fill_(77))


@pytest.mark.parametrize("length, cosets", [(256, 32), (256, 5), (512, 3), (1024, 9), (2048, 4), (4096, 3), (8192, 2)])
def test_exact(each_path, device, poisoned, launched, length, cosets):
    calls = launched(module, "_keyed_correlation_triton")
    arguments = inputs(device, 2, 3, length, cosets)
    assert_exact(keyed_correlation(*arguments), oracle(*arguments))
    assert bool(calls) == (each_path == "triton")


@pytest.mark.parametrize("length", [256, 1024, 8192])
def test_exact_at_the_largest_values(each_path, device, length):
    """A field that is one pattern: all sums are as large as they can be, and nothing is rounded."""
    rng = np.random.default_rng(length)
    _, positions, signs = inputs(device, 1, 4, length, 3, n=length)
    wanted = rng.integers(0, 2 * 3 * length, 4)
    for key, number in enumerate(wanted):
        coset, walsh = number // 2 // length, number // 2 % length
        function = [(-1) ** bin(i & int(walsh)).count("1") for i in range(length)]
        code = plus_minus(signs[key, coset]) * function * (1 - 2 * (number & 1))
        values = torch.zeros((1, length), dtype=torch.int8, device=device)
        values[0, positions[key].long()] = torch.from_numpy(15 * code).to(device, torch.int8)
        peak, pattern, energy = keyed_correlation(values, positions[key, None], signs[key, None])
        assert (int(peak), int(pattern), int(energy)) == (15 * length, number, 225 * length)


@pytest.mark.parametrize("value, peak, pattern", [(0, 0, 0), (9, 9, 0), (-9, 9, 1)])
def test_of_equals_the_lowest_pattern_wins(each_path, device, value, peak, pattern):
    _, positions, signs = inputs(device, 1, 1, cosets=40)
    values = torch.zeros((1, 300), dtype=torch.int8, device=device)
    values[0, positions[0, 0]] = value  # all scores are +-value
    signs[0, :, 0] &= 127  # no stream flips the first element
    got = keyed_correlation(values, positions, signs)
    assert [int(t) for t in got] == [peak, pattern, value**2]
    values, positions, signs = inputs(device, 2, 2, cosets=1)
    once, again = (keyed_correlation(values, positions, signs.repeat(1, times, 1)) for times in (1, 70))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_non_contiguous_inputs(each_path, device):
    values, positions, signs = inputs(device, cosets=4)
    expected = oracle(values, positions, signs)
    spread = torch.stack((values, torch.full_like(values, 15)), -1).flatten(-2)[:, ::2]
    got = keyed_correlation(spread, positions.T.contiguous().T, signs.transpose(0, 1).contiguous().transpose(0, 1))
    assert_exact(got, expected)


@pytest.mark.parametrize("keys, scores", [(1, 256), (2, 700), (3, 1 << 20)])
def test_the_reference_does_not_depend_on_its_blocks(monkeypatch, keys, scores):
    arguments = inputs(cosets=7)
    monkeypatch.setattr(module, "_KEYS", keys)
    monkeypatch.setattr(module, "_SCORES", scores)
    assert_exact(keyed_correlation_reference(*arguments), oracle(*arguments))


@pytest.mark.parametrize("programs", [1, 4, 1000])
def test_the_kernel_does_not_depend_on_its_programs(triton_path, monkeypatch, device, poisoned, programs):
    """Few programs take several images each; many share a key's streams."""
    monkeypatch.setattr(module, "_PROGRAMS", programs)
    arguments = inputs(device, 5, 2, cosets=75)
    assert_exact(keyed_correlation(*arguments), oracle(*arguments))


def test_one_key_with_many_streams(each_path, device):
    arguments = inputs(device, 1, 1, 512, 200)
    assert_exact(keyed_correlation(*arguments), oracle(*arguments))


def test_the_scores_of_all_pairs_are_never_there_at_once(reference_path):
    arguments = inputs(images=40, keys=64, length=256, cosets=32)
    scores = 40 * 64 * 256 * 32
    assert 0 < peak_bytes(keyed_correlation_reference, *arguments) < scores / 4


@pytest.mark.parametrize("length, dtype", [(256, torch.int16), (2048, torch.int16), (4096, torch.int32)])
def test_walsh_scores(length, dtype):
    values, positions, signs = inputs(images=1, keys=3, length=length)
    field = torch.stack([values[0, at.long()] for at in positions])
    got = walsh_scores(field, signs)
    assert got.shape == (length, 3, 3) and got.dtype is dtype
    assert np.array_equal(got.permute(2, 1, 0).numpy(), all_scores(values, positions, signs)[0][0])
    streams = torch.zeros((1, 1, length // 8), dtype=torch.uint8)
    extreme = walsh_scores(torch.full((1, length), -15, dtype=torch.int8), streams)
    assert int(extreme[0, 0, 0]) == -15 * length and not extreme[1:].any()


def test_compiles_whole(each_path, device, compiled):
    arguments = inputs(device)
    peak, pattern, energy = compiled(lambda *a: keyed_correlation(*a))(*arguments)
    assert_exact((peak, pattern, energy), oracle(*arguments))


def test_custom_op_is_registered_right(each_path, device):
    torch.library.opcheck(module._keyed_correlation_op, inputs(device))


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("values", torch.zeros(3, dtype=torch.int8)),
        ("values", torch.zeros(0, 293, dtype=torch.int8)),
        ("values", torch.zeros(3, 293)),
        ("positions", torch.zeros(5, 128, dtype=torch.int32)),
        ("positions", torch.zeros(5, 256, dtype=torch.int64)),
        ("signs", torch.zeros(4, 3, 32, dtype=torch.uint8)),
        ("signs", torch.zeros(5, 3, 256, dtype=torch.uint8)),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name, wrong):
    arguments = dict(zip(("values", "positions", "signs"), inputs(), strict=True)) | {name: wrong}
    with pytest.raises(KernelError, match=rf"{name} \({', '.join(map(str, wrong.shape))}.*{wrong.dtype}.*expected"):
        keyed_correlation(**arguments)


@pytest.mark.parametrize("name, number", [("values", 16), ("values", -128), ("positions", 293), ("positions", -1)])
def test_numbers_out_of_range_are_refused(each_path, device, name, number):
    arguments = dict(zip(("values", "positions", "signs"), inputs(device), strict=True))
    arguments[name][1, 3] = number
    with pytest.raises(KernelError, match=rf"{name} in .*{number}.*expected values in -15..15 and positions in 0..292"):
        keyed_correlation(**arguments)
