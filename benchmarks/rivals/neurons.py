"""Memorisation neurons: rows of cross-attention's value projections that a text drives out of their usual range, at 0.

    a_i = mean over tokens of |(W_v e)_i|,   z_i = (a_i - mean_i) / std_i over usual captions
    a neuron is taken out where z_i > theta for any phrasing; theta falls from 5 until memory is gone

Memory is seen in one evaluation: of a memorised text, noises of all seeds are denoised towards one picture, so that
their changes e(x, c) - x point the same way. Theta falls by .25 until their mean cosine is no higher than usual
captions' (mean + one std) and some neuron is out; then layers that are not needed for that are put back, one by one.

Source: NeMo (arXiv 2406.02366). We differ: cosine where the paper takes SSIM of the changes; general captions of the
package for the usual ranges; whole layers are put back, where the paper goes on to single neurons. A concept that is
not memorised has no memory to lose: then the first theta that finds a neuron decides, so that this is no eraser of
concepts, and stands beside them for memorised pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ...methods.errors import MembraneError
from ...methods.membranes.captions import PRESERVE
from ...methods.membranes.phrases import fold, names
from ...pipelines.family import denoiser_of
from ...pipelines.latents import latent_shape
from ...pipelines.prediction import Predictor
from ...pipelines.rows import row_layout
from ...pipelines.text import encode_text
from ...pipelines.weights import weights_of
from ..erasure.methods import Told
from .shared import cross_attention, fitted, in_place
from .training import rows_of

_HIGHEST, _LOWEST, _STRIDE = 5.0, 1.0, 0.25  # of theta; below 1 usual captions are out of range, too


@contextmanager
def erase(pipe, told: Told, seeds: int = 8, usual: int = 64) -> Iterator[dict]:
    """Take a concept's memorisation neurons out.

    Args:
        seeds: noises that memory is measured with, >= 2. usual: captions for the usual range, >= 2.
    """
    options = {"seeds": seeds, "usual": usual}
    masks = fitted(told, "neurons", options, lambda: _fit(pipe, told, **options))
    with in_place(pipe, _masked(pipe, masks)) as extra:
        yield extra


def _layers(pipe) -> dict[str, str]:
    """Module key -> name of the weight, of the value projections."""
    modules = cross_attention(pipe, "attn2.to_v", "the memorisation mask")
    denoiser, attribute = denoiser_of(pipe)
    paths = {id(module): path for path, module in denoiser.named_modules()}
    return {key: f"{attribute}.{paths[id(module)]}.weight" for key, module in modules.items()}


def _masked(pipe, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    layers = _layers(pipe)
    weights = weights_of(pipe, cross_attention(pipe, "attn2.to_v", "the memorisation mask"))
    return {
        layers[key]: weights[key].masked_fill(mask[:, None].to(weights[key].device), 0.0)
        for key, mask in masks.items()
        if mask.any()
    }


def outliers(concept: Tensor, usual: Tensor) -> Tensor:
    """(n,): the highest z of each neuron, from mean absolute activations (P, n) and (U, n)."""
    std = usual.std(dim=0).clamp_min(1e-12)
    return ((concept - usual.mean(dim=0)) / std).amax(dim=0)


@torch.no_grad()
def _fit(pipe, told: Told, seeds: int, usual: int) -> dict[str, Tensor]:
    if seeds < 2 or usual < 2:
        raise MembraneError(f"seeds={seeds}, usual={usual}; expected two or more of each")
    weights = weights_of(pipe, cross_attention(pipe, "attn2.to_v", "the memorisation mask"))
    own = [fold(phrase) for phrase in told.phrases]
    captions = [caption for caption in PRESERVE if caption and not names(caption, own)][:usual]
    asked, plain = (encode_text(pipe, texts).hidden for texts in (told.phrases, captions))
    scores = {
        key: outliers(*((text @ w.to(text).T).abs().mean(1).float() for text in (asked, plain)))
        for key, w in weights.items()
    }
    memory = _Memory(pipe, seeds)
    normal = torch.stack([memory(caption) for caption in captions[:16]])
    bound = float(normal.mean() + normal.std())

    def gone(masks: Mapping[str, Tensor]) -> bool:
        with in_place(pipe, _masked(pipe, masks)):
            return all(float(memory(phrase)) <= bound for phrase in told.phrases)

    theta, masks = _HIGHEST, {}
    while theta >= _LOWEST:
        masks = {key: z > theta for key, z in scores.items()}
        if any(mask.any() for mask in masks.values()) and gone(masks):
            break
        theta -= _STRIDE
    if not any(mask.any() for mask in masks.values()):
        raise MembraneError(
            f"no value neuron answers {told.phrases[0]!r} out of its usual range (z > {_LOWEST}); nothing can be masked"
        )
    if theta < _LOWEST:
        return masks  # memory is not gone, and all that is out of range is masked
    for key in sorted(masks, key=lambda k: float(scores[k].max())):
        fewer = {k: mask for k, mask in masks.items() if k != key}
        if any(mask.any() for mask in fewer.values()) and gone(fewer):
            masks = fewer
    return masks


class _Memory:
    """How alike the changes are that one text makes to different noises, in one evaluation at pure noise."""

    def __init__(self, pipe, seeds: int):
        self.pipe, self.predictor = pipe, Predictor(pipe)
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.randn(seeds, *latent_shape(pipe), generator=generator)
        self.now = self.predictor.times(50, self.noise)[:1].expand(seeds)

    def __call__(self, text: str) -> Tensor:
        """Mean cosine between pairs of changes."""
        hidden, pooled = rows_of(encode_text(self.pipe, [text]), len(self.noise))
        noise = self.noise.to(hidden.device)
        with row_layout("positive"):
            change = self.predictor(noise, self.now.to(hidden.device), hidden, pooled) - noise
        flat = torch.nn.functional.normalize(change.flatten(1), dim=1)
        count = len(flat)
        return ((flat @ flat.T).sum() - count) / (count * (count - 1))
