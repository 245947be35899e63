"""Content binding: signs of the noise that say what the picture shows, so that a mark cannot move to another picture.

Each element j of the binding field has a random direction r_j in {-1, 1}^D under content secret and nonce, and

    sign(z_j) = keystream_j XOR [r_j . v < 0],   v = embedding of the picture

A detector embeds the picture in hand to v' and counts the elements that agree with it. For unrelated pictures v . v'
is about 0 and every sign is a fair coin, so the tail of that count is an exact p-value; two pictures at an angle t
agree in a share 1 - t / pi (SimHash). The picture depends on the noise and the noise on the picture:
`draw_bound` draws, binds and draws again.

Keystream and directions come from the content secret, which exported detectors do not hold: who can read a mark still
cannot say of a new picture that it is the signed one. In pictures of format 1 (keys.py) they came from the stream
secret; they are read, but never vouch for what a picture shows.

Source: SEAL (arXiv 2503.12172) binds patches to a caption by SimHash; here it is one field of the latent, tested
softly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ..errors import WatermarkError
from .fields import fields_of, first_field, split
from .keys import FORMAT, WatermarkKey
from .mark import Reading, read
from .statistics import level_counts, log_tail, quantise

Embedding = Callable[[Tensor], Tensor]  # pictures (B, 3, H, W) in 0..1 -> (B, D), about 0 on average over pictures
# (pictures' noise (B, ...), which of them to draw) -> (those pictures, in what form the caller likes; and their pixels
# (b, 3, H, W) in 0..1)
Draw = Callable[[Tensor, list[int]], tuple[Sequence, Tensor]]
ROUNDS = 4  # redraws at most of a picture whose content is bound; each is a sampling run; chosen by hand,
ENOUGH = 0.88  # the share of content bits that it keeps (cosine .93) before it is left as it is; chosen by hand,
LEAST = 0.7  # and what it must keep: below it a detector would call the picture someone else's
_GRID = 8  # cosines along each side
_SIDE = 32  # pixels of the picture that they are taken of: the fastest cosine has four and a half for each half wave


def perceptual_hash(pixels: Tensor) -> Tensor:
    """The built-in embedding: what colour is where, by the 64 slowest cosines along both sides.

    Args:
        pixels: (B, 3, H, W) in 0..1.

    Returns:
        (B, 189) float32: 63 cosine coefficients (without the mean) of brightness and of two colour differences, times
        the root of their frequency: the coarsest would decide alone otherwise.
    """
    grid = torch.nn.functional.interpolate(pixels.float(), size=(_SIDE, _SIDE), mode="area")
    red, green, blue = grid.unbind(1)
    planes = torch.stack([(red + green + blue) / 3, red - green, (red + green) / 2 - blue], 1)
    k, x = torch.arange(_GRID)[:, None], torch.arange(_SIDE)[None]
    basis = torch.cos(math.pi / _SIDE * (x + 0.5) * k).to(planes)
    frequency = (k**2 + k.T**2).to(planes) ** 0.25
    return rearrange(torch.einsum("kh,bchw,lw->bckl", basis, planes, basis) * frequency, "b c k l -> b c (k l)")[
        ..., 1:
    ].flatten(1)


# Keystream and directions, by format. A new layout needs no new names: its nonces are longer.
_STREAMS = {1: ("binding", "content"), 2: ("binding 2", "content 2"), 3: ("binding 2", "content 2")}


def content_bits(
    key: WatermarkKey, nonce: int, features: Tensor, count: int, scope: str = "", *, form: int = FORMAT
) -> np.ndarray:
    """(D,) features -> (count,) uint8: on which side of each keyed direction they lie, in a format of pictures.

    Raises:
        WatermarkError: features of another shape, or NaN or Inf inside, or a detector's copy of the key.
    """
    values = features.detach().to("cpu", torch.float32).numpy()
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise WatermarkError(
            f"the embedding of a picture has shape {values.shape} or holds NaN or Inf; expected one vector of finite"
            " numbers for each picture"
        )
    directions = key.stream(_STREAMS[form][1], values.shape, nonce, count * values.size, scope=scope)
    sides = (1 - 2 * rearrange(directions, "(bit d) -> bit d", bit=count).astype(np.float32)) @ values
    return (sides < 0).astype(np.uint8)


def content_agreement(features: Tensor, others: Tensor) -> Tensor:
    """(B, D), (B, D) -> (B,): the share 1 - angle / pi of content bits that pairs of pictures have in common."""
    cosine = torch.nn.functional.cosine_similarity(features.float(), others.float(), dim=-1).clamp(-1, 1)
    return 1 - torch.arccos(cosine) / math.pi


def _positions(key: WatermarkKey, shape: tuple[int, ...], scope: str, form: int) -> np.ndarray:
    fields = fields_of(shape, form)
    return split(fields, first_field(fields, key, scope).positions)[1]


def _signs(key: WatermarkKey, reading: Reading, features: Tensor, shape: tuple[int, ...], scope: str):
    """(n,) positions of the binding and (n,) uint8 sign bits there that say what the features are of."""
    form = reading.format or FORMAT
    positions = _positions(key, shape, scope, form)
    bits = key.stream(_STREAMS[form][0], shape, reading.nonce, len(positions), scope=scope)
    return positions, bits ^ content_bits(key, reading.nonce, features, len(positions), scope, form=form)


def bind(latents: Tensor, features: Tensor, key: WatermarkKey, scope: str = "") -> Tensor:
    """Write what pictures show into the signs of their noise; magnitudes and all other signs stay.

    Args:
        latents: (B, ...) from `KeyedMark.sample(..., bound=True)`, in the shape they were signed in.
        features: (B, D) embeddings of the pictures.
        key, scope: as signed.

    Returns:
        As latents.

    Raises:
        WatermarkError: other latents, or a number of features that is not theirs.
    """
    if len(features) != len(latents):
        raise WatermarkError(f"{len(features)} embeddings were given for {len(latents)} latents; expected one each")
    bound = latents.clone()
    for row, values, reading in zip(bound, features, read(latents, [key], scope=scope), strict=True):
        if not (reading.bound and reading.mac_ok):
            raise WatermarkError(
                "content was to be bound in latents that do not say so; make them with"
                " KeyedMark(key).sample(shape, bound=True)"
            )
        positions, bits = _signs(key, reading, values, tuple(row.shape), scope)
        flat, at = row.view(-1), torch.from_numpy(positions).to(row.device)
        flat[at] = flat[at].abs() * torch.from_numpy(1 - 2 * bits.astype(np.int8)).to(row)
    return bound


@dataclass(frozen=True, eq=False)
class BoundPicture:
    """One picture whose mark knows what it shows.

    Args:
        picture: as `draw` returned it.
        noise: (C, ...) that it was drawn from.
        content_agreement: share of the bound content bits that the picture has itself.
        draws: how often it was drawn.
    """

    picture: Any
    noise: Tensor
    content_agreement: float
    draws: int


def draw_bound(
    draw: Draw,
    noise: Tensor,
    key: WatermarkKey,
    *,
    advice: str,
    rounds: int = ROUNDS,
    embedding: Embedding = perceptual_hash,
    scope: str = "",
    holds: Callable[[Tensor], Sequence[bool]] | None = None,
) -> list[BoundPicture]:
    """Draw pictures, write what they show into their noise and draw them again, until they stay; the best of each.

    The first draw says what a picture will show, the second starts from noise that says so. Rewriting an eighth of the
    signs hardly changes a picture; where it does, the new content is written again.

    Args:
        draw: see `Draw`.
        noise: (B, ...) from `KeyedMark.sample(..., bound=True)`; it stays as it is.
        key, scope: as signed.
        advice: what the caller can do where a picture never stays.
        rounds: redraws at most, at least 1.
        embedding: pictures (B, 3, H, W) in 0..1 -> (B, D); detection needs the same one.
        holds: f(pictures (b, 3, H, W)) -> whether a detector finds each valid; where it does not, it is drawn again.
            None asks nobody. Pictures whose content did not stay are not shown to it.

    Raises:
        WatermarkError: a picture that shows something else in every round, or that the detector never finds valid.
    """
    noise, pending = noise.clone(), list(range(len(noise)))
    best: list[BoundPicture | None] = [None] * len(noise)
    bound: list[Tensor | None] = [None] * len(noise)  # the features that each picture's noise says
    held = [False] * len(noise)
    for redrawn in range(rounds + 1):
        pictures, pixels = draw(noise, pending)
        said = embedding(pixels)
        stays = [
            float(content_agreement(bound[i], shown)) if redrawn else 0.0
            for i, shown in zip(pending, said, strict=True)
        ]
        fit = [row for row, stayed in enumerate(stays) if redrawn and stayed >= LEAST]
        found = dict(zip(fit, [True] * len(fit) if holds is None or not fit else holds(pixels[fit]), strict=True))
        for row, (i, picture, shown, stayed) in enumerate(zip(pending, pictures, said, stays, strict=True)):
            fine = found.get(row, False)
            if best[i] is None or (fine, stayed) > (held[i], best[i].content_agreement):
                best[i], held[i] = BoundPicture(picture, noise[i].clone(), stayed, redrawn + 1), fine
            best[i], bound[i] = replace(best[i], draws=redrawn + 1), shown
        pending = [i for i in pending if best[i].content_agreement < ENOUGH or not held[i]]
        if not pending or redrawn == rounds:
            break
        noise[pending] = bind(noise[pending], torch.stack([bound[i] for i in pending]), key, scope)
    if lost := [i for i, one in enumerate(best) if one.content_agreement < LEAST]:
        raise WatermarkError(
            f"the content of {len(lost)} of {len(best)} pictures (the first: number {lost[0] + 1}) changed whenever it"
            f" was bound, at best {max(best[i].content_agreement for i in lost):.0%} of its bits stayed; expected"
            f" {LEAST:.0%}: {advice}"
        )
    if lost := [i for i in range(len(best)) if not held[i]]:
        raise WatermarkError(
            f"the content of {len(lost)} of {len(best)} pictures (the first: number {lost[0] + 1}) stayed, but the"
            f" detector did not find their mark valid in {best[lost[0]].draws} draws; expected that it does, with some"
            f" margin: see whether it finds this model's pictures without bound content, {advice}"
        )
    return best


def content_p_value(
    noise: Tensor, reading: Reading, features: Tensor, key: WatermarkKey, scope: str = "", *, votes: bool = False
) -> float:
    """The chance that a picture of unrelated content fits the binding in `noise` as well as this one.

    Args:
        noise: one image's noise estimate, in the shape it was signed in.
        reading: of that noise.
        features: (D,) embedding of the picture in hand.
        key, scope: of the reading.
        votes: the noise is votes (reader.py, channels.py).

    Raises:
        WatermarkError: a detector's copy of the key.
    """
    positions, bits = _signs(key, reading, features, tuple(noise.shape), scope)
    values = quantise(noise[None], votes=votes)[0][positions].astype(np.int64)
    return math.exp(log_tail(level_counts(values), int(values @ (1 - 2 * bits.astype(np.int64)))))
