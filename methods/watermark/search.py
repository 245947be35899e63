"""Find a mark in a picture that was flipped, turned, shifted or cropped: undo each possible edit and look.

An edit is undone in pixels, since neither encoder nor denoiser follows shifts of less than a latent cell. Whole cells
are free: one estimate of the noise is looked at in every position, and there a Walsh-Hadamard transform looks at all
nonces. A coarse grid of edits (an agreement of .79 is still .70 two pixels off) finds the place, and smaller moves
around the best of it read the payload.

p-values: the edits of each family form a finite list that does not depend on the keys, coarse grid and finest moves
alike. The p-value of a reading counts times the length of its family's list and the number of families (Bonferroni),
looked at or not, so neither the order nor the search's own choices can make it too small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import WatermarkError
from .channels import ChannelWeights, as_read
from .edits import ROUNDS, Edit, Family, cells_inside, crops, shifts, turns, without_flats
from .fields import Fields, fields_of, first_field_bytes, fit
from .keys import FORMAT, WatermarkKey
from .mark import Reading, read
from .statistics import quantise

__all__ = ["Inverter", "Search", "Undone", "run"]

_BATCH = 16  # pictures in the model at a time, as detection's own default: it bounds memory
_READ = 12  # places of a family that are decoded: more than the 8 orientations, which are all read; chosen by hand
_REFINED = 3  # of them that finer moves go around where none is significant; chosen by hand on the canvas
_SIGNIFICANT = -3  # log10 p of one reading below which its family's other places need no finer moves; chosen by hand
# Coarse places along a latent cell: small latents (under 4,096 elements) can afford less loss of agreement.
_PHASES = 3
_PHASES_OF_LARGE = 2


class Inverter(Protocol):
    """How to get from pictures to their initial noise.

    multiple: sides of pictures are cut to multiples of it, in pixels. native: side of the square that the model draws,
    in pixels; None, or left out, where that is not known.
    """

    multiple: int
    native: int | None

    def encode(self, pixels: list[Tensor]) -> Tensor:
        """Pictures (3, H, W) in 0..1 of one size (videos (F, 3, H, W)) -> latents (B, C, h, w) or (B, C, f, h, w)."""

    def invert(self, latents: Tensor, steps: int) -> Tensor:
        """Estimate the noise with `steps` evaluations of the denoiser for each latent; 0 gives the latents back."""


@dataclass(frozen=True)
class Search:
    """Which edits to undo, each alone or after a mirroring.

    Args:
        orientations: flips and turns by 90, 180, 270 degrees, and the mirrored forms of all that follows.
        translation: shifts by up to this share of each side, 0 (none) to below 1.
        crop: crops that kept at least this share of the area, above 0 to 1 (none), enlarged or not.
        rotation: turns by up to this many degrees to both sides, 0 (none) to 45.
        steps: of the inversion of each picture tried, at least 0.
        budget: of denoiser evaluations for each picture (of pictures encoded, if steps is 0).

    Raises:
        WatermarkError: a value out of range.
    """

    orientations: bool = True
    translation: float = 0.25
    crop: float = 0.7
    rotation: float = 15.0
    steps: int = 1
    budget: int = 256

    def __post_init__(self):
        ranges = {
            "translation": (0 <= self.translation < 1, "a share of the side, 0 up to but not 1"),
            "crop": (0 < self.crop <= 1, "a share of the area above 0, up to 1"),
            "rotation": (0 <= self.rotation <= 45, "degrees from 0 to 45"),
            "steps": (self.steps >= 0 and self.steps == int(self.steps), "a whole number from 0"),
            "budget": (self.budget >= 1 and self.budget == int(self.budget), "a whole number from 1"),
        }
        for name, (fits, expected) in ranges.items():
            if not fits:
                raise WatermarkError(f"the search was given {name}={getattr(self, name)!r}; expected {expected}")


@dataclass(frozen=True, eq=False)
class Undone:
    """The best of all readings, and the edit that it took.

    Args:
        reading: of the noise.
        noise: (C, h, w) estimated, 0 outside of the picture.
        picture: (3, H, W) as it was signed.
        transform: what was undone, in words.
        tries: what the reading's p-value has to be multiplied by.
        evaluations: of the denoiser, over the whole search.
    """

    reading: Reading
    noise: Tensor
    picture: Tensor
    transform: str
    tries: int
    evaluations: int


@dataclass(frozen=True, eq=False)
class _Found:
    reading: Reading
    noise: Tensor
    edit: Edit


@dataclass(frozen=True, eq=False)
class _Candidate:
    """The best places of one family, best first."""

    found: list[_Found]
    family: Family
    frame: tuple[int, int]  # as signed, cut to whole latent cells
    tries: int

    @property
    def best(self) -> _Found:
        return self.found[0]

    @property
    def log10_p(self) -> float:
        return self.best.reading.log10_p + math.log10(self.tries)

    @property
    def significant(self) -> bool:
        """Whether finer moves around the best place alone are worth it."""
        return self.best.reading.log10_p < _SIGNIFICANT


@dataclass(eq=False)
class _Hunt:
    """One picture while it is searched."""

    picture: Tensor
    valid: Tensor  # (H, W), 0 where an area of one colour was filled
    inverter: Inverter
    keys: list[WatermarkKey]
    search: Search
    scope: str
    log10_rate: float
    size: tuple[int, int] | None
    channels: ChannelWeights | None
    spent: int = 0  # evaluations of the budget
    # Known once the first picture is encoded:
    cell: int = 0  # pixels along a latent cell
    shape: tuple[int, ...] = ()  # of the latent
    laid: list[tuple[Fields, Tensor, Tensor]] = field(default_factory=list)  # the keys' first fields there, by layout

    def refined(self) -> Iterator[_Candidate]:
        """The best of each family with finer moves around it; where its coarse grid shows something, at once.

        What coarse grids show is cheap, so finer moves around nothing wait until all grids have been looked at.
        """
        later = []
        for family, tries in self.families():
            candidate = self.look(family, tries)
            if candidate is None:  # the budget is spent
                continue
            if candidate.significant:
                yield self.refine(candidate)
            else:
                later.append(candidate)
        for candidate in later:
            yield self.refine(candidate)

    def families(self) -> Iterator[tuple[Family, int]]:
        """All families with their tries, cheapest first; the later ones need the size of a latent cell."""
        given = self.picture.shape[-2], self.picture.shape[-1]
        signed = self.size or given
        builders = _builders(self.search, signed != given)
        mirrors = (False, True) if self.search.orientations else (False,)
        firsts = _orientations(self.search.orientations, given, self.size)
        count = len(firsts) + len(builders) * len(mirrors)
        for family in firsts:
            yield family, count * family.tries
        if not self.cell:  # the budget did not allow any
            return
        phases = _PHASES if math.prod(self.shape) < 4096 else _PHASES_OF_LARGE
        for mirrored in mirrors:
            for build, reach in builders:
                rows, columns = signed if build is turns else given
                edit = Edit(rows, columns, mirrored=mirrored)
                family = build(edit, signed, reach, self.cell, phases)
                if family is not None:
                    yield family, count * family.tries

    def noises(self, edits: Sequence[Edit], frame: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
        """As many of the edits as the budget allows: (C, h, w) noise, 0 outside of the picture, and (h, w) inside."""
        each, out = max(self.search.steps, 1), []
        edits = edits[: max(0, self.search.budget - self.spent) // each]
        self.spent += len(edits) * each
        for start in range(0, len(edits), _BATCH):
            undone = [edit.undo(self.picture, self.valid, frame) for edit in edits[start : start + _BATCH]]
            latents = self.inverter.encode([pixels for pixels, _ in undone])
            for noise, (_, inside) in zip(self.inverter.invert(latents, self.search.steps), undone, strict=True):
                inside = cells_inside(inside, noise.shape[-2:])
                out.append((as_read(noise.float().cpu()[None], inside, self.channels, self.search.steps)[0], inside))
        if out and tuple(out[0][0].shape) != self.shape:
            self.shape = tuple(out[0][0].shape)
            self.cell = frame[0] // self.shape[-2]
            self.laid = []
            for form in (FORMAT, 2):
                fields, keys = fields_of(self.shape, form), [key for key in self.keys if form in key.layouts]
                if keys:
                    places, signs = first_field_bytes(fields, keys, self.scope)
                    self.laid.append((fields, torch.from_numpy(places), torch.from_numpy(signs)))
        return out

    def read(self, noises: Sequence[Tensor], edits: Sequence[Edit]) -> list[_Found]:
        """Readings at these edits, the likeliest mark first; in the order given where nothing tells them apart."""
        if not noises:
            return []
        readings = read(torch.stack(list(noises)), self.keys, scope=self.scope, votes=self.channels is not None)
        found = [_Found(*item) for item in zip(readings, noises, edits, strict=True)]
        return sorted(found, key=lambda one: one.reading.log10_p)

    def scores(self, noise: Tensor, inside: Tensor, moves: list[tuple[int, int]]) -> np.ndarray:
        """(len(moves),) the best nonce's score of the best key, in standard deviations, at each move of cells."""
        values = np.zeros(self.shape, np.int8)
        if not self.laid or not inside.any():
            return np.zeros(len(moves))
        weights = quantise(noise[None, :, inside], votes=self.channels is not None)
        values[:, inside.numpy()] = weights[0].reshape(len(values), -1)
        moved = torch.from_numpy(np.stack([_moved(values, move).reshape(-1) for move in moves]))
        return np.max([fit(fields, moved, *laid).amax(1).numpy() for fields, *laid in self.laid], axis=0)

    def settled(self, candidate: _Candidate) -> bool:
        """Present and decoded, so that no other edit could say more."""
        reading = candidate.best.reading
        decoded = reading.payload is not None and reading.mac_ok is not False
        return decoded and reading.log10_p + math.log10(2 * candidate.tries) <= self.log10_rate

    def look(self, family: Family, tries: int) -> _Candidate | None:
        """The best places of a family's coarse grid; None where the budget allows no look."""
        height, width = (side - side % self.inverter.multiple for side in family.frame)
        frame = height, width
        noises, places = self.noises([edit for edit, _ in family.coarse], frame), []
        for index, ((noise, inside), (_, moves)) in enumerate(zip(noises, family.coarse, strict=False)):
            if len(family.coarse) * len(moves) <= _READ:
                scores = np.zeros(len(moves))  # all are read
            else:
                scores = self.scores(noise, inside, moves)
            places += [(score, index, move) for score, move in zip(scores, moves, strict=True)]
        places = sorted(places, key=lambda place: -place[0])[:_READ]
        edits = [family.coarse[i][0].moved(down * self.cell, right * self.cell) for _, i, (down, right) in places]
        found = self.read([_moved(noises[i][0], move) for _, i, move in places], edits)
        return _Candidate(found, family, frame, tries) if found else None

    def refine(self, candidate: _Candidate) -> _Candidate:
        """Finer moves around the best of a family, or around several where none is significant."""
        around = candidate.found[:1] if candidate.significant else candidate.found[:_REFINED]
        for number in range(ROUNDS):
            if self.settled(candidate):
                break
            moved = list({edit: None for one in around for edit in candidate.family.moves(one.edit, number)})
            tried = self.noises(moved, candidate.frame)
            near = self.read([noise for noise, _ in tried], moved[: len(tried)])
            if not near or near[0].reading.log10_p >= candidate.best.reading.log10_p:
                break
            around = near[:1]
            candidate = replace(candidate, found=around)
        return candidate


def _moved(array, move: tuple[int, int]):
    """(C, h, w) array or tensor moved down and right by whole cells, 0 where it came from."""
    out, spans = array * 0, []
    for distance, side in zip(move, array.shape[-2:], strict=True):
        if abs(distance) >= side:
            return out
        spans.append(
            (slice(max(distance, 0), side + min(distance, 0)), slice(max(-distance, 0), side - max(distance, 0)))
        )
    (rows, rows_from), (columns, columns_from) = spans
    out[:, rows, columns] = array[:, rows_from, columns_from]
    return out


def run(
    picture: Tensor,
    inverter: Inverter,
    keys: Sequence[WatermarkKey],
    search: Search,
    false_positive_rate: float = 1e-6,
    *,
    size: tuple[int, int] | None = None,
    scope: str = "",
    channels: ChannelWeights | None = None,
) -> Undone | None:
    """Undo edits until a mark is settled or the budget is spent; None if the budget allowed no look.

    Args:
        picture: (3, H, W) in 0..1 as it was found.
        inverter: of the model that drew it.
        keys: to look for; each is looked for in every place, so the time grows with their number.
        search: which edits.
        false_positive_rate: where the search may stop, half of it being the search's.
        size: (height, width) that was signed, in pixels; None: the picture's own. Cuts need it.
        scope: as at signing.
        channels: how much each channel of the latents says.

    Raises:
        WatermarkError: a picture or a size smaller than what the model encodes.
    """
    if picture.ndim != 3 or min(*picture.shape[-2:], *(size or (1 << 20,))) < inverter.multiple:
        raise WatermarkError(
            f"a picture of shape {tuple(picture.shape)} and the signed size {size} were given to search; expected"
            f" (3, H, W) and sides of {inverter.multiple} pixels or more"
        )
    filled, valid = without_flats(picture.float().cpu())
    size = (size[0], size[1]) if size else None
    rate = math.log10(false_positive_rate)
    hunt = _Hunt(filled, valid, inverter, list(keys), search, scope, rate, size, channels)
    best: _Candidate | None = None
    for candidate in hunt.refined():
        if best is None or candidate.log10_p < best.log10_p:
            best = candidate
        if hunt.settled(candidate):
            break
    if best is None:
        return None
    edit = best.best.edit
    undone, _ = edit.undo(hunt.picture, hunt.valid, best.frame)
    said = ", ".join(part for part in (str(edit), best.family.said(edit)) if part)
    said = said or ("as given" if valid.all() else "plain areas filled")
    evaluations = hunt.spent if search.steps else 0
    return Undone(best.best.reading, best.best.noise, undone, said, best.tries, evaluations)


def _orientations(wanted: bool, given: tuple[int, int], size: tuple[int, int] | None) -> list[Family]:
    """The picture as it is, scaled to the size that was signed, in all orientations: a family for each frame."""
    if not wanted:
        return [Family([(Edit(*(size or given)), [(0, 0)])], lambda e, _: [], 0, lambda e: "", size or given)]
    frames: dict[tuple[int, int], list[Edit]] = {}
    for mirrored in (False, True):
        for quarters in range(4):
            rows, columns = size or (given if quarters % 2 == 0 else given[::-1])
            edit = Edit(rows, columns, quarters=quarters, mirrored=mirrored)
            frames.setdefault((rows, columns), []).append(edit)
    return [
        Family([(edit, [(0, 0)]) for edit in edits], lambda e, _: [], 0, lambda e: "", frame)
        for frame, edits in frames.items()
    ]


def _builders(search: Search, cut: bool) -> list[tuple[Callable, float]]:
    choices = (
        (shifts, search.translation, cut or search.translation > 0),
        (turns, search.rotation, search.rotation > 0),
        (crops, search.crop, search.crop < 1),
    )
    return [(build, reach) for build, reach, wanted in choices if wanted]
