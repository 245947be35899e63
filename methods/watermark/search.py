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
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...kernels.keyed_correlation import keyed_correlation
from ..errors import WatermarkError
from .edits import ROUNDS, Edit, Family, cells_inside, crops, shifts, turns, without_flats
from .fields import fields_of, packed_first_field
from .keys import WatermarkKey
from .mark import Reading, read
from .statistics import levelled, quantise

__all__ = ["Inverter", "Search", "run"]

_BATCH = 16
_READ = 12  # positions of a family that are decoded
_REFINED = 3  # of them that are moved around where none is settled


class Inverter(Protocol):
    """How to get from pictures to their initial noise.

    multiple: sides of pictures are cut to multiples of it, in pixels.
    """

    multiple: int

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


@dataclass
class _Found:
    reading: Reading
    noise: Tensor
    edit: Edit


@dataclass
class _Run:
    """One picture while it is searched."""

    picture: Tensor
    valid: Tensor
    inverter: Inverter
    keys: list[WatermarkKey]
    search: Search
    scope: str
    log10_rate: float
    cell: int = 0
    spent: int = 0
    laid: tuple[Tensor, Tensor] | None = None
    shape: tuple[int, ...] = field(default=())

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
                out.append((levelled(noise.float().cpu()[None], inside)[0], inside))
        if out and tuple(out[0][0].shape) != self.shape:
            self.shape = tuple(out[0][0].shape)
            self.cell = frame[0] // self.shape[-2]
            places, signs = packed_first_field(fields_of(self.shape), self.keys, self.scope)
            self.laid = torch.from_numpy(places), torch.from_numpy(signs)
        return out

    def read(self, noises: Sequence[Tensor], edits: Sequence[Edit]) -> list[_Found]:
        if not noises:
            return []
        readings = read(torch.stack(list(noises)), self.keys, scope=self.scope)
        return [_Found(*found) for found in zip(readings, noises, edits, strict=True)]

    def scores(self, noise: Tensor, inside: Tensor, moves: list[tuple[int, int]]) -> np.ndarray:
        """(len(moves),) the best nonce's score of the best key, in standard deviations, at each move of cells."""
        values = np.zeros(self.shape, np.int8)
        if self.laid is None or not inside.any():
            return np.zeros(len(moves))
        values[:, inside.numpy()] = quantise(noise[None, :, inside])[0].reshape(len(values), -1)
        moved = torch.from_numpy(np.stack([_moved(values, move).reshape(-1) for move in moves]))
        peak, _, energy = keyed_correlation(moved, *self.laid)
        return (peak / energy.clamp(min=1).sqrt()).amax(1).numpy()

    def settled(self, found: _Found, tries: int) -> bool:
        decoded = found.reading.payload is not None and found.reading.mac_ok is not False
        return decoded and found.reading.log10_p + math.log10(2 * tries) <= self.log10_rate

    def look(self, family: Family, frame: tuple[int, int]) -> list[_Found]:
        """Readings at the best places of a family's coarse grid, best first."""
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
        found.sort(key=lambda one: one.reading.log10_p)  # stable: by score where nothing is significant
        return found

    def refine(self, found: list[_Found], family: Family, frame: tuple[int, int], tries: int) -> list[_Found]:
        """The best of a family with finer moves around it, or around several where none is significant."""
        around = found[:1] if _significant(found) else found[:_REFINED]
        for number in range(ROUNDS):
            if self.settled(found[0], tries):
                break
            moved = list({edit: None for one in around for edit in family.moves(one.edit, number)})
            tried = self.noises(moved, frame)
            near = self.read([noise for noise, _ in tried], moved[: len(tried)])
            near.sort(key=lambda one: one.reading.log10_p)
            if not near or near[0].reading.log10_p >= found[0].reading.log10_p:
                break
            found = around = near[:1]
        return found


def _significant(found: list[_Found]) -> bool:
    return bool(found) and found[0].reading.log10_p < -3


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
) -> tuple[list[tuple[Reading, Tensor, Tensor, str]], int, int]:
    """Undo edits until a mark is settled or the budget is spent.

    Args:
        picture: (3, H, W) in 0..1 as it was found.
        inverter: of the model that drew it.
        keys: to look for; each is looked for in every place, so the time grows with their number.
        search: which edits.
        size: (height, width) that was signed, in pixels; None: the picture's own. Cuts need it.
        scope: as at signing.
        false_positive_rate: where the search may stop, half of it being the search's.

    Returns:
        The best reading, or none if the budget allowed none: (reading, noise (C, h, w), picture (3, H, W) as signed,
        what was undone); the number by which its p-value has to be multiplied; evaluations of the denoiser.

    Raises:
        WatermarkError: a picture or a size smaller than what the model encodes.
    """
    if picture.ndim != 3 or min(*picture.shape[-2:], *(size or (1 << 20,))) < inverter.multiple:
        raise WatermarkError(
            f"a picture of shape {tuple(picture.shape)} and the signed size {size} were given to search; expected"
            f" (3, H, W) and sides of {inverter.multiple} pixels or more"
        )
    filled, valid = without_flats(picture.float().cpu())
    state = _Run(filled, valid, inverter, list(keys), search, scope, math.log10(false_positive_rate))
    given = picture.shape[-2], picture.shape[-1]
    signed = (size[0], size[1]) if size else given
    builders = _builders(search, signed != given)
    mirrors = (False, True) if search.orientations else (False,)
    firsts = _orientations(search.orientations, given, size)
    families = len(firsts) + len(builders) * len(mirrors)
    best: tuple[float, _Found, int, Family, tuple[int, int]] | None = None
    later = []

    def done(found: list[_Found], family: Family, frame: tuple[int, int], tries: int) -> bool:
        nonlocal best
        found = state.refine(found, family, frame, tries)
        log10_p = found[0].reading.log10_p + math.log10(tries)
        if best is None or log10_p < best[0]:
            best = log10_p, found[0], tries, family, frame
        return state.settled(found[0], tries)

    for family in _families(state, firsts, builders, mirrors, given, signed):
        height, width = (side - side % inverter.multiple for side in family.frame)
        tries, frame = families * family.tries, (height, width)
        found = state.look(family, frame)
        if _significant(found):
            if done(found, family, frame, tries):
                break
        elif found:  # what a coarse grid shows is cheap: finer moves wait until all of them have been looked at
            later.append((found, family, frame, tries))
    else:
        for item in later:
            if done(*item):
                break
    if best is None:
        return [], 1, 0
    _, one, tries, family, frame = best
    undone, _ = one.edit.undo(state.picture, state.valid, frame)
    said = ", ".join(part for part in (str(one.edit), family.said(one.edit)) if part)
    said = said or ("as given" if valid.all() else "plain areas filled")
    return [(one.reading, one.noise, undone, said)], tries, state.spent if search.steps else 0


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


def _families(state: _Run, firsts: list[Family], builders, mirrors, given, signed) -> Iterator[Family]:
    """All families, cheapest first; the later ones need the size of a latent cell, which the first one finds."""
    yield from firsts
    if not state.cell:  # the budget did not allow any
        return
    phases = 3 if math.prod(state.shape) < 4096 else 2  # small latents can afford less loss of agreement
    for mirrored in mirrors:
        for build, reach in builders:
            rows, columns = signed if build is turns else given
            edit = Edit(rows, columns, mirrored=mirrored)
            family = build(edit, signed, reach, state.cell, phases)
            if family is not None:
                yield family
