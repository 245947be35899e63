"""Where in a picture the mark was found: a map over the picture, and what was found in words below it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..pictures import from_pil
from .config import DetectionResult
from .views import AS_GIVEN

__all__ = ["heat_map", "p_text", "sign_agreement"]

_AGREES, _AGAINST, _PAPER, _INK = (0.05, 0.62, 0.35), (0.85, 0.25, 0.2), (255, 255, 255), (32, 32, 36)
_WINDOW = 5  # latent cells; one cell alone is close to a coin's toss; chosen by eye
_FULL = 0.9  # agreement drawn in full color, of a soft value's mean magnitude


def sign_agreement(evidence: np.ndarray) -> Tensor:
    """Evidence (C, h, w) -> (h, w) in -1..1: how far the signs around each place agree with the mark's; 0 is chance."""
    evidence = torch.from_numpy(np.asarray(evidence, np.float32))
    sums = torch.stack([evidence.sum(0), evidence.abs().sum(0)])[:, None]
    window = min(_WINDOW, *evidence.shape[-2:])
    window -= 1 - window % 2
    smooth = F.avg_pool2d(sums, window, stride=1, padding=window // 2, count_include_pad=False)[:, 0]
    return smooth[0] / smooth[1].clamp(min=1e-6)


def heat_map(picture: Tensor, result: DetectionResult, label: str = "") -> Tensor:
    """One picture (3, H, W) in 0..1 and its result -> (H', W', 3): green where the mark agrees, red where it does not.

    Where an edit was undone the picture is left out: the map lies as the picture did before that edit.
    """
    grey = picture.float().cpu().mean(0, keepdim=True).expand(3, -1, -1)
    shown = 0.25 + 0.5 * grey if result.transform == AS_GIVEN else torch.full_like(grey, 0.5)
    if result.evidence is not None:
        cells = sign_agreement(result.evidence)[None, None]
        size = shown.shape[-2:]
        share = F.interpolate(cells, size=size, mode="bilinear", align_corners=False)[0] / _FULL
        ink = torch.where(share[0] > 0, torch.tensor(_AGREES)[:, None, None], torch.tensor(_AGAINST)[:, None, None])
        weight = 0.7 * share.abs().clamp(max=1)
        shown = shown * (1 - weight) + ink * weight
    return torch.cat([rearrange(shown, "c h w -> h w c"), _caption(_words(result, label), shown.shape[-1])])


def _words(result: DetectionResult, label: str) -> list[str]:
    words = [*filter(None, [label]), result.verdict, f"p = {p_text(result)}"]
    if result.transform != AS_GIVEN:
        words.append(result.transform)
    return words


def p_text(result: DetectionResult) -> str:
    """The p-value in short, below what a float can hold too."""
    return f"{result.p_value:.2g}" if result.log10_p > -99 else f"1e{result.log10_p:.0f}"


def _caption(lines: list[str], width: int) -> Tensor:
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(max(11, min(18, width // 14)))
    height = sum(font.getbbox("Ag")[3] + 3 for _ in lines) + 5
    image = Image.new("RGB", (width, height), _PAPER)
    draw, y = ImageDraw.Draw(image), 2
    for line in lines:
        draw.text((4, y), line, fill=_INK, font=font)
        y += font.getbbox("Ag")[3] + 3
    return rearrange(from_pil(image), "c h w -> h w c")
