"""The CPU path: the winners of naive float32 whatever the data look like, little memory, and the speed it claims."""

import statistics
import time

import pytest
import torch
import torch.nn.functional as F
from semiperm.benchmarks.memory import peak_bytes
from semiperm.kernels import token_match_cpu as module
from semiperm.kernels.token_match_merge import best_match, token_match_merge

TIE = 2e-6


pytestmark = pytest.mark.usefixtures("reference_path")


@pytest.fixture(params=["scan", "exact"])
def stages(request, monkeypatch):
    """Both ways to search a block, whatever this CPU is."""
    monkeypatch.setattr(module, "SMALL", 0)
    monkeypatch.setattr(module, "_has_fast_bfloat16", lambda x: request.param == "scan")
    return request.param


@pytest.fixture(params=["scan", "exact", "at once"])
def ways(request, monkeypatch):
    """Those, and the one of small problems."""
    monkeypatch.setattr(module, "SMALL", 2**20 if request.param == "at once" else 0)
    monkeypatch.setattr(module, "_has_fast_bfloat16", lambda x: request.param == "scan")


def naive(x, strength=0.9, threshold=0.7):
    """The released algorithm along the right axis: row 0 is the reference, and is matched with itself too."""
    normal = F.normalize(x, dim=-1)
    score, index = (normal @ normal[:1].transpose(-1, -2)).max(-1)
    match = torch.gather(x[:1].expand_as(x), 1, index[..., None].expand_as(x))
    merged = torch.where((score > threshold)[..., None], (1 + strength) * x - strength * match, x)
    return merged, score, index


def ours(x, strength=0.9, threshold=0.7):
    return token_match_merge(x[1:], x[:1], strength, threshold)


def tokens(kind: str, side: int, channels: int) -> torch.Tensor:
    """(3, side^2, C): rows whose keys are easy or hard to tell apart."""
    torch.manual_seed(0)
    noise = torch.randn(3, side * side, channels)
    upsample = {"smooth": "bicubic", "flat": "nearest"}.get(kind)
    if upsample:  # an image's features: neighbours are alike, or equal but for a thousandth
        coarse = F.interpolate(torch.randn(3, channels, 4, 4), size=side, mode=upsample).flatten(2).transpose(1, 2)
        return (coarse + {"smooth": 0.1, "flat": 1e-3}[kind] * noise).contiguous()
    if kind == "common":  # what all tokens share hides what they do not
        return noise + 30 * torch.randn(channels)
    if kind == "outliers":
        noise[:, ::17] *= 1e3
        noise[:, :, 0] *= 50
    if kind == "copies":
        noise[1:] = noise[0, torch.randperm(side * side)] * 3 + 0.1 * noise[1:]
    if kind == "grey":  # all keys but one are equal
        noise[0] = noise[0, 0]
        noise[0, 100] += 1e-3
    return noise


@pytest.mark.parametrize("small", [False, True], ids=["one_block", "many_blocks"])
@pytest.mark.parametrize("kind", ["random", "copies", "common", "smooth", "flat", "outliers", "grey"])
def test_the_winners_are_those_of_naive_float32(ways, monkeypatch, kind, small):
    if small:
        for name, size in (("QUERY_BLOCK", 100), ("KEY_BLOCK", 150), ("CHUNK", 40)):
            monkeypatch.setattr(module, name, size)
    x = tokens(kind, side=22, channels=96)
    merged, score, index = ours(x)
    wanted, top, best = (t[1:] for t in naive(x))
    torch.testing.assert_close(score, top, atol=TIE, rtol=0)
    normal = F.normalize(x.double(), dim=-1)
    cosine = normal[1:] @ normal[0].T
    loss = cosine.gather(-1, best[..., None]) - cosine.gather(-1, index[..., None])
    assert loss.abs().max() <= TIE
    same = index == best
    assert same.float().mean() > (0.9 if kind not in ("grey", "common") else 0)
    clear = same & ((top - 0.7).abs() > TIE)
    torch.testing.assert_close(merged[clear], wanted[clear], atol=1e-4, rtol=1e-4)


def test_crowded_blocks_go_to_float32(monkeypatch):
    monkeypatch.setattr(module, "SMALL", 0)
    monkeypatch.setattr(module, "_has_fast_bfloat16", lambda x: True)
    exact = []
    original = module._Block._exact
    monkeypatch.setattr(module._Block, "_exact", lambda block, q: exact.append(len(q)) or original(block, q))
    best_match(*tokens("random", 22, 96).split([2, 1]))
    assert sum(exact) < 0.02 * 2 * 22 * 22, "random keys are told apart by the scan"
    exact.clear()
    x = tokens("flat", 22, 96)
    best_match(x[1:], x[:1])
    assert sum(exact) > 0.9 * 2 * 22 * 22


def test_half_precision_inputs_lose_nothing(ways):
    for dtype in (torch.float16, torch.bfloat16):
        x = tokens("smooth", 22, 96).to(dtype)
        score, index = best_match(x[1:], x[:1])
        expected, best = best_match(x[1:].float(), x[:1].float())
        torch.testing.assert_close(score, expected, atol=TIE, rtol=0)
        assert (index == best).float().mean() > 0.99


def test_blocks_without_a_number_do_not_crash(ways):
    x = tokens("random", 12, 32)
    x[1, 3] = torch.nan
    merged, score, index = ours(x)
    assert index.max() < 144 and torch.isfinite(merged[0, 4:]).all() and torch.isfinite(merged[1]).all()


@pytest.mark.parametrize("kind", ["copies", "flat"])
def test_no_matrix_of_scores_in_memory(stages, kind):
    x = tokens(kind, side=32, channels=64)
    assert peak_bytes(naive, x) > 3 * 1024 * 1024 * 4
    assert peak_bytes(ours, x) < 0.5 * 1024 * 1024 * 4
    four = x.repeat(1, 4, 1)
    assert peak_bytes(ours, four) < 4.5 * peak_bytes(ours, x), "it must not grow with N x M"


@pytest.mark.bench
def test_speed_and_memory_at_4096_tokens():
    """Against the released algorithm, interleaved: at least 1.5 times as fast, with at most 5 % of its extra memory."""
    x = torch.cat([tokens("copies", 64, 640), tokens("random", 64, 640)[1:2]])
    assert peak_bytes(ours, x) <= 0.05 * peak_bytes(naive, x)
    times = {naive: [], ours: []}
    for _ in range(7):
        for function, spent in times.items():
            start = time.perf_counter()
            function(x)
            spent.append(time.perf_counter() - start)
    ratio = statistics.median(times[naive][1:]) / statistics.median(times[ours][1:])
    assert ratio >= 1.5, f"{ratio:.2f} times as fast"
