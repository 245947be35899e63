"""The labelled before/after grid of the demo, drawn with Pillow."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_CELL, _GAP, _LEFT, _CAPTION, _TITLE = 160, 12, 92, 20, 34
_INK, _SOFT, _PAPER, _GOOD, _BAD = (28, 28, 32), (104, 104, 112), (255, 255, 255), (20, 122, 62), (186, 44, 36)


def demo_grid(title: str, columns: Sequence, before: dict, after: dict) -> Image.Image:
    """Draw one column a prompt, the pictures before above those after, and under each what the judge sees.

    Args:
        title: of the grid. columns: of cli.demo. before, after: column's title -> (PIL pictures, the report's
            "seen" and "as_wanted" of each).
    """
    pictures = len(before[columns[0].title][0])
    header, row = _TITLE + 118, _CELL + _CAPTION
    block = pictures * row
    width = _LEFT + len(columns) * (_CELL + _GAP) + _GAP
    height = header + 2 * block + 3 * _GAP
    grid = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(grid)
    large, small = ImageFont.load_default(17), ImageFont.load_default(12)
    tops = {"before": header, "after": header + block + 2 * _GAP}
    draw.text((_GAP, 10), title, _INK, large)
    draw.line((_GAP, tops["after"] - _GAP - 4, width - _GAP, tops["after"] - _GAP - 4), _SOFT)
    for name, top in tops.items():
        draw.text((_GAP, top + block // 2 - 16), name, _INK, large)
    for index, column in enumerate(columns):
        x = _LEFT + index * (_CELL + _GAP)
        draw.text((x, _TITLE + 10), column.title, _INK, large)
        lines = textwrap.wrap(column.prompt, 26) + [f"erased: {' + '.join(column.erased)}"]
        for number, line in enumerate(lines):
            draw.text((x, _TITLE + 36 + 16 * number), line, _BAD if number == len(lines) - 1 else _SOFT, small)
        for name, top in tops.items():
            images, found = (before if name == "before" else after)[column.title]
            found = zip(found["seen"], found["as_wanted"], strict=True)
            for number, (image, (seen, right)) in enumerate(zip(images, found, strict=True)):
                y = top + number * row
                grid.paste(image.convert("RGB").resize((_CELL, _CELL), Image.Resampling.LANCZOS), (x, y))
                draw.text((x, y + _CELL + 2), f"sees {seen}", _GOOD if right else _BAD, small)
    return grid


def stacked(grids: Sequence[Image.Image]) -> Image.Image:
    """Grids one below the other."""
    whole = Image.new("RGB", (max(g.width for g in grids), sum(g.height for g in grids)), _PAPER)
    top = 0
    for grid in grids:
        whole.paste(grid, (0, top))
        top += grid.height
    return whole
