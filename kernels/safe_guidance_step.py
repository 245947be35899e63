"""One step of safe latent diffusion: three predictions and a momentum give the guided prediction and a new momentum.

    d = t - s;  mu = 0 where d >= lambda, else min(|d| S, 1);  gamma = (s - u) mu + s_m m
    m' = beta m + (1 - beta) gamma;  guided = u + w (t - u - [active] gamma)

Shapes: u, t, s, guided (B, ...), m and m' the same in float32, mu's mean (B,) float32. Bytes in half precision: u, t,
s, m read and guided, m' written once, 16 an element, against about 94 in 19 eager kernels. Bound: launches on an image
(65 k elements), memory on video. Deterministic: the mean is summed from one partial sum per program, without atomics.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dispatch import check_tensors, jit, kernel_path, needs_grad, tl, triton
from .errors import KernelError

__all__ = ["compile_cases", "safe_guidance_step", "safe_guidance_step_reference"]


def safe_guidance_step_reference(
    noise_pred_uncond: Tensor,
    noise_pred_text: Tensor,
    noise_pred_safety: Tensor,
    momentum: Tensor | None,
    active: Tensor,
    guidance_scale: float,
    safety_guidance_scale: float,
    safety_threshold: float,
    momentum_scale: float,
    momentum_beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`safe_guidance_step` in plain torch: float32 inside, one downcast. `active` is (B,) bool."""
    u, t, s = (p.to(torch.promote_types(p.dtype, torch.float32)) for p in
               (noise_pred_uncond, noise_pred_text, noise_pred_safety))  # fmt: skip
    difference = t - s
    scaled = difference.abs() * safety_guidance_scale
    grad = needs_grad(u, scaled) or (momentum is not None and needs_grad(momentum))
    if grad or torch.compiler.is_compiling():  # a compiler fuses this; what is below saves passes over memory
        mu = torch.where(difference >= safety_threshold, 0.0, scaled.clamp(max=1.0))
        gamma = (s - u) * mu
        if momentum is not None:
            gamma = gamma + momentum_scale * momentum
        new_momentum = (1 - momentum_beta) * gamma
        if momentum is not None:
            new_momentum = momentum_beta * momentum + new_momentum
        applied = torch.where(active.view(-1, *[1] * (u.ndim - 1)), gamma, 0.0)
        guided = u + guidance_scale * (t - u - applied)
    else:
        mu = scaled.clamp_(max=1.0).masked_fill_(difference >= safety_threshold, 0.0)
        gamma = torch.sub(s, u, out=difference).mul_(mu)
        if momentum is not None:
            gamma.add_(momentum, alpha=momentum_scale)
        new_momentum = gamma * (1 - momentum_beta)
        if momentum is not None:
            new_momentum.add_(momentum, alpha=momentum_beta)
        gamma.masked_fill_(~active.view(-1, *[1] * (u.ndim - 1)), 0.0)
        guided = torch.sub(t, u).sub_(gamma).mul_(guidance_scale).add_(u)
    return guided.to(noise_pred_uncond.dtype), new_momentum, mu.flatten(1).mean(dim=1)


_BLOCK, _WARPS = 1024, 4  # elements of one sample a program


@jit
def _safe_guidance_step_kernel(
    uncond_ptr,  # (B, M)
    text_ptr,  # (B, M)
    safety_ptr,  # (B, M)
    momentum_ptr,  # (B, M) float32; not read unless HAS_MOMENTUM
    active_ptr,  # (B,) bool
    guided_ptr,  # (B, M), contiguous
    new_momentum_ptr,  # (B, M) float32, contiguous
    partial_ptr,  # (B, programs of a sample) float32: sums of mu
    size,  # M
    stride_u,
    stride_t,
    stride_s,
    stride_m,
    guidance_scale,
    safety_guidance_scale,
    safety_threshold,
    momentum_scale,
    momentum_beta,
    HAS_MOMENTUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    u_raw = tl.load(uncond_ptr + batch * stride_u + offsets, mask=mask, other=0.0)
    u = u_raw.to(tl.float32)
    t = tl.load(text_ptr + batch * stride_t + offsets, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(safety_ptr + batch * stride_s + offsets, mask=mask, other=0.0).to(tl.float32)
    active = tl.load(active_ptr + batch)
    difference = t - s
    clipped = tl.minimum(tl.abs(difference) * safety_guidance_scale, 1.0, propagate_nan=tl.PropagateNan.ALL)
    mu = tl.where(difference >= safety_threshold, 0.0, clipped)
    gamma = (s - u) * mu
    if HAS_MOMENTUM:
        m = tl.load(momentum_ptr + batch * stride_m + offsets, mask=mask, other=0.0)
        gamma += momentum_scale * m
        new_momentum = momentum_beta * m + (1.0 - momentum_beta) * gamma
    else:
        new_momentum = (1.0 - momentum_beta) * gamma
    applied = tl.where(active != 0, gamma, 0.0)
    guided = u + guidance_scale * (t - u - applied)
    tl.store(guided_ptr + batch * size + offsets, guided.to(u_raw.dtype), mask=mask)
    tl.store(new_momentum_ptr + batch * size + offsets, new_momentum, mask=mask)
    total = tl.sum(tl.where(mask, mu, 0.0), axis=0)
    tl.store(partial_ptr + batch * tl.num_programs(0) + tl.program_id(0), total)


def _safe_guidance_step_triton(
    u: Tensor, t: Tensor, s: Tensor, momentum: Tensor | None, active: Tensor, *scales: float
) -> tuple[Tensor, Tensor, Tensor]:
    shape, rows = u.shape, u.shape[0]
    u, t, s, m = (_flat(p) for p in (u, t, s, u if momentum is None else momentum))
    size = u.shape[1]
    programs = triton.cdiv(size, _BLOCK)
    guided = torch.empty(shape, dtype=u.dtype, device=u.device)
    new_momentum = torch.empty(shape, dtype=torch.float32, device=u.device)
    partial = torch.empty(rows, programs, dtype=torch.float32, device=u.device)
    _safe_guidance_step_kernel[programs, rows](
        u, t, s, m, active.contiguous(), guided, new_momentum, partial,
        size, u.stride(0), t.stride(0), s.stride(0), m.stride(0), *scales,
        HAS_MOMENTUM=momentum is not None, BLOCK=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip
    return guided, new_momentum, partial.sum(dim=1) / size


def _flat(t: Tensor) -> Tensor:
    t = t.reshape(t.shape[0], -1)
    return t if t.stride(-1) == 1 else t.contiguous()


@torch.library.custom_op("semiperm::safe_guidance_step", mutates_args=())
def _safe_guidance_step_op(
    noise_pred_uncond: Tensor,
    noise_pred_text: Tensor,
    noise_pred_safety: Tensor,
    momentum: Tensor | None,
    active: Tensor,
    guidance_scale: float,
    safety_guidance_scale: float,
    safety_threshold: float,
    momentum_scale: float,
    momentum_beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (
        noise_pred_uncond, noise_pred_text, noise_pred_safety, momentum, active,
        guidance_scale, safety_guidance_scale, safety_threshold, momentum_scale, momentum_beta,
    )  # fmt: skip
    if kernel_path(noise_pred_uncond, rows=noise_pred_uncond.shape[0]) == "triton":
        return _safe_guidance_step_triton(*arguments)
    guided, new_momentum, mean_scale = safe_guidance_step_reference(*arguments)
    return guided.contiguous(), new_momentum.contiguous(), mean_scale


@_safe_guidance_step_op.register_fake
def _(noise_pred_uncond, *_):
    shape, device = noise_pred_uncond.shape, noise_pred_uncond.device
    return (
        torch.empty(shape, dtype=noise_pred_uncond.dtype, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
        torch.empty(shape[:1], dtype=torch.float32, device=device),
    )


def safe_guidance_step(
    noise_pred_uncond: Tensor,
    noise_pred_text: Tensor,
    noise_pred_safety: Tensor,
    momentum: Tensor | None,
    *,
    guidance_scale: float,
    safety_guidance_scale: float,
    safety_threshold: float,
    momentum_scale: float,
    momentum_beta: float,
    active: bool | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Classifier-free guidance that steers away from a safety concept where the prompt comes near it.

    Args:
        noise_pred_uncond, noise_pred_text, noise_pred_safety: u, t, s (B, ...), float32, float16 or bfloat16.
        momentum: m (B, ...) float32, what the last step returned; None (zeros) at the first.
        guidance_scale: w.
        safety_guidance_scale: S >= 0; 0 with no momentum is plain guidance.
        safety_threshold: lambda, in units of the prediction.
        momentum_scale: s_m; 0 leaves the momentum out of the guidance.
        momentum_beta: beta, 0 to below 1.
        active: False while warming up, for all or per sample (B,) bool on the device: the momentum builds, and the
            prediction is u + w (t - u).

    Returns:
        guided (B, ...) in u's dtype, m' (B, ...) float32, and the mean of mu per sample (B,) float32 for the record: 0
        where nothing was unsafe. New tensors. Gradients: on the reference path only; backward through the Triton path
        raises.

    Raises:
        KernelError: shapes, dtypes, devices or values outside these.

    Source: SLD (arXiv 2211.05105), in the signs of diffusers' StableDiffusionPipelineSafe, which keeps the
    momentum in the prediction's dtype.
    """
    u = noise_pred_uncond
    check_tensors("safe_guidance_step", u, noise_pred_text=noise_pred_text, noise_pred_safety=noise_pred_safety)
    for name, t in (("text", noise_pred_text), ("safety", noise_pred_safety)):
        if u.ndim < 2 or t.shape != u.shape:
            raise KernelError(
                f"safe_guidance_step: noise_pred_{name} {tuple(t.shape)}, noise_pred_uncond {tuple(u.shape)}; expected"
                " the same shape (B, ...)"
            )
    if momentum is not None and (
        momentum.shape != u.shape or momentum.dtype is not torch.float32 or momentum.device != u.device
    ):
        raise KernelError(
            f"safe_guidance_step: momentum {tuple(momentum.shape)} {momentum.dtype} on {momentum.device}; expected what"
            f" the last step returned: {tuple(u.shape)} torch.float32 on {u.device}"
        )
    scales = guidance_scale, safety_guidance_scale, safety_threshold, momentum_scale, momentum_beta
    if not all(map(math.isfinite, scales)) or safety_guidance_scale < 0 or not 0 <= momentum_beta < 1:
        raise KernelError(
            f"safe_guidance_step: guidance_scale={guidance_scale}, safety_guidance_scale={safety_guidance_scale},"
            f" safety_threshold={safety_threshold}, momentum_scale={momentum_scale}, momentum_beta={momentum_beta};"
            " expected finite values, safety_guidance_scale from 0, momentum_beta from 0 to below 1"
        )
    if not isinstance(active, Tensor):
        active = torch.full(u.shape[:1], bool(active), device=u.device)
    elif active.shape != u.shape[:1] or active.dtype is not torch.bool or active.device != u.device:
        raise KernelError(
            f"safe_guidance_step: active {tuple(active.shape)} {active.dtype} on {active.device}; expected a bool, or"
            f" ({u.shape[0]},) torch.bool on {u.device}"
        )
    arguments = u, noise_pred_text, noise_pred_safety, momentum, active, *map(float, scales)
    if kernel_path(u, rows=u.shape[0]) == "reference":
        return safe_guidance_step_reference(*arguments)  # which a compiler fuses better than we could
    tensors = (u, noise_pred_text, noise_pred_safety) + (() if momentum is None else (momentum,))
    if torch.compiler.is_compiling() or needs_grad(*tensors):
        return _safe_guidance_step_op(*arguments)  # whose backward raises
    return _safe_guidance_step_triton(*arguments)


def compile_cases() -> list[dict]:
    """What kernel_resources.py compiles: each dtype, with a momentum and (at the first step) without."""
    cases = []
    for kind, has_momentum in (("fp32", True), ("fp16", True), ("bf16", True), ("bf16", False)):
        names = ("uncond_ptr", "text_ptr", "safety_ptr")
        signature = dict.fromkeys(names, f"*{kind}")
        signature |= {"momentum_ptr": "*fp32" if has_momentum else f"*{kind}", "active_ptr": "*i1"}
        signature |= {"guided_ptr": f"*{kind}", "new_momentum_ptr": "*fp32", "partial_ptr": "*fp32"}
        signature |= dict.fromkeys(("size", "stride_u", "stride_t", "stride_s", "stride_m"), "i32:16")
        scales = ("guidance_scale", "safety_guidance_scale", "safety_threshold", "momentum_scale", "momentum_beta")
        cases.append(
            {
                "name": f"safe_guidance_step, {kind}, {'momentum' if has_momentum else 'first step'}",
                "kernel": _safe_guidance_step_kernel,
                "signature": signature | dict.fromkeys(scales, "fp32"),
                "constexprs": {"HAS_MOMENTUM": has_momentum, "BLOCK": _BLOCK},
                "num_warps": _WARPS,
                "num_stages": 3,
            }
        )
    return cases
