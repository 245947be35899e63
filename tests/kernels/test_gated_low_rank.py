"""gated_low_rank against float64, on both paths: values, dead rows, gradients, torch.compile."""

import pytest
import torch
from semiperm.kernels import gated_low_rank as module
from semiperm.kernels.errors import KernelError
from semiperm.kernels.gated_low_rank import gated_low_rank, gated_low_rank_reference

# relative to the largest output; half precisions round the inputs of the second product and the output
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
DTYPES = list(TOLERANCE)


def inputs(dtype, device, shape=(3, 37), n_in=21, n_out=45, rank=5, shared=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = 1 if shared else shape[0]
    shapes = (*shape, n_out), (*shape, n_in), (rank, n_in), (rank, n_out), (rows, rank)
    return [torch.randn(s, generator=g).to(device, dtype) for s in shapes]


def oracle(y, x, down, up, gamma):
    """One row and one rank at a time, in float64."""
    y, x, down, up, gamma = (t.double() for t in (y, x, down, up, gamma))
    out = y.clone()
    for b in range(len(y)):
        for r in range(len(down)):
            gate = gamma[b if len(gamma) > 1 else 0, r]
            out[b] += gate * (x[b] * down[r]).sum(-1, keepdim=True) * up[r]
    return out


def assert_close(got, expected, dtype):
    error = float((got.double() - expected).abs().max() / expected.abs().max())
    assert error < TOLERANCE[dtype], f"{error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 16, 33, 200])
def test_matches_float64(each_path, device, poisoned, launched, dtype, rank):
    calls = launched(module, "_gated_low_rank_triton")
    arguments = inputs(dtype, device, rank=rank)
    got = gated_low_rank(*arguments)
    assert got.dtype is dtype and got.shape == arguments[0].shape
    assert_close(got, oracle(*arguments), dtype)
    assert bool(calls) == (each_path == "triton")


@pytest.mark.parametrize("shape", [(2,), (1, 1), (2, 5, 7), (2, 130)])
@pytest.mark.parametrize("shared", [False, True])
def test_any_number_of_token_axes_and_one_row_of_gates_for_all(each_path, device, poisoned, shape, shared):
    arguments = inputs(torch.float32, device, shape, n_in=70, n_out=131, shared=shared)
    assert_close(gated_low_rank(*arguments), oracle(*arguments), torch.float32)


def test_rank_512(each_path, device):
    arguments = inputs(torch.float32, device, (1, 3), rank=512)
    assert_close(gated_low_rank(*arguments), oracle(*arguments), torch.float32)


def test_gates_may_stay_in_float32(each_path, device):
    *arguments, gamma = inputs(torch.bfloat16, device)
    assert_close(gated_low_rank(*arguments, gamma.float()), oracle(*arguments, gamma), torch.bfloat16)


def test_non_contiguous_inputs(each_path, device, poisoned):
    y, x, down, up, gamma = inputs(torch.float32, device, (2, 6, 4))
    expected = oracle(y, x, down, up, gamma)

    def spread(t):  # every second element along the last axis
        return torch.stack((t, t.new_full((), float("nan")).expand_as(t)), -1).flatten(-2)[..., ::2]

    channels_first = y.movedim(-1, 1).contiguous().movedim(1, -1), x.movedim(-1, 1).contiguous().movedim(1, -1)
    got = gated_low_rank(*channels_first, spread(down), up.T.contiguous().T, spread(gamma))
    assert_close(got, expected, torch.float32)
    halves = torch.cat((y, y), 1)[:, :6], torch.cat((x, x), -1)[..., : x.shape[-1]]
    assert_close(gated_low_rank(*halves, down, up, gamma), expected, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dead", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_dead_rows_keep_their_bits(each_path, device, poisoned, dtype, dead):
    y, x, down, up, gamma = inputs(dtype, device, rank=40)
    y[:, 0] = -0.0  # y + 0 would turn it into +0
    dead = list(dead)
    gamma[dead] = 0
    x[dead] = float("inf")  # not even looked at
    got = gated_low_rank(y, x, down, up, gamma)
    bits = {2: torch.int16, 4: torch.int32}[y.element_size()]
    assert torch.equal(got[dead].view(bits), y[dead].view(bits))
    alive = [b for b in range(3) if b not in dead]
    if alive:
        assert_close(got[alive], oracle(y[alive], x[alive], down, up, gamma[alive]), dtype)
    assert got.data_ptr() != y.data_ptr()


def test_dead_tiles_of_ranks_are_skipped(triton_path, device, poisoned):
    y, x, down, up, gamma = inputs(torch.float32, device, rank=100)
    gamma[:, 32:64] = 0
    expected = oracle(y, x, down, up, gamma)
    down[32:64] = float("nan")
    assert_close(gated_low_rank(y, x, down, up, gamma), expected, torch.float32)


def test_float16_does_not_overflow_between_the_products(each_path, device):
    y, x, down, up, gamma = inputs(torch.float16, device)
    x[:], down[:], up[:] = 80, 80, 2**-10  # x D^T = 134400
    gamma[:] = 0.5
    if device.type == "cuda" and each_path == "reference":
        pytest.skip("there the reference keeps h in float16")
    assert torch.isfinite(gated_low_rank(y, x, down, up, gamma)).all()


@pytest.mark.parametrize("shared", [False, True])
def test_gradcheck_of_the_reference(shared):
    arguments = [t.double().requires_grad_() for t in inputs(torch.float32, "cpu", (2, 3), 4, 3, 2, shared)]
    assert torch.autograd.gradcheck(gated_low_rank_reference, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_of_both_paths(each_path, device, dtype, shared):
    arguments = [t.requires_grad_() for t in inputs(dtype, device, rank=20, shared=shared)]
    with torch.no_grad():
        arguments[-1][0, :7] = 0  # a closed gate has a gradient all the same
    weight = torch.randn(arguments[0].shape, generator=torch.Generator().manual_seed(1)).to(device)
    (gated_low_rank(*arguments) * weight).sum().backward()
    wide = [t.detach().double().requires_grad_() for t in arguments]
    (oracle_formula(*wide) * weight).sum().backward()
    for got, expected in zip(arguments, wide, strict=True):
        assert got.grad.dtype is dtype
        assert_close(got.grad, expected.grad, dtype)
    assert arguments[-1].grad[0, :7].abs().min() > 0


def oracle_formula(y, x, down, up, gamma):
    return y + torch.einsum("bni,ri,br,ro->bno", x, down, gamma.expand(len(y), -1), up)


def test_compiles_whole_and_gates_do_not_recompile(each_path, device, compiled):
    y, x, down, up, gamma = inputs(torch.float32, device)
    twice = compiled(lambda *a: gated_low_rank(*a) * 2)
    for gates in (gamma, gamma * 0.5, torch.zeros_like(gamma)):
        assert_close(twice(y, x, down, up, gates), 2 * oracle(y, x, down, up, gates), torch.float32)
    assert twice.graphs == 1


def test_gradients_through_torch_compile(each_path, device, compiled):
    arguments = [t.requires_grad_() for t in inputs(torch.float32, device)]
    got = torch.autograd.grad(compiled(gated_low_rank)(*arguments).square().sum(), arguments)
    wide = [t.detach().double().requires_grad_() for t in arguments]
    expected = torch.autograd.grad(oracle_formula(*wide).square().sum(), wide)
    for g, e in zip(got, expected, strict=True):
        assert_close(g, e, torch.float32)


def test_custom_op_is_registered_right(each_path, device):
    arguments = [t.requires_grad_() for t in inputs(torch.float32, device)]
    torch.library.opcheck(module._gated_low_rank_op, arguments)


@pytest.mark.parametrize(
    "name, shape", [("x", (3, 36, 21)), ("down", (5, 20)), ("up", (4, 45)), ("gamma", (2, 5)), ("gamma", (3, 1, 5))]
)
def test_shapes_that_do_not_fit_are_refused(name, shape):
    arguments = dict(zip(("y", "x", "down", "up", "gamma"), inputs(torch.float32, "cpu"), strict=True))
    arguments[name] = torch.zeros(shape)
    with pytest.raises(KernelError, match=rf"{name} \({', '.join(map(str, shape))}\).*expected"):
        gated_low_rank(**arguments)


def test_dtypes_that_do_not_fit_are_refused():
    y, x, down, up, gamma = inputs(torch.float32, "cpu")
    with pytest.raises(KernelError, match="x is torch.float16"):
        gated_low_rank(y, x.half(), down, up, gamma)
    with pytest.raises(KernelError, match="gamma is torch.float64"):
        gated_low_rank(y, x, down, up, gamma.double())
