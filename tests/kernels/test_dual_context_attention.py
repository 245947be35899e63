"""Two contexts with a shared part against float64, on both paths, poisoned outputs, asserted routing."""

import math

import pytest
import torch
from semiperm.kernels import dispatch
from semiperm.kernels import dual_context_attention as module
from semiperm.kernels.dual_context_attention import dual_context_attention, dual_context_pays
from semiperm.kernels.errors import KernelError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CLOSE = {
    torch.float32: 2e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}  # values up to 5: weights and outputs are rounded


@pytest.fixture
def path(each_path, launched):
    ran = {
        "triton": launched(module, "_dual_context_attention_triton"),
        "reference": launched(module, "dual_context_attention_reference"),
    }
    yield each_path
    assert {name for name, calls in ran.items() if calls} == {each_path}


def sample(dtype=torch.float32, rows=2, heads=3, tokens=37, shared=37, positive=13, negative=21, width=24, one=False):
    generator = torch.Generator().manual_seed(0)

    def draw(rows, length):
        return (1.5 * torch.randn(rows, heads, length, width, generator=generator)).to(DEVICE, dtype)

    pairs = [(draw(rows, n), draw(rows, n)) if n else None for n in (shared, positive)]
    return draw(rows, tokens), *pairs, (draw(1 if one else rows, negative), draw(1 if one else rows, negative))


def oracle(q, shared, own, scale=None):
    k, v = (t.expand(len(q), -1, -1, -1) for t in own)
    if shared is not None:
        k, v = torch.cat([shared[0], k], 2), torch.cat([shared[1], v], 2)
    q, k, v = q.double(), k.double(), v.double()
    return torch.softmax(q @ k.mT * (scale or q.shape[-1] ** -0.5), -1) @ v


def check(result, q, shared, positive, negative, phi, scale=None):
    z, z_negative, norms = result
    wanted = [oracle(q, shared, own, scale) for own in (positive, negative)]
    tolerance = CLOSE[q.dtype]
    for mine, theirs in zip((z, z_negative), wanted, strict=True):
        assert mine.dtype == q.dtype and mine.shape == q.shape
        assert (mine.double() - theirs).abs().max() <= tolerance
    extrapolated = wanted[0] + phi * (wanted[0] - wanted[1])
    expected = torch.stack([t.abs().sum((1, 3)) for t in (wanted[0], extrapolated)], -1)
    assert norms.dtype == torch.float32 and norms.shape == (len(q), q.shape[2], 2)
    assert ((norms - expected).abs() / expected).max() <= tolerance * (1 + abs(phi))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"shared": 0},
        {"tokens": 130, "shared": 70, "positive": 65, "negative": 1, "width": 40},
        {"one": True, "width": 80, "heads": 2},
        {"rows": 1, "heads": 1, "tokens": 1, "shared": 1, "positive": 1, "negative": 1, "width": 3},
    ],
    ids=["joint", "nothing shared", "odd", "one negative", "smallest"],
)
def test_both_contexts_and_the_norms(path, poisoned, shape, dtype):
    inputs = sample(dtype, **shape)
    check(dual_context_attention(*inputs, phi=4.0), *inputs, 4.0)


def test_views_scales_and_large_scores(path, poisoned):
    q, shared, positive, negative = sample(tokens=40, shared=40)
    q, shared = q.transpose(1, 2).contiguous().transpose(1, 2), (shared[0][:, :, ::2], shared[1].flip(2)[:, :, ::2])
    check(dual_context_attention(q, shared, positive, negative, phi=-1.5, scale=0.3), q, shared, positive, negative,
          -1.5, 0.3)  # fmt: skip
    far = (positive[0] * 10, positive[1])
    check(dual_context_attention(q, shared, far, negative, phi=0.0), q, shared, far, negative, 0.0)


def test_one_context_twice_is_plain_attention(path):
    q, shared, positive, _ = sample()
    z, z_negative, norms = dual_context_attention(q, shared, positive, positive, phi=3.0)
    assert torch.equal(z, z_negative)
    torch.testing.assert_close(norms[..., 0], norms[..., 1])


def test_the_norms_are_those_that_guidance_takes(path):
    """With them the bound of normalized attention guidance needs no pass of its own."""
    from semiperm.kernels.normalized_attention_guidance import normalized_attention_guidance_reference

    inputs = sample()
    z, z_negative, norms = dual_context_attention(*inputs, phi=4.0)
    flat = [t.transpose(1, 2).flatten(2) for t in (z, z_negative)]
    tau, alpha = 1.2, 0.25
    factor = (tau * norms[..., 0] / norms[..., 1]).clamp(max=1.0)[..., None]
    guided = alpha * factor * (flat[0] + 4.0 * (flat[0] - flat[1])) + (1 - alpha) * flat[0]
    torch.testing.assert_close(guided, normalized_attention_guidance_reference(*flat, 4.0, tau, alpha))


def test_compiles_whole(path, compiled):
    inputs = sample()
    run = compiled(lambda *given: dual_context_attention(*given, phi=4.0))
    for mine, theirs in zip(run(*inputs), dual_context_attention(*inputs, phi=4.0), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert run.graphs == 1


def test_autocast_changes_nothing(path):
    inputs = sample()
    expected = dual_context_attention(*inputs, phi=4.0)
    with torch.autocast(DEVICE, torch.bfloat16):
        mixed = dual_context_attention(*inputs, phi=4.0)
    assert all(torch.equal(a, b) for a, b in zip(mixed, expected, strict=True))


def test_gradients_by_torchs_attention(triton_path):
    q, shared, positive, negative = sample()
    q.requires_grad_()
    z, z_negative, norms = dual_context_attention(q, shared, positive, negative, phi=4.0)
    (z.sum() + z_negative.sum() + norms.sum()).backward()
    assert q.grad.isfinite().all() and q.grad.abs().max() > 0


def test_the_rule():
    """Joint attention pays where the image is half as long as both texts or longer; cross-attention never does."""
    half, wide = torch.zeros(1, 1, 1, 128, dtype=torch.bfloat16), torch.zeros(1, 1, 1, 160, dtype=torch.float16)
    assert dual_context_pays(half, 4096, 512, 512) and dual_context_pays(half, 512, 512, 512)
    assert not dual_context_pays(half, 511, 512, 512) and not dual_context_pays(half, 0, 77, 77)
    assert not dual_context_pays(wide, 4096, 77, 77) and not dual_context_pays(half.float(), 4096, 77, 77)


def test_auto_follows_the_rule(monkeypatch, launched):
    monkeypatch.delenv("SEMIPERM_KERNELS", raising=False)
    monkeypatch.setattr(module, "kernel_path", lambda x, products: "triton")
    monkeypatch.setattr(module, "_dual_context_attention_triton", lambda *given: "kernel")
    assert dual_context_attention(*sample(torch.bfloat16, shared=64), phi=1.0) == "kernel"
    assert dual_context_attention(*sample(torch.bfloat16, shared=0), phi=1.0) != "kernel"
    assert dual_context_attention(*sample(torch.float32, shared=64), phi=1.0) != "kernel"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 24)}, r"q \(2, 3, 24\)"),
        ({"positive": (torch.zeros(2, 3, 0, 24),) * 2}, "none of them empty"),
        ({"positive": (torch.zeros(1, 3, 5, 24),) * 2}, r"k_positive \(1, 3, 5, 24\)"),
        ({"negative": (torch.zeros(2, 3, 5, 24), torch.zeros(2, 3, 6, 24))}, r"v_negative \(2, 3, 6, 24\)"),
        ({"shared": (torch.zeros(2, 4, 5, 24),) * 2}, r"k_shared \(2, 4, 5, 24\)"),
        ({"negative": (torch.zeros(2, 3, 5, 24).half(),) * 2}, "torch.float16"),
        ({"phi": math.nan}, "phi=nan"),
    ],
)
def test_errors_say_what_was_given(change, message):
    q, shared, positive, negative = (
        tuple(t.cpu() for t in part) if isinstance(part, tuple) else part.cpu() for part in sample()
    )
    given = {"q": q, "shared": shared, "positive": positive, "negative": negative, "phi": 4.0} | change
    with pytest.raises(KernelError, match=message):
        dual_context_attention(**given)


def test_forced_where_it_cannot_run(monkeypatch):
    monkeypatch.setenv("SEMIPERM_KERNELS", "triton")
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    with pytest.raises(KernelError, match="SEMIPERM_KERNELS=triton"):
        dual_context_attention(
            *(tuple(t.cpu() for t in p) if isinstance(p, tuple) else p.cpu() for p in sample()), phi=1.0
        )
