"""Negative token merging: each token is pushed from (or pulled to) its best-matching reference token.

    score_n = max_j cos(x_n, r_j),  index_n = the lowest j that attains it,  over the allowed references and tokens
    out_n   = x_n + a (x_n - r_index)  where score_n > threshold,  else x_n;   a = strength * gate

Shapes: x (B, N, C); reference (R, M, C); pairs and, where each has its own, strength (B, R); masks (R, M); gates (B,).
A token that holds NaN or Inf matches nothing, and is matched by nothing.

Two kernels. The search cuts the keys into `splits`, so that one picture fills a GPU: programs = B x query tiles x
splits, each of which writes its best key as one int64 a token (score, then the complement of the index: the greatest is
the best, and the lowest of equals). The merge takes the best of the splits, and pushes.
Bytes: eager writes and reads the B x N x M cosines and some fifteen tensors of x's size; here x and the reference are
read from memory twice and the output is written once. Bound: 2 B N M C operations, 440 to 1750 per byte: the tensor
cores, on every GPU; tiles come from the L2 cache. benchmarks/kernels/model.py
has a model of the time (not measured).
Elsewhere: token_match_cpu for CPUs, token_match_gpu for GPUs without these kernels.
Source: NegToMe (arXiv 2412.01339), section 3. The released code takes the maximum over x's tokens instead.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import check_tensors, interpreted, kernel_path, needs_grad, next_power_of_2, triton
from .errors import KernelError
from .token_match_cpu import best_match_reference, token_match_merge_reference
from .token_match_gpu import best_match_tiles, token_match_merge_tiles
from .token_match_triton import inverse_norm_kernel, token_match_kernel, token_merge_kernel

__all__ = ["best_match", "compile_cases", "everything_from", "token_match_merge"]

# BM queries against BN keys, BK channels at a time. Larger tiles spill (128 x 256: 60 words on sm_90, 42 on sm_100), or
# exceed AMD's 64 KiB shared memory; with 4 warps the short one spills on sm_120, with BK = 32 float32 does.
CONFIGS = {
    "float32": {"BM": 64, "BN": 64, "BK": 16, "num_warps": 8, "num_stages": 2},
    "half": {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
    "half_short": {"BM": 64, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},  # few tokens: more programs
}
SHORT = 2048  # tokens, up to which tiles of 128 make 16 programs a row or fewer: too few for a GPU of a hundred cores
MERGE = {"BM": 16, "BK": 128, "num_warps": 4, "num_stages": 2}  # the merge moves memory: small tiles, many programs
MOST_SPLITS = 16  # more would read the queries more often than the keys


def _config(dtype: torch.dtype, tokens: int, channels: int) -> dict[str, int]:
    name = "float32" if dtype == torch.float32 else "half_short" if tokens <= SHORT else "half"
    config = CONFIGS[name]
    return config | {"BK": min(config["BK"], max(16, next_power_of_2(channels)))}


def _splits(programs: int, blocks: int, cores: int) -> int:
    """Into how many parts the blocks of keys are cut, so that the slowest core is done first.

    Args:
        programs: without splits. blocks: of keys. cores: multiprocessors, each with one program at a time.
    """

    def seconds(splits: int) -> int:
        return -(-programs * splits // cores) * -(-blocks // splits)

    # the fewest that are nearly as good: a split more is a program more to start, and a result more to read
    candidates = range(1, min(blocks, MOST_SPLITS) + 1)
    best = min(map(seconds, candidates))
    return next(splits for splits in candidates if seconds(splits) <= 1.1 * best)


def cut_for(programs: int, blocks: int, cores: int) -> tuple[int, int]:
    """(splits, blocks of each): none of them empty. Arguments as `_splits`."""
    steps = -(-blocks // _splits(programs, blocks, cores))
    return -(-blocks // steps), steps


@functools.cache
def _cores(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _launch(x, reference, threshold, pairs, mask, gate, strength, seen) -> tuple[Tensor | None, Tensor, Tensor]:
    """Run the kernels; strength None: search alone."""
    (batch, tokens, channels), (references, length, _) = x.shape, reference.shape
    if references * (length + 128) >= 2**31:
        raise KernelError(
            f"token_match_merge: {references} references of {length} tokens; expected fewer than 2**31 tokens in all"
        )
    x, reference = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, reference))
    pairs, mask, gate, strength = (None if t is None else t.contiguous() for t in (pairs, mask, gate, strength))
    config = _config(x.dtype, tokens, channels)
    tiles, blocks = triton.cdiv(tokens, config["BM"]), references * triton.cdiv(length, config["BN"])
    working = batch if seen is None else max(1, sum(map(bool, seen)))
    splits, steps = cut_for(working * tiles, blocks, _cores(x.device))
    merged = None if strength is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    score = torch.empty((batch, tokens), dtype=torch.float32, device=x.device)
    index = torch.empty((batch, tokens), dtype=torch.int64, device=x.device)
    inverse_norm = torch.empty((references, length), dtype=torch.float32, device=x.device)
    best = torch.empty((splits, batch, tokens), dtype=torch.int64, device=x.device)
    norm_tiles = triton.cdiv(length, 32)
    inverse_norm_kernel[(norm_tiles * references,)](
        reference, mask, inverse_norm, *reference.stride()[:2], length, norm_tiles, C=channels, BM=32, BK=config["BK"]
    )
    token_match_kernel[(tiles * splits * batch,)](
        x, reference, inverse_norm, pairs, gate, best,
        *x.stride()[:2], *reference.stride()[:2], tokens, length, references, tiles, splits, steps, C=channels,
        WIDEN=interpreted() and x.dtype == torch.bfloat16, **config,
    )  # fmt: skip
    merge = MERGE | {"BK": min(MERGE["BK"], max(16, next_power_of_2(channels)))}
    merge_tiles = triton.cdiv(tokens, merge["BM"])
    token_merge_kernel[(merge_tiles * batch,)](
        x, reference, best, gate, strength, threshold, merged, score, index,
        *x.stride()[:2], *reference.stride()[:2], tokens, length, references, merge_tiles, splits, C=channels, **merge,
    )  # fmt: skip
    return merged, score, index


def compile_cases() -> list[dict]:
    """One case for each default configuration, to be compiled without a GPU: see benchmarks/kernels/resources.py."""
    strides = dict.fromkeys(("stride_xb", "stride_xn", "stride_rr", "stride_rm", "N", "M"), "i32:16") | {"R": "i32"}
    cases = []
    for name, config in CONFIGS.items():
        dtype = "*fp32" if name == "float32" else "*bf16"
        pointers = {"x": dtype, "reference": dtype, "inverse_norm": "*fp32", "pairs": "*i1"}
        pointers |= {"gate": "*fp32", "best": "*i64"}
        case = {"name": f"token_match_merge_{name}", "kernel": token_match_kernel, "products": True}
        case["signature"] = pointers | strides | dict.fromkeys(("tiles", "splits", "steps"), "i32")
        case["constexprs"] = {key: config[key] for key in ("BM", "BN", "BK")} | {"C": 640, "WIDEN": False}
        cases.append(case | {key: config[key] for key in ("num_warps", "num_stages")})
    for name, dtype in (("half", "*bf16"), ("float32", "*fp32")):
        pointers = {"x": dtype, "reference": dtype, "best": "*i64", "gate": "*fp32", "strength": "*fp32"}
        pointers |= {"threshold": "*fp32", "merged": dtype, "score": "*fp32", "index": "*i64"}
        case = {"name": f"token_match_merge_merge_{name}", "kernel": token_merge_kernel}
        case["signature"] = pointers | strides | dict.fromkeys(("tiles", "splits"), "i32")
        case["constexprs"] = {key: MERGE[key] for key in ("BM", "BK")} | {"C": 640}
        cases.append(case | {key: MERGE[key] for key in ("num_warps", "num_stages")})
    return cases + [
        {
            "name": "token_match_merge_inverse_norm",
            "kernel": inverse_norm_kernel,
            "signature": {"keys": "*bf16", "mask": "*i1", "inverse_norm": "*fp32", "tiles": "i32"}
            | dict.fromkeys(("stride_r", "stride_m", "M"), "i32:16"),
            "constexprs": {"C": 640, "BM": 32, "BK": 64},
            "num_warps": 4,
            "num_stages": 3,
        }
    ]


def _best_match(queries, keys, pairs, key_mask, gate, seen=None) -> tuple[Tensor, Tensor]:
    if kernel_path(queries, products=True) == "triton":
        return _launch(queries, keys, None, pairs, key_mask, gate, None, seen)[1:]
    search = best_match_tiles if _on_gpu(queries) else best_match_reference
    return search(queries, keys, pairs=pairs, key_mask=key_mask, gate=gate, seen=seen)


def _token_match_merge(x, reference, strength, threshold, pairs, mask, gate, seen=None):
    if kernel_path(x, products=True) == "triton":
        return _launch(x, reference, threshold, pairs, mask, gate, strength, seen)
    merge = token_match_merge_tiles if _on_gpu(x) else token_match_merge_reference
    return merge(x, reference, strength, threshold, pairs=pairs, reference_mask=mask, gate=gate, seen=seen)


def _on_gpu(x: Tensor) -> bool:
    """Whether to ask x's device for a number would make the host wait."""
    return x.device.type != "cpu"


_best_match_op = torch.library.custom_op(
    "semiperm::best_match",
    _best_match,
    mutates_args=(),
    schema="(Tensor queries, Tensor keys, Tensor? pairs, Tensor? key_mask, Tensor? gate) -> (Tensor, Tensor)",
)
_token_match_merge_op = torch.library.custom_op(
    "semiperm::token_match_merge",
    _token_match_merge,
    mutates_args=(),
    schema="(Tensor x, Tensor reference, Tensor strength, Tensor threshold, Tensor? pairs, Tensor? mask, Tensor? gate)"
    " -> (Tensor, Tensor, Tensor)",
)


@_best_match_op.register_fake
def _(queries, keys, pairs, key_mask, gate):
    shape = queries.shape[:2]
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


@_token_match_merge_op.register_fake
def _(x, reference, strength, threshold, pairs, mask, gate):
    shape = x.shape[:2]
    scores = x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int64)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), *scores


def best_match(
    queries: Tensor,
    keys: Tensor,
    *,
    pairs: Tensor | None = None,
    key_mask: Tensor | None = None,
    gate: Tensor | None = None,
    seen: Sequence[Sequence[int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return each query's best cosine and the key that attains it, without the N x M matrix.

    Args:
        queries: (B, N, C), float32, float16 or bfloat16.
        keys: (R, M, C), the same dtype and device; it may share memory with queries.
        pairs: (B, R) bool: row b looks at reference r. None: at all.
        key_mask: (R, M) bool: the keys that may win. None: all.
        gate: (B,): rows with 0 are skipped, on the device. None: 1.
        seen: for each of B rows the references that `pairs` lets it look at, () where its gate is 0: what the host
            knows of these two, so that nothing has to be read from the device, or multiplied in vain. None: nothing.

    Returns:
        score (B, N) float32, and index (B, N) int64 = r * M + j, the lowest on ties. Without an allowed key, and where
        the gate is 0: -inf and -1. The zero vector's cosine is 0; a token that holds NaN or Inf has -inf and -1, and is
        nobody's match. No gradients. On a GPU without our kernel (see kernels/dispatch.py) products of half-precision
        tensors are rounded: score and winner are then within 2e-3 of the best.

    Raises:
        KernelError: shapes, dtypes or devices do not fit, or SEMIPERM_KERNELS asks for what cannot run here.
    """
    pairs, key_mask, gate = _checked("best_match", queries, keys, pairs, key_mask, gate, seen)
    with torch.no_grad():
        if torch.compiler.is_compiling():
            return _best_match_op(queries.detach(), keys.detach(), pairs, key_mask, gate)
        return _best_match(queries.detach(), keys.detach(), pairs, key_mask, gate, seen)


def token_match_merge(
    x: Tensor,
    reference: Tensor,
    strength: float | Tensor,
    threshold: float | Tensor,
    *,
    pairs: Tensor | None = None,
    reference_mask: Tensor | None = None,
    gate: Tensor | None = None,
    seen: Sequence[Sequence[int]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Push each token from its best match: out = x + strength gate (x - r) where their cosine is high.

    Args:
        x: (B, N, C), float32, float16 or bfloat16.
        reference: (R, M, C), the same dtype and device; it may share memory with x, or be x.
        strength: how far, a number, (B,), or (B, R) for what the best match is of; neutral 0 (bit-identical x),
            negative pulls towards the reference.
        threshold: cosine above which a token is merged, a number or a tensor of one; neutral above 1, and -1 is every
            token that has a match.
        pairs: (B, R) bool: row b looks at reference r; `~eye` pushes each image from all others. None: at all.
        reference_mask: (R, M) bool: the reference tokens that may win. None: all.
        gate: (B,), multiplies strength; rows with 0 keep their bits and are skipped, on the device. None: 1.
        seen: as in `best_match`.

    Returns:
        merged (B, N, C), x's bits where nothing was merged; and `best_match`'s score and index. Gradients flow through
        merged, except while compiling; the matching has none.

    Raises:
        KernelError: as `best_match`; or strength is neither a number nor (B,) nor (B, R), or threshold not one number.

    Source: NegToMe (arXiv:2412.01339). The released code finds the best x token of every reference token, and applies
    its number to the reference: `best_match` with the arguments exchanged.
    """
    pairs, mask, gate = _checked("token_match_merge", x, reference, pairs, reference_mask, gate, seen)
    shape = x.shape[0], reference.shape[0]
    if not isinstance(strength, Tensor):
        strength = torch.full(shape, float(strength), dtype=torch.float32, device=x.device)
    elif strength.shape not in (shape[:1], shape):
        raise KernelError(
            f"token_match_merge: strength has shape {tuple(strength.shape)}; expected a number, ({shape[0]},)"
            f" or {shape}"
        )
    strength = strength.to(x.device, torch.float32)
    strength = (strength if strength.ndim == 2 else strength[:, None]).expand(shape)
    threshold = everything_from(threshold, x.device)
    if torch.compiler.is_compiling():
        return _token_match_merge_op(x, reference, strength, threshold, pairs, mask, gate)
    if not needs_grad(x, reference, strength):
        return _token_match_merge(x, reference, strength, threshold, pairs, mask, gate, seen)
    score, index = best_match(x, reference, pairs=pairs, key_mask=mask, gate=gate, seen=seen)
    owner, token = index.clamp_min(0) // reference.shape[1], index.clamp_min(0) % reference.shape[1]
    amount = strength.gather(1, owner)[:, :, None]
    amount = amount if gate is None else amount * gate[:, None, None]
    merged = (x.float() + amount * (x.float() - reference[owner, token].float())).to(x.dtype)
    return torch.where((score > threshold)[:, :, None] & (amount != 0), merged, x), score, index


def everything_from(threshold: float | Tensor, device: torch.device) -> Tensor:
    """A threshold as a float32 tensor (), where -1 (and less) is -inf: a cosine may be rounded to below -1.

    Raises:
        KernelError: not one number.
    """
    if isinstance(threshold, Tensor):
        if threshold.numel() != 1:
            raise KernelError(f"token_match_merge: threshold has shape {tuple(threshold.shape)}; expected one number")
        threshold = threshold.to(device, torch.float32).reshape(())
        return torch.where(threshold <= -1.0, -torch.inf, threshold)
    value = -torch.inf if threshold <= -1.0 else float(threshold)
    return torch.full((), value, dtype=torch.float32, device=device)


def _checked(operation, x, reference, pairs, mask, gate, seen) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Check shapes; return pairs and mask as bool, gate as float32."""
    check_tensors(operation, x, reference=reference)
    shapes = f"{tuple(x.shape)} and {tuple(reference.shape)}"
    if x.dim() != 3 or reference.dim() != 3 or x.shape[2] != reference.shape[2] or 0 in (*x.shape, *reference.shape):
        raise KernelError(f"{operation}: got shapes {shapes}; expected (B, N, C) and (R, M, C), none of them 0")
    expected = {
        "pairs": (pairs, (x.shape[0], reference.shape[0])),
        "mask": (mask, tuple(reference.shape[:2])),
        "gate": (gate, (x.shape[0],)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.device != x.device):
            raise KernelError(
                f"{operation}: {name} is {tuple(tensor.shape)} on {tensor.device};"
                f" expected {shape} on {x.device} beside {shapes}"
            )
        if name != "gate" and tensor is not None and tensor.dtype != torch.bool:
            raise KernelError(f"{operation}: {name} is {tensor.dtype}; expected bool")
    if seen is not None and (len(seen) != x.shape[0] or any(not 0 <= r < len(reference) for row in seen for r in row)):
        raise KernelError(
            f"{operation}: seen={seen!r}; expected {x.shape[0]} rows of numbers below {len(reference)} beside {shapes}"
        )
    return pairs, mask, None if gate is None else gate.float()
