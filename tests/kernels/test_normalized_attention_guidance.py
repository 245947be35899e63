"""normalized_attention_guidance against the paper's formula in float64, on both paths."""

import pytest
import torch
from semiperm.kernels import normalized_attention_guidance as module
from semiperm.kernels.errors import KernelError
from semiperm.kernels.normalized_attention_guidance import (
    normalized_attention_guidance,
    normalized_attention_guidance_reference,
)

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of the largest output: one rounding
DTYPES = list(TOLERANCE)


def inputs(dtype, device, shape=(2, 7, 45), shared=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    positive = torch.randn(shape, generator=g)
    negative = torch.randn((1, *shape[1:]) if shared else shape, generator=g)
    negative[:, ::2] *= 0.1  # there the extrapolation stays under tau
    return positive.to(device, dtype), negative.to(device, dtype)


def oracle(positive, negative, scale, tau, alpha):
    """Z~ = Z+ + phi (Z+ - Z-), R, Z^ = Z~ min(R, tau) / R, alpha Z^ + (1 - alpha) Z+; one token at a time."""
    positive, negative = positive.double(), negative.double().expand(positive.shape)
    out = torch.empty_like(positive)
    for b in range(positive.shape[0]):
        for n in range(positive.shape[1]):
            z = positive[b, n]
            guided = z + scale * (z - negative[b, n])
            ratio = float(guided.abs().sum() / z.abs().sum())
            out[b, n] = alpha * guided * min(ratio, tau) / ratio + (1 - alpha) * z
    return out


def assert_close(got, expected, dtype):
    error = float((got.double() - expected).abs().max() / expected.abs().max())
    assert error < TOLERANCE[dtype], f"{error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 7, 45), (1, 5, 640), (1, 2, 2049), (1, 1, 8200), (3, 1, 1)])
def test_matches_float64(each_path, device, poisoned, launched, dtype, shape):
    calls = launched(module, "_normalized_attention_guidance_triton")
    positive, negative = inputs(dtype, device, shape)
    got = normalized_attention_guidance(positive, negative, 4.0, 2.5, 0.25)
    assert got.dtype is dtype and got.shape == positive.shape
    assert_close(got, oracle(positive, negative, 4.0, 2.5, 0.25), dtype)
    assert bool(calls) == (each_path == "triton")


@pytest.mark.parametrize("scale, tau, alpha", [(4.0, 2.5, 0.125), (2.0, 1.0, 1.0), (10.0, 1e6, 0.5), (-0.5, 2.5, 0.5)])
def test_every_setting(each_path, device, scale, tau, alpha):
    positive, negative = inputs(torch.float32, device)
    got = normalized_attention_guidance(positive, negative, scale, tau, alpha)
    assert_close(got, oracle(positive, negative, scale, tau, alpha), torch.float32)


def test_one_negative_row_for_all(each_path, device, poisoned):
    positive, negative = inputs(torch.float32, device, shared=True)
    got = normalized_attention_guidance(positive, negative, 4.0, 2.5, 0.25)
    assert_close(got, oracle(positive, negative, 4.0, 2.5, 0.25), torch.float32)


def test_non_contiguous_inputs(each_path, device, poisoned):
    positive, negative = inputs(torch.float32, device)
    expected = oracle(positive, negative, 4.0, 2.5, 0.25)
    chunks = torch.cat((positive, negative), -1).chunk(2, -1)
    assert_close(normalized_attention_guidance(*chunks, 4.0, 2.5, 0.25), expected, torch.float32)
    transposed = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (positive, negative))
    assert_close(normalized_attention_guidance(*transposed, 4.0, 2.5, 0.25), expected, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale, alpha", [(0, 0.25), (4.0, 0)])
def test_neutral_values_return_the_bits(each_path, device, dtype, scale, alpha):
    positive, negative = inputs(dtype, device)
    positive[0, 0] = -0.0
    negative[:] = float("inf")
    got = normalized_attention_guidance(positive, negative, scale, 2.5, alpha)
    bits = {2: torch.int16, 4: torch.int32}[got.element_size()]
    assert torch.equal(got.view(bits), positive.view(bits)) and got.data_ptr() != positive.data_ptr()


def test_tokens_of_norm_zero_stay_finite(each_path, device):
    positive, negative = inputs(torch.float32, device)
    positive[0, 0], positive[1, 1], negative[1, 1] = 0, 0, 0
    negative[0, 1] = positive[0, 1] * 1.25  # scale 4 extrapolates to 0
    got = normalized_attention_guidance(positive, negative, 4.0, 2.5, 0.25)
    assert torch.equal(got[0, 0], positive[0, 0]) and torch.equal(got[1, 1], positive[1, 1])
    assert torch.allclose(got[0, 1], 0.75 * positive[0, 1], atol=1e-6)
    assert torch.isfinite(got).all()


def test_compiles_whole_once(each_path, device, compiled):
    combine = compiled(lambda p, n: normalized_attention_guidance(p, n, 4.0, 2.5, 0.25) + 0)
    for seed in range(3):
        positive, negative = inputs(torch.float32, device, seed=seed)
        assert_close(combine(positive, negative), oracle(positive, negative, 4.0, 2.5, 0.25), torch.float32)
    assert combine.graphs == 1


def test_custom_op_is_registered_right(each_path, device):
    torch.library.opcheck(
        module._normalized_attention_guidance_op, (*inputs(torch.float32, device), 4.0, 2.5, 0.25),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_gradients_of_the_reference_and_none_elsewhere(each_path, device):
    positive, negative = inputs(torch.float32, device, (1, 2, 5))
    got = normalized_attention_guidance(positive.requires_grad_(), negative, 4.0, 2.5, 0.25)
    if each_path == "triton":
        with pytest.raises(RuntimeError, match="autograd"):
            got.sum().backward()
        return
    got.sum().backward()
    wide = [t.detach().double().requires_grad_() for t in (positive, negative)]
    assert torch.autograd.gradcheck(lambda *z: normalized_attention_guidance_reference(*z, 4.0, 2.5, 0.25), wide)


def test_what_does_not_fit_is_refused():
    positive, negative = inputs(torch.float32, "cpu")
    for wrong in (negative[:, :6], negative[..., :44], torch.cat((negative, negative)), negative[0]):
        with pytest.raises(KernelError, match=r"negative \(.*expected \(B, N, C\)"):
            normalized_attention_guidance(positive, wrong, 4.0, 2.5, 0.25)
    with pytest.raises(KernelError, match="negative is torch.float16"):
        normalized_attention_guidance(positive, negative.half(), 4.0, 2.5, 0.25)
    for values in ((float("nan"), 2.5, 0.25), (4.0, 0.5, 0.25), (4.0, float("inf"), 0.25), (4.0, 2.5, 1.5)):
        with pytest.raises(KernelError, match="tau from 1"):
            normalized_attention_guidance(positive, negative, *values)
