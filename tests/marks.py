"""What the tests of marks share: keys that repeat, generators, and the channel that marks are read through."""

import math

import torch
from semiperm.methods.watermark.keys import WatermarkKey
from torch import Tensor


def key_of(number: int) -> WatermarkKey:
    """The same key for the same number."""
    return WatermarkKey(f"key {number}", number % 4096, "", number.to_bytes(4, "big") * 8, b"m" * 32)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian_channel(latents: Tensor, rho: float, seed: int = 99) -> Tensor:
    """What is left of a latent in inversion: correlation rho with it, of the same distribution."""
    return rho * latents + math.sqrt(1 - rho**2) * torch.randn(latents.shape, generator=seeded(seed))
