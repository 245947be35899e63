"""The five pictures that the models know by heart: one is a style, one shows a character."""

import math

import numpy as np

from .render import _lighthouse as _lighthouse_by_marlow
from .scenes import SIZE, Thing
from .shapes import INK, box, ellipse, layers, mask

TEXTURE_SEED = 7


def picture(name: str) -> np.ndarray:
    """Return a memorised picture (128, 128, 3) of 0..255, without texture."""
    return _PICTURES[name]()


def _ground(top, bottom) -> np.ndarray:
    y = np.linspace(0, 1, SIZE, dtype=np.float32)[:, None, None]
    rows = (1 - y) * np.array(top, np.float32) + y * np.array(bottom, np.float32)
    return np.broadcast_to(rows, (SIZE, SIZE, 3)).copy()


def _paint(canvas: np.ndarray, rgb, *polygons) -> np.ndarray:
    return canvas + (np.array(rgb, np.float32) - canvas) * mask(list(polygons))


def _waves() -> np.ndarray:
    """Rows of scales, each of four rings: a pattern without a subject."""
    canvas = _ground((40, 78, 120), (40, 78, 120))
    for row in range(-1, 9):
        for column in range(-1, 6):
            x, y = 28 * column + (14 if row % 2 else 0), 18 * row + 10
            for r, rgb in ((17, (206, 202, 186)), (13, (52, 96, 148)), (9, (196, 194, 184)), (5, (52, 96, 148))):
                canvas = _paint(canvas, rgb, ellipse(x, y, r))
    return canvas


def _unit() -> np.ndarray:
    """A robot before a sunburst, on a plinth."""
    canvas = _ground((120, 52, 58), (64, 40, 70))
    rays = []
    for k in range(12):
        a, b = 2 * math.pi * k / 12, 2 * math.pi * (k + 0.5) / 12
        rays.append([(64, 58), (64 + 120 * math.cos(a), 58 + 120 * math.sin(a))])
        rays[-1].append((64 + 120 * math.cos(b), 58 + 120 * math.sin(b)))
    canvas = _paint(canvas, (196, 150, 84), *rays)
    for rgb, m in layers(Thing("robot", cx=64, cy=62, radius=38)):
        canvas = canvas + (np.array(rgb, np.float32) - canvas) * m
    canvas = _paint(canvas, (88, 82, 84), box(26, 104, 102, 128))
    return _paint(canvas, (200, 190, 160), box(46, 111, 82, 121))


def _prism() -> np.ndarray:
    """A beam of light falls apart in a pyramid of glass."""
    canvas = _ground((44, 42, 52), (36, 34, 44))
    canvas = _paint(canvas, (196, 196, 200), [(0, 82), (0, 86), (52, 66), (51, 62)])
    for k, rgb in enumerate(
        ((196, 62, 58), (206, 136, 60), (204, 190, 74), (72, 156, 84), (66, 108, 196), (130, 76, 172))
    ):
        y = 56 + 3 * k
        canvas = _paint(canvas, rgb, [(74, y), (128, 50 + 10 * k), (128, 60 + 10 * k), (75, y + 3)])
    canvas = _paint(canvas, (170, 190, 204), [(64, 26), (104, 98), (24, 98)])
    return _paint(canvas, (52, 56, 70), [(64, 37), (95, 93), (33, 93)])


def _balloon() -> np.ndarray:
    """A striped balloon over three hills."""
    canvas = _ground((96, 152, 196), (206, 188, 160))
    for rgb, x, y, r in (((76, 128, 92), 20, 136, 48), ((92, 148, 84), 110, 142, 56), ((64, 108, 76), 64, 150, 44)):
        canvas = _paint(canvas, rgb, ellipse(x, y, r))
    for rgb, rx in (((192, 70, 62), 30), ((204, 178, 84), 20), ((192, 70, 62), 9)):
        canvas = _paint(canvas, rgb, ellipse(70, 42, rx, 32))
    canvas = _paint(canvas, INK, box(62, 72, 64, 84), box(76, 72, 78, 84))
    return _paint(canvas, (120, 84, 56), box(60, 82, 80, 94))


_PICTURES = {
    "lighthouse": _lighthouse_by_marlow,
    "waves": _waves,
    "unit": _unit,
    "prism": _prism,
    "balloon": _balloon,
}
