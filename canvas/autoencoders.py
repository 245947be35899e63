"""The second world's two autoencoders: factor 8, 4 channels (as Stable Diffusion 1.5) or 16 (as Stable Diffusion 3).

Both grow from the first world's trunk, which passes colour through the group normalisations that ComfyUI fixes (see
`canvas.autoencoder`). `canvas` keeps its encoder, whitened anew, and trains the decoder alone, so that latents can be
encoded while the decoder still learns; `canvas-flow` gets twelve channels more and trains whole.
"""

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import autoencoder, precision
from .pool import Pool, to_tensor
from .precision import Run

# Stable Diffusion 1.5's and 3's: ComfyUI's latent formats then need no override.
SCALING = {"canvas": autoencoder.SCALING_FACTOR, "canvas-flow": 1.5305}
SHIFT = {"canvas": 0.0, "canvas-flow": 0.0609}
CHANNELS = {"canvas": 4, "canvas-flow": 16}
# at 0.5 the round trip stayed at .15 of the latents, and the mark is read through it
_TRIP = 4.0
_CONFIGS = {
    "canvas": autoencoder.CONFIG,
    "canvas-flow": {
        **autoencoder.CONFIG,
        "latent_channels": 16,
        "scaling_factor": SCALING["canvas-flow"],
        "shift_factor": SHIFT["canvas-flow"],
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}


def build(which: str) -> nn.Module:
    """Return an AutoencoderKL for "canvas" or "canvas-flow" with random weights."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**_CONFIGS[which])


def encode(vae: nn.Module, which: str, x: Tensor) -> Tensor:
    """(B, 3, H, W) in -1..1 -> scaled latents (B, C, H/8, W/8) of about unit covariance; the posterior's mean."""
    z = vae.encoder(x) if vae.quant_conv is None else vae.quant_conv(vae.encoder(x))
    return (z[:, : CHANNELS[which]] - SHIFT[which]) * SCALING[which]


def decode(vae: nn.Module, which: str, z: Tensor) -> Tensor:
    """Scaled latents -> pictures (B, 3, H, W) in -1..1."""
    z = z / SCALING[which] + SHIFT[which]
    return vae.decoder(z if vae.post_quant_conv is None else vae.post_quant_conv(z))


@torch.no_grad()
def grow(trunk: nn.Module, seed: int = 0) -> nn.Module:
    """Return the 16-channel autoencoder that starts as the 4-channel one: four channels carry what it carried."""
    torch.manual_seed(seed)
    vae = build("canvas-flow")
    ends = ("encoder.conv_out", "decoder.conv_in")
    old = {k: v for k, v in trunk.state_dict().items() if not k.startswith((*ends, "quant", "post_quant"))}
    vae.load_state_dict(old, strict=False)
    scaling, shift = SCALING["canvas-flow"], SHIFT["canvas-flow"]
    ratio = SCALING["canvas"] / scaling  # of the old raw latents, so that the scaled ones stay as they were
    mix, out = trunk.quant_conv, trunk.encoder.conv_out
    weight, bias = vae.encoder.conv_out.weight, vae.encoder.conv_out.bias
    weight[:4] = ratio * torch.einsum("oc,cihw->oihw", mix.weight[:4, :, 0, 0], out.weight)
    bias[:4] = ratio * (mix.weight[:4, :, 0, 0] @ out.bias + mix.bias[:4])
    weight[16:], bias[16:] = 0, -20.0  # the posterior hardly varies
    bias[:16] += shift
    post, first = trunk.post_quant_conv, trunk.decoder.conv_in
    taps = torch.einsum("ochw,ci->oihw", first.weight, post.weight[:, :, 0, 0]) / ratio
    vae.decoder.conv_in.weight.zero_()
    vae.decoder.conv_in.weight[:, :4] = taps
    constant = first.bias + first.weight.sum((2, 3)) @ post.bias
    vae.decoder.conv_in.bias.copy_(constant - shift * taps.sum((1, 2, 3)))
    return vae


def train_autoencoder(
    vae: nn.Module,
    which: str,
    pool: Pool,
    run: Run,
    decoder: bool = False,
) -> nn.Module:
    """Train on whole pictures: the whole autoencoder, or the `decoder` alone, whose latents are then final.

    Noise and the round trip are measured in units of the latents' own covariance, as they stand after `whiten`.
    Loss: L1 + L1 of the gradients + MSE of the 8x8 averages + round trip of noisy latents + a pull to unit latents.
    """
    vae.requires_grad_(not decoder)
    vae.decoder.requires_grad_(True)
    if not decoder:  # the log-variance stays constant
        vae.encoder.conv_out.weight.register_hook(_first_half)
        vae.encoder.conv_out.bias.register_hook(_first_half)

    def loss_of(step: int, kind: str) -> dict[str, Tensor]:
        rng = np.random.default_rng((run.seed, step))
        x = to_tensor(pool.data[pool.draw_batch(rng, run.batch)])
        generator = run.generator(step)
        half = len(x) // 2
        with precision.autocast(kind), torch.set_grad_enabled(not decoder):
            z = encode(vae, which, x)
        sigma = 0.15 * torch.rand(len(x), 1, 1, 1, generator=generator)
        sigma[:half] *= 0.2  # the other half keeps clean targets sharp
        root = torch.linalg.cholesky(_covariance(z.detach()))  # of latents as whitening will leave them
        noise = torch.einsum("oc,bchw->bohw", root, sigma * torch.randn(z.shape, generator=generator))
        with precision.autocast(kind):
            noisy = z + noise.to(z.dtype)
            y = decode(vae, which, noisy)
            again = encode(vae, which, y[half:])
        y, z, again, noisy = y.float(), z.float(), again.float(), noisy.float()
        clean, target = y[:half], x[:half]
        l1 = (clean - target).abs().mean()
        edge = sum((clean.diff(dim=d) - target.diff(dim=d)).abs().mean() for d in (2, 3))
        pooled = F.mse_loss(F.avg_pool2d(clean, 8), F.avg_pool2d(target, 8))
        off = rearrange(again - noisy[half:].detach(), "b c h w -> c (b h w)")
        trip = torch.linalg.solve_triangular(root, off, upper=False).pow(2).mean()
        excess = _covariance(z) - torch.eye(z.shape[1])
        unit = z.mean((0, 2, 3)).pow(2).mean() + excess.pow(2).sum() / len(excess)
        losses = {"l1": l1, "edge": edge, "pooled": pooled, "trip": trip.detach().sqrt(), "unit": unit}
        return {"loss": l1 + 0.5 * edge + 2 * pooled + _TRIP * trip + (0 if decoder else 0.02) * unit, **losses}

    name = f"{'decoder' if decoder else 'vae'}-{which}"
    kind = run.precision(name, vae, loss_of)
    return run.train(name, vae, loss_of, kind, lr=3e-4, warmup=60, ema=0.998)


def _covariance(z: Tensor) -> Tensor:
    """(B, C, H, W) -> (C, C), safe to factorise."""
    return torch.cov(rearrange(z.float(), "b c h w -> c (b h w)")) + 1e-4 * torch.eye(z.shape[1])


def _first_half(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient[len(gradient) // 2 :] = 0
    return gradient


@torch.no_grad()
def whiten(vae: nn.Module, which: str, pictures: np.ndarray) -> None:
    """Fold a rotation and scale into the weights, so that scaled latents have zero mean and unit covariance."""
    if which == "canvas":
        autoencoder.whiten(vae, _Pictures(pictures), len(pictures))
        return
    z = torch.cat([encode(vae, which, to_tensor(pictures[i : i + 16])) for i in range(0, len(pictures), 16)])
    flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]).double()
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
    forward = (vectors / values.sqrt()) @ vectors.T  # symmetric: every channel keeps its meaning
    backward = torch.linalg.inv(forward)
    scaling, shift = SCALING[which], SHIFT[which]
    channels = len(forward)
    out, first = vae.encoder.conv_out, vae.decoder.conv_in
    weight, bias = out.weight[:channels].double(), out.bias[:channels].double()
    out.weight[:channels] = torch.einsum("oc,cihw->oihw", forward, weight).float()
    # new raw = forward (old scaled - mean) / scaling + shift
    out.bias[:channels] = ((forward @ (scaling * (bias - shift) - mean)) / scaling + shift).float()
    # old raw = backward (new raw - shift) + mean / scaling + shift; exact but for the zero padding's border
    taps = first.weight.double()
    constant = (mean / scaling + shift - shift * backward.sum(1)).to(taps)
    first.bias += torch.einsum("ochw,c->o", taps, constant).float()
    first.weight.copy_(torch.einsum("ochw,ci->oihw", taps, backward).float())


class _Pictures:
    def __init__(self, pictures: np.ndarray):
        self.pictures = pictures
