"""safe_guidance_step against SLD's formula in float64, on both paths, over several steps."""

import pytest
import torch
from semiperm.kernels import safe_guidance_step as module
from semiperm.kernels.errors import KernelError
from semiperm.kernels.safe_guidance_step import safe_guidance_step, safe_guidance_step_reference

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of the largest output: one rounding
DTYPES = list(TOLERANCE)
MEDIUM = {"safety_guidance_scale": 1000.0, "safety_threshold": 0.01, "momentum_scale": 0.3, "momentum_beta": 0.4}
GENTLE = {"safety_guidance_scale": 0.7, "safety_threshold": 0.3, "momentum_scale": 0.5, "momentum_beta": 0.7}
BITS = {2: torch.int16, 4: torch.int32}


def inputs(dtype, device, shape=(3, 4, 9, 11), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(device, dtype) for _ in range(3)]


def oracle(u, t, s, m, w, c, active):
    """The formula of SLD (research/guidance.md), in float64; `active` one bool per sample."""
    u, t, s = u.double(), t.double(), s.double()
    d = t - s
    mu = (d.abs() * c["safety_guidance_scale"]).minimum(torch.ones_like(d)) * (d < c["safety_threshold"])
    gamma = (s - u) * mu + c["momentum_scale"] * m
    new = c["momentum_beta"] * m + (1 - c["momentum_beta"]) * gamma
    on = torch.tensor(active, device=u.device).double().view(-1, *[1] * (u.ndim - 1))
    return u + w * (t - u - on * gamma), new, mu.flatten(1).mean(1)


def assert_close(got, expected, tolerance):
    error = float((got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-9))
    assert error < tolerance, f"{error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [MEDIUM, GENTLE], ids=["medium", "gentle"])
@pytest.mark.parametrize("shape", [(3, 4, 9, 11), (2, 1), (1, 16, 3, 17, 13)])
def test_matches_float64_over_steps(each_path, device, poisoned, launched, dtype, config, shape):
    calls = launched(module, "_safe_guidance_step_triton")
    momentum, exact = None, 0.0
    for step in range(3):
        u, t, s = inputs(dtype, device, shape, seed=step)
        if step == 0 and dtype is torch.float32:
            s[:, :1] = t[:, :1]  # d = 0, below the threshold, mu = 0
        guided, momentum, mean = safe_guidance_step(
            u, t, s, momentum, guidance_scale=7.5, active=step > 0, **config
        )  # fmt: skip
        expected, exact, expected_mean = oracle(u, t, s, exact, 7.5, config, [step > 0] * shape[0])
        assert guided.dtype is dtype and momentum.dtype is mean.dtype is torch.float32
        assert guided.shape == momentum.shape == shape and mean.shape == shape[:1]
        assert_close(guided, expected, TOLERANCE[dtype])
        assert_close(momentum, exact, 2e-6)
        assert torch.allclose(mean.double(), expected_mean, atol=1e-6)
    assert len(calls) == (3 if each_path == "triton" else 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_warm_up_per_sample(each_path, device, poisoned, dtype):
    u, t, s = inputs(dtype, device)
    momentum = torch.randn(u.shape, generator=torch.Generator().manual_seed(9)).to(device)
    active = torch.tensor([True, False, True], device=device)
    guided, built, _ = safe_guidance_step(u, t, s, momentum, guidance_scale=7.5, active=active, **MEDIUM)
    expected, exact, _ = oracle(u, t, s, momentum.double(), 7.5, MEDIUM, active.tolist())
    assert_close(guided, expected, TOLERANCE[dtype])
    assert_close(built, exact, 2e-6)
    for row, flag in ((0, True), (1, False)):
        both, same, _ = safe_guidance_step(u, t, s, momentum, guidance_scale=7.5, active=flag, **MEDIUM)
        assert torch.equal(both[row], guided[row]) and torch.equal(same, built)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neutral_is_plain_guidance_to_the_bit(each_path, device, dtype):
    u, t, s = inputs(dtype, device)
    neutral = MEDIUM | {"safety_guidance_scale": 0.0}
    warm_up, _, _ = safe_guidance_step(u, t, s, None, guidance_scale=7.5, active=False, **MEDIUM)
    off, momentum, mean = safe_guidance_step(u, t, s, None, guidance_scale=7.5, active=True, **neutral)
    plain = (u.float() + 7.5 * (t.float() - u.float())).to(dtype)
    assert torch.equal(warm_up.view(BITS[u.element_size()]), off.view(BITS[u.element_size()]))
    # A GPU fuses the multiplication and the addition, and Triton's interpreter cuts bfloat16 off instead of rounding.
    if device.type == "cpu" and (each_path, dtype) != ("triton", torch.bfloat16):
        assert torch.equal(warm_up, plain)
    assert_close(warm_up, plain.double(), TOLERANCE[dtype])
    assert not momentum.any() and not mean.any()


def test_unsafe_infinities_do_not_reach_a_sample_that_warms_up(each_path, device):
    u, t, s = inputs(torch.float32, device)
    momentum = torch.full_like(u, float("inf"))
    guided, _, _ = safe_guidance_step(u, t, s, momentum, guidance_scale=7.5, active=False, **MEDIUM)
    assert torch.isfinite(guided).all()


def test_nan_is_not_hidden(each_path, device):
    u, t, s = inputs(torch.float32, device)
    s[0, 0, 0, 0] = float("nan")
    guided, momentum, mean = safe_guidance_step(u, t, s, None, guidance_scale=7.5, active=True, **MEDIUM)
    assert all(bool(o[0].isnan().any()) and not bool(o[1:].isnan().any()) for o in (guided, momentum, mean))


def test_non_contiguous_inputs(each_path, device, poisoned):
    u, t, s = inputs(torch.float32, device)
    momentum = torch.randn(u.shape, generator=torch.Generator().manual_seed(9)).to(device)
    expected = safe_guidance_step(u, t, s, momentum, guidance_scale=7.5, active=True, **GENTLE)
    interleaved = torch.stack((u, t, s), 1).unbind(1)
    last = (p.movedim(1, -1).contiguous().movedim(-1, 1) for p in (u, t, s))
    for views in (interleaved, last):
        got = safe_guidance_step(
            *views, momentum.transpose(2, 3).contiguous().transpose(2, 3), guidance_scale=7.5, active=True, **GENTLE
        )  # fmt: skip
        assert all(map(torch.equal, got, expected))


def test_runs_are_equal_to_the_bit_and_inputs_are_untouched(each_path, device):
    arguments = [*inputs(torch.float16, device, (2, 4, 33, 32)), torch.randn(2, 4, 33, 32).to(device)]
    before = [a.clone() for a in arguments]
    runs = [safe_guidance_step(*arguments, guidance_scale=7.5, active=True, **GENTLE) for _ in range(2)]
    assert all(map(torch.equal, *runs)) and all(map(torch.equal, arguments, before))


def test_compiles_whole_and_active_does_not_recompile(each_path, device, compiled):
    u, t, s = inputs(torch.float32, device)
    step = compiled(lambda m, on: safe_guidance_step(u, t, s, m, guidance_scale=7.5, active=on, **GENTLE))
    momentum = torch.zeros_like(u)
    for flags in ([False] * 3, [True, False, True], [True] * 3):
        active = torch.tensor(flags, device=device)
        guided, momentum_next, _ = step(momentum, active)
        expected, exact, _ = oracle(u, t, s, momentum.double(), 7.5, GENTLE, flags)
        assert_close(guided, expected, 2e-6)
        assert_close(momentum_next, exact, 2e-6)
        momentum = momentum_next
    assert step.graphs == 1


def test_custom_op_is_registered_right(each_path, device):
    u, t, s = inputs(torch.float16, device)
    active = torch.ones(3, dtype=torch.bool, device=device)
    for momentum in (None, torch.zeros(u.shape, device=device)):
        torch.library.opcheck(
            module._safe_guidance_step_op, (u, t, s, momentum, active, 7.5, *MEDIUM.values()),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


def test_gradients_of_the_reference_and_none_elsewhere(each_path, device):
    u, t, s = inputs(torch.float32, device, (2, 3))
    guided, _, _ = safe_guidance_step(u.requires_grad_(), t, s, None, guidance_scale=7.5, active=True, **GENTLE)
    if each_path == "triton":
        with pytest.raises(RuntimeError, match="autograd"):
            guided.sum().backward()
        return
    guided.sum().backward()
    wide = [p.detach().double().requires_grad_() for p in (u, t, s)]
    active = torch.ones(2, dtype=torch.bool, device=device)

    def step(*predictions):
        return safe_guidance_step_reference(*predictions, None, active, 7.5, *GENTLE.values())[:2]

    assert torch.autograd.gradcheck(step, wide)


def test_what_does_not_fit_is_refused():
    u, t, s = inputs(torch.float32, "cpu")
    rest = {"guidance_scale": 7.5, "active": True, **MEDIUM}
    with pytest.raises(KernelError, match=r"noise_pred_safety \(2, 4, 9, 11\)"):
        safe_guidance_step(u, t, s[:2], None, **rest)
    with pytest.raises(KernelError, match="noise_pred_text is torch.float16"):
        safe_guidance_step(u, t.half(), s, None, **rest)
    for momentum in (u[:2], u.double()):
        with pytest.raises(KernelError, match="momentum .*expected what the last step returned"):
            safe_guidance_step(u, t, s, momentum, **rest)
    for active in (torch.ones(3), torch.ones(2, dtype=torch.bool)):
        with pytest.raises(KernelError, match=r"active \(.*expected a bool"):
            safe_guidance_step(u, t, s, None, **rest | {"active": active})
    for name, value in (
        ("momentum_beta", 1.0), ("safety_guidance_scale", -1.0), ("safety_threshold", float("nan"))
    ):  # fmt: skip
        with pytest.raises(KernelError, match=f"{name}={value}"):
            safe_guidance_step(u, t, s, None, **rest | {name: value})
