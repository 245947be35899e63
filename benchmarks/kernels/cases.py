"""The operations that `bench kernels` measures: inputs, our kernel, the naive algorithm, and what equal answers are.

The naive algorithms are written from their formulas in eager torch, in the tensors' dtype, as the released codes are.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.dual_context_attention import dual_context_attention
from ...kernels.gated_low_rank import gated_low_rank
from ...kernels.gated_projection import gated_projection
from ...kernels.keyed_correlation import keyed_correlation
from ...kernels.normalized_attention_guidance import normalized_attention_guidance
from ...kernels.safe_guidance_step import safe_guidance_step
from ...kernels.token_match_merge import token_match_merge

RELATIVE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 3e-2}  # of a token; the naive ones round often
SCORE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}  # the naive cosines are rounded
TIE = {torch.float32: 1e-5, torch.float16: 1e-4, torch.bfloat16: 1e-4}  # ours are not: sums in float32


class KernelBenchmarkError(RuntimeError):
    """A kernel and the naive algorithm disagree: a wrong answer has no speed."""


class Operation:
    """One operation at one size. `kernel` and `naive` take what `inputs` returns, and return the same tensors."""

    name = ""
    bound = "bandwidth"  # or "arithmetic": which roof it is under

    def __init__(self, *size: int, timed: bool = True, dtype: torch.dtype | None = None):
        """dtype: instead of the run's. timed: False measures our memory, and computes the naive one."""
        self.size, self.timed, self.dtype = size, timed, dtype

    @property
    def shape(self) -> str:
        return " ".join(f"{letter}{number}" for letter, number in zip(self.letters, self.size, strict=True))

    @property
    def peers(self) -> dict[str, Callable]:
        """Further algorithms that are timed beside the naive one."""
        return {}

    def check(self, inputs: tuple, ours: tuple, naive: tuple | None) -> None:
        """Raise KernelBenchmarkError unless the answers are equal, token by token, to the rounding of their dtype."""
        for number, (mine, theirs) in enumerate(zip(ours, naive, strict=True)):
            self.require(f"output {number}", _token_error(mine, theirs), RELATIVE[inputs[0].dtype])

    def require(self, what: str, error: float, bound: float) -> None:
        if not error <= bound:  # nor NaN
            raise KernelBenchmarkError(
                f"{self.name} at {self.shape}: {what} differs from the naive algorithm's by {error:.2e}, more than"
                f" {bound:.0e}; nothing is reported, run pytest tests/kernels"
            )


class TokenMatchMerge(Operation):
    """B - 1 images pushed from a reference, row 0. The released algorithm compares row 0 with itself too."""

    name, letters, bound = "negative_token_merging/token_match_merge", "BNC", "arithmetic"
    strength, threshold = 0.9, 0.7

    def __init__(self, *size: int, smooth: bool = False, **how):
        """smooth: images of 4 x 4 patches, a square of tokens. Many keys are nearly equal: hard for the CPU path."""
        super().__init__(*size, **how)
        self.smooth = smooth

    @property
    def shape(self) -> str:
        return super().shape + (" smooth" if self.smooth else "")

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor]:
        """Neighbours are alike, as in an image; image 1 is the reference moved about, the others are of their own."""
        batch, tokens, channels = self.size
        if self.smooth:
            coarse = F.interpolate(_noise(1, batch, channels, 4, 4), size=math.isqrt(tokens), mode="bicubic")
            x = coarse.flatten(2).transpose(1, 2) + 0.1 * _noise(0, batch, tokens, channels)
            return (x.contiguous().to(device, dtype),)
        noise, at = _noise(0, batch, tokens, channels), torch.arange(tokens) // 16
        coarse = _noise(1, batch, 1 + tokens // 16, channels)
        x = coarse[:, at].add_(noise, alpha=0.3)
        x[1] = 3 * x[0, torch.randperm(tokens, generator=torch.Generator().manual_seed(2))] + 0.5 * noise[1]
        return (x.to(device, dtype),)

    def kernel(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return token_match_merge(x[1:], x[:1], self.strength, self.threshold)

    def naive(self, x: Tensor, queries=slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """The released algorithm, along the right axis: each token's best reference token."""
        normal = F.normalize(x, dim=-1)
        score, index = (normal[:, queries] @ normal[:1].transpose(-1, -2)).max(-1)
        del normal
        token = x[:, queries]
        match = torch.gather(x[:1].expand_as(x), 1, index[..., None].expand_as(token))
        pushed = (1 + self.strength) * token - self.strength * match
        return torch.where((score > self.threshold)[..., None], pushed, token), score, index

    @property
    def peers(self) -> dict[str, Callable]:
        """The five lines that anyone would write first: 1,024 queries at a time, and no row that is not pushed."""
        return {"naive, in chunks": self._chunked}

    def _chunked(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normal, keys = F.normalize(x[1:], dim=-1), F.normalize(x[0], dim=-1).T
        found = [(part @ keys).max(-1) for part in normal.flatten(0, 1).split(1024)]
        score, index = (torch.cat(parts).view(x[1:].shape[:2]) for parts in zip(*found, strict=True))
        pushed = (1 + self.strength) * x[1:] - self.strength * x[0][index]
        return torch.where((score > self.threshold)[..., None], pushed, x[1:]), score, index

    def check(self, inputs, ours, naive) -> None:
        """Our winner is as good as the naive one, to ties; tokens with the same winner are merged alike."""
        (x,) = inputs
        reference, queries = x[0], x[1:]
        if naive is None:  # too large for the naive algorithm: some tokens stand for all
            some = torch.linspace(0, x.shape[1] - 1, 64, device=x.device).long()
            naive, ours, queries = self.naive(x, some), tuple(t[:, some] for t in ours), queries[:, some]
        (merged, score, index), (wanted, top, best) = ours, (t[-len(queries) :] for t in naive)
        self.require("an index", float(((index < 0) | (index >= len(reference))).sum()), 0)  # out of range
        won, lost = (F.cosine_similarity(queries.float(), reference[at].float(), dim=-1) for at in (index, best))
        self.require("the winner", float((lost - won).max()), TIE[x.dtype])
        self.require("its cosine", float((score - won).abs().max()), TIE[x.dtype])
        self.require("the score", float((score - top).abs().max()), SCORE[x.dtype])
        clear = (index == best) & ((top - self.threshold).abs() > SCORE[x.dtype])
        self.require("half of the winners", float(clear.float().mean() < 0.5), 0)
        self.require("a merged token", _token_error(merged[clear], wanted[clear]), RELATIVE[x.dtype])

    def work(self, element: int) -> tuple[int, int]:
        batch, tokens, channels = self.size
        return (2 * batch - 1) * tokens * channels * element + (batch - 1) * tokens * 12, (
            2 * (batch - 1) * tokens**2 * channels
        )


class GatedLowRank(Operation):
    """K membranes as one pair of R ranks in all; every row and rank has an open gate."""

    name, letters = "membranes/gated_low_rank", ("B", "N", "in", "out", "R")

    def inputs(self, device, dtype) -> tuple[Tensor, ...]:
        batch, tokens, n_in, n_out, rank = self.size
        y, x = _noise(0, batch, tokens, n_out), _noise(1, batch, tokens, n_in)
        down, up = _noise(2, rank, n_in) / n_in**0.5, _noise(3, rank, n_out) / rank**0.5
        gamma = 0.5 + _noise(4, batch, rank).abs()
        return tuple(t.to(device, dtype) for t in (y, x, down, up, gamma))

    def kernel(self, y, x, down, up, gamma) -> tuple[Tensor]:
        return (gated_low_rank(y, x, down, up, gamma),)

    def naive(self, y, x, down, up, gamma) -> tuple[Tensor]:
        return (y + ((x @ down.T) * gamma[:, None]) @ up,)

    def work(self, element) -> tuple[int, int]:
        batch, tokens, n_in, n_out, rank = self.size
        moved = batch * tokens * (n_in + 2 * n_out) + rank * (n_in + n_out + batch)
        return moved * element, 2 * batch * tokens * rank * (n_in + n_out)


class GatedProjection(Operation):
    """R directions of image-side membranes; every picture has tokens with open gates and with shut ones."""

    name, letters = "membranes/gated_projection", "BNCR"

    def inputs(self, device, dtype) -> tuple[Tensor, ...]:
        batch, tokens, channels, rank = self.size
        y = _noise(0, batch, tokens, channels).to(device, dtype)
        read, write = ((_noise(i, rank, channels) / channels**0.5).to(device, dtype) for i in (1, 2))
        gates = torch.tensor([[0.0], [0.5], [2.0], [0.1], [2.0]]).expand(5, rank).contiguous()
        return y, read, write, gates.to(device), torch.ones(batch, rank, device=device)

    def kernel(self, y, read, write, gates, gamma) -> tuple[Tensor]:
        return (gated_projection(y, read, write, gates, gamma)[0],)

    def naive(self, y, read, write, gates, gamma) -> tuple[Tensor]:
        offset, low, slope, seen, steep = gates
        a = y.float() @ read.float().T - offset
        picture = ((a.amax(dim=1, keepdim=True) - seen) * steep).clamp(0, 1)
        h = ((a - low) * slope).clamp(0, 1) * picture * a * gamma[:, None]
        return ((y.float() - h @ write.float()).to(y.dtype),)

    def work(self, element) -> tuple[int, int]:
        batch, tokens, channels, rank = self.size
        moved = (2 * batch * tokens * channels + 2 * rank * channels + batch * tokens * rank) * element
        return moved + 4 * rank * (5 + batch + 2 * batch * tokens), 4 * batch * tokens * rank * channels


class NormalizedAttentionGuidance(Operation):
    name, letters = "normalized_attention_guidance", "BNC"
    scale, tau, alpha = 4.0, 2.5, 0.25

    def inputs(self, device, dtype) -> tuple[Tensor, ...]:
        return tuple(_noise(seed, *self.size).to(device, dtype) for seed in (0, 1))

    def kernel(self, positive, negative) -> tuple[Tensor]:
        return (normalized_attention_guidance(positive, negative, self.scale, self.tau, self.alpha),)

    def naive(self, positive, negative) -> tuple[Tensor]:
        """18 passes over (B, N, C)."""
        extrapolated = positive * (self.scale + 1) - negative * self.scale
        ratio = extrapolated.norm(p=1, dim=-1, keepdim=True) / positive.norm(p=1, dim=-1, keepdim=True)
        bounded = extrapolated * (ratio.clamp(max=self.tau) / ratio)
        return (bounded * self.alpha + positive * (1 - self.alpha),)

    def work(self, element) -> tuple[int, int]:
        return 3 * math.prod(self.size) * element, 0


class DualContextAttention(Operation):
    """Joint attention of an image's tokens N, which both contexts share, and P words in each of two contexts."""

    name, letters, bound = "dual_context_attention", "BHNDP", "arithmetic"
    phi = 4.0

    def inputs(self, device, dtype) -> tuple[Tensor, ...]:
        batch, heads, tokens, width, words = self.size
        lengths = (tokens, tokens, tokens, words, words, words, words)
        return tuple(_noise(n, batch, heads, size, width).to(device, dtype) for n, size in enumerate(lengths))

    def kernel(self, q, k, v, k_positive, v_positive, k_negative, v_negative) -> tuple[Tensor, Tensor]:
        positive, negative = (k_positive, v_positive), (k_negative, v_negative)
        return dual_context_attention(q, (k, v), positive, negative, phi=self.phi)[:2]

    def naive(self, q, k, v, k_positive, v_positive, k_negative, v_negative) -> tuple[Tensor, Tensor]:
        """torch's attention twice, as the released code attends."""
        return tuple(
            F.scaled_dot_product_attention(q, torch.cat((k, own_k), 2), torch.cat((v, own_v), 2))
            for own_k, own_v in ((k_positive, v_positive), (k_negative, v_negative))
        )

    def work(self, element) -> tuple[int, int]:
        batch, heads, tokens, width, words = self.size
        moved = batch * heads * width * (5 * tokens + 4 * words) * element
        return moved, 4 * batch * heads * tokens * width * (tokens + 2 * words)


class SafeGuidanceStep(Operation):
    name, letters = "safe_guidance/safe_guidance_step", "BCHW"
    guidance_scale, safety_guidance_scale, threshold, momentum_scale, beta = 7.5, 0.5, 0.01, 0.3, 0.4

    def inputs(self, device, dtype) -> tuple[Tensor, ...]:
        """Sixteenths: their differences are exact in every dtype, so both sides are on the same side of the threshold.

        The last is the momentum in the predictions' dtype, which is what the released code keeps.
        """
        u, t, s, m = (_noise(seed, *self.size).mul_(16).round_().div_(16).clamp_(-4, 4) for seed in range(4))
        return (*(p.to(device, dtype) for p in (u, t, s)), m.to(device), m.to(device, dtype))

    def kernel(self, u, t, s, momentum, _) -> tuple[Tensor, Tensor]:
        return safe_guidance_step(
            u, t, s, momentum, guidance_scale=self.guidance_scale, safety_guidance_scale=self.safety_guidance_scale,
            safety_threshold=self.threshold, momentum_scale=self.momentum_scale, momentum_beta=self.beta, active=True,
        )[:2]  # fmt: skip

    def naive(self, u, t, s, _, momentum) -> tuple[Tensor, Tensor]:
        """19 operations."""
        scale = ((t - s).abs() * self.safety_guidance_scale).clamp(max=1.0)
        scale = torch.where((t - s) >= self.threshold, torch.zeros_like(scale), scale)
        gamma = (s - u) * scale + self.momentum_scale * momentum
        momentum = self.beta * momentum + (1 - self.beta) * gamma
        return u + self.guidance_scale * ((t - u) - gamma), momentum

    def work(self, element) -> tuple[int, int]:
        return math.prod(self.size) * (4 * element + 8), 0


class KeyedCorrelation(Operation):
    """B images of 8 L values under K keys. All numbers are integers, and equal to the last bit."""

    name, letters, bound = "watermark/keyed_correlation", ("B", "K", "L", "cosets"), "arithmetic"

    def __init__(self, *size: int, **how):
        super().__init__(*size, **({"dtype": torch.int8} | how))

    def inputs(self, device, dtype) -> tuple[Tensor, ...]:
        images, keys, length, cosets = self.size
        g = torch.Generator().manual_seed(0)
        values = torch.randint(-14, 15, (images, 8 * length), generator=g, dtype=torch.int8)
        positions = torch.randint(0, 8 * length, (keys, length), generator=g, dtype=torch.int32)
        signs = torch.randint(0, 256, (keys, cosets, length // 8), generator=g, dtype=torch.uint8)
        return tuple(t.to(device) for t in (values, positions, signs))

    def kernel(self, values, positions, signs) -> tuple[Tensor, Tensor, Tensor]:
        return keyed_correlation(values, positions, signs)

    def naive(self, values, positions, signs) -> tuple[Tensor, Tensor, Tensor]:
        """The fast Walsh-Hadamard transform of all pairs at once."""
        field = values[:, positions.long()].int()
        bits = (signs[..., None] >> torch.arange(7, -1, -1, dtype=torch.uint8, device=signs.device)) & 1
        scores = field[:, :, None] * (1 - 2 * bits.flatten(2).int())
        half = 1
        while half < scores.shape[-1]:
            low, high = scores.view(*scores.shape[:3], -1, 2, half).unbind(-2)
            scores = torch.stack((low + high, low - high), -2).flatten(3)
            half *= 2
        scores = scores.flatten(2)
        index = scores.abs().argmax(-1, keepdim=True)
        best = scores.gather(-1, index)[..., 0]
        return best.abs(), 2 * index[..., 0] + (best < 0), field.square().sum(-1).int()

    def check(self, inputs, ours, naive) -> None:
        for name, mine, theirs in zip(("the peak", "the pattern", "the energy"), ours, naive, strict=True):
            self.require(name, float((mine != theirs).sum()), 0)

    def work(self, element) -> tuple[int, int]:
        """A product by a Walsh matrix on each side of a square or nearly square tile, of 64 at most."""
        images, keys, length, cosets = self.size
        rows = 1 << (length.bit_length() - 1) // 2
        moved = images * 8 * length + keys * length * (4 + cosets / 8) + images * keys * 16
        return int(moved), 2 * images * keys * cosets * length * min(128, rows + length // rows)


def small_cases() -> list[Operation]:
    """Odd sizes, checked before anything is timed; the match's is large enough for blocks."""
    return [
        TokenMatchMerge(3, 1111, 72),
        GatedLowRank(3, 77, 40, 56, 5),
        GatedProjection(3, 77, 40, 5),
        KeyedCorrelation(3, 5, 256, 3),
        NormalizedAttentionGuidance(3, 77, 72),
        DualContextAttention(2, 3, 77, 40, 13),
        SafeGuidanceStep(3, 4, 9, 7),
    ]


def timed_cases(device: torch.device, quick: bool) -> list[Operation]:
    """What is timed: SDXL's layers on a CPU; those of SDXL and Flux at 1024 pixels and Wan at 480p on a GPU.

    The watermark's keys are those of latents of 16,384 (SDXL) and 65,536 (Flux) elements.
    """
    if quick:
        cases = [TokenMatchMerge(4, 1024, 640), GatedLowRank(2, 1024, 640, 640, 20), GatedProjection(2, 1024, 640, 20)]
        cases.append(KeyedCorrelation(2, 64, 2048, 4))
        cases.append(DualContextAttention(1, 4, 1024, 64, 77))
        return cases + [NormalizedAttentionGuidance(2, 1024, 640), SafeGuidanceStep(4, 4, 64, 64)]
    if device.type == "cuda":
        cases = [TokenMatchMerge(4, 4096, 640), TokenMatchMerge(4, 4096, 3072), TokenMatchMerge(2, 32760, 1536)]
    else:
        cases = [TokenMatchMerge(4, 4096, 640), TokenMatchMerge(4, 4096, 640, smooth=True)]
        cases.append(TokenMatchMerge(4, 1024, 1280))
        cases.append(TokenMatchMerge(2, 32760, 1536, timed=False, dtype=torch.bfloat16))
    cases += [GatedLowRank(8, 4096, 640, 640, rank) for rank in (2, 20, 200)]
    cases += [GatedProjection(8, 4096, 640, rank) for rank in (1, 20, 100)]
    cases += [
        KeyedCorrelation(*((16, 1024) if device.type == "cuda" else (4, 64)), length, 4) for length in (2048, 8192)
    ]
    # a layer of Flux at 1024 pixels; SD3's at 512 on a CPU
    cases.append(DualContextAttention(*((1, 24, 4096, 128, 512) if device.type == "cuda" else (1, 24, 1024, 64, 154))))
    return cases + [NormalizedAttentionGuidance(2, 4096, 640), SafeGuidanceStep(4, 4, 128, 128)]


def _noise(seed: int, *size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def _token_error(mine: Tensor, theirs: Tensor) -> float:
    """Largest relative error of a token: of one row of the last dimension."""
    mine, theirs = mine.float(), theirs.float()
    return float(((mine - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp_min(1e-6)).max())
