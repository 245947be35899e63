"""Quality against robustness, a panel for each world and group of concepts, with intervals. Pillow alone."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["arena_plot"]

# Sizes and colours were chosen by eye.
_SIDE, _LEFT, _TOP, _LINE, _COLUMNS = 340, 70, 46, 18, 3
_INK, _FAINT, _PAPER = (30, 34, 40), (206, 211, 217), (255, 255, 255)
_COLOURS = (
    (13, 83, 122), (186, 44, 36), (32, 134, 98), (150, 98, 20), (112, 64, 150), (20, 140, 160), (190, 80, 130),
    (90, 96, 106),
)  # fmt: skip


def arena_plot(rows: Sequence[dict]):
    """Draw the pooled rows of each world's first judge.

    A method is a number: right of it what is kept of everything else (IRA and CRA), above it the share of pictures that
    other words and attackers asked for in which the concept is not seen; lines are 95 % intervals. A hollow one could
    not be attacked on every surface.

    Args:
        rows: of the arena's JSON.

    Returns:
        A PIL picture.
    """
    from PIL import Image, ImageDraw, ImageFont

    first = {row["world"]: row["judge"] for row in reversed(rows)}
    rows = [row for row in rows if row["pooled"] and row["judge"] == first[row["world"]]]
    panels: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        panels.setdefault((row["world"], row["concept"]), []).append(row)
    names = list(dict.fromkeys(row["method"] for row in rows))
    columns = min(_COLUMNS, max(1, len(panels)))
    across, down = _LEFT + _SIDE + 24, _TOP + _SIDE + 70
    lines = -(-len(names) // columns)
    image = Image.new("RGB", (across * columns, down * max(1, -(-len(panels) // columns)) + _LINE * lines + 24), _PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for number, ((world, concept), some) in enumerate(panels.items()):
        left, top = across * (number % columns) + _LEFT, down * (number // columns) + _TOP
        _panel(draw, font, left, top, f"{concept}, {world}", some, names)
    top = down * -(-len(panels) // columns) + 8
    seen = {row["method"] for row in rows if _place(row)}
    for number, name in enumerate(names):
        text = f"{number} {name}" if name in seen else f"{number} {name}: not measured"
        draw.text((24 + across * (number // lines), top + _LINE * (number % lines)), text, _colour(number), font)
    return image


def _colour(number: int) -> tuple[int, int, int]:
    return _COLOURS[number % len(_COLOURS)]


def _place(row: dict) -> bool:
    """Whether the row has a point."""
    return row["quality"][0] is not None and row["robust"][0] is not None


def _panel(draw, font, left: int, top: int, title: str, rows: Sequence[dict], names: Sequence[str]) -> None:
    draw.text((left, top - 24), title, _INK, font)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = left + share * _SIDE, top + (1 - share) * _SIDE
        draw.line((left, y, left + _SIDE, y), _FAINT)
        draw.line((x, top, x, top + _SIDE), _FAINT)
        draw.text((left - 30, y - 7), f"{100 * share:.0f}", _INK, font)
        draw.text((x - 8, top + _SIDE + 6), f"{100 * share:.0f}", _INK, font)
    draw.text((left, top + _SIDE + 24), "right: quality, % of all else right; up: robustness, % not seen", _INK, font)
    draw.text((left, top + _SIDE + 38), "hollow: not every attack could be tried", _INK, font)
    for row in filter(_place, rows):
        (across, low, high), (up, lower, upper) = row["quality"], row["robust"]
        number, x, y = names.index(row["method"]), left + across * _SIDE, top + (1 - up) * _SIDE
        colour = _colour(number)
        draw.line((left + low * _SIDE, y, left + high * _SIDE, y), colour)
        draw.line((x, top + (1 - lower) * _SIDE, x, top + (1 - upper) * _SIDE), colour)
        whole = all(share[0] is not None for share in row["surfaces"].values())
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour if whole else _PAPER, colour)
        draw.text((x + 6, y - 15), str(number), colour, font)
