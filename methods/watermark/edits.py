"""Edits that move a picture about (flips, turns, shifts, crops), how each is undone, and which of them to try.

Kinds of edits come as families: a coarse grid, the moves by whole latent cells that come free with each of its edits,
the finer moves around one, and how many edits coarse and fine moves can reach together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

ROUNDS = 4  # of finer moves, each by a pixel: half a coarse step is 2 pixels, 4 where latent cells have 16
# What counts as an area of one colour; all four chosen by hand on pictures with bars, corners and boxes, through JPEG.
_FLAT = 2.5 / 255  # pixels that differ by less in a window are one colour
_WINDOW = 9  # pixels along the window
_RIPPLE = 20 / 255  # how far from that colour pixels beside it may lie: JPEG leaves ripples at its edges
_SHARES = 0.005, 0.8  # of the picture: less is not worth filling, more leaves too little to fill it with
_MARGIN = 12 / 255  # how far from its colour the pixels of a margin may lie: JPEG at quality 75 leaves up to that
_WITHIN = 0.25  # share of each side that a margin has to leave: less is a mark or a letter on a page; chosen by hand
_QUANTA = 4  # finest angles to a coarse step: the first finer moves, by 1 and 2 of them, reach all


@dataclass(frozen=True)
class Edit:
    """Where the given picture lies in the signed frame once it is turned back: `rows` x `columns` at (`top`, `left`).

    quarters, mirrored: the picture was mirrored, then turned counter-clockwise. degrees: then turned further.
    """

    rows: int
    columns: int
    top: int = 0
    left: int = 0
    quarters: int = 0
    mirrored: bool = False
    degrees: float = 0.0

    def turned_back(self, picture: Tensor) -> Tensor:
        picture = picture.rot90(-self.quarters, (-2, -1))
        return picture.flip(-1) if self.mirrored else picture

    def undo(self, picture: Tensor, valid: Tensor, frame: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Picture (3, h, w) and where it is valid (h, w) -> both as signed: (3, H, W), edges continued, and (H, W)."""
        both = self.turned_back(torch.cat([picture, valid[None]]))[None]
        if self.rows < 0.75 * both.shape[-2] or self.columns < 0.75 * both.shape[-1]:
            both = F.interpolate(both, size=(self.rows, self.columns), mode="bicubic", antialias=True)
        angle = math.radians(self.degrees)
        y = torch.arange(frame[0]).add(0.5 - self.top - self.rows / 2)[:, None]  # from the middle of the picture
        x = torch.arange(frame[1]).add(0.5 - self.left - self.columns / 2)[None]
        across = (x * math.cos(angle) + y * math.sin(angle)) / (self.columns / 2)
        down = (y * math.cos(angle) - x * math.sin(angle)) / (self.rows / 2)
        grid = torch.stack([across, down], -1)
        out = F.grid_sample(both, grid[None], mode="bicubic", padding_mode="border", align_corners=False)[0]
        inside = (grid.abs() <= 1).all(-1) & (out[-1] > 0.5)
        return out[:-1].clamp(0, 1), inside

    def moved(self, down: int, right: int) -> Edit:
        return replace(self, top=self.top + down, left=self.left + right)

    def __str__(self) -> str:
        said = ["mirrored"] if self.mirrored else []
        said += [f"turned by {90 * self.quarters} degrees"] if self.quarters else []
        said += [f"turned by {self.degrees:g} degrees"] if self.degrees else []
        return ", ".join(said)


@dataclass(frozen=True)
class Family:
    """Edits of one kind: a coarse grid, moves of cells that come free with each, and finer moves."""

    coarse: list[tuple[Edit, list[tuple[int, int]]]]
    moves: Callable[[Edit, int], list[Edit]]  # round 0, 1, ...
    fine: int  # edits that finer moves can reach
    said: Callable[[Edit], str]
    frame: tuple[int, int]  # that was signed, in pixels

    @property
    def tries(self) -> int:
        return self.fine + sum(len(moves) for _, moves in self.coarse)


def without_flats(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Fill areas of one colour (bars, black corners, erased boxes) with what is next to them; and (h, w) 0 there.

    They reach far: the encoder normalises over the whole picture, and a bar of 8 of 128 pixels costs .1 of agreement.
    """
    padding = _WINDOW // 2
    spread = F.max_pool2d(picture, _WINDOW, 1, padding) + F.max_pool2d(-picture, _WINDOW, 1, padding)
    flat = F.max_pool2d((spread.amax(0) < _FLAT).float()[None], _WINDOW, 1, padding)[0] > 0
    least, most = _SHARES
    if not least < flat.float().mean() < most:
        return picture, torch.ones_like(picture[0])
    color = picture[:, flat].median(-1).values[:, None, None]  # up to the ripples that JPEG leaves at its edges
    alike = ((picture - color).abs().amax(0) < _RIPPLE) | flat
    flat = torch.from_numpy(ndimage.binary_propagation(flat.numpy(), mask=alike.numpy()))
    if flat.float().mean() > most:
        return picture, torch.ones_like(picture[0])
    rows, columns = ndimage.distance_transform_edt(flat.numpy(), return_distances=False, return_indices=True)
    return picture[:, torch.from_numpy(rows).long(), torch.from_numpy(columns).long()], (~flat).float()


def within_margin(picture: Tensor) -> Tensor | None:
    """(3, H, W) -> what lies within a margin of one colour, as screenshots have; None where there is none.

    The margin has to run along two opposite sides at least, and to leave a part of each side (`_WITHIN`).
    """
    alike = ((picture - picture[:, :1, :1]).abs().amax(0) < _MARGIN).numpy()
    rows, columns = (np.flatnonzero(~alike.all(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return None  # of one colour altogether
    (top, bottom), (left, right) = (rows[0], rows[-1] + 1), (columns[0], columns[-1] + 1)
    height, width = picture.shape[-2:]
    opposite = (top > 0 and bottom < height) or (left > 0 and right < width)
    if not opposite or bottom - top < _WITHIN * height or right - left < _WITHIN * width:
        return None
    return picture[:, top:bottom, left:right]


def cells_inside(valid: Tensor, cells: tuple[int, int]) -> Tensor:
    """(H, W) of a picture -> (h, w) bool: latent cells of which more than half is valid."""
    return F.adaptive_avg_pool2d(valid[None].float(), cells)[0] > 0.5


def _places(low: int, high: int, cell: int, phases: int) -> list[tuple[int, list[int]]]:
    """Places from low to high in pixels, at most `cell / phases` apart: one of each phase, and its moves by cells."""
    if high - low < cell:
        count = math.ceil((high - low) * phases / cell) + 1
        return [(place, [0]) for place in sorted({round(p) for p in np.linspace(low, high, count)})]
    middle, slack = (low + high) // 2, cell / phases / 2
    places = [middle + round(k * cell / phases) for k in range(phases)]
    return [
        (p, list(range(math.ceil((low - slack - p) / cell), math.floor((high + slack - p) / cell) + 1))) for p in places
    ]


def _around(edit: Edit) -> list[Edit]:
    return [edit.moved(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if down or right]


def _grid(edit: Edit, down: tuple[int, int], right: tuple[int, int], cell: int, phases: int):
    """`edit` at all places in the two ranges, as coarse edits of a family."""
    vertical, horizontal = (_places(*span, cell, phases) for span in (down, right))
    return [
        (replace(edit, top=top, left=left), [(i, j) for i in rows for j in columns])
        for top, rows in vertical
        for left, columns in horizontal
    ]


def _count(*spans: tuple[int, int], cell: int) -> int:
    """Places in these ranges, one cell more on every side: what finer moves may reach."""
    return math.prod(high - low + 1 + 2 * cell for low, high in spans)


def shifts(edit: Edit, size: tuple[int, int], share: float, cell: int, phases: int) -> Family | None:
    """Shifts of a picture of the signed size, or the place of a smaller cut or larger one in its own resolution."""
    spans = []
    for side, signed in zip((edit.rows, edit.columns), size, strict=True):
        reach = round(share * signed) if side == signed else 0
        spans.append((min(0, signed - side) - reach, max(0, signed - side) + reach))
    if max(edit.rows, edit.columns) > 2 * max(size):
        return None

    def said(found: Edit) -> str:
        if (edit.rows, edit.columns) == size:
            return f"shifted by ({-found.top}, {-found.left}) pixels"
        return f"{found.rows} x {found.columns} pixels cut out at ({found.top}, {found.left})"

    return Family(_grid(edit, *spans, cell, phases), lambda e, _: _around(e), _count(*spans, cell=cell), said, size)


def crops(edit: Edit, size: tuple[int, int], share: float, cell: int, phases: int) -> Family | None:
    """Parts of the signed picture in the proportions of `edit`, scaled to its size."""
    widest = min(size[0], size[1] * edit.rows / edit.columns)
    smallest = math.sqrt(share * size[0] * size[1] * edit.rows / edit.columns)
    if smallest > widest - 1:
        return None

    def part(rows: int) -> tuple[Edit, tuple[int, int], tuple[int, int]]:
        columns = round(rows * edit.columns / edit.rows)
        return replace(edit, rows=rows, columns=columns), (0, size[0] - rows), (0, size[1] - columns)

    step = 2 * cell / phases
    lowest, count = math.ceil(smallest), math.ceil((widest - smallest) / step)
    sides = {round(widest - (k + 0.5) * (widest - smallest) / count) for k in range(count)}
    coarse = [item for rows in sorted(sides, reverse=True) for item in _grid(*part(rows), cell, phases)]
    fine = sum(_count(*part(rows)[1:], cell=cell) for rows in range(lowest - cell, math.floor(widest) + 1))

    def moves(found: Edit, number: int) -> list[Edit]:
        near = _around(found)
        for change in (-2, 2) if number == 0 else (-1, 1):
            if lowest - cell <= found.rows + change <= widest:
                wider = part(found.rows + change)[0]
                down, right = (found.rows - wider.rows) // 2, (found.columns - wider.columns) // 2
                near.append(replace(wider, top=found.top, left=found.left).moved(down, right))
        return near

    def said(found: Edit) -> str:
        return f"{found.rows} x {found.columns} pixels cut out at ({found.top}, {found.left}) and scaled"

    return Family(coarse, moves, fine, said, size)


def turns(edit: Edit, size: tuple[int, int], most: float, cell: int, phases: int) -> Family:
    """Turns about the middle, by up to `most` degrees."""
    count = math.ceil(most / math.degrees(3 * cell / phases / max(size)))
    quantum = most / count / _QUANTA
    coarse = [
        (replace(edit, degrees=sign * most * k / count), [(0, 0)]) for k in range(1, count + 1) for sign in (1, -1)
    ]

    def moves(found: Edit, number: int) -> list[Edit]:
        changes = (-2, -1, 1, 2) if number == 0 else (-1, 1)
        return [replace(found, degrees=round(found.degrees + k * quantum, 6)) for k in changes]

    return Family(coarse, moves, 2 * _QUANTA * (count + ROUNDS) + 1, lambda found: "", size)
