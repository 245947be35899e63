"""How well images fit keys: the best of all sign patterns that a key allows, by a Walsh-Hadamard transform.

    score[b, k, c, w] = sum_i (-1)^(bit i of signs[k, c]  +  ones of w AND i)  values[b, positions[k, i]]
    peak[b, k] = max over c, w of |score|;   pattern[b, k] = 2 (c L + w) + (score < 0), the lowest that attains it
    energy[b, k] = sum_i values[b, positions[k, i]]^2

Shapes: values (B, n) int8 in -15..15; positions (K, L) int32, L a power of two in 256..8192; signs (K, cosets, L / 8)
uint8, the most significant bit first. Integers, exact on every path.
Bytes: eager writes and reads B K cosets L scores log2 L times; here positions and signs are read once for some images
each, mostly from the cache, and 12 bytes a pair of image and key are written. At B = 16, K = 10^4, L = 8192 and 4
cosets: 21 GB of int32 scores, against 0.4 GB read and 2 MB written.
Arithmetic: with L = P H W, P two at L = 8192 and else one, H and W 64 at most, the transform is P - 1 butterflies and
a matrix product by the W x W and one by the H x H Walsh matrix: 2 L (H + W) operations a stream on the tensor cores.
float16 holds whole numbers up to 2,048, and after the first product they are at most 15 P W <= 1,920; float32 sums stay
below 2^17. So nothing is rounded.
On a CPU: butterflies in the narrowest integers that hold them, in blocks that stay in the cache.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from .dispatch import jit, kernel_path, tl, triton
from .errors import KernelError

__all__ = ["compile_cases", "keyed_correlation", "keyed_correlation_reference", "walsh_scores"]

LARGEST = 15  # magnitude of a value: see the proof above
_LENGTHS = (256, 512, 1024, 2048, 4096, 8192)  # 16,384 would take P = 4, and float16 would round
_KEYS = 32  # of a block on a CPU: butterflies run over this many neighbours or more
_SCORES = 1 << 20  # of a block on a CPU: 2 MiB in int16, about a core's cache
_CHUNKS = 16  # of a stream's scores: only the best one is searched again for its peak's place; chosen by hand


def walsh_scores(values: Tensor, signs: Tensor) -> Tensor:
    """Scores of all Walsh functions under each stream of signs: integer butterflies in plain torch.

    Args:
        values: (K, L) int8 in -15..15, in the keys' orders.
        signs: (K, cosets, L / 8) uint8, eight bits a byte.

    Returns:
        (L, cosets, K) int16 or int32. Streams lie innermost: every butterfly then runs over contiguous memory.
    """
    streams = _plus_minus(signs)
    return _butterflies(values.T.contiguous(), streams, _scratch(streams.numel(), values.device))


def _scratch(scores: int, device: torch.device) -> Tensor:
    """Room for that many scores, twice. Asking for it anew in each block would cost as much as the butterflies."""
    return torch.empty((2, 4 * scores), dtype=torch.uint8, device=device)


def _plus_minus(signs: Tensor) -> Tensor:
    """(K, cosets, L / 8) bytes of bits -> (L, cosets, K) int8, 1 or -1."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=signs.device)
    octets = rearrange(signs, "key coset octet -> octet 1 coset key").contiguous()
    bits = (octets >> rearrange(shifts, "bit -> 1 bit 1 1")).bitwise_and_(1)
    return rearrange(bits.view(torch.int8).mul_(-2).add_(1), "octet bit coset key -> (octet bit) coset key")


def _butterflies(field: Tensor, streams: Tensor, scratch: Tensor) -> Tensor:
    """Values (L, K) under streams (L, cosets, K) of 1 and -1. The scores lie in the scratch."""
    length, half, dtype, turn = len(streams), 1, torch.int8, 0

    def buffer() -> Tensor:
        return scratch[turn, : streams.numel() * dtype.itemsize].view(dtype).view(streams.shape)

    scores = torch.mul(field.unsqueeze(1), streams, out=buffer())
    while half < length:
        largest, turn = 2 * half * LARGEST, 1 - turn
        wide = torch.int8 if largest < 1 << 7 else torch.int16 if largest < 1 << 15 else torch.int32
        if wide is not dtype:
            dtype = wide
            scores, turn = buffer().copy_(scores), 1 - turn
        pairs, out = (t.view(length // (2 * half), 2, -1) for t in (scores, buffer()))
        torch.add(pairs[:, 0], pairs[:, 1], out=out[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=out[:, 1])
        scores, half = buffer(), 2 * half
    return scores


def keyed_correlation_reference(values: Tensor, positions: Tensor, signs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`keyed_correlation` in plain torch, block by block."""
    (images, _), (keys, length), cosets = values.shape, positions.shape, signs.shape[1]
    peak = torch.full((images, keys), -1, dtype=torch.int32, device=values.device)
    pattern = torch.empty((images, keys), dtype=torch.int64, device=values.device)
    energy = torch.empty((images, keys), dtype=torch.int32, device=values.device)
    tall = min(keys, max(1, min(_KEYS, _SCORES // length)))
    width = min(cosets, max(1, _SCORES // (tall * length)))
    scratch = _scratch(length * width * tall, values.device)
    for first in range(0, keys, tall):
        block = slice(first, first + tall)
        order = positions[block].T.contiguous()
        for start in range(0, cosets, width):
            streams = _plus_minus(signs[block, start : start + width])
            for image, row in enumerate(values):
                field = row[order]
                if not start:
                    energy[image, block] = field.int().square_().sum(0, dtype=torch.int32)
                found, number = _best(_butterflies(field, streams, scratch))
                better = found > peak[image, block]  # of equals the first
                pattern[image, block] = torch.where(better, number + 2 * length * start, pattern[image, block])
                peak[image, block] = torch.where(better, found, peak[image, block])
    return peak, pattern, energy


def _best(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(L, cosets, K) -> (K,) peaks and pattern numbers: the best chunk of each stream, then the place in it."""
    length, cosets, keys = scores.shape
    chunks = rearrange(scores, "(chunk place) coset key -> chunk place coset key", chunk=_CHUNKS)
    tops = torch.maximum(chunks.amax(1), -chunks.amin(1))
    top, place = rearrange(tops, "chunk coset key -> (coset chunk) key").max(0)  # the first
    coset, chunk = place // _CHUNKS, place % _CHUNKS
    line = chunks[chunk, :, coset, torch.arange(keys, device=scores.device)]
    within = (line.abs() == top[:, None]).to(torch.uint8).argmax(1)
    negative = line.gather(1, within[:, None])[:, 0] < 0
    walsh = chunk * (length // _CHUNKS) + within
    return top.int(), 2 * (coset * length + walsh) + negative


_ELEMENTS = 8192  # of a step: one stream of 8,192, or as many shorter ones as make that,
_STREAMS = 16  # but 16: of 32, sm_120 spills a word
_WARPS, _STAGES = 8, 1  # spill nothing (tests/kernels/test_resources.py)
_IMAGES = 16  # at most, of one program, which then reads a key's streams once for all of them
_PROGRAMS = 1024  # enough to fill a GPU


@jit
def _walsh(N: tl.constexpr):
    """(N, N) float16 Walsh matrix, N at most 256."""
    ones = tl.arange(0, N)[:, None] & tl.arange(0, N)[None, :]
    ones ^= ones >> 4
    ones ^= ones >> 2
    ones ^= ones >> 1
    return (1 - 2 * (ones & 1)).to(tl.float16)


@jit
def _signed(field, byte_ptrs, mask, W: tl.constexpr, S: tl.constexpr, H: tl.constexpr):
    """Values (W, 1, H) under the signs of S streams, whose bytes (W / 8, S, H) lie at the pointers: (W, S, H)."""
    byte = tl.load(byte_ptrs, mask=mask, other=0)
    shift = 7 - tl.arange(0, 8)[None, :, None, None]
    negative = tl.reshape((tl.expand_dims(byte, 1) >> shift) & 1, (W, S, H))
    return tl.where(negative != 0, -field, field)


@jit
def _keyed_correlation_kernel(
    values_ptr,  # (B, n) int8
    positions_ptr,  # (K, L) int32
    signs_ptr,  # (K, cosets, L / 8) uint8
    best_ptr,  # (splits, B, K) int64: peak, then the complement of the pattern's number
    energy_ptr,  # (B, K) int32
    n,
    images,
    keys,
    cosets,
    group,  # images of one program
    steps,  # of one program
    P: tl.constexpr,  # L = P H W, P one or two
    H: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,  # streams of one step: S L is 8,192, or 4,096 at L = 256
):
    key = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    # A step's tiles are (W, S P, H) before the first product and (H, S P W) after it; Walsh matrices on the left.
    streams, rows, column = tl.arange(0, S), tl.arange(0, H), tl.arange(0, S * P * W)
    low, high = _walsh(W), _walsh(H)
    positions = positions_ptr + key * (P * H * W) + (rows[None, None, :] * W + tl.arange(0, W)[:, None, None])
    byte_at = rows[None, None, :] * (W // 8) + tl.arange(0, W // 8)[:, None, None]
    first = tl.program_id(1) * group
    for image in range(first, tl.minimum(first + group, images)):
        at = tl.zeros((), tl.int64) + image
        values = values_ptr + at * n
        field = tl.load(values + tl.load(positions)).to(tl.float16)  # of each image anew: registers are scarce
        energy = tl.sum(field.to(tl.float32) * field.to(tl.float32))
        upper = field
        if P == 2:
            upper = tl.load(values + tl.load(positions + H * W)).to(tl.float16)
            energy += tl.sum(upper.to(tl.float32) * upper.to(tl.float32))
        if split == 0:
            tl.store(energy_ptr + at * keys + key, energy.to(tl.int32))
        best = tl.zeros((), tl.int64)
        for step in range(split * steps, (split + 1) * steps):
            coset = (step * S + streams)[None, :, None]
            byte_ptrs = signs_ptr + key * cosets * (P * H * W // 8) + (coset * (P * H * W // 8) + byte_at)
            signed = _signed(field, byte_ptrs, coset < cosets, W, S, H)
            if P == 2:  # the butterfly of the elements' highest bit
                other = _signed(upper, byte_ptrs + H * W // 8, coset < cosets, W, S, H)
                signed = signed + tl.where(tl.arange(0, 2)[None, :, None] == 0, other, -other)
            half = tl.dot(low, tl.reshape(signed, (W, S * P * H))).to(tl.float16)
            half = tl.permute(tl.reshape(half, (W, S * P, H)), (2, 1, 0))
            score = tl.dot(high, tl.reshape(half, (H, S * P * W))).to(tl.int32)
            # The peak, then the pattern, lowest first: of each column, where the row is the Walsh function's middle
            # bits, and then of all columns. 17 bits and 14 stay below 2^31.
            joint = tl.abs(score) * (2 * H) + (2 * H - 1) - (2 * rows[:, None] + (score < 0).to(tl.int32))
            joint = tl.max(joint, axis=0)
            last = 2 * H - 1 - joint % (2 * H)
            number = 2 * ((column // W * H + last // 2) * W + column % W) + last % 2
            joint = joint // (2 * H) * (2 * S * P * H * W) + (2 * S * P * H * W - 1) - number
            joint = tl.where(step * S + column // (P * W) < cosets, joint, 0)[None, :]
            top = tl.sum(tl.max(joint, axis=1)).to(tl.int64)  # Triton 3.6 cannot reduce one axis here on sm_100
            place = (step + 1) * (2 * S * P * H * W) - 1 - top % (2 * S * P * H * W)
            best = tl.maximum(best, ((top // (2 * S * P * H * W)) << 32) + 0xFFFFFFFF - place)
        tl.store(best_ptr + (split * images + at) * keys + key, best)


def _config(length: int) -> dict[str, int]:
    pairs = 2 if length > 4096 else 1
    rows = 1 << ((length // pairs).bit_length() - 1) // 2
    return {"P": pairs, "H": rows, "W": length // pairs // rows, "S": min(_STREAMS, _ELEMENTS // length)}


def _keyed_correlation_triton(values: Tensor, positions: Tensor, signs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values, positions, signs = values.contiguous(), positions.contiguous(), signs.contiguous()
    (images, n), (keys, length), cosets = values.shape, positions.shape, signs.shape[1]
    config = _config(length)
    total = triton.cdiv(cosets, config["S"])
    group = min(_IMAGES, max(1, images * keys // _PROGRAMS))
    groups = triton.cdiv(images, group)
    steps = triton.cdiv(total, min(total, triton.cdiv(_PROGRAMS, keys * groups)))
    splits = triton.cdiv(total, steps)
    best = torch.empty((splits, images, keys), dtype=torch.int64, device=values.device)
    energy = torch.empty((images, keys), dtype=torch.int32, device=values.device)
    _keyed_correlation_kernel[keys, groups, splits](
        values, positions, signs, best, energy, n, images, keys, cosets, group, steps,
        **config, num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    best = best.amax(0)
    return (best >> 32).int(), 0xFFFFFFFF - (best & 0xFFFFFFFF), energy


def _keyed_correlation(values: Tensor, positions: Tensor, signs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_contents(values, positions)
    run = _keyed_correlation_triton if kernel_path(values, products=True) == "triton" else keyed_correlation_reference
    return run(values, positions, signs)


_keyed_correlation_op = torch.library.custom_op("semiperm::keyed_correlation", _keyed_correlation, mutates_args=())


@_keyed_correlation_op.register_fake
def _(values, positions, signs):
    shape = len(values), len(positions)
    return tuple(values.new_empty(shape, dtype=dtype) for dtype in (torch.int32, torch.int64, torch.int32))


def keyed_correlation(values: Tensor, positions: Tensor, signs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best of a key's sign patterns for each image and key, without the B x K x cosets x L scores.

    Args:
        values: (B, n) int8 in -15..15: soft values of B images.
        positions: (K, L) int32 in 0..n-1: where each key's elements lie, L a power of two in 256..8192.
        signs: (K, cosets, L / 8) uint8: the keys' streams, as `numpy.packbits` puts bits into bytes.

    Returns:
        peak (B, K) int32 = max |score|; pattern (B, K) int64 = 2 (coset L + walsh) + negative, the lowest on ties;
        energy (B, K) int32 = the sum of squares of the values at the key's positions. All exact; no gradients.

    Raises:
        KernelError: shapes, dtypes, devices or numbers out of range, or SEMIPERM_KERNELS asks for what cannot run here.
    """
    _check(values, positions, signs)
    run = _keyed_correlation_op if torch.compiler.is_compiling() else _keyed_correlation
    return run(values, positions, signs)


def _check(values: Tensor, positions: Tensor, signs: Tensor) -> None:
    if (
        (values.ndim, positions.ndim, signs.ndim) != (2, 2, 3)
        or 0 in (*values.shape, *positions.shape, *signs.shape)
        or positions.shape[1] not in _LENGTHS
        or signs.shape[0] != positions.shape[0]
        or 8 * signs.shape[2] != positions.shape[1]
        or (values.dtype, positions.dtype, signs.dtype) != (torch.int8, torch.int32, torch.uint8)
        or not values.device == positions.device == signs.device
    ):
        given = ", ".join(
            f"{name} {tuple(t.shape)} {t.dtype} on {t.device}"
            for name, t in (("values", values), ("positions", positions), ("signs", signs))
        )
        raise KernelError(
            f"keyed_correlation: {given}; expected (B, n) int8, (K, L) int32 and (K, cosets, L / 8) uint8 on one"
            f" device, none of them empty, L one of {', '.join(map(str, _LENGTHS))}"
        )


def _check_contents(values: Tensor, positions: Tensor) -> None:
    """Numbers out of range would be rounded, or read from elsewhere. Costs one wait for the device."""
    ends = torch.stack([end.long() for t in (values, positions) for end in t.aminmax()])
    low, high, first, last = ends.tolist()
    if not (-LARGEST <= low and high <= LARGEST and 0 <= first and last < values.shape[1]):
        raise KernelError(
            f"keyed_correlation: values in {low}..{high} and positions in {first}..{last}; expected values in"
            f" -{LARGEST}..{LARGEST} and positions in 0..{values.shape[1] - 1}"
        )


def compile_cases() -> list[dict]:
    """What kernel_resources.py compiles: every length."""
    signature = {"values_ptr": "*i8", "positions_ptr": "*i32", "signs_ptr": "*u8", "best_ptr": "*i64"}
    signature |= {"energy_ptr": "*i32", "n": "i32:16"}
    signature |= dict.fromkeys(("images", "keys", "cosets", "group", "steps"), "i32")
    return [
        {
            "name": f"keyed_correlation, L {length}",
            "kernel": _keyed_correlation_kernel,
            "products": True,
            "signature": signature,
            "constexprs": _config(length),
            "num_warps": _WARPS,
            "num_stages": _STAGES,
        }
        for length in _LENGTHS
    ]
