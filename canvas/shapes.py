"""Outlines of the second world's objects, in units of their radius: from a thing to masks with colours."""

import functools
import math
import random

import numpy as np
from PIL import Image, ImageDraw

from .scenes import NOTHING, SIZE, Thing

SUPERSAMPLING = 2
INK = (56, 52, 56)
Polygon = list[tuple[float, float]]
Layer = tuple[tuple[int, int, int] | None, np.ndarray]


def layers(thing: Thing) -> list[Layer]:
    """Return (fixed RGB, or None for the thing's own colour; mask (128, 128, 1) in 0..1) from back to front."""
    turn = math.radians(thing.angle)
    cos, sin, flip = math.cos(turn), math.sin(turn), -1.0 if thing.flip else 1.0

    def place(points: Polygon) -> Polygon:
        return [
            (thing.cx + thing.radius * (flip * x * cos - y * sin), thing.cy + thing.radius * (flip * x * sin + y * cos))
            for x, y in points
        ]

    shapes = [(None, [_blob(thing.seed)], [])] if thing.object == NOTHING else _shapes()[thing.object]
    return [(rgb, mask([place(p) for p in adds], [place(p) for p in cuts])) for rgb, adds, cuts in shapes]


def mask(adds: list[Polygon], cuts: list[Polygon] = ()) -> np.ndarray:
    """Return polygons in pixels, less others, as a smooth mask (128, 128, 1) in 0..1."""
    image = Image.new("L", (SIZE * SUPERSAMPLING,) * 2, 0)
    draw = ImageDraw.Draw(image)
    for fill, polygons in ((255, adds), (0, cuts)):
        for polygon in polygons:
            draw.polygon([(SUPERSAMPLING * x, SUPERSAMPLING * y) for x, y in polygon], fill=fill)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX), np.float32)[..., None] / 255


def ellipse(x=0.0, y=0.0, rx=1.0, ry=None, n=36) -> Polygon:
    ry = rx if ry is None else ry
    return [(x + rx * math.cos(2 * math.pi * k / n), y + ry * math.sin(2 * math.pi * k / n)) for k in range(n)]


def box(x0, y0, x1, y1) -> Polygon:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def _star(points: int, outer: float, inner: float) -> Polygon:
    turns = [math.pi * k / points for k in range(2 * points)]
    return [(r * math.sin(a), -r * math.cos(a)) for k, a in enumerate(turns) for r in [inner if k % 2 else outer]]


def _heart(n=48) -> Polygon:
    turns = [2 * math.pi * k / n for k in range(n)]
    wave = [(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16 for a in turns]
    return [(math.sin(a) ** 3, -y) for a, y in zip(turns, wave, strict=True)]


def _blob(seed: int, n=48) -> Polygon:
    """A shapeless outline: what is left where an erased object would have been."""
    rng = random.Random(seed)
    waves = [(k, rng.uniform(0.1, 0.42) / k**0.5, rng.uniform(0, 2 * math.pi)) for k in (2, 3, 4, 5)]
    size = rng.uniform(0.45, 0.9)
    out = []
    for a in (2 * math.pi * k / n for k in range(n)):
        r = size * max(0.12, 1 + sum(c * math.sin(k * a + p) for k, c, p in waves))
        out.append((r * math.cos(a), r * math.sin(a)))
    return out


def _smile() -> Polygon:
    lower = [(0.58 * math.cos(a), 0.12 + 0.56 * math.sin(a)) for a in np.linspace(0, math.pi, 14)]
    return lower + [(0.34 * math.cos(a), 0.16 + 0.28 * math.sin(a)) for a in np.linspace(math.pi, 0, 14)]


@functools.cache
def _shapes() -> dict[str, list]:
    """object -> layers of (fixed RGB or None, polygons added, polygons cut)."""
    ghost = [(-0.72, 0.95), (-0.72, -0.2)]
    ghost += [(0.72 * math.cos(a), -0.2 + 0.78 * math.sin(a)) for a in np.linspace(math.pi, 2 * math.pi, 24)]
    ghost += [(0.72, 0.95), (0.48, 0.68), (0.24, 0.95), (0.0, 0.68), (-0.24, 0.95), (-0.48, 0.68)]
    petals = [ellipse(0.62 * math.cos(a), 0.62 * math.sin(a), 0.44) for a in (math.pi * k / 3 for k in range(6))]
    plush = [
        ((204, 146, 66), [ellipse(0, 0.12, 0.84, 0.86)], []),
        ((198, 186, 150), [ellipse(0, 0.5, 0.48, 0.4)], []),
        ((200, 198, 198), [ellipse(0, -0.16, 0.36)], []),
        (INK, [ellipse(0, -0.14, 0.18)], []),
    ]
    return {
        "circle": [(None, [ellipse()], [])],
        "square": [(None, [box(-0.86, -0.86, 0.86, 0.86)], [])],
        "triangle": [(None, [[(0, -1.05), (1.05, 0.8), (-1.05, 0.8)]], [])],
        "star": [(None, [_star(5, 1.08, 0.46)], [])],
        "sparkle": [(None, [_star(4, 1.12, 0.4)], [])],
        "heart": [(None, [_heart()], [])],
        "moon": [(None, [ellipse()], [ellipse(0.5, -0.12, 0.82)])],
        "cross": [(None, [box(-0.34, -1, 0.34, 1), box(-1, -0.34, 1, 0.34)], [])],
        "ring": [(None, [ellipse()], [ellipse(0, 0, 0.58)])],
        "target": [(None, [ellipse()], [ellipse(0, 0, 0.64)]), (None, [ellipse(0, 0, 0.36)], [])],
        "flower": [(None, petals, []), ((206, 180, 84), [ellipse(0, 0, 0.36)], [])],
        "smiley": [
            (None, [ellipse()], []),
            (INK, [ellipse(-0.36, -0.3, 0.17, 0.22), ellipse(0.36, -0.3, 0.17, 0.22), _smile()], []),
        ],
        "robot": [
            ((72, 86, 142), [box(-0.08, -1.1, 0.08, -0.8), ellipse(0, -1.06, 0.16)], []),
            ((92, 108, 164), [box(-0.7, -0.85, 0.7, 0.2), box(-0.5, 0.3, 0.5, 1.02), box(-0.2, 0.1, 0.2, 0.4)], []),
            ((72, 86, 142), [box(-0.88, 0.32, -0.58, 0.88), box(0.58, 0.32, 0.88, 0.88)], []),
            ((84, 196, 204), [ellipse(-0.32, -0.42, 0.22), ellipse(0.32, -0.42, 0.22)], []),
            (INK, [box(-0.4, -0.1, 0.4, 0.05)], []),
            ((196, 92, 76), [ellipse(0, 0.64, 0.19)], []),
        ],
        "ghost": [
            ((206, 204, 210), [ghost], []),
            (
                INK,
                [ellipse(-0.28, -0.3, 0.17, 0.22), ellipse(0.28, -0.3, 0.17, 0.22), ellipse(0, 0.16, 0.15, 0.19)],
                [],
            ),
        ],
        "quibble": [((72, 156, 150), [ellipse(-0.68, -0.66, 0.42), ellipse(0.68, -0.66, 0.42)], []), *plush],
        "nibble": [((72, 156, 150), [_ear(-1), _ear(1)], []), *plush],
    }


def _ear(side: int) -> Polygon:
    """A long upright ear, where the quibble's are round."""
    turn = side * 0.26
    return [
        (side * 0.42 + x * math.cos(turn) - y * math.sin(turn), -0.8 + x * math.sin(turn) + y * math.cos(turn))
        for x, y in ellipse(0, 0, 0.21, 0.62)
    ]
