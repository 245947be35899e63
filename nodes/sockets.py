"""The sockets that several of our nodes share, and what they carry."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from comfy_api.latest import io
from torch import Tensor

from ..methods.watermark.config import DetectionResult

KeyringIO = io.Custom("SEMIPERM_KEYRING")
DetectionIO = io.Custom("SEMIPERM_DETECTION")
MembranesIO = io.Custom("SEMIPERM_MEMBRANES")
GuidanceDetectorsIO = io.Custom("SEMIPERM_GUIDANCE_DETECTORS")


@dataclass(frozen=True)
class Detection:
    """What a DETECTION socket carries: the results, and the digest of the pictures that they are of."""

    results: list[DetectionResult]
    digest: str


def aliases(*words: str) -> dict:
    """What else people search a node by, for its `io.Schema`; nothing where this ComfyUI does not know of it."""
    known = "search_aliases" in getattr(io.Schema, "__dataclass_fields__", {})
    return {"search_aliases": list(words)} if known else {}


def digest(images: Tensor) -> str:
    """Of a batch of pictures, to tell it from others."""
    return hashlib.sha256(repr(tuple(images.shape)).encode() + images.cpu().contiguous().numpy().tobytes()).hexdigest()
