"""The marks that the watermark's benchmark compares, by the names of its tables, all behind one face."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from ...methods.watermark import mark as watermark
from ...methods.watermark import reading
from ...methods.watermark.keys import FORMAT, KEY_IDS, WatermarkKey
from ...methods.watermark.peers.gaussian_shading import GaussianShading
from ...methods.watermark.peers.pseudorandom_code import PseudorandomCode
from ...methods.watermark.peers.ring_id import RingID
from ...methods.watermark.peers.tree_ring import TreeRing

OURS = "semiperm"


def seeded(*about) -> torch.Generator:
    """A generator that depends on what is said about its use, and on nothing else."""
    digest = hashlib.sha256(repr(about).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def key_of(*about, since: int = FORMAT) -> WatermarkKey:
    """A key of the same kind: no secret, but a benchmark has to be repeatable."""
    stream, mac = (hashlib.sha256(repr((part, *about)).encode()).digest() for part in ("stream", "mac"))
    return WatermarkKey(f"benchmark {about}", stream[0] % KEY_IDS, "", stream, mac, since=since)


@dataclass(frozen=True)
class Found:
    """What a detector says of one latent.

    Args:
        p_value: under the random key, exact or an upper bound.
        exact: whether the whole message came out as it was sent; None for a mark without one.
        right: share of the message's bits that did; None where the detector says nothing rather than something wrong.
    """

    p_value: float
    exact: bool | None = None
    right: float | None = None


class Keyed:
    """This package's mark, with a payload that the key tells.

    Args:
        bits: of the code, MAC included; None is what the release gives the shape, others are for comparison.
    """

    def __init__(self, key: WatermarkKey, bits: int | None = None):
        self.key, self.bits = key, bits

    def payload(self, shape: Sequence[int]) -> watermark.Payload:
        """The payload of latents of one image's shape, of the size in use."""
        return self._payload(watermark.capacity(shape))

    def _payload(self, layout: watermark.Layout) -> watermark.Payload:
        drawn = int.from_bytes(hashlib.sha256(self.key.stream_key).digest(), "big")
        return watermark.Payload(drawn % (1 << layout.unique_id), time=(drawn >> 64) % (1 << layout.time))

    @contextlib.contextmanager
    def _carrying(self, image: Sequence[int]):
        """The release has one size for each shape, asked of `capacity`: here it answers with ours."""
        asked = watermark.capacity
        layout = asked(image)
        if self.bits is not None and self.bits != layout.total:
            ident = min(64, (self.bits - layout.bound) // 2)
            rest = {"version": 0, "key_id": 0, "time": 0, "model": 0}
            layout = replace(layout, **rest, unique_id=ident, mac=self.bits - layout.bound - ident)
        for module in (watermark, reading):
            module.capacity = lambda shape: layout
        try:
            yield layout
        finally:
            for module in (watermark, reading):
                module.capacity = asked

    def sample(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """(B, ...) marked latents, each with a nonce of its own, and all with the same payload."""
        with self._carrying(shape[1:]) as layout:
            return watermark.KeyedMark(self.key).sample(shape, self._payload(layout), generator)

    def p_value(self, latents: Tensor) -> float:
        """Of one latent, given with its batch."""
        return self.find(latents).p_value

    def find(self, latents: Tensor) -> Found:
        """What one latent says, given with its batch."""
        with self._carrying(latents.shape[1:]) as layout:
            said = watermark.read(latents, [self.key])[0]
            return Found(said.p_value, bool(said.mac_ok) and said.payload == self._payload(layout))


class Baseline:
    """Another mark, with one message a key or without any.

    Args:
        make: f(key, bits of the message or None) -> the mark.
        told: whether its p-value is computed for the message that was sent, as Gaussian Shading's is.
    """

    def __init__(self, make: Callable, told: bool, key: WatermarkKey, bits: int | None = None):
        self.mark, self.told = make(key, bits), told

    def _message(self, shape: Sequence[int]) -> dict:
        if not hasattr(self.mark, "decode"):
            return {}
        image = tuple(shape[1:])
        return {"bits": self.mark.key.stream("benchmark message", image, 0, self.mark.capacity(image))}

    def sample(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """(B, ...) marked latents, with the same message where there is one."""
        return self.mark.sample(shape, generator, **self._message(shape))

    def p_value(self, latents: Tensor) -> float:
        """Of one latent, given with its batch."""
        return float(self.mark.p_values(latents, **(self._message(latents.shape) if self.told else {}))[0])

    def find(self, latents: Tensor) -> Found:
        """What one latent says, given with its batch."""
        sent, p_value = self._message(latents.shape), self.p_value(latents)
        if not sent:
            return Found(p_value)
        got = self.mark.decode(latents)[0]
        if got is None:
            return Found(p_value, False)
        right = float(np.mean(got == sent["bits"]))
        return Found(p_value, right == 1, right)


class NewMessages(Baseline):
    """The same with a message of its own for every latent: what is left to see is the stream they share."""

    def sample(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """(B, ...) marked latents."""
        bits = torch.randint(0, 2, (shape[0], self.mark.capacity(tuple(shape[1:]))), generator=generator)
        return self.mark.sample(shape, generator, bits=bits.numpy())


class ReleasedTreeRing:
    """The p-value of Tree-Ring's released code, which takes a noncentral chi-square for its law.

    p = P(chi2 <= sum |F - K|^2 / v), 2 |M| degrees of freedom, noncentrality sum |K|^2 / v, v the variance of F's real
    and imaginary parts inside the disc M of radius 10. But half of M is the conjugate of the other half.
    """

    def __init__(self, key: WatermarkKey, bits: int | None = None):
        self.key = key

    def p_value(self, latents: Tensor) -> float:
        """Of one latent (1, C, H, W); channel 0 alone."""
        height, width = latents.shape[2:]
        y, x = (torch.arange(side)[shape] - side // 2 for side, shape in ((height, (..., None)), (width, (None, ...))))
        disc = torch.fft.ifftshift(x**2 + y**2 <= 100)
        found = torch.fft.fft2(latents[0, 0].double())[disc]
        pattern = torch.randn(height, width, generator=seeded("tree-ring", self.key.stream_key), dtype=torch.float64)
        pattern = torch.fft.fft2(pattern)[disc]
        variance = torch.cat([found.real, found.imag]).var()
        distance, centre = ((v.abs() ** 2).sum() / variance for v in (found - pattern, pattern))
        return float(stats.ncx2.cdf(float(distance), 2 * len(found), float(centre)))


def _soft_shading(key: WatermarkKey, bits: int | None) -> GaussianShading:
    return GaussianShading(key, bits, soft=True)


def _tree_ring(key: WatermarkKey, bits: int | None) -> TreeRing:
    return TreeRing(key)


def _ring_id(key: WatermarkKey, bits: int | None) -> RingID:
    return RingID(key)


SHADING, SOFT, CODE, TREE, RINGS = "gaussian shading", "gaussian shading, soft", "prc", "tree-ring", "ring-id"
RELEASED = f"{TREE}, released p-value"
# name -> f(key, bits of the message or None)
MARKS = {
    OURS: Keyed,
    SHADING: partial(Baseline, GaussianShading, True),
    SOFT: partial(Baseline, _soft_shading, True),
    f"{SHADING}, new messages": partial(NewMessages, GaussianShading, True),
    CODE: partial(Baseline, PseudorandomCode, False),
    TREE: partial(Baseline, _tree_ring, False),
    RINGS: partial(Baseline, _ring_id, False),
    RELEASED: ReleasedTreeRing,
}
BASELINES = (SHADING, SOFT, CODE, TREE, RINGS)
CARRIERS = (SHADING, SOFT, CODE)  # of messages
CONTROLS = (SHADING, f"{SHADING}, new messages", CODE, TREE, RINGS)  # of the classifiers
