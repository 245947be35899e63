"""From pictures to verdicts: climb a ladder of inversion steps, undo edits, check the content that is bound.

Diffusers pipelines and ComfyUI models come in as an `Inverter`; nothing here knows of either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..errors import WatermarkError
from .content import Embedding, content_p_value, perceptual_hash
from .edits import cells_inside, without_flats
from .keys import WatermarkKey
from .mark import Payload, Reading, read
from .search import Inverter, Search, run
from .statistics import levelled

LADDER = (0, 1, 5, 10, 25)
# Where inversion asks the denoiser, as a share of the noise schedule. Told t = 0 it says nothing of the noise that a
# picture still carries; on the canvas signs agree best when it is told .05 to .1 at first (one step: .785 of signs at
# .05, .740 at 0, .631 at .96, the end of the step). 5 steps so find .793, diffusers' DDIMInverseScheduler .721.
FIRST = 0.05
_LAST = 0.961  # where DDIM's first step of 25 stands; the signs hardly depend on it
_POWER = 1.5
CONTENT = 3e-3  # of pictures that show something unrelated, this many are taken for the one that was signed
AS_GIVEN = "as given"


def inversion_times(steps: int) -> list[float]:
    """steps + 1 shares of the noise schedule, from 0 (the picture) towards the noise, closer together at first.

    Inverters ask the denoiser at each of them, but at `FIRST` or later.
    """
    return [_LAST * (i / steps) ** _POWER for i in range(steps + 1)]


@dataclass(frozen=True)
class DetectionResult:
    """What one picture says.

    Args:
        verdict: "valid" (mark present, payload authenticated, and the content is what was signed where it is bound),
            "content differs" (an authentic mark in a picture that shows something else: a transplant), "unverified"
            (mark present, but the payload did not decode, or its MAC is wrong, or the keyring has no MAC key: treat the
            payload as a claim) or "absent".
        p_value, log10_p: the chance that a picture made without the keys looks so marked; all keys, nonces, rungs of
            the ladder and edits undone are accounted for.
        payload: None if absent or not decoded.
        bit_confidence: share of the payload field's weight that agrees with the decoded payload, about .5 without a
            mark.
        key_id, key_name: None if absent.
        model_evaluations: of the denoiser, over all rungs and edits.
        content_p_value: the chance that a picture of unrelated content fits the bound one so well; None where no
            content is bound or the payload was not decoded.
        transform: the edit that was undone, "as given" without one.
        evidence: float32 in the latent's shape (C, h, w), positive where the mark agrees; None where nothing was
            decoded.
    """

    verdict: str
    p_value: float
    log10_p: float
    payload: Payload | None
    bit_confidence: float
    key_id: int | None
    key_name: str | None
    model_evaluations: int
    content_p_value: float | None = None
    transform: str = AS_GIVEN
    evidence: np.ndarray | None = field(default=None, repr=False, compare=False)


@dataclass
class _Case:
    """One picture while it is looked at; `found` holds (log10 p corrected for its share, reading, noise, pixels)."""

    pixels: Tensor
    filled: tuple[Tensor, Tensor] | None  # with areas of one colour filled, and where it is valid; None without any
    found: list[tuple[float, Reading, Tensor, Tensor, str]] = field(default_factory=list)
    evaluations: int = 0

    @property
    def log10_p(self) -> float:
        return min([0.0, *(log10_p for log10_p, *_ in self.found)])

    def settled(self, log10_rate: float) -> bool:
        """Present, and no further rung could say more: authenticated, or decoded where there is no MAC key."""
        last = self.found[-1][1]
        decoded = last.payload is not None and last.mac_ok is not False
        return decoded and self.log10_p <= log10_rate


def detect_in(
    pixels: Sequence[Tensor],
    inverter: Inverter,
    keys: Iterable[WatermarkKey],
    *,
    false_positive_rate: float = 1e-6,
    ladder: Sequence[int] = LADDER,
    scope: str = "",
    batch_size: int = 16,
    mask: Tensor | None = None,
    search: Search | None = None,
    size: tuple[int, int] | None = None,
    embedding: Embedding = perceptual_hash,
) -> list[DetectionResult]:
    """Look for the mark of any key in pictures, taking more inversion steps only where fewer do not settle it.

    A picture leaves the ladder once the mark is present and its payload authenticated, or without a MAC key decoded.
    With R rungs each is tested at rate / R, so p = min(1, R min_r p_r) holds wherever the climb stops (Bonferroni:
    rungs see the same picture and are not independent). A picture with areas of one colour (bars, erased boxes) has
    two climbs, as it is and with these filled and not counted. With a search half of the rate is the ladders' and half
    is shared by all edits that the search can undo.

    Args:
        pixels: (3, H, W) in 0..1 each, of any sizes; videos (F, 3, H, W).
        inverter: of the model that drew them.
        keys: at least one.
        false_positive_rate: at which a mark counts as present, above 0, below 1.
        ladder: inversion steps of each rung, rising.
        scope, batch_size: as at signing; pictures at a time.
        mask: (H, W) of the pictures, 1 (in uint8: 255) where an inpainting drew; None is everywhere.
        search: edits to undo where the ladder finds nothing; None for none.
        size: (height, width) that was signed, in pixels, where pictures may have been resized since.
        embedding: as when the content was bound.

    Raises:
        WatermarkError: no keys, or an argument out of range.
    """
    keys, ladder = list(keys), tuple(ladder)
    if not keys:
        raise WatermarkError("the keyring is empty; expected at least one key: make one with `semiperm keys new`")
    if not 0 < false_positive_rate < 1:
        raise WatermarkError(
            f"the false positive rate is {false_positive_rate}; expected above 0, below 1, such as 1e-6"
        )
    if not ladder or ladder[0] < 0 or any(b <= a for a, b in zip(ladder, ladder[1:], strict=False)):
        raise WatermarkError(f"the ladder is {ladder}; expected rising numbers of inversion steps, such as {LADDER}")
    if search is not None and (mask is not None or any(picture.ndim != 3 for picture in pixels)):
        raise WatermarkError("a search for edits was asked for with a mask or in videos; it works on whole pictures")
    cases = [_case(whole_cells(_sized(picture, size), inverter.multiple)) for picture in pixels]
    by_size: dict[tuple[int, ...], list[_Case]] = {}
    for case in cases:
        by_size.setdefault(tuple(case.pixels.shape), []).append(case)
    log10_rate, share = math.log10(false_positive_rate), len(ladder) * (1 if search is None else 2)
    for group in by_size.values():
        for start in range(0, len(group), batch_size):
            part = group[start : start + batch_size]
            _climb(part, inverter, keys, log10_rate, ladder, share, scope, mask)
            if part := [case for case in part if case.filled and not case.settled(log10_rate)]:
                _climb(part, inverter, keys, log10_rate, ladder, share, scope, mask, filled=True)
    if search is not None:
        for case, picture in zip(cases, pixels, strict=True):
            if case.log10_p > log10_rate:
                found = run(picture, inverter, keys, search, false_positive_rate, size=size, scope=scope)
                readings, tries, evaluations = found
                case.evaluations += evaluations
                for reading, noise, undone, what in readings:
                    case.found.append((reading.log10_p + math.log10(2 * tries), reading, noise, undone, what))
    return [
        _result(case, log10_rate, {(key.key_id, key.name): key for key in keys}, scope, embedding) for case in cases
    ]


def latent_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """(H, W) of a picture -> (height, width) bool of its latent, as inpainting pipelines do: the nearest pixel, at .5.

    Cells on the mask's border still agree with the mark in part, so they count.

    Raises:
        WatermarkError: not two-dimensional, or no cell is inside.
    """
    if mask.ndim != 2:
        raise WatermarkError(f"the mask has shape {tuple(mask.shape)}; expected (H, W) of the picture")
    inside = (mask >= (0.5 if mask.is_floating_point() or mask.dtype == torch.bool else 128)).float()[None, None]
    inside = torch.nn.functional.interpolate(inside, size=(height, width))[0, 0] > 0
    if not inside.any():
        raise WatermarkError(f"the mask holds no cell of the {height} x {width} latent; expected a larger area")
    return inside


def _sized(picture: Tensor, size: tuple[int, int] | None) -> Tensor:
    if size is None or picture.shape[-2:] == tuple(size):
        return picture
    frames = picture if picture.ndim == 4 else picture[None]
    resized = torch.nn.functional.interpolate(frames, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    return resized if picture.ndim == 4 else resized[0]


def whole_cells(picture: Tensor, multiple: int) -> Tensor:
    """Leave out what is beyond the last whole latent cell, on the right and below.

    Raises:
        WatermarkError: nothing is left.
    """
    height, width = (side - side % multiple for side in picture.shape[-2:])
    if not height or not width:
        raise WatermarkError(
            f"a picture of {picture.shape[-2]} x {picture.shape[-1]} pixels is smaller than what the model encodes;"
            f" expected at least {multiple} x {multiple}"
        )
    return picture[..., :height, :width]


def _case(pixels: Tensor) -> _Case:
    if pixels.ndim != 3:
        return _Case(pixels, None)
    filled, valid = without_flats(pixels)
    return _Case(pixels, None if valid.all() else (filled, valid))


def _climb(cases: list[_Case], inverter, keys, log10_rate, ladder, share: int, scope, mask, *, filled=False) -> None:
    filled_in = [case.filled for case in cases if case.filled is not None] if filled else []
    pictures = [picture for picture, _ in filled_in] or [case.pixels for case in cases]
    latents, pending = inverter.encode(pictures), list(range(len(cases)))
    cells = latents.shape[-2:]
    inside = torch.ones(len(cases), *cells, dtype=torch.bool, device=latents.device)
    if filled:
        inside &= torch.stack([cells_inside(valid, cells) for _, valid in filled_in]).to(inside.device)
    if mask is not None:
        inside &= latent_mask(whole_cells(mask, inverter.multiple), *cells).to(inside.device)
    for steps in ladder:
        noise = levelled(inverter.invert(latents[pending], steps), inside[pending])
        for row, i, reading in zip(noise, pending, read(noise, keys, scope=scope), strict=True):
            case = cases[i]
            tries = share * (2 if case.filled else 1)  # told by the picture alone, whichever climb this is
            said = "plain areas filled" if filled else AS_GIVEN
            case.found.append((reading.log10_p + math.log10(tries), reading, row, pictures[i], said))
            case.evaluations += steps
        pending = [i for i in pending if not cases[i].settled(log10_rate)]
        if not pending:
            return


def _result(case: _Case, log10_rate: float, keys: dict, scope: str, embedding) -> DetectionResult:
    _, best, noise, pixels, transform = min(case.found, key=lambda found: (not found[1].mac_ok, found[0]))
    log10_p, counted = case.log10_p, case.evaluations
    if log10_p > log10_rate:
        return DetectionResult("absent", 10**log10_p, log10_p, None, best.bit_confidence, None, None, counted)
    verdict, content = "valid" if best.mac_ok else "unverified", None
    if best.bound:
        content = content_p_value(noise, best, embedding(pixels[None])[0], keys[best.key_id, best.key_name], scope)
        if verdict == "valid" and content > CONTENT:
            verdict = "content differs"
    said = best.payload, best.bit_confidence, best.key_id, best.key_name, counted, content, transform, best.evidence
    return DetectionResult(verdict, 10**log10_p, log10_p, *said)
