"""From pictures to verdicts: climb a ladder of inversion steps, undo edits, check the content that is bound.

Diffusers pipelines and ComfyUI models come in as an `Inverter`; nothing here knows of either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from ..errors import WatermarkError
from .channels import as_read
from .config import SOON, DetectionConfig, DetectionResult
from .content import content_p_value
from .edits import cells_inside, without_flats
from .fields import MINIMUM
from .issued import read_issued
from .keys import FORMAT, WatermarkKey
from .mark import Reading, read
from .reader import STEPS, Reader
from .search import Inverter, Search
from .search import run as search_edits
from .views import AS_GIVEN, LARGEST, large_enough, latent_mask, resized, signed_sizes, views, whole_cells

CONTENT = 3e-3  # of pictures that show something unrelated, this many are taken for the one that was signed


@dataclass(frozen=True, eq=False)
class _Look:
    """One reading of a picture; log10_p is corrected for all looks that share the rate."""

    log10_p: float
    reading: Reading
    noise: Tensor
    pixels: Tensor  # as they were read
    transform: str
    inverted: bool  # by a step at least, or as far as the ladder goes
    votes: bool  # whether `noise` is votes


@dataclass(eq=False)
class _Case:
    """One picture while it is looked at."""

    pixels: Tensor
    filled: tuple[Tensor, Tensor] | None  # with areas of one colour filled, and where it is valid; None without any
    views: int = 1  # of the picture, that share the rate
    transform: str = AS_GIVEN
    looks: list[_Look] = field(default_factory=list)
    evaluations: int = 0

    @property
    def log10_p(self) -> float:
        return min([0.0, *(look.log10_p for look in self.looks)])

    @property
    def best(self) -> _Look:
        """Of the least p-value, among those with an authenticated payload where there are any."""
        return min(self.looks, key=lambda look: (not look.reading.mac_ok, look.log10_p))

    def settled(self, log10_rate: float) -> bool:
        """Present, and no further rung could say more: authenticated, or decoded where there is no MAC key.

        Where content is bound, latents as they are say too little of its few signs (.64 of them are right on the
        canvas, .79 after one step): what was decided by them alone is looked at once more.
        """
        if not self.looks:
            return False
        last = self.looks[-1].reading
        if last.bound and last.mac_ok and not self.looks[-1].inverted:
            return False
        decoded = last.payload is not None and last.mac_ok is not False
        return decoded and self.log10_p <= log10_rate


def detect_in(
    pixels: Sequence[Tensor | tuple[Tensor, ...]],
    inverter: Inverter,
    keys: Iterable[WatermarkKey],
    config: DetectionConfig | None = None,
    *,
    mask: Tensor | None = None,
) -> list[DetectionResult]:
    """Look for the mark of any key in pictures, taking more inversion steps only where fewer do not settle it.

    A picture leaves the ladder once the mark is present and its payload authenticated, or without a MAC key decoded.
    With R rungs, the reader's among them, each is tested at rate / R, so p = min(1, R min_r p_r) holds wherever the
    climb stops (Bonferroni: rungs see the same picture and are not independent). A picture with areas of one colour
    (bars, erased boxes) has two climbs, as it is and with these filled and not counted. What it may have looked like
    when it was signed (views.py) has a climb each, four at most. With a search half of the rate is the ladders' and
    half is shared by all edits that the search can undo.

    Args:
        pixels: (3, H, W) in 0..1 each, of any sizes, or two: as they lie in the file, and turned as its EXIF says;
            videos (F, 3, H, W).
        inverter: of the model that drew them.
        keys: at least one.
        config: how to look.
        mask: (H, W) of the pictures, 1 (in uint8: 255) where an inpainting drew; None is everywhere.

    Raises:
        WatermarkError: no keys, or a search with a mask or in videos.
    """
    config, keys = config or DetectionConfig(), list(keys)
    if not keys:
        raise WatermarkError("the keyring is empty; expected at least one key: make one with `semiperm keys new`")
    files = [one if isinstance(one, tuple) else (one,) for one in pixels]
    if config.search is not None and (mask is not None or any(readings[0].ndim != 3 for readings in files)):
        raise WatermarkError("a search for edits was asked for with a mask or in videos; it works on whole pictures")
    search = cast("Search | None", config.search)  # no bool any more
    detector = _Detector(inverter, keys, config, mask)
    seen = [detector.cases(readings) for readings in files]
    several = max(map(len, seen), default=0)
    # All views up to a few steps before any of them goes higher, which takes ten times as long.
    for rungs in filter(None, (config.rungs[:SOON], config.rungs[SOON:]) if several > 1 else (config.rungs,)):
        for turn in range(several):
            left = [cases for cases in seen if not any(case.settled(config.log10_rate) for case in cases)]
            for part in _batches([cases[turn] for cases in left if turn < len(cases)], config.batch_size):
                detector.climb(part, rungs)
                if part := [case for case in part if case.filled and not case.settled(config.log10_rate)]:
                    detector.climb(part, rungs, filled=True)
    results = []
    for cases, readings in zip(seen, files, strict=True):
        case = replace(cases[0], looks=[look for c in cases for look in c.looks])
        case.evaluations = sum(c.evaluations for c in cases)
        if search is not None and case.log10_p > config.log10_rate:
            detector.undo_edits(case, readings[0], search)
        results.append(detector.result(case))
    return results


def _filled(pixels: Tensor) -> tuple[Tensor, Tensor] | None:
    if pixels.ndim != 3:
        return None
    filled, valid = without_flats(pixels)
    return None if valid.all() else (filled, valid)


def _batches(cases: Sequence[_Case], batch_size: int) -> Iterator[list[_Case]]:
    """The cases in batches of pictures of one size."""
    by_size: dict[tuple[int, ...], list[_Case]] = {}
    for case in cases:
        by_size.setdefault(tuple(case.pixels.shape), []).append(case)
    for group in by_size.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


@dataclass(frozen=True, eq=False)
class _Detector:
    """One model and one set of keys, looking at cases."""

    inverter: Inverter
    keys: list[WatermarkKey]
    config: DetectionConfig
    mask: Tensor | None
    _elements: dict[tuple[int, ...], int] = field(default_factory=dict)  # of the latent, by the picture's size

    def cases(self, readings: Sequence[Tensor]) -> list[_Case]:
        """A picture's views; whoever knows where it was drawn (mask) knows its size, and videos have their own."""
        native = getattr(self.inverter, "native", None)
        if self.mask is not None or readings[0].ndim != 3:
            native, readings = None, readings[:1]
        found = views(readings, self.inverter.multiple, native, self.config.size, self._elements_of)
        return [_Case(view.pixels, _filled(view.pixels), len(found), view.transform) for view in found]

    def _elements_of(self, pixels: Tensor) -> int:
        cells = math.prod(side // self.inverter.multiple for side in pixels.shape[-2:])
        if cells >= MINIMUM:  # a latent has one channel or more
            return cells
        shape = tuple(pixels.shape)
        if shape not in self._elements:
            self._elements[shape] = self.inverter.encode([pixels])[0].numel()
        return self._elements[shape]

    def climb(self, cases: list[_Case], rungs: Sequence[int | None], *, filled: bool = False) -> None:
        """Up these rungs of the ladder, with areas of one colour as they are or filled."""
        config, inverter = self.config, self.inverter
        pictures = [case.filled[0] if filled and case.filled else case.pixels for case in cases]
        latents, pending = inverter.encode(pictures), list(range(len(cases)))
        inside = self._inside(cases, latents, filled)
        share = len(config.rungs) * (1 if config.search is None else 2)
        for steps in rungs:
            if steps is None:
                noise = self._votes(latents[pending], inside[pending])
            else:
                noise = as_read(inverter.invert(latents[pending], steps), inside[pending], config.channels, steps)
            votes = steps is None or config.channels is not None
            readings = self._read(noise, votes=votes)
            for row, i, reading in zip(noise, pending, readings, strict=True):
                case = cases[i]
                tries = share * case.views * (2 if case.filled else 1)  # told by the picture alone, whichever climb
                said = case.transform
                if filled:
                    said = "plain areas filled" if said == AS_GIVEN else f"{said}, plain areas filled"
                log10_p, inverted = reading.log10_p + math.log10(tries), steps != 0 or config.rungs == (0,)
                case.looks.append(_Look(log10_p, reading, row, pictures[i], said, inverted, votes))
                case.evaluations += sum(STEPS) if steps is None else steps
            pending = [i for i in pending if not cases[i].settled(config.log10_rate)]
            if not pending:
                return

    def _votes(self, latents: Tensor, inside: Tensor) -> Tensor:
        """What the reader says of the signs, 0 in cells that do not count."""
        reader = cast("Reader", self.config.reader)
        votes = reader([self.inverter.invert(latents, steps).float() for steps in STEPS])
        return votes * inside[:, None].to(votes)

    def _read(self, noise: Tensor, *, votes: bool) -> list[Reading]:
        """What each latent says, compared with what was issued where that is known, each at half of the error."""
        scope = self.config.scope
        found = read(noise, self.keys, scope=scope, votes=votes, thorough=True)
        if not self.config.issued:
            return found
        known = read_issued(noise, self.config.issued, self.keys, scope=scope, votes=votes)
        halves = []
        for both in zip(found, known, strict=True):
            halved = [replace(one, log10_p=one.log10_p + math.log10(2)) for one in both if one is not None]
            halves.append(min(halved, key=lambda one: one.log10_p))
        return halves

    def _inside(self, cases: list[_Case], latents: Tensor, filled: bool) -> Tensor:
        """(B, h, w) bool: the latent cells that count."""
        cells = latents.shape[-2], latents.shape[-1]
        inside = torch.ones(len(cases), *cells, dtype=torch.bool, device=latents.device)
        if filled:
            valid = [cells_inside(case.filled[1], cells) for case in cases if case.filled]
            inside &= torch.stack(valid).to(inside.device)
        if self.mask is not None:
            inside &= latent_mask(whole_cells(self.mask, self.inverter.multiple), *cells).to(inside.device)
        return inside

    def undo_edits(self, case: _Case, picture: Tensor, search: Search) -> None:
        """Look at the picture as it was given, turned back from what may have been done to it."""
        config, native = self.config, getattr(self.inverter, "native", None)
        height, width = picture.shape[-2], picture.shape[-1]
        if native and height * width > LARGEST * native**2:
            factor = math.sqrt(LARGEST * native**2 / (height * width))
            height, width = max(1, int(height * factor)), max(1, int(width * factor))
            picture = resized(picture, (height, width))
        multiple = self.inverter.multiple
        sizes = [config.size] if config.size else signed_sizes((height, width), native, multiple)
        enlarged = large_enough(picture, multiple, self._elements_of)
        if len(sizes) > 1:  # cuts need the size that was signed: the model's is the likelier
            sizes = sizes[::-1] if enlarged is picture else sizes[1:]
        search = replace(search, budget=max(1, search.budget // len(sizes)))
        for size in sizes:
            if case.settled(config.log10_rate):
                return
            rate = config.false_positive_rate / len(sizes)
            undone = search_edits(
                enlarged,
                self.inverter,
                self.keys,
                search,
                rate,
                size=size,
                scope=config.scope,
                channels=config.channels,
            )
            if undone is None:  # the budget allowed nothing
                continue
            case.evaluations += undone.evaluations
            log10_p = undone.reading.log10_p + math.log10(2 * len(sizes) * undone.tries)
            found = undone.reading, undone.noise, undone.picture, undone.transform
            case.looks.append(_Look(log10_p, *found, True, config.channels is not None))

    def result(self, case: _Case) -> DetectionResult:
        """What all looks at a picture say together."""
        best, reading = case.best, case.best.reading
        absent = DetectionResult(
            verdict="absent",
            p_value=10**case.log10_p,
            log10_p=case.log10_p,
            payload=None,
            bit_confidence=reading.bit_confidence,
            key_id=None,
            key_name=None,
            model_evaluations=case.evaluations,
        )
        if case.log10_p > self.config.log10_rate:
            return absent
        verdict, content = "valid" if reading.mac_ok else "unverified", None
        if reading.bound and reading.mac_ok:  # a detector's copy cannot tell
            key = next(k for k in reversed(self.keys) if (k.key_id, k.name) == (reading.key_id, reading.key_name))
            features = self.config.embedding(best.pixels[None])[0]
            content = content_p_value(best.noise, reading, features, key, self.config.scope, votes=best.votes)
            if content > CONTENT:
                verdict = "content differs"
            elif (reading.format or FORMAT) < FORMAT:  # a holder of a detector's copy could have bound this content
                verdict = "unverified"
        return replace(
            absent,
            verdict=verdict,
            payload=reading.payload,
            key_id=reading.key_id,
            key_name=reading.key_name,
            content_p_value=content,
            transform=best.transform,
            evidence=reading.evidence,
        )
