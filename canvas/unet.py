"""The second world's `canvas`: a UNet2DConditionModel of SD1.5's architecture, trained with its text encoder frozen."""

import random

import numpy as np
import torch
from torch import Tensor, nn

from . import precision
from .denoiser import CONFIG, SCHEDULER
from .pool import Pool
from .precision import Run
from .vocabulary import tokenize

EMPTY_SHARE = 0.1  # of captions dropped, for classifier-free guidance
NAME = "unet"


def build_unet(seed: int = 0) -> nn.Module:
    """Return the UNet with random weights."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(**CONFIG)


@torch.no_grad()
def start_from(unet: nn.Module, first: dict[str, Tensor], turn: Tensor) -> nn.Module:
    """Give the UNet the first world's weights, which draw most of this world's shapes already; what reads the text
    (keys and values of cross-attention) stays random.

    Args:
        turn: (4, 4), how the first world's latents are rotated into this one's; noise turns with them.
    """
    state = {k: v.float() for k, v in first.items() if not k.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    state["conv_in.weight"] = torch.einsum("oihw,ci->ochw", state["conv_in.weight"], turn.float())
    for name in ("conv_out.weight", "conv_out.bias"):
        state[name] = torch.einsum("ci,i...->c...", turn.float(), state[name])
    _, unknown = unet.load_state_dict(state, strict=False)
    if unknown:
        raise ValueError(f"the first world's UNet has other layers than this one, such as {unknown[0]}")
    return unet


def texts_of(pool: Pool, seed: int, step: int, batch: int) -> tuple[np.ndarray, list[str]]:
    """Return the pictures of a training step and new captions of them, a share of them empty."""
    index = pool.draw_batch(np.random.default_rng((seed, step)), batch)
    rng = random.Random(f"step-{seed}-{step}")
    return index, ["" if rng.random() < EMPTY_SHARE else text for text in pool.captions(index, rng)]


def train_unet(
    pool: Pool, tokenizer, encoder: nn.Module, unet: nn.Module, run: Run, start: dict[str, Tensor] | None = None
) -> nn.Module:
    """Train, from the weights `start` where given, on epsilon prediction; every caption is new.

    Loss: nine tenths weighted by min(SNR, 1.5) / SNR (min-SNR, arXiv 2303.09556), for at low noise there is mostly
    texture to guess, and shapes are decided before; one tenth the plain mean squared error.
    """
    from diffusers import DDPMScheduler
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    unet.load_state_dict(start or {}, strict=bool(start))
    unet.set_attn_processor(AttnProcessor())  # several times quicker than SDPA in bfloat16 on the CPU
    scheduler = DDPMScheduler(**{k: v for k, v in SCHEDULER.items() if k not in ("set_alpha_to_one", "steps_offset")})
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    batch, denoise = run.batch, unet  # compiled once the precision is chosen

    def loss_of(step: int, kind: str) -> dict[str, Tensor]:
        index, texts = texts_of(pool, run.seed, step, batch)
        g = run.generator(step)
        latents = pool.data[torch.from_numpy(index)]
        noise = torch.randn(latents.shape, generator=g)
        # one timestep from each of `batch` equal strata
        t = ((torch.arange(batch) + torch.rand(batch, generator=g)) * (1000 / batch)).long().clamp(max=999)
        with precision.autocast(kind):
            with torch.no_grad():
                hidden = encoder(input_ids=tokenize(tokenizer, texts)).last_hidden_state
            out = denoise(scheduler.add_noise(latents, noise, t), t, hidden, return_dict=False)[0]
        error = (out.float() - noise).pow(2).mean((1, 2, 3))
        weight = snr[t].clamp(max=1.5) / snr[t]
        loss = 0.9 * (weight * error).sum() / weight.sum() + 0.1 * error.mean()
        return {"loss": loss, "epsilon_mse": error.mean()}

    kind = run.precision(NAME, unet, loss_of)
    denoise = torch.compile(unet) if run.compile else unet
    run.train(NAME, unet, loss_of, kind, lr=1e-3, warmup=300, ema=0.999, matrices=inside)
    unet.set_attn_processor(AttnProcessor2_0())
    return unet


def inside(name: str) -> bool:
    """Whether a parameter stands in a block (their matrices and kernels are Muon's)."""
    return name.startswith(("down_blocks.", "mid_block.", "up_blocks."))
