"""Negative token merging (NegToMe, arXiv 2412.01339): push attention outputs away from an image, or from one another.

    out_n = x_n + alpha (x_n - r_j*),  j* = argmax_j cos(x_n, r_j),  where cos(x_n, r_j*) > tau, else out_n = x_n

Reference tokens r come from rows that are denoised beside the batch (reference mode), or from the other images of the
batch (diversity mode). We differ from the released code (1jsingh/negtome), unless compat="official" asks for it: it
takes the argmax over the wrong axis; it pushes the unconditional rows as well, so that guidance, which amplifies the
difference of the two, cancels most of the effect; and its diversity mode pushes from image 0 alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.token_match_merge import best_match, token_match_merge
from .errors import TokenMergingError

__all__ = [
    "MergeRows",
    "NegativeTokenMergingConfig",
    "TokenMergingError",
    "diversity_rows",
    "merge_tokens",
    "reference_rows",
    "token_mask",
]

_CHOICES = {
    "unit": ("percent", "sigma"),
    "rows": ("conditional", "all"),
    "matching": ("reference", "output"),
    "diversity": ("symmetric", "first"),
    "compat": (None, "official"),
}


@dataclass(frozen=True, eq=False)
class NegativeTokenMergingConfig:
    """What to push away from, how far, and when.

    Args:
        reference: image(s) to push away from: PIL images or float tensors (3, H, W) in 0..1, one or several; any
            size. None is diversity mode: the images of a batch push each other away.
        mask: where in the reference to look, for each image or one for all: PIL image or float tensor (H, W), white
            is what to avoid. None is everywhere.
        merging_alpha: how far, 0 is exactly the untouched model, below 0 pulls towards the reference. In the paper
            0.9; strong prompts want 2 to 3.
        merging_threshold: least cosine, -1 to 1, at which a token is pushed; -1 pushes every token.
        start, end: window of the noise schedule: from 0 (pure noise) to 1 (image) for unit="percent", from the higher
            to the lower noise level for unit="sigma". The default is the paper's.
        rows: "conditional" (guidance then amplifies the push) or "all" rows of the batch, as released.
        reference_prompt: words for what the reference shows, with which its row is denoised, so that the features
            that belong to these words stand out. None takes each image's own prompt.
        blocks: only attention layers whose path starts with one of these; None is the paper's choice: ("up_blocks",) of
            a UNet, all of a transformer. ("",) is all.
        cross_attention: push the outputs of cross-attention, too (UNets).
        max_downscale: layers at a resolution coarser than latent / max_downscale are left alone.
        noise_reference: bring the reference to each step's noise level; False feeds it clean, as released.
        seed: of the reference's noise, which is the same at every step.
        matching: "reference" finds for each output token the best reference token; "output" is the released code's
            axis: for each reference position the best output token, whose index then picks from the reference.
        diversity: "symmetric" pushes each image from its best matches in all others, "first" only from image 0.
        compat: "official" sets matching, diversity, rows, cross_attention and noise_reference as released.

    Raises:
        TokenMergingError: a value outside its range, an image or mask of the wrong shape, or a mask without reference.
    """

    reference: object = None
    mask: object = None
    merging_alpha: float = 0.9
    merging_threshold: float = 0.65
    start: float = 0.0
    end: float = 0.2
    unit: str = "percent"
    rows: str = "conditional"
    reference_prompt: str | None = None
    blocks: Sequence[str] | None = None
    cross_attention: bool = False
    max_downscale: int = 4
    noise_reference: bool = True
    seed: int = 0
    matching: str = "reference"
    diversity: str = "symmetric"
    compat: str | None = None

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise TokenMergingError(f"{name}={getattr(self, name)!r}; expected one of {choices}")
        if self.compat == "official":
            released = {"matching": "output", "diversity": "first", "rows": "all"}
            self._set(**released, cross_attention=True, noise_reference=False)
        if not math.isfinite(self.merging_alpha):
            raise TokenMergingError(f"merging_alpha={self.merging_alpha}; expected a finite number, 0 to do nothing")
        if not -1.0 <= self.merging_threshold <= 1.0:
            raise TokenMergingError(f"merging_threshold={self.merging_threshold}; expected a cosine from -1 to 1")
        if self.max_downscale < 1:
            raise TokenMergingError(f"max_downscale={self.max_downscale}; expected 1 (full resolution only) or more")
        if self.unit == "percent" and not 0.0 <= self.start < self.end <= 1.0:
            raise TokenMergingError(f"window [{self.start}, {self.end}]; expected 0 <= start < end <= 1")
        if self.unit == "sigma" and not self.start > self.end >= 0.0:
            raise TokenMergingError(f"window [{self.start}, {self.end}] in sigma; expected start > end >= 0")
        images, masks = as_images(self.reference), as_masks(self.mask)
        if masks and not images:
            raise TokenMergingError("a mask without a reference; it says where in the reference to look")
        if masks and len(masks) not in (1, len(images)):
            raise TokenMergingError(f"{len(masks)} masks for {len(images)} references; expected one each, or one")
        if self.reference_prompt is not None and not images:
            raise TokenMergingError("a reference_prompt without a reference; diversity mode has no reference row")
        if isinstance(self.blocks, str):
            raise TokenMergingError(
                f"blocks={self.blocks!r}; expected a sequence of path prefixes, e.g. ('up_blocks',)"
            )
        self._set(reference=images or None, mask=masks * (len(images) if len(masks) == 1 else 1) or None)
        self._set(blocks=None if self.blocks is None else tuple(self.blocks))

    def _set(self, **values) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def mode(self) -> str:
        """ "reference" or "diversity"."""
        return "diversity" if self.reference is None else "reference"

    def inside(self, percent: float | Tensor, sigma: float | Tensor) -> bool | Tensor:
        """Whether a step lies in the window; percent from 0 (noise) to 1 (image). Numbers, or scalar tensors."""
        if self.unit == "sigma":
            return (self.end < sigma) & (sigma <= self.start)
        return (self.start <= percent) & (percent <= self.end)

    def takes(self, path: str) -> bool:
        """Whether `blocks` lets this layer in."""
        return self.blocks is None or path.startswith(self.blocks)


def as_images(value) -> tuple[Tensor, ...]:
    """PIL images or tensors (3, H, W), (R, 3, H, W), one or a sequence -> float tensors (3, H, W) in 0..1."""
    return tuple(_as_tensor(item, "RGB", 3) for item in _items(value, 4))


def as_masks(value) -> tuple[Tensor, ...]:
    """PIL images or tensors (H, W), (R, H, W), one or a sequence -> float tensors (H, W) in 0..1."""
    masks = tuple(_as_tensor(item, "L", None) for item in _items(value, 3))
    if any(not bool((mask > 0.5).any()) for mask in masks):
        raise TokenMergingError("a mask is black everywhere, so nothing would be avoided; white marks what to avoid")
    return masks


def _items(value, batched: int) -> list:
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        return [item for part in value for item in _items(part, batched)]
    return list(value) if isinstance(value, Tensor) and value.ndim == batched else [value]


def _as_tensor(item, mode: str, channels: int | None) -> Tensor:
    if hasattr(item, "convert"):  # PIL, which this package's mathematics does not import
        item = item.convert(mode)
        pixels = torch.frombuffer(bytearray(item.tobytes()), dtype=torch.uint8).float() / 255
        pixels = pixels.view(item.height, item.width, -1).movedim(-1, 0)
        return pixels if channels else pixels[0]
    expected = f"(3, H, W){', or a batch (R, 3, H, W),' if channels else ''}" if channels else "(H, W)"
    if not isinstance(item, Tensor) or item.ndim != (3 if channels else 2) or (channels and item.shape[0] != channels):
        found = tuple(item.shape) if hasattr(item, "shape") else type(item).__name__
        raise TokenMergingError(f"{found} is no image; expected a PIL image or a float tensor {expected} in 0..1")
    if not item.is_floating_point() or not 0.0 <= float(item.min()) <= float(item.max()) <= 1.0:
        low, high = float(item.min()), float(item.max())
        raise TokenMergingError(
            f"an image of {item.dtype} with values from {low:g} to {high:g}; expected floats from 0 to 1"
        )
    return item.detach().float()


@dataclass(frozen=True, eq=False)
class MergeRows:
    """Which rows of a batch are pushed, and from which rows.

    Args:
        gate: (B,) float, 1 for pushed rows, 0 for those that keep every bit.
        pairs: (B, R) bool, which reference rows each row may match.
    """

    gate: Tensor
    pairs: Tensor


def reference_rows(groups: Sequence[int], count: int, device=None) -> MergeRows:
    """Rows for reference mode.

    Args:
        groups: for each of B rows which group of reference rows it matches, -1 for rows that are not pushed.
        count: reference images; the reference rows are ordered by group, then by image.
    """
    group = torch.tensor(groups, device=device)
    owner = torch.arange((max(groups) + 1) * count, device=device) // count
    return MergeRows((group >= 0).float(), group[:, None] == owner)


def diversity_rows(groups: Sequence[int], diversity: str = "symmetric", device=None) -> MergeRows:
    """Rows for diversity mode: each row is pushed from the others of its group, or ("first") from the group's first.

    Args:
        groups: for each of B rows its group, -1 for rows that are not pushed.

    Raises:
        TokenMergingError: a group of one, which has nothing to be pushed from.
    """
    alone = [g for g in set(groups) if g >= 0 and groups.count(g) < 2]
    if alone:
        raise TokenMergingError(
            "diversity mode needs at least two images in a batch, got one; raise num_images_per_prompt (ComfyUI: the"
            " latent's batch_size), or give a reference image"
        )
    group = torch.tensor(groups, device=device)
    same = (group[:, None] == group) & (group >= 0)
    if diversity == "symmetric":
        return MergeRows((group >= 0).float(), same & ~torch.eye(len(groups), dtype=torch.bool, device=device))
    first = torch.tensor([g >= 0 and groups.index(g) == b for b, g in enumerate(groups)], device=device)
    return MergeRows(((group >= 0) & ~first).float(), same & first)


def merge_tokens(
    x: Tensor, reference: Tensor, rows: MergeRows, config: NegativeTokenMergingConfig, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Push the tokens of a layer's output away from their best matches.

    Args:
        x: (B, N, C). reference: (R, M, C), of the same layer; may be x itself.
        rows: gate (B,) and pairs (B, R).
        mask: (R, M) bool, which reference tokens count; None is all.

    Returns:
        (B, N, C), rows with gate 0 bit for bit as they were; and which tokens were pushed, (B, N) bool.

    Raises:
        TokenMergingError: matching="output" with M other than N.

    Source: NegToMe, section 3; matching="output" is `negtome()` of the released code at 9011ed4.
    """
    alpha, threshold = config.merging_alpha, config.merging_threshold
    if config.matching == "reference":
        merged, score, _ = token_match_merge(
            x, reference, alpha, threshold, pairs=rows.pairs, reference_mask=mask, gate=rows.gate
        )
        return merged, score > threshold
    batch, tokens, channels = x.shape
    if reference.shape[1] != tokens:
        raise TokenMergingError(
            f"matching='output' needs as many reference tokens as output tokens, got {reference.shape[1]} and {tokens};"
            " use matching='reference'"
        )
    own = rows.pairs.to(torch.uint8).argmax(dim=1)  # the released code has one reference a row
    mine = reference[own]
    row = torch.arange(batch, device=x.device)
    score, index = best_match(mine, x, pairs=row[:, None] == row, gate=rows.gate)
    pushed = score > threshold
    if mask is not None:
        pushed = pushed & mask[own]
    index = (index - row[:, None] * tokens).clamp(min=0)
    taken = mine.gather(1, index[..., None].expand(-1, -1, channels))
    wide = x.float()
    merged = (wide + alpha * (wide - taken.float())).to(x.dtype)
    return torch.where(pushed[..., None], merged, x), pushed


def grid_of(tokens: int, height: int, width: int) -> tuple[int, int, int]:
    """(frames, rows, columns) of a layer of so many tokens; the finest has height x width, and each level halves.

    Raises:
        TokenMergingError: no level has so many tokens.
    """
    rows, columns = height, width
    while rows * columns > tokens and rows * columns > 1:
        rows, columns = math.ceil(rows / 2), math.ceil(columns / 2)
    if tokens % (rows * columns):
        raise TokenMergingError(f"a layer of {tokens} tokens does not fit a latent of {height} x {width}")
    return tokens // (rows * columns), rows, columns


def token_mask(masks: Sequence[Tensor], tokens: int, height: int, width: int) -> Tensor:
    """Masks (H, W) on a layer's grid: (R, tokens) bool, True where any pixel of the token's patch is white."""
    frames, rows, columns = grid_of(tokens, height, width)
    small = [F.adaptive_max_pool2d(mask[None, None], (rows, columns)).flatten() > 0.5 for mask in masks]
    return torch.stack(small).repeat(1, frames)
