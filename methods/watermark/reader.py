"""A learned reader: how likely each sign of the initial noise is positive, from what inversion makes of a picture.

    votes = f(E(x), I_1(x), I_2(x)),    sigmoid(2 votes) = P(noise > 0)

E(x) is the picture's latent and I_n the noise after n steps of inversion: three evaluations of the denoiser. f is a
small convolutional network that was trained on pictures and edits of one model, and knows nothing of keys. So its votes
are weights like any others (statistics.py): they are fixed before the key's random signs are compared, and p-values
stay exact whatever it says. What it says is worth something for the model it was trained with alone: its file names
that by a fingerprint of the weights.

Source: OSI (arXiv 2602.09494) reads signs in one learned step instead of inverting; here the network corrects what two
steps of inversion find.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import WatermarkError
from ..files import read_safetensors, save_safetensors
from ..membranes.base_model import SAME_BASE_BITS, base_model_distance, base_model_hash

__all__ = ["STEPS", "Reader", "load_reader", "model_fingerprint", "save_reader", "trained_with"]

STEPS = (0, 1, 2)  # of inversion, that the network is shown; more hardly say more (1 step: .29 of the noise's signal
# after regenerate:0.14 on the canvas, 2: .313, 5: .315)
_FORMAT = "semiperm-mark-reader.1"


class _Block(nn.Module):
    """x + W2 silu(W1 norm(depthwise 5x5 (x)))."""

    def __init__(self, width: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.GroupNorm(1, width)
        self.wide = nn.Conv2d(width, 2 * width, 1)
        self.narrow = nn.Conv2d(2 * width, width, 1)
        nn.init.zeros_(self.narrow.weight)
        nn.init.zeros_(self.narrow.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(nn.functional.silu(self.wide(self.norm(self.depthwise(x)))))


class Reader(nn.Module):
    """The network.

    Args:
        channels: of the model's latents.
        width, blocks: of the network; 48 and 3 make some 40,000 weights.
        model: fingerprint of the model that it was trained with, 16 hex digits.
    """

    def __init__(self, channels: int, width: int = 48, blocks: int = 3, model: str = ""):
        super().__init__()
        self.channels, self.width, self.model = channels, width, model
        self.first = nn.Conv2d(len(STEPS) * channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(blocks)))
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        self.gain = nn.Parameter(torch.full((channels, 1, 1), 0.5))  # of the last estimate, as it is
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, estimates: Sequence[Tensor]) -> Tensor:
        """(B, C, h, w) latents and estimates after `STEPS` steps -> (B, C, h, w) votes."""
        shapes = {tuple(one.shape[1:2]) for one in estimates}
        if len(estimates) != len(STEPS) or shapes != {(self.channels,)}:
            raise WatermarkError(
                f"the reader was given {len(estimates)} estimates with {sorted(c for (c,) in shapes)} channels;"
                f" expected {len(STEPS)} with {self.channels}: it belongs to another model"
            )
        given = torch.cat(list(estimates), 1).to(self.gain)
        return self.last(self.blocks(self.first(given))) + self.gain * estimates[-1].to(self.gain)


def save_reader(reader: Reader, path: str | os.PathLike, about: dict | None = None) -> None:
    """Write a reader in fp16, with what it was trained on.

    Args:
        about: more to say of its training, anything JSON can hold.
    """
    shape = {"channels": reader.channels, "width": reader.width, "blocks": len(reader.blocks)}
    said = {"format": _FORMAT, "model": reader.model, "shape": json.dumps(shape), "about": json.dumps(about or {})}
    save_safetensors({name: value.half() for name, value in reader.state_dict().items()}, Path(path), said)


def load_reader(path: str | os.PathLike, model: str | None = None) -> Reader:
    """Read a reader.

    Args:
        model: fingerprint of the model in hand; None takes whatever it was trained with.

    Raises:
        WatermarkError: another kind of file, or a reader of another model.
        SemipermError: no such file, or a damaged one.
    """
    tensors, said = read_safetensors(path)
    if said.get("format") != _FORMAT:
        raise WatermarkError(f"{path} is no reader of marks ({said.get('format')!r}); expected a {_FORMAT}")
    if model is not None and not trained_with(said["model"], model):
        raise WatermarkError(
            f"the reader {path} was trained with model {said['model']}, this one is {model}"
            f" ({base_model_distance(model, said['model'])} of 64 bits differ): train one for it, e.g."
            " `semiperm canvas reader`"
        )
    reader = Reader(**json.loads(said["shape"]), model=said["model"])
    reader.load_state_dict({name: value.float() for name, value in tensors.items()})
    return reader.eval()


def trained_with(known: str, model: str) -> bool:
    """Whether two fingerprints are of one model, in whatever dtype, or of a fine-tune of it."""
    return base_model_distance(known, model) <= SAME_BASE_BITS


def model_fingerprint(denoiser: Mapping[str, Tensor], vae: Mapping[str, Tensor]) -> str:
    """16 hex digits that tell a model: of its denoiser's and its autoencoder's matrices, by diffusers' names."""
    parts = {"denoiser": denoiser, "vae": vae}
    return base_model_hash(
        {
            f"{part} {name}": value
            for part, weights in parts.items()
            for name, value in weights.items()
            if value.is_floating_point() and value.ndim >= 2
        }
    )
