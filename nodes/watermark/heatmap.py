"""ComfyUI's pictures of where a mark was found, and the table of what was found."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ...methods.watermark.config import DetectionResult
from ...methods.watermark.heatmap import heat_map, p_text, sign_agreement
from ...methods.watermark.views import AS_GIVEN

__all__ = ["detection_text", "heat_map", "heat_maps", "p_text", "sign_agreement"]


def heat_maps(images: Tensor, results: list[DetectionResult], labels: str = "") -> Tensor:
    """ComfyUI's IMAGE (B, H, W, C) -> (B, H', W, 3), padded with white below where captions have more lines."""
    pictures = rearrange(images[..., :3], "b h w c -> b c h w").clamp(0, 1)
    names = [*labels.splitlines(), *[""] * len(results)]
    maps = [heat_map(*one) for one in zip(pictures, results, names, strict=False)]
    height = max(len(one) for one in maps)
    return torch.stack([F.pad(one, (0, 0, 0, 0, 0, height - len(one)), value=1.0) for one in maps])


def detection_text(results: list[DetectionResult], labels: str = "") -> str:
    """A table, one line a picture; a key is named where a mark was found, its unique id where it was decoded."""
    names = labels.splitlines() if labels else []
    names = [*names, *(str(i) for i in range(len(names), len(results)))][: len(results)]
    rows = [("picture", "verdict", "p", "key", "unique id", "evaluations", "undone")]
    for name, result in zip(names, results, strict=True):
        key = "" if result.key_name is None else f"{result.key_name} ({result.key_id})"
        unique = "" if result.payload is None else f"{result.payload.unique_id:x}"
        undone = "" if result.transform == AS_GIVEN else result.transform
        rows.append((name, result.verdict, p_text(result), key, unique, str(result.model_evaluations), undone))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
