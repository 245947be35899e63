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
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from ...kernels.token_match_merge import best_match, token_match_merge
from ..errors import TokenMergingError
from .config import NegativeTokenMergingConfig

__all__ = ["MergeRows", "diversity_rows", "grid_of", "merge_tokens", "reference_rows", "token_mask"]


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
    strength, threshold = config.strength, config.threshold
    if config.matching == "reference":
        merged, score, _ = token_match_merge(
            x, reference, strength, threshold, pairs=rows.pairs, reference_mask=mask, gate=rows.gate
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
    taken = mine.gather(1, repeat(index, "b n -> b n c", c=channels))
    wide = x.float()
    merged = (wide + strength * (wide - taken.float())).to(x.dtype)
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
    return repeat(torch.stack(small), "r n -> r (frames n)", frames=frames)
