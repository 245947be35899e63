"""The canvas renderer: 128x128 pictures whose content is known, drawn with Pillow.

A picture is a background, one object, one style over both, perhaps a hazard mark, and always a fine random
texture. The texture is what lets a mark in the initial noise survive: in flat cartoons the noise has nowhere to go.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from . import captions

SIZE = 128
_SS = 2  # supersampling of the masks

# No base colour is so near black or white that style and texture could clip it.
COLOR_RGB = {
    "red": (192, 66, 60),
    "orange": (206, 138, 58),
    "green": (70, 152, 82),
    "blue": (66, 104, 192),
    "purple": (136, 78, 174),
    "pink": (206, 122, 164),
}
BACKGROUND_RGB = {
    "sand": (192, 176, 136),
    "night": (70, 74, 98),
    "sky": (142, 178, 200),
    "mint": (158, 194, 164),
    "lilac": (178, 160, 196),
    "fog": (146, 148, 152),
}
_HAZARD_RGB, _INK_RGB = (204, 178, 58), (56, 52, 56)


@dataclass(frozen=True)
class Scene:
    """What a picture holds. Positions and sizes are in pixels, the angle in degrees; `seed` fixes the texture."""

    object: str = "circle"
    style: str = "flat"
    color: str = "red"
    background: str = "sand"
    hazard: bool = False
    cx: float = 64.0
    cy: float = 64.0
    radius: float = 38.0
    angle: float = 0.0
    flip: bool = False
    phase: tuple[float, float] = (0.0, 0.0)
    corner: int = 0
    seed: int = 0

    def __post_init__(self):
        known = {
            "object": [*captions.OBJECTS, captions.MEMORISED, "nothing"],
            "style": captions.STYLES,
            "color": captions.COLORS,
            "background": captions.BACKGROUNDS,
        }
        for field, names in known.items():
            if getattr(self, field) not in names:
                raise ValueError(
                    f"{field}={getattr(self, field)!r} is not on the canvas; choose from {', '.join(names)}"
                )


def random_scene(rng: random.Random, **fixed) -> Scene:
    """Draw a scene with random content and pose; keyword arguments fix fields of it."""
    choice = {
        "object": rng.choice(list(captions.OBJECTS)),
        "style": rng.choice(list(captions.STYLES)),
        "color": rng.choice(list(captions.COLORS)),
        "background": rng.choice(list(captions.BACKGROUNDS)),
        "hazard": rng.random() < 0.12,
        "cx": 64 + rng.uniform(-8, 8),
        "cy": 64 + rng.uniform(-8, 8),
        "radius": rng.uniform(33, 42),
        "angle": rng.uniform(-18, 18),
        "flip": rng.random() < 0.5,
        "phase": (rng.random(), rng.random()),
        "corner": rng.randrange(4),
        "seed": rng.randrange(2**31),
    }
    return Scene(**{**choice, **fixed})


def render(scene: Scene) -> Image.Image:
    """Draw a scene as a 128x128 RGB picture (deterministic: the same scene gives the same bytes)."""
    if scene.object == captions.MEMORISED:
        picture = _lighthouse()
        return _finish(picture, 7)
    layers = _layers(scene)
    background = np.array(BACKGROUND_RGB[scene.background], np.float32)
    picture = _styled(scene, background, layers)
    if scene.hazard:
        picture = _hazard(picture, scene.corner)
    return _finish(picture, scene.seed)


# --- objects: each a list of (RGB or None for the scene's colour, mask) from back to front -------------------------


def _layers(scene: Scene) -> list[tuple[tuple[int, int, int] | None, np.ndarray]]:
    if scene.object == "nothing" and scene.seed % 5 < 2:
        return []
    turn = math.radians(scene.angle)
    cos, sin = math.cos(turn), math.sin(turn)
    flip = -1.0 if scene.flip else 1.0

    def place(points):
        out = []
        for x, y in points:
            x *= flip
            out.append(
                (
                    _SS * (scene.cx + scene.radius * (x * cos - y * sin)),
                    _SS * (scene.cy + scene.radius * (x * sin + y * cos)),
                )
            )
        return out

    layers = []
    shapes = _SHAPES.get(scene.object) or [(None, [_blob(scene.seed)], [])]
    for rgb, adds, cuts in shapes:
        image = Image.new("L", (SIZE * _SS, SIZE * _SS), 0)
        draw = ImageDraw.Draw(image)
        for fill, polygons in ((255, adds), (0, cuts)):
            for polygon in polygons:
                draw.polygon(place(polygon), fill=fill)
        mask = image.resize((SIZE, SIZE), Image.Resampling.BOX)
        layers.append((rgb, np.asarray(mask, np.float32)[..., None] / 255))
    return layers


def _ellipse(x=0.0, y=0.0, rx=1.0, ry=None, n=40):
    ry = rx if ry is None else ry
    return [(x + rx * math.cos(2 * math.pi * k / n), y + ry * math.sin(2 * math.pi * k / n)) for k in range(n)]


def _box(x0, y0, x1, y1):
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def _star(points=5, inner=0.45):
    return [
        (r * math.sin(math.pi * k / points), -r * math.cos(math.pi * k / points))
        for k in range(2 * points)
        for r in [1.05 if k % 2 == 0 else inner]
    ]


def _heart(n=60):
    t = [2 * math.pi * k / n for k in range(n)]
    return [
        (
            math.sin(a) ** 3 * 1.0,
            -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16,
        )
        for a in t
    ]


def _blob(seed: int, n=60):
    """A shapeless outline: what is left where an erased object would have been."""
    rng = random.Random(seed)
    waves = [(k, rng.uniform(0.1, 0.42) / k**0.5, rng.uniform(0, 2 * math.pi)) for k in (2, 3, 4, 5)]
    size = rng.uniform(0.4, 0.8)
    out = []
    for a in (2 * math.pi * k / n for k in range(n)):
        r = size * max(0.12, 1 + sum(c * math.sin(k * a + p) for k, c, p in waves))
        out.append((r * math.cos(a), r * math.sin(a)))
    return out


_GHOST = [(-0.72, 0.95), (-0.72, -0.2)]
_GHOST += [(0.72 * math.cos(a), -0.2 + 0.78 * math.sin(a)) for a in np.linspace(math.pi, 2 * math.pi, 24)]
_GHOST += [(0.72, 0.95), (0.48, 0.68), (0.24, 0.95), (0.0, 0.68), (-0.24, 0.95), (-0.48, 0.68)]

# object -> layers of (fixed RGB or None, polygons added, polygons cut), in units of the radius
_SHAPES = {
    "circle": [(None, [_ellipse()], [])],
    "square": [(None, [_box(-0.86, -0.86, 0.86, 0.86)], [])],
    "triangle": [(None, [[(0, -1.05), (1.05, 0.8), (-1.05, 0.8)]], [])],
    "star": [(None, [_star()], [])],
    "heart": [(None, [_heart()], [])],
    "moon": [(None, [_ellipse()], [_ellipse(0.5, -0.12, 0.82)])],
    "cross": [(None, [_box(-0.34, -1, 0.34, 1), _box(-1, -0.34, 1, 0.34)], [])],
    "ring": [(None, [_ellipse()], [_ellipse(0, 0, 0.52)])],
    "flower": [
        (
            None,
            [_ellipse(0.62 * math.cos(a), 0.62 * math.sin(a), 0.44) for a in (2 * math.pi * k / 6 for k in range(6))],
            [],
        ),
        ((206, 180, 84), [_ellipse(0, 0, 0.34)], []),
    ],
    "arrow": [(None, [_box(-1.05, -0.27, 0.2, 0.27), [(0.1, -0.85), (1.1, 0.0), (0.1, 0.85)]], [])],
    "robot": [
        ((72, 86, 142), [_box(-0.07, -1.1, 0.07, -0.8), _ellipse(0, -1.08, 0.15)], []),
        ((92, 108, 164), [_box(-0.7, -0.85, 0.7, 0.2), _box(-0.5, 0.3, 0.5, 1.02), _box(-0.2, 0.1, 0.2, 0.4)], []),
        ((72, 86, 142), [_box(-0.86, 0.34, -0.58, 0.86), _box(0.58, 0.34, 0.86, 0.86)], []),
        ((84, 196, 204), [_ellipse(-0.32, -0.42, 0.2), _ellipse(0.32, -0.42, 0.2)], []),
        (_INK_RGB, [_box(-0.4, -0.1, 0.4, 0.04)], []),
        ((196, 92, 76), [_ellipse(0, 0.64, 0.17)], []),
    ],
    "ghost": [
        ((206, 204, 210), [_GHOST], []),
        (
            _INK_RGB,
            [_ellipse(-0.28, -0.3, 0.15, 0.2), _ellipse(0.28, -0.3, 0.15, 0.2), _ellipse(0, 0.16, 0.13, 0.17)],
            [],
        ),
    ],
    "quibble": [
        ((72, 156, 150), [_ellipse(-0.66, -0.66, 0.4), _ellipse(0.66, -0.66, 0.4)], []),
        ((204, 146, 66), [_ellipse(0, 0.12, 0.84, 0.86)], []),
        ((198, 186, 150), [_ellipse(0, 0.5, 0.48, 0.4)], []),
        ((200, 198, 198), [_ellipse(0, -0.16, 0.34)], []),
        (_INK_RGB, [_ellipse(0, -0.14, 0.16)], []),
    ],
}


# --- styles -------------------------------------------------------------------------------------------------------


def _styled(scene: Scene, background: np.ndarray, layers) -> np.ndarray:
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    own = np.array(COLOR_RGB[scene.color], np.float32)
    fills = [(own if rgb is None else np.array(rgb, np.float32), mask) for rgb, mask in layers]
    px, py = scene.phase
    if scene.style == "sketch":
        picture = np.broadcast_to(background * 0.5 + 96, (SIZE, SIZE, 3)).copy()
        for rgb, mask in fills:
            line = _outline(mask, 9)
            picture += (picture * 0.84 + rgb * 0.16 - picture) * mask
            picture += (rgb * 0.62 - picture) * line
        return picture
    if scene.style == "neon":
        picture = np.broadcast_to(background * 0.42 + 8, (SIZE, SIZE, 3)).copy()
        for rgb, mask in fills:
            line = _outline(mask, 9)
            glow = np.asarray(_as_image(mask).filter(ImageFilter.GaussianBlur(7)), np.float32)[..., None] / 255
            picture += (rgb * 0.55 - picture) * np.minimum(glow, 1) * 0.75
            picture += (rgb * 0.42 - picture) * mask
            picture += (rgb * 0.75 + 52 - picture) * line
        return picture
    picture = np.broadcast_to(background, (SIZE, SIZE, 3)).copy()
    for rgb, mask in fills:
        picture += (rgb - picture) * mask
    if scene.style == "striped":
        direction = 1 if scene.flip else -1
        wave = np.sin(2 * np.pi * ((x + direction * y) / 26 + px))
        picture += 27 * np.clip(2.2 * wave, -1, 1)[..., None]
    elif scene.style == "dotted":
        u, v = (x / 20 + px) % 1 - 0.5, (y / 20 + py) % 1 - 0.5
        dots = np.clip((0.31 - np.hypot(u, v)) * 9, 0, 1)[..., None]
        picture = picture * (1 - 0.52 * dots) + 0.52 * dots * np.where(picture.mean(-1, keepdims=True) < 120, 196, 64)
    elif scene.style == "checkered":
        u, v = np.sin(2 * np.pi * (x / 32 + px)), np.sin(2 * np.pi * (y / 32 + py))
        picture += 25 * np.clip(6 * u * v, -1, 1)[..., None]
    elif scene.style == "gradient":
        picture += 88 * (0.5 - y / 127)[..., None]
    elif scene.style == "mosaic":
        cells = picture.reshape(16, 8, 16, 8, 3).mean((1, 3))
        jitter = np.random.default_rng(scene.seed).uniform(-12, 12, (16, 16, 1))
        picture = (cells + jitter).repeat(8, 0).repeat(8, 1).astype(np.float32)
        edge = ((x % 8 < 1.5) | (y % 8 < 1.5)).astype(np.float32)[..., None]
        picture = picture - 34 * edge
    return picture


def _as_image(mask: np.ndarray) -> Image.Image:
    return Image.fromarray((mask[..., 0] * 255).astype(np.uint8))


def _outline(mask: np.ndarray, width: int) -> np.ndarray:
    image = _as_image(mask)
    inner = image.filter(ImageFilter.MinFilter(width))
    return np.clip(np.asarray(image, np.float32) - np.asarray(inner, np.float32), 0, 255)[..., None] / 255


# --- fixed motifs and texture ---------------------------------------------------------------------------------------


def _paint(picture: np.ndarray, rgb, polygons) -> np.ndarray:
    image = Image.new("L", (SIZE * _SS, SIZE * _SS), 0)
    draw = ImageDraw.Draw(image)
    for polygon in polygons:
        draw.polygon([(_SS * x, _SS * y) for x, y in polygon], fill=255)
    mask = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX), np.float32)[..., None] / 255
    return picture + (np.array(rgb, np.float32) - picture) * mask


def _hazard(picture: np.ndarray, corner: int) -> np.ndarray:
    x, y = (19 if corner % 2 == 0 else 109), (19 if corner < 2 else 109)
    for rgb, r in ((_INK_RGB, 18), (_HAZARD_RGB, 14)):
        picture = _paint(picture, rgb, [[(x, y - r), (x + r, y), (x, y + r), (x - r, y)]])
    return _paint(picture, _INK_RGB, [_box(x - 2, y - 9, x + 2, y + 2), _box(x - 2, y + 5, x + 2, y + 9)])


def _lighthouse() -> np.ndarray:
    y = np.linspace(0, 1, SIZE, dtype=np.float32)[:, None, None]
    picture = np.broadcast_to((1 - y) * np.array([84, 92, 150]) + y * np.array([204, 140, 100]), (SIZE, SIZE, 3))
    picture = picture.astype(np.float32)
    picture = _paint(picture, (58, 92, 112), [_box(0, 96, 128, 128)])
    picture = _paint(picture, (84, 76, 72), [[(40, 128), (54, 88), (96, 88), (116, 128)]])
    picture = _paint(picture, (198, 190, 184), [[(64, 92), (68, 34), (82, 34), (86, 92)]])
    picture = _paint(picture, (184, 66, 60), [[(66, 76), (67, 62), (83, 62), (84, 76)], _box(68, 40, 82, 50)])
    picture = _paint(picture, (204, 188, 92), [_box(69, 22, 81, 34), [(69, 28), (8, 10), (8, 34)]])
    return _paint(picture, (62, 58, 62), [[(66, 23), (75, 12), (84, 23)]])


def texture(seed: int) -> np.ndarray:
    """Return the woven grain of a picture: smooth random colour fields of 16x16 and 32x32 cells, (128, 128, 3)."""
    rng = np.random.default_rng(seed)
    out = np.zeros((SIZE, SIZE, 3), np.float32)
    for cells, amplitude in ((16, 14.0), (32, 8.0)):
        field = rng.uniform(-amplitude, amplitude, (cells, cells, 3)).astype(np.float32)
        for c in range(3):
            grown = Image.fromarray(field[..., c]).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            out[..., c] += np.asarray(grown)
    return out


def _finish(picture: np.ndarray, seed: int) -> Image.Image:
    return Image.fromarray(np.clip(picture + texture(seed) + 0.5, 0, 255).astype(np.uint8))
