"""gated_projection against float64, on both paths: values, gates, dead tokens, torch.compile, gradients."""

import pytest
import torch
from semiperm.kernels import gated_projection as module
from semiperm.kernels.errors import KernelError
from semiperm.kernels.gated_projection import gated_projection, gated_projection_reference

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}  # of the largest output
DTYPES = list(TOLERANCE)
BITS = {2: torch.int16, 4: torch.int32}


def inputs(dtype, device, shape=(3, 37, 45), rank=5, shared=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    (rows, _, channels), scale = shape, shape[-1] ** -0.5
    y = torch.randn(shape, generator=g).to(device, dtype)
    read, write = (torch.randn(rank, channels, generator=g).mul(scale).to(device, dtype) for _ in range(2))
    gates = torch.stack([torch.randn(rank, generator=g) * 0.1, *(torch.full((rank,), v) for v in (0.3, 2.0, 0.5, 0.7))])
    gamma = torch.rand(1 if shared else rows, rank, generator=g) + 0.5
    return y, read, write, gates.to(device), gamma.to(device)


def oracle(y, read, write, gates, gamma):
    """One row and one direction at a time, in float64."""
    y, read, write, gates, gamma = (t.double() for t in (y, read, write, gates, gamma))
    out, opened = y.clone(), torch.zeros(*y.shape[:2], len(read), dtype=torch.float64, device=y.device)
    for b in range(len(y)):
        for r in range(len(read)):
            a = (y[b] * read[r]).sum(-1) - gates[0, r]
            picture = float(((a.max() - gates[3, r]) * gates[4, r]).clamp(0, 1))
            opened[b, :, r] = ((a - gates[1, r]) * gates[2, r]).clamp(0, 1) * picture
            strength = gamma[b if len(gamma) > 1 else 0, r]
            out[b] -= (strength * opened[b, :, r] * a)[:, None] * write[r]
    return out, opened


def assert_close(got, expected, dtype):
    error = float((got.double() - expected).abs().max() / expected.abs().max())
    assert error < TOLERANCE[dtype], f"{error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, rank", [((3, 37, 45), 5), ((1, 5, 640), 1), ((2, 65, 33), 17), ((1, 3, 70), 100), ((2, 130, 3), 1)]
)
def test_matches_float64(each_path, device, poisoned, launched, dtype, shape, rank):
    calls = launched(module, "_gated_projection_triton")
    given = inputs(dtype, device, shape, rank)
    out, opened = gated_projection(*given)
    assert out.dtype is opened.dtype is dtype and out.shape == shape and opened.shape == (*shape[:2], rank)
    expected, gates = oracle(*given)
    assert_close(out, expected, dtype)
    assert float((opened.double() - gates).abs().max()) < 4 * TOLERANCE[dtype]
    assert bool(calls) == (each_path == "triton")


def test_more_ranks_than_a_program_holds_take_torch(each_path, device, launched):
    calls = launched(module, "_gated_projection_triton")
    given = inputs(torch.float32, device, (1, 5, 21), rank=129)
    if each_path == "triton":
        with pytest.raises(KernelError, match="129 directions are more than one program holds"):
            gated_projection(*given)
        return
    assert_close(gated_projection(*given)[0], oracle(*given)[0], torch.float32)
    assert not calls


@pytest.mark.parametrize("dtype", DTYPES)
def test_closed_tokens_keep_their_bits(each_path, device, dtype):
    y, read, write, gates, gamma = inputs(dtype, device)
    y[0, 0] = -0.0
    gates[1] = 1e3  # no token reaches it
    out, opened = gated_projection(y, read, write, gates, gamma)
    bits = BITS[y.element_size()]
    assert torch.equal(out.view(bits), y.view(bits)) and not opened.any() and out.data_ptr() != y.data_ptr()
    gates[1], gates[3] = -1e3, 1e3  # every token does, no picture
    out, opened = gated_projection(y, read, write, gates, gamma)
    assert torch.equal(out.view(bits), y.view(bits)) and not opened.any()
    gates[3] = -1e3
    gamma[1] = 0.0
    out, opened = gated_projection(y, read, write, gates, gamma)
    assert torch.equal(out[1].view(bits), y[1].view(bits)) and bool((opened == 1).all())
    assert not torch.equal(out[0], y[0])


def test_one_row_of_strengths_for_all_and_non_contiguous_tokens(each_path, device, poisoned):
    y, read, write, gates, gamma = inputs(torch.float32, device, shared=True)
    expected, _ = oracle(y, read, write, gates, gamma)
    assert_close(gated_projection(y, read, write, gates, gamma)[0], expected, torch.float32)
    wide = torch.cat([y, y], dim=-1)[..., : y.shape[-1]]
    turned = y.transpose(1, 2).contiguous().transpose(1, 2)
    for other in (wide, turned):
        assert_close(gated_projection(other, read, write, gates, gamma)[0], expected, torch.float32)


def test_gradients_run_through_the_edit(each_path, device, launched):
    calls = launched(module, "_gated_projection_triton")
    y, read, write, gates, gamma = inputs(torch.float32, device, (1, 4, 7), rank=2)
    out, _ = gated_projection(y.requires_grad_(), read, write, gates, gamma)
    out.sum().backward()
    assert y.grad is not None and not calls
    wide = y.detach().double().requires_grad_()
    rest = [t.double() for t in (read, write, gates, gamma)]
    assert torch.autograd.gradcheck(lambda t: gated_projection_reference(t, *rest)[0], (wide,))


def test_compiles_whole_once(each_path, device, compiled):
    edit = compiled(lambda *given: gated_projection(*given)[0] + 0)
    for seed in range(3):
        given = inputs(torch.float32, device, seed=seed)
        assert_close(edit(*given), oracle(*given)[0], torch.float32)
    assert edit.graphs == 1


def test_custom_op_is_registered_right(triton_path, device):
    torch.library.opcheck(
        module._gated_projection_op, inputs(torch.float32, device), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda y, read, write, gates, gamma: (y[0], read, write, gates, gamma),
        lambda y, read, write, gates, gamma: (y, read[:, :-1], write, gates, gamma),
        lambda y, read, write, gates, gamma: (y, read, write, gates[:3], gamma),
        lambda y, read, write, gates, gamma: (y, read, write, gates, gamma[:2]),
        lambda y, read, write, gates, gamma: (y, read[:0], write[:0], gates[:, :0], gamma[:, :0]),
        lambda y, read, write, gates, gamma: (y, read, write, gates.double(), gamma),
        lambda y, read, write, gates, gamma: (y, read.half(), write, gates, gamma),
    ],
)
def test_what_does_not_fit_is_refused(device, change):
    with pytest.raises(KernelError, match="expected"):
        gated_projection(*change(*inputs(torch.float32, device)))
