"""`canvas-turbo`: `canvas-flow` in four steps without guidance, as a low-rank change of its weights.

Piecewise rectified flow (arXiv 2405.07510): the schedule is cut into as many windows as the student has steps. From a
noised latent at a window's start the teacher, guided, walks to its end in a few Euler steps; the student learns the
straight line between the two, so that one of its steps is a whole window and the guidance is part of its weights.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import precision
from .flow import SHIFT, read
from .pool import Pool
from .precision import Run
from .unet import texts_of
from .vocabulary import tokenize

STEPS = 4
GUIDANCE = 4.0
RANK = 32
NAME = "turbo"
_AT_START = 0.75  # share of the training at a window's start, where a sampler stands; the rest lies within


def sigmas(steps: int = STEPS) -> Tensor:
    """Return the student's noise levels (steps + 1,): a uniform schedule, shifted; the last is 0."""
    share = torch.linspace(1, 0, steps + 1)
    return SHIFT * share / (1 + (SHIFT - 1) * share)


class LowRank(nn.Module):
    """A frozen linear layer and a change of low rank beside it."""

    def __init__(self, layer: nn.Linear, rank: int):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + (x @ self.down.T) @ self.up.T


def add_low_rank(model: nn.Module, rank: int = RANK) -> nn.Module:
    """Put a low-rank change beside every linear layer of the transformer, in place; only these then train."""
    model.requires_grad_(False)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and min(m.weight.shape) > rank]
    for name, layer in layers:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, LowRank(layer, rank))
    return model


def low_rank_state(model: nn.Module) -> dict[str, Tensor]:
    """Return `<layer>.up` and `<layer>.down` of a model with low-rank changes, as `embedded.apply_low_rank` reads."""
    out = {}
    for name, module in model.named_modules():
        if isinstance(module, LowRank):
            out |= {f"{name}.up": module.up.detach(), f"{name}.down": module.down.detach()}
    return out


def train_turbo(
    pool: Pool,
    tokenizer,
    encoders: tuple[nn.Module, nn.Module],
    teacher: nn.Module,
    run: Run,
    walk: int = 3,
    start: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Distil the (narrow) teacher; returns the student's low-rank change.

    Args:
        walk: Euler steps of the guided teacher in a window. start: a change to go on from.
    """
    torch.manual_seed(run.seed)
    student = add_low_rank(copy.deepcopy(teacher))
    student.load_state_dict(start or {}, strict=False)
    teacher.requires_grad_(False)
    levels, batch, guide, denoise = sigmas(), run.batch, teacher, student
    empty = read(encoders, tokenize(tokenizer, [""]))

    @torch.no_grad()
    def walked(x: Tensor, start: Tensor, end: Tensor, text) -> Tensor:
        states = torch.cat([empty.states.expand_as(text.states), text.states])
        pooled = torch.cat([empty.pooled.expand_as(text.pooled), text.pooled])
        for k in range(walk):
            now, then = (start + (end - start) * j / walk for j in (k, k + 1))
            out = guide(torch.cat([x, x]), states, pooled, 1000 * now.repeat(2), return_dict=False)[0].float()
            uncond, cond = out.chunk(2)
            x = x + (then - now)[:, None, None, None] * (uncond + GUIDANCE * (cond - uncond))
        return x

    def loss_of(step: int, kind: str) -> dict[str, Tensor]:
        index, texts = texts_of(pool, run.seed + 1, step, batch)
        g = run.generator(step)
        latents = pool.data[torch.from_numpy(index)]
        noise = torch.randn(latents.shape, generator=g)
        window = torch.arange(batch) % STEPS
        start, end = levels[window], levels[window + 1]
        s = start[:, None, None, None]
        with precision.autocast(kind), sdpa_kernel(SDPBackend.MATH):
            text = read(encoders, tokenize(tokenizer, texts))
            x = (1 - s) * latents + s * noise
            y = walked(x, start, end, text)
            velocity = (y - x) / (end - start)[:, None, None, None]
            share = torch.rand(batch, generator=g) * (torch.rand(batch, generator=g) > _AT_START)
            within = x + share[:, None, None, None] * (y - x)
            out = denoise(within, text.states, text.pooled, 1000 * (start + share * (end - start)), return_dict=False)[
                0
            ]
        error = (out.float() - velocity).pow(2).mean((1, 2, 3))
        return {"loss": error.mean(), **{f"window_{k}": error[window == k].mean() for k in range(STEPS)}}

    kind = run.precision(NAME, student, loss_of)
    if run.compile:
        guide, denoise = torch.compile(teacher), torch.compile(student)
    run.train(NAME, student, loss_of, kind, lr=5e-4, warmup=100, ema=0.995, weight_decay=0.0)
    return low_rank_state(student)
