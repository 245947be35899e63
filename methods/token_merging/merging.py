"""Negative token merging (NegToMe, arXiv 2412.01339): push attention outputs away from an image, or from one another.

    out_n = x_n + strength (x_n - r_j*),  j* = argmax_j cos(x_n, r_j),  if cos(x_n, r_j*) > threshold, else x_n

Reference tokens r come from rows that are denoised beside the batch (reference mode), or from the other images of the
batch (diversity mode). We differ from the released code (1jsingh/negtome), unless compat="official" asks for it: it
takes the argmax over the wrong axis; it pushes the unconditional rows as well, so that guidance, which amplifies the
difference of the two, cancels most of the effect; and its diversity mode pushes from image 0 alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from ...kernels.token_match_merge import best_match, everything_from, token_match_merge
from ..errors import TokenMergingError
from ..pictures import fit_to, to_aspect
from .config import NegativeTokenMergingConfig

__all__ = [
    "MergeRows",
    "diversity_rows",
    "fitted_images",
    "fitted_masks",
    "grid_of",
    "knobs",
    "merge_tokens",
    "reference_rows",
    "token_mask",
]


@dataclass(frozen=True, eq=False)
class MergeRows:
    """Which rows of a batch are pushed, and from which rows; on the host, and on the device, made once for many layers.

    Args:
        gate: (B,) float, 1 for pushed rows, 0 for those that keep every bit.
        pairs: (B, R) bool, which reference rows each row may match.
        seen: the same as the host knows it: for each row the reference rows, () where the gate is 0.
    """

    gate: Tensor
    pairs: Tensor
    seen: tuple[tuple[int, ...], ...]
    _cut: dict[int, MergeRows] = field(default_factory=dict)

    @classmethod
    def of(cls, seen: Sequence[Sequence[int]], references: int, device=None) -> MergeRows:
        """From what the host knows."""
        pairs = torch.tensor([[r in row for r in range(references)] for row in seen], dtype=torch.bool, device=device)
        return cls(pairs.any(1).float(), pairs, tuple(map(tuple, seen)))

    def padded(self, more: int) -> MergeRows:
        """With further rows, which are not pushed."""
        return MergeRows(F.pad(self.gate, (0, more)), F.pad(self.pairs, (0, 0, 0, more)), self.seen + ((),) * more)

    def by_frame(self, frames: int) -> MergeRows:
        """For rows that are cut into frames, (B frames) of them: each frame sees the references' same frame."""
        if frames not in self._cut:
            same = torch.eye(frames, dtype=torch.bool, device=self.pairs.device)
            pairs = rearrange(self.pairs[:, None, :, None] & same[:, None], "b f r g -> (b f) (r g)")
            seen = tuple(tuple(r * frames + f for r in row) for row in self.seen for f in range(frames))
            self._cut[frames] = MergeRows(repeat(self.gate, "b -> (b f)", f=frames), pairs, seen)
        return self._cut[frames]


def reference_rows(groups: Sequence[int], count: int, device=None) -> MergeRows:
    """Rows for reference mode.

    Args:
        groups: for each of B rows which group of reference rows it matches, -1 for rows that are not pushed.
        count: reference images; the reference rows are ordered by group, then by image.
    """
    seen = [range(group * count, (group + 1) * count) if group >= 0 else () for group in groups]
    return MergeRows.of(seen, (max(groups) + 1) * count, device)


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
    seen: list[tuple[int, ...]] = []
    for b, group in enumerate(groups):
        others = [r for r, other in enumerate(groups) if group >= 0 and other == group and r != b]
        if diversity == "first":
            others = [r for r in others[:1] if r < b]
        seen.append(tuple(others))
    return MergeRows.of(seen, len(groups), device)


def merge_tokens(
    x: Tensor,
    reference: Tensor,
    rows: MergeRows,
    config: NegativeTokenMergingConfig,
    mask: Tensor | None = None,
    *,
    strength: Tensor | None = None,
    threshold: Tensor | None = None,
    frames: int = 1,
) -> tuple[Tensor, Tensor]:
    """Push the tokens of a layer's output away from their best matches.

    Args:
        x: (B, N, C). reference: (R, M, C), of the same layer; may be x itself.
        rows: which of B rows look at which of R.
        mask: (R, M) bool, which reference tokens count; None is all.
        strength, threshold: (R,) and (), the config's on x's device (`knobs`), made once; None makes them.
        frames: of a video in which the reference stands still: a token is then matched within its own frame, since
            the reference's other frames show the same; matching="output" does not cut.

    Returns:
        (B, N, C), rows with gate 0 bit for bit as they were; and which tokens were pushed, (B, N) bool.

    Raises:
        TokenMergingError: matching="output" with M other than N.

    Source: NegToMe, section 3; matching="output" is `negtome()` of the released code at 9011ed4.
    """
    if strength is None or threshold is None:
        strength, threshold = knobs(config, reference.shape[0], x.device)
    if config.matching == "reference":
        batch, whole = len(x), strength.expand(len(x), -1)
        if frames > 1 and x.shape[1] == reference.shape[1]:
            x, reference = (rearrange(t, "b (f n) c -> (b f) n c", f=frames) for t in (x, reference))
            mask = None if mask is None else rearrange(mask, "r (f m) -> (r f) m", f=frames)
            whole, rows = repeat(strength, "r -> bf (r f)", bf=len(x), f=frames), rows.by_frame(frames)
        merged, score, index = token_match_merge(
            x, reference, whole, threshold, pairs=rows.pairs, reference_mask=mask, gate=rows.gate, seen=rows.seen
        )
        pushed = score > threshold
        if (
            not torch.compiler.is_compiling() and 0.0 in config.strengths
        ):  # what is like that reference was matched, and stays
            pushed = pushed & (whole.gather(1, index.clamp_min(0) // reference.shape[1]) != 0)
        return merged.view(batch, -1, merged.shape[-1]), pushed.view(batch, -1)
    batch, tokens, channels = x.shape
    if reference.shape[1] != tokens:
        raise TokenMergingError(
            f"matching='output' needs as many reference tokens as output tokens, got {reference.shape[1]} and {tokens};"
            " use matching='reference'"
        )
    own = rows.pairs.to(torch.uint8).argmax(dim=1)  # the released code has one reference a row
    mine = reference.index_select(0, own)
    row = torch.arange(batch, device=x.device)
    alone = tuple((b,) if seen else () for b, seen in enumerate(rows.seen))
    score, index = best_match(mine, x, pairs=row[:, None] == row, gate=rows.gate, seen=alone)
    pushed = score > threshold
    if mask is not None:
        pushed = pushed & mask.index_select(0, own)
    index = (index - row[:, None] * tokens).clamp(min=0)
    taken = mine.gather(1, repeat(index, "b n -> b n c", c=channels))
    wide = x.float()
    merged = (wide + strength.index_select(0, own)[:, None, None] * (wide - taken.float())).to(x.dtype)
    return torch.where(pushed[..., None], merged, x), pushed


def knobs(config: NegativeTokenMergingConfig, rows: int, device=None) -> tuple[Tensor, Tensor]:
    """(strength of each reference row (R,), threshold ()) as tensors, which a compiled graph reads anew at each call.

    Args:
        rows: R, a multiple of the references, ordered by group, then by image.
    """
    each = torch.tensor(config.strengths * (rows // len(config.strengths)), dtype=torch.float32, device=device)
    return each, everything_from(config.threshold, device)


def fitted_images(config: NegativeTokenMergingConfig, height: int, width: int) -> Tensor:
    """The reference images (R, 3, height, width) by the config's `fit`; borders have the image's mean colour."""
    images = config.reference or ()
    return torch.stack([fit_to(image, height, width, config.fit, image.mean((1, 2), keepdim=True)) for image in images])


def fitted_masks(config: NegativeTokenMergingConfig, height: int, width: int) -> list[Tensor]:
    """The masks (H, W) on what `fitted_images` shows, each at its own resolution; none where everything counts.

    Raises:
        TokenMergingError: the part that is shown has nothing white.
    """
    masks = config.mask
    if masks is None and config.fit == "pad":  # the borders are no picture
        masks = tuple(torch.ones(image.shape[1:]) for image in config.reference or ())
    shown = [to_aspect(mask, height, width, config.fit) for mask in masks or ()]
    if any(not bool((mask > 0.5).any()) for mask in shown):
        raise TokenMergingError(
            f"cropped to {width} x {height}, a mask has nothing white, so nothing would be avoided; give image and mask"
            " the picture's shape, or fit='pad', which shows all of the reference"
        )
    return shown


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
    return repeat(torch.stack(small), "r n -> r (frames n)", frames=frames)
