"""The course of a training run as a picture: losses, and what validation says of each concept. Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

__all__ = ["training_plot"]

# Sizes and colours were chosen by eye.
_WIDTH, _HEIGHT, _LEFT, _GAP = 420, 240, 64, 44
_INK, _FAINT, _PAPER = (30, 34, 40), (206, 211, 217), (255, 255, 255)
_COLOURS = (
    (13, 83, 122), (186, 44, 36), (32, 134, 98), (150, 98, 20), (112, 64, 150), (20, 140, 160), (190, 80, 130),
    (90, 96, 106),
)  # fmt: skip
_LISTED = 12  # names in a legend; more would not fit


def training_plot(rows: Sequence[dict[str, Any]]):
    """Draw a log's rows: the training losses beside `erased` and `moved` of each concept's validation.

    Args:
        rows: of a `TrainingLog`, as `train_membranes` writes them.

    Returns:
        A PIL picture.
    """
    from PIL import Image

    validated = [row for row in rows if row.get("validation")]
    names = list(dict.fromkeys(name for row in validated for name in row["validation"]))
    trained = [row for row in rows if "loss" in row]
    panels = [
        ("loss in training", {n: [(r["step"], r[n]) for r in trained] for n in ("loss", "erasing", "anchoring")}, True),
        ("validation: distance to the target (1: untouched)", _of(validated, names, "erased"), False),
        ("validation: moved of what is kept", _of(validated, names, "moved"), True),
    ]
    panels = [(title, {n: points for n, points in lines.items() if points}, log) for title, lines, log in panels]
    panels = [panel for panel in panels if panel[1]]
    legend = 18 * min(_LISTED, max((len(lines) for _, lines, _ in panels), default=0))
    size = max(1, len(panels)) * (_LEFT + _WIDTH + 24), _HEIGHT + 2 * _GAP + legend
    image = Image.new("RGB", size, _PAPER)
    for number, panel in enumerate(panels):
        _panel(image, number * (_LEFT + _WIDTH + 24) + _LEFT, _GAP, *panel)
    return image


def _of(rows: Sequence[dict[str, Any]], names: Sequence[str], figure: str) -> dict[str, list]:
    return {
        name: [(row["step"], row["validation"][name][figure]) for row in rows if name in row["validation"]]
        for name in names
    }


def _panel(image, left: int, top: int, title: str, lines: dict[str, list], log: bool) -> None:
    from PIL import ImageDraw, ImageFont

    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    points = [point for line in lines.values() for point in line]
    least = min((y for _, y in points if y > 0), default=1e-9)  # a logarithm has no zero
    scale = (lambda y: math.log10(max(y, least))) if log else (lambda y: y)
    low, high = min(0.0 if not log else math.inf, *(scale(y) for _, y in points)), max(scale(y) for _, y in points)
    last, spread = max(x for x, _ in points) or 1, (high - low) or 1.0
    draw.text((left, top - 24), title, _INK, font)
    for share in (0.0, 0.5, 1.0):
        y, value = top + _HEIGHT * (1 - share), low + share * spread
        draw.line((left, y, left + _WIDTH, y), _FAINT)
        draw.text((left - 58, y - 7), f"{10**value:.2g}" if log else f"{value:.2f}", _INK, font)
        draw.text((left + share * _WIDTH - 8, top + _HEIGHT + 6), f"{share * last:.0f}", _INK, font)
    for number, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        dots = [(left + x / last * _WIDTH, top + (1 - (scale(y) - low) / spread) * _HEIGHT) for x, y in line]
        draw.line(dots * (2 if len(dots) == 1 else 1), colour, 2)
        for x, y in dots if len(dots) < 60 else ():
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), colour)
        if number < _LISTED:
            row = top + _HEIGHT + 28 + 18 * number
            draw.line((left, row + 7, left + 22, row + 7), colour, 3)
            draw.text((left + 30, row), f"{name[:44]}: {line[-1][1]:.3g}", _INK, font)
