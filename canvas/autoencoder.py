"""The canvas autoencoder: a small AutoencoderKL (factor 8, 4 latent channels) and how it is trained.

Two things make it small and quick to train. (1) Group normalisation removes absolute levels: with 64 channels in the
32 groups that ComfyUI fixes, a pair of channels keeps nothing of its mean, and such models learn no colour for a long
time. So the weights start as a linear codec (box average down, smooth interpolation up) that passes the norms: each
colour travels as a pair (s, a - s), where a is one large value in one corner, made from the zero padding. The pair's
mean and variance then hardly depend on s, and silu(v) - silu(-v) = v. Training adds the detail.
(2) It is trained to find its own latents again, encode(decode(z + n)) = z + n, with n white noise: what a watermark
needs from it.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dataset import Pool
from .loop import train

SCALING_FACTOR = 0.18215  # SD1.5's: ComfyUI's latent format then needs no override
CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (64, 64, 64, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 32,
    "sample_size": 128,
    "scaling_factor": SCALING_FACTOR,
}


def build_autoencoder(seed: int = 0) -> nn.Module:
    """Return an AutoencoderKL that starts as a linear codec of the 8x8-averaged colours."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(**CONFIG)
    with torch.no_grad():
        for name, module in vae.named_modules():
            if name.endswith(("conv2", "to_out.0")):  # residual branches start at zero
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        box = torch.tensor([[0.25, 0.25, 0], [0.25, 0.25, 0], [0, 0, 0]])
        tent = torch.tensor([0.25, 0.5, 0.25])
        centre = torch.zeros(3, 3)
        centre[1, 1] = 1
        # On a constant, these give 1 in one corner (where padding is read) and 0 elsewhere.
        last_corner = torch.tensor([[1.0, 0, -1], [0, 0, 0], [-1, 0, 1]])
        first_corner = torch.tensor([[1.0, -1, 0], [-1, 1, 0], [0, 0, 0]])
        for half, blocks, scale, constant, corner, size in (
            (vae.encoder, [b.downsamplers[0].conv for b in vae.encoder.down_blocks[:3]], box, box, last_corner, 16),
            (
                vae.decoder,
                [b.upsamplers[0].conv for b in vae.decoder.up_blocks[:3]],
                tent[:, None] * tent,
                centre,
                first_corner,
                128,
            ),
        ):
            _carry(half.conv_in, {2 * c: {c: centre} for c in range(3)} | {_ONE: {}})
            half.conv_in.bias[_ONE] = 1
            for conv in blocks:
                _carry(conv, {2 * c: {2 * c: scale} for c in range(3)} | {_ONE: {_ONE: constant}})
            spike = _SIGMA * 2**0.5 * size * corner
            pairs = {2 * c + 1: {2 * c: -scale, _ONE: spike} for c in range(3)}
            _carry(blocks[-1], pairs | {_SPIKE: {_ONE: spike}, _SPIKE + 1: {}})
            out = half.conv_out
            out.weight[:3] *= 0.02
            for c in range(3):
                out.weight[c, :10] = 0
                out.weight[c, 2 * c, 1, 1], out.weight[c, 2 * c + 1, 1, 1] = _SIGMA, -_SIGMA
                out.weight[c, _SPIKE, 1, 1] = _SIGMA
                out.bias[c] = 0
        for conv in (vae.quant_conv, vae.post_quant_conv):
            conv.weight.copy_(torch.eye(conv.weight.shape[0])[..., None, None])
            conv.bias.zero_()
    return vae


_ONE, _SPIKE = 6, 8  # channels that carry the constant 1 and the bare corner value
_SIGMA = 3.0  # standard deviation that the corner value gives a pair


def _carry(conv: nn.Conv2d, taps: dict[int, dict[int, Tensor]]) -> None:
    """Set output channels of a 3x3 convolution to exactly the given kernels on the given input channels."""
    for out, kernels in taps.items():
        conv.weight[out], conv.bias[out] = 0, 0
        for channel, kernel in kernels.items():
            conv.weight[out, channel] = kernel


def to_tensor(pictures: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def encode_mean(vae: nn.Module, x: Tensor) -> Tensor:
    """Return the posterior mean (B, 4, H/8, W/8); the canvas autoencoder is used without sampling."""
    return vae.quant_conv(vae.encoder(x))[:, :4]


def train_autoencoder(
    pool: Pool, workdir: Path, steps: int = 1500, seed: int = 0, stop_after: int | None = None
) -> nn.Module:
    """Train on whole pictures (batch 4) in bfloat16 autocast.

    Loss: L1 + L1 of the gradients + MSE of the 8x8 averages + round trip of noisy latents + a pull to unit latents.
    """
    vae = build_autoencoder(seed)

    def loss_of(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((seed, step))
        pictures = pool.pictures[rng.integers(0, len(pool.scenes), 4)]
        x = to_tensor(pictures)
        noise = torch.Generator().manual_seed(seed * 1_000_003 + step)
        with torch.autocast("cpu", torch.bfloat16):
            z = encode_mean(vae, x)
            half = len(x) // 2
            sigma = 0.25 * torch.rand(len(x), 1, 1, 1, generator=noise)
            sigma[:half] *= 0.2  # the other half keeps clean targets sharp
            noisy = z + (sigma * torch.randn(z.shape, generator=noise) * z.detach().float().std()).to(z.dtype)
            y = vae.decoder(vae.post_quant_conv(noisy))
            again = encode_mean(vae, y[half:])
        y, z, again, noisy = y.float(), z.float(), again.float(), noisy.float()
        clean, target = y[:half], x[:half]
        l1 = (clean - target).abs().mean()
        edge = sum((clean.diff(dim=d) - target.diff(dim=d)).abs().mean() for d in (2, 3))
        pooled = F.mse_loss(F.avg_pool2d(clean, 8), F.avg_pool2d(target, 8))
        trip = F.mse_loss(again, noisy[half:].detach()) / noisy[half:].detach().var()
        unit = z.mean((0, 2, 3)).pow(2).mean() + (z.std((0, 2, 3)) - 1).pow(2).mean()
        return {
            "loss": l1 + 0.5 * edge + 2 * pooled + 0.5 * trip + 0.02 * unit,
            "l1": l1,
            "edge": edge,
            "pooled": pooled,
            "trip": trip.detach().sqrt(),
            "unit": unit,
        }

    average = train(
        "autoencoder", vae, loss_of, steps=steps, lr=3e-4, workdir=workdir, warmup=200, ema=0.998, stop_after=stop_after
    )
    vae.load_state_dict(average, strict=False)
    return vae.eval()


@torch.no_grad()
def whiten(vae: nn.Module, pool: Pool, n: int = 512) -> None:
    """Fold a rotation and scale into the 1x1 convolutions, so that scaled latents have zero mean and unit covariance.

    The log-variance becomes a constant -20: `encode(...).sample()` is then deterministic to rounding.
    """
    pictures = pool.pictures[:n]
    z = torch.cat([encode_mean(vae, to_tensor(pictures[i : i + 16])) for i in range(0, len(pictures), 16)])
    flat = z.permute(0, 2, 3, 1).reshape(-1, 4).double()
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
    forward = (vectors / values.sqrt()).T / SCALING_FACTOR  # latents = forward (z - mean)
    backward = torch.linalg.inv(forward)
    q, p = vae.quant_conv, vae.post_quant_conv
    weight, bias = q.weight[:4, :, 0, 0].double(), q.bias[:4].double()
    q.weight.zero_(), q.bias.fill_(-20.0)
    q.weight[:4] = (forward @ weight).float()[..., None, None]
    q.bias[:4] = (forward @ (bias - mean)).float()
    weight, bias = p.weight[:, :, 0, 0].double(), p.bias.double()
    p.weight.copy_((weight @ backward).float()[..., None, None])
    p.bias.copy_((bias + weight @ mean).float())
