"""`canvas-flow`: an SD3Transformer2DModel trained by rectified flow on 16-channel latents, text encoders frozen.

It trains and is stored with a narrow context embedder and is widened when loaded: Stable Diffusion 3 pads its text
states with zeros to 4096, and the columns that read zeros need not be learnt.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import precision
from .pool import Pool
from .precision import Run
from .unet import texts_of
from .vocabulary import WIDTH, tokenize

FIRST_TOKENS = 40  # nearly all captions are shorter; see train_flow
FIRST_SHARE = 0.75
SHIFT = 3.0  # of the schedule, as Stable Diffusion 3 has it
JOINT_DIM = 4096
# Of the loss of channels that `autoencoders.grow` added: they hold texture, as loud as the shapes once latents are
# whitened, and there are three of them for each that holds shape and colour.
DETAIL_WEIGHT = 0.3
DEPTH = 4  # hidden size 64 x depth: ComfyUI reads the depth off the width
NAME = "flow"


def build_transformer(joint_dim: int = JOINT_DIM, seed: int = 0, depth: int = DEPTH) -> nn.Module:
    """Return the transformer with random weights; `joint_dim` is the width of the text states it reads."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(seed)
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=depth,
        attention_head_dim=64,
        num_attention_heads=depth,
        joint_attention_dim=joint_dim,
        caption_projection_dim=64 * depth,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
    )


def widen(state: dict[str, Tensor]) -> None:
    """Make narrow weights those of the same transformer for text states padded with zeros to 4096, in place."""
    weight = state["context_embedder.weight"]
    state["context_embedder.weight"] = torch.nn.functional.pad(weight, (0, JOINT_DIM - weight.shape[1]))


@dataclass(frozen=True)
class Reading:
    """What a pair of text encoders makes of captions: states (B, N, 2 x width) and pooled (B, 2 x width)."""

    states: Tensor
    pooled: Tensor


@torch.no_grad()
def read(encoders: tuple[nn.Module, nn.Module], ids: Tensor) -> Reading:
    """Encode token ids (B, N) as Stable Diffusion 3 does: last but one hidden state, and the projected pooled one."""
    outs = [encoder(input_ids=ids, output_hidden_states=True) for encoder in encoders]
    return Reading(
        torch.cat([out.hidden_states[-2] for out in outs], -1), torch.cat([out.text_embeds for out in outs], -1)
    )


def cut(ids: Tensor, short: bool, end: int) -> Tensor:
    """Cut token ids to FIRST_TOKENS where `short`; a longer caption ends there."""
    if not short:
        return ids
    ids = ids[:, :FIRST_TOKENS].clone()
    ids[:, -1] = end
    return ids


def noise_levels(batch: int, g: torch.Generator) -> Tensor:
    """Return sigmas (B,): logit-normal, one from each of `batch` equal strata, shifted to noise."""
    share = (torch.arange(batch) + torch.rand(batch, generator=g)) / batch
    u = torch.special.ndtri(share.clamp(1e-4, 1 - 1e-4)).sigmoid()
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def train_flow(
    pool: Pool,
    tokenizer,
    encoders: tuple[nn.Module, nn.Module],
    run: Run,
    depth: int = DEPTH,
    start: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Train, from the weights `start` where given, on the velocity noise - latents; every caption is new, a tenth of
    them empty. Returns the narrow model.

    Three quarters of the steps see the first 40 tokens alone, at half the cost; the rest see all 77, for the padding
    is read as well.
    """
    model = build_transformer(2 * WIDTH, run.seed, depth)
    if start:
        model.load_state_dict(start)
    else:
        scale_to_unit(model, read(encoders, tokenize(tokenizer, texts_of(pool, run.seed, 0, 32)[1])))
    denoise = model  # compiled once the precision is chosen
    weight = torch.tensor([1.0] * 4 + [DETAIL_WEIGHT] * 12)
    weight /= weight.mean()

    def loss_of(step: int, kind: str) -> dict[str, Tensor]:
        index, texts = texts_of(pool, run.seed, step, run.batch)
        g = run.generator(step)
        latents = pool.data[torch.from_numpy(index)]
        noise = torch.randn(latents.shape, generator=g)
        sigma = noise_levels(run.batch, g)
        s = sigma[:, None, None, None]
        with precision.autocast(kind), sdpa_kernel(SDPBackend.MATH):
            short = step < FIRST_SHARE * run.steps
            text = read(encoders, cut(tokenize(tokenizer, texts), short, tokenizer.eos_token_id))
            noisy = (1 - s) * latents + s * noise
            out = denoise(noisy, text.states, text.pooled, 1000 * sigma, return_dict=False)[0]
        error = (out.float() - (noise - latents)).pow(2).mean((2, 3))
        loss = (error * weight).mean()
        error = error.mean(1)
        return {
            "loss": loss,
            "mse": error.mean(),
            "noisy": error[sigma > 0.75].mean(),
            "clear": error[sigma < 0.5].mean(),
        }

    kind = run.precision(NAME, model, loss_of)
    denoise = torch.compile(model, dynamic=False) if run.compile else model
    return run.train(NAME, model, loss_of, kind, lr=1e-3, warmup=300, ema=0.999, matrices=in_blocks)


def in_blocks(name: str) -> bool:
    """Whether a parameter stands in a transformer block (their matrices are Muon's), its modulation excepted."""
    return name.startswith("transformer_blocks.") and ".norm1" not in name


@torch.no_grad()
def scale_to_unit(model: nn.Module, text: Reading) -> None:
    """Scale the first layers that read the text, so that what they give starts with unit variance."""
    embedder, first = model.context_embedder, model.time_text_embed.text_embedder.linear_1
    for layer, states in ((embedder, text.states), (first, text.pooled)):
        layer.weight /= layer(states).std()
