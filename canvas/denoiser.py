"""The canvas denoiser: a UNet2DConditionModel of SD1.5's architecture, trained together with its text encoder."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from .autoencoder import SCALING_FACTOR, encode_mean, to_tensor
from .dataset import Pool, caption_of
from .loop import save_tensors, train
from .text import MAX_LENGTH, tokenize

CONFIG = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (64, 128, 96),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 128,
    "attention_head_dim": 2,  # SD1.5's name for the number of heads
    "norm_num_groups": 32,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
PHRASINGS = 6  # captions kept per picture; epochs take turns


def build_unet(seed: int = 0) -> nn.Module:
    """Return the UNet with random weights."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(**CONFIG)


@dataclass(frozen=True)
class EncodedPool:
    """Scaled latents (P, 4, 16, 16), caption ids (P, PHRASINGS, 32) and the epoch order (see Pool.order)."""

    latents: Tensor
    ids: Tensor
    order: np.ndarray


@torch.no_grad()
def encode_pool(
    vae: nn.Module, tokenizer, pool: Callable[[], Pool], seed: int, cache: Path | None = None, stamp: str = ""
) -> EncodedPool:
    """Encode every picture once and tokenise its phrasings.

    Args:
        pool: makes the pool; not called where `cache` (safetensors) already holds these latents.
        stamp: names the pool; a cache made of another pool, or by another autoencoder, is made again.
    """
    from rich.progress import track

    digest = hashlib.sha256(stamp.encode())
    for _, weight in sorted(vae.state_dict().items()):
        digest.update(weight.float().numpy().tobytes())
    stamp = digest.hexdigest()
    if cache and Path(cache).exists():
        with safe_open(str(cache), "pt") as f:
            if (f.metadata() or {}).get("stamp") == stamp:
                return EncodedPool(f.get_tensor("latents"), f.get_tensor("ids").long(), f.get_tensor("order").numpy())
    pool = pool()
    latents = torch.empty(len(pool.scenes), 4, 16, 16)
    for i in track(range(0, len(latents), 32), "encoding"):
        with torch.autocast("cpu", torch.bfloat16):
            z = encode_mean(vae, to_tensor(pool.pictures[i : i + 32]))
        latents[i : i + 32] = z.float() * SCALING_FACTOR
    texts = [caption_of(seed, i, s, epoch) for i, s in enumerate(pool.scenes) for epoch in range(PHRASINGS)]
    ids = torch.cat([tokenize(tokenizer, texts[i : i + 10_000]) for i in range(0, len(texts), 10_000)])
    ids = ids.view(len(latents), PHRASINGS, MAX_LENGTH)
    if cache:
        kept = {"latents": latents, "ids": ids.int(), "order": torch.from_numpy(pool.order)}
        save_tensors(kept, Path(cache), {"stamp": stamp})
    return EncodedPool(latents, ids, pool.order)


def train_denoiser(
    data: EncodedPool,
    tokenizer,
    unet: nn.Module,
    text_encoder: nn.Module,
    workdir: Path,
    steps: int = 16_000,
    seed: int = 0,
    batch: int = 48,
    compile: bool = True,
    stop_after: int | None = None,
) -> None:
    """Train UNet and text encoder, in place, on epsilon prediction; a tenth of the captions is dropped.

    Loss: nine tenths weighted by min(SNR, 1.5) / SNR (min-SNR, arXiv 2303.09556), for at low noise there is mostly
    texture to guess, and shapes are decided before; one tenth the plain mean squared error.
    """
    from diffusers import DDPMScheduler
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    unet.set_attn_processor(AttnProcessor())  # several times quicker than SDPA in bfloat16 on the CPU
    both = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    scheduler = DDPMScheduler(**{k: v for k, v in SCHEDULER.items() if k not in ("set_alpha_to_one", "steps_offset")})
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    empty = tokenize(tokenizer, [""])[0]
    denoise = torch.compile(unet) if compile else unet

    def loss_of(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((seed, step))
        index = torch.from_numpy(rng.choice(data.order, batch))
        phrasing = torch.from_numpy(rng.integers(0, PHRASINGS, batch))
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        latents, ids = data.latents[index], data.ids[index, phrasing].clone()
        ids[torch.rand(batch, generator=g) < 0.1] = empty
        noise = torch.randn(latents.shape, generator=g)
        # one timestep from each of `batch` equal strata
        t = ((torch.arange(batch) + torch.rand(batch, generator=g)) * (1000 / batch)).long().clamp(max=999)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = text_encoder(ids).last_hidden_state
            out = denoise(scheduler.add_noise(latents, noise, t), t, hidden, return_dict=False)[0]
        error = (out.float() - noise).pow(2).mean((1, 2, 3))
        weight = snr[t].clamp(max=1.5) / snr[t]
        loss = 0.9 * (weight * error).sum() / weight.sum() + 0.1 * error.mean()
        return {"loss": loss, "epsilon_mse": error.mean()}

    average = train(
        "denoiser", both, loss_of, steps=steps, lr=1e-3, workdir=workdir, warmup=300, ema=0.999, stop_after=stop_after
    )
    both.load_state_dict(average, strict=False)
    unet.set_attn_processor(AttnProcessor2_0())
    both.eval()
