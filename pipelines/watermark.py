"""The keyed mark on diffusers pipelines of the SD1.x, SD2, SDXL, SD3, Flux and Wan families: sign noise, read pictures.

latents = sign_noise(pipe, key)
picture = pipe("an eared mascot in striped style on sky", latents=latents).images[0]
result = detect(picture, pipe, keyring)[0]  # result.verdict, result.p_value, result.payload
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..methods.watermark import KeyedMark, Payload, Reading, read
from ..methods.watermark_keys import WatermarkError, WatermarkKey
from .text import denoiser_of, device_of
from .watermark_inversion import check_scheduler, encode_images, family_of, invert, latent_shape, pixels_of

__all__ = ["LADDER", "DetectionResult", "WatermarkMixin", "detect", "sign_noise"]

LADDER = (0, 1, 5, 10, 25)


@dataclass(frozen=True)
class DetectionResult:
    """What one picture says.

    verdict: "valid" (mark present, payload authenticated), "unverified" (mark present, but the payload did not decode,
    or its MAC is wrong, or the keyring has no MAC key: treat the payload as a claim) or "absent".
    p_value, log10_p: the chance that a picture made without the keys looks so marked, all keys, nonces and rungs of
    the ladder accounted for. payload: None if absent or not decoded. key_id, key_name: None if absent. bit_confidence:
    share of the payload field's weight that agrees with the decoded payload, about .5 without a mark.
    model_evaluations: of the denoiser, over all rungs climbed.
    """

    verdict: str
    p_value: float
    log10_p: float
    payload: Payload | None
    bit_confidence: float
    key_id: int | None
    key_name: str | None
    model_evaluations: int


def sign_noise(
    pipe,
    key: WatermarkKey,
    batch: int = 1,
    height: int | None = None,
    width: int | None = None,
    payload: Payload | Sequence[Payload] | None = None,
    generator: torch.Generator | None = None,
    *,
    frames: int | None = None,
    scope: str = "",
) -> Tensor:
    """Draw the marked initial noise of `batch` pictures, ready for `pipe(..., latents=latents)`.

    Each picture's noise is exactly N(0, I). Give the call of the pipeline the same height and width.

    Args:
        pipe: SD1.x, SD2, SDXL, SD3, Flux or Wan pipeline with a deterministic sampler; nothing in it changes.
        key: signs; it needs its MAC key.
        batch: pictures, at least 1.
        height, width: of the pictures, in pixels; None is the model's own size.
        payload: one for all, one each, or None: a fresh unique id each, made now.
        generator: makes the noise reproducible; leave it out otherwise.
        frames: of a video, in pictures; Wan alone.
        scope: separates marks of one key further; `detect` needs the same.

    Returns:
        (B, C, H, W), (B, N, C) packed for Flux, (B, C, F, H, W) for Wan; on the pipeline's device, in its dtype.

    Raises:
        WatermarkError: a sampler that adds noise, a size that the model cannot draw or that holds no payload.
    """
    family = family_of(pipe)
    check_scheduler(pipe)
    if batch < 1:
        raise WatermarkError(f"noise for {batch} pictures was asked for; expected at least 1")
    if frames is not None and family != "wan":
        raise WatermarkError(f"{type(pipe).__name__} draws pictures, but {frames} frames were asked for; leave it out")
    shape = batch, *latent_shape(pipe, height, width, frames)
    latents = KeyedMark(key, scope).sample(shape, payload, generator)
    latents = latents.to(device_of(pipe), torch.float32 if family == "wan" else denoiser_of(pipe)[0].dtype)
    return pipe._pack_latents(latents, *shape) if family == "flux" else latents


def detect(
    images,
    pipe,
    keyring: Iterable[WatermarkKey],
    *,
    alpha: float = 1e-6,
    ladder: Sequence[int] = LADDER,
    scope: str = "",
    batch_size: int = 16,
) -> list[DetectionResult]:
    """Look for the mark of any key in pictures, taking more inversion steps only where fewer do not settle it.

    A picture leaves the ladder once the mark is present and its payload authenticated, or without a MAC key decoded.
    With R rungs each is tested at alpha / R, so p = min(1, R min_r p_r) holds wherever the climb stops (Bonferroni:
    rungs see the same picture and are not independent).

    Args:
        images: PIL images, tensors (3, H, W) in 0..1 or arrays (H, W, 3), of any sizes, or one of them; for Wan,
            videos: sequences of frames. Sizes must be those that were signed.
        pipe: a pipeline of the model that drew them; which scheduler it has does not matter.
        keyring: the keys to try, a `Keyring` or any others.
        alpha: the false positive rate at which a mark counts as present, above 0, below 1.
        ladder: inversion steps of each rung, rising; (1,) costs a single evaluation of the denoiser.
        scope: as in `sign_noise`.
        batch_size: pictures at a time.

    Returns:
        One result a picture, in order.

    Raises:
        WatermarkError: no keys, no pictures, other things than pictures, or an argument out of range.
    """
    keys, ladder = list(keyring), tuple(ladder)
    if not keys:
        raise WatermarkError("the keyring is empty; expected at least one key: make one with `semiperm keys new`")
    if not 0 < alpha < 1:
        raise WatermarkError(f"alpha is {alpha}; expected a rate above 0 and below 1, such as 1e-6")
    if not ladder or ladder[0] < 0 or any(b <= a for a, b in zip(ladder, ladder[1:], strict=False)):
        raise WatermarkError(f"the ladder is {ladder}; expected rising numbers of inversion steps, such as {LADDER}")
    pixels = pixels_of(pipe, images)
    by_size: dict[tuple[int, ...], list[int]] = {}
    for i, picture in enumerate(pixels):
        by_size.setdefault(tuple(picture.shape), []).append(i)
    results: dict[int, DetectionResult] = {}
    for indices in by_size.values():
        for start in range(0, len(indices), batch_size):
            part = indices[start : start + batch_size]
            latents = encode_images(pipe, [pixels[i] for i in part], batch_size)
            found = _climb(pipe, latents, keys, math.log10(alpha), ladder, scope)
            results |= dict(zip(part, found, strict=True))
    return [results[i] for i in range(len(pixels))]


def _climb(pipe, latents: Tensor, keys, log10_alpha: float, ladder, scope: str) -> list[DetectionResult]:
    seen: list[list[Reading]] = [[] for _ in latents]
    evaluations, pending = [0] * len(latents), list(range(len(latents)))
    for steps in ladder:
        noise = without_offset(invert(pipe, latents[pending], steps))
        for i, reading in zip(pending, read(noise, keys, scope=scope), strict=True):
            seen[i].append(reading)
            evaluations[i] += steps
        pending = [i for i in pending if not _settled(seen[i], log10_alpha - math.log10(len(ladder)))]
        if not pending:
            break
    return [_result(readings, n, log10_alpha, len(ladder)) for readings, n in zip(seen, evaluations, strict=True)]


def without_offset(noise: Tensor) -> Tensor:
    """Take each channel's mean over a picture (or frame) away: the picture's own color, which no noise accounts for.

    On the canvas it raises the share of equal signs from .617 to .641 at 0 steps and from .783 to .790 at 1. A fixed
    map, chosen without the keys: p-values stay exact.
    """
    return noise - noise.mean((-2, -1), keepdim=True)


def _settled(readings: list[Reading], log10_alpha: float) -> bool:
    last = readings[-1]
    decoded = last.payload is not None and last.mac_ok is not False  # reported only where no chance explains it
    return decoded and min(r.log10_p for r in readings) <= log10_alpha


def _result(readings: list[Reading], evaluations: int, log10_alpha: float, rungs: int) -> DetectionResult:
    best = min(readings, key=lambda r: (not r.mac_ok, r.log10_p))
    log10_p = min(0.0, min(r.log10_p for r in readings) + math.log10(rungs))
    if log10_p > log10_alpha:
        return DetectionResult("absent", 10**log10_p, log10_p, None, best.bit_confidence, None, None, evaluations)
    verdict = "valid" if best.mac_ok else "unverified"
    said = best.payload, best.bit_confidence, best.key_id, best.key_name
    return DetectionResult(verdict, 10**log10_p, log10_p, *said, evaluations)


class WatermarkMixin:
    """The mark as methods of a pipeline: put it before any diffusers pipeline class of a supported family.

    class Marked(WatermarkMixin, StableDiffusionPipeline): ...
    """

    def sign_noise(self, key: WatermarkKey, batch: int = 1, *args, **kwargs) -> Tensor:
        """`semiperm.sign_noise(self, ...)`."""
        return sign_noise(self, key, batch, *args, **kwargs)

    def detect_watermark(self, images, keyring: Iterable[WatermarkKey], **kwargs) -> list[DetectionResult]:
        """`semiperm.detect(images, self, ...)`."""
        return detect(images, self, keyring, **kwargs)
