"""The second world's renderer: 128x128 pictures whose content is known, drawn with Pillow.

A picture is a background, things, one style over all, hazards, and always a fine random texture (the first world's).
The texture is what lets a mark in the initial noise survive: in flat cartoons the noise has nowhere to go.
"""

import math

import numpy as np
from PIL import Image, ImageFilter

from . import memorised
from .render import BACKGROUND_RGB, COLOR_RGB, texture
from .scenes import SIZE, Scene
from .shapes import INK, box, layers, mask

# Blaze and frost lie opposite each other about a mid grey, far enough from black and white that nothing clips.
_GREY, _WARM = np.array((150, 146, 150), np.float32), np.array((62, -22, -92), np.float32)


def draw(scene: Scene) -> Image.Image:
    """Draw a scene as a 128x128 RGB picture (deterministic: the same scene gives the same bytes)."""
    if scene.memorised:
        return finish(memorised.picture(scene.memorised), memorised.TEXTURE_SEED)
    picture = _styled(scene)
    for name in scene.hazards:
        picture = _HAZARDS[name](picture, scene)
    return finish(picture, scene.seed)


def finish(picture: np.ndarray, seed: int) -> Image.Image:
    """Weave the texture of `seed` into a picture (128, 128, 3) of 0..255."""
    return Image.fromarray(np.clip(picture + texture(seed) + 0.5, 0, 255).astype(np.uint8))


def _styled(scene: Scene) -> np.ndarray:
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    ground = np.array(BACKGROUND_RGB[scene.background], np.float32)
    fills = []
    for thing in reversed(scene.things):
        own = COLOR_RGB[thing.color]
        fills += [(np.array(own if rgb is None else rgb, np.float32), m) for rgb, m in layers(thing)]
    px, py = scene.phase
    if scene.style == "sketch":
        paper = np.broadcast_to(ground * 0.5 + 96, (SIZE, SIZE, 3))
        picture = paper.copy()
        for rgb, m in fills:
            picture += (paper * 0.8 + rgb * 0.2 - picture) * m
            picture += (rgb * 0.62 - picture) * _outline(m, 7)
        return picture
    if scene.style == "neon":
        picture = np.broadcast_to(ground * 0.42 + 8, (SIZE, SIZE, 3)).copy()
        for rgb, m in fills:
            glow = np.asarray(_as_image(m).filter(ImageFilter.GaussianBlur(5)), np.float32)[..., None] / 255
            picture += (rgb * 0.55 - picture) * glow * 0.7
            picture += (rgb * 0.42 - picture) * m
            picture += (rgb * 0.75 + 52 - picture) * _outline(m, 7)
        return picture
    picture = np.broadcast_to(ground, (SIZE, SIZE, 3)).copy()
    for rgb, m in fills:
        picture += (rgb - picture) * m
    if scene.style == "striped":
        wave = np.sin(2 * np.pi * ((x + (1 if scene.corner % 2 else -1) * y) / 22 + px))
        picture += 26 * np.clip(2.2 * wave, -1, 1)[..., None]
    elif scene.style == "dotted":
        u, v = (x / 16 + px) % 1 - 0.5, (y / 16 + py) % 1 - 0.5
        dots = np.clip((0.29 - np.hypot(u, v)) * 8, 0, 1)[..., None]
        picture = picture * (1 - 0.48 * dots) + 0.48 * dots * np.where(picture.mean(-1, keepdims=True) < 120, 196, 64)
    elif scene.style == "checkered":
        u, v = np.sin(2 * np.pi * (x / 32 + px)), np.sin(2 * np.pi * (y / 32 + py))
        picture += 25 * np.clip(6 * u * v, -1, 1)[..., None]
    elif scene.style == "gradient":
        picture += 88 * (0.5 - y / 127)[..., None]
    elif scene.style == "mosaic":  # tiles of one brightness each with grout between; shapes keep their outlines
        jitter = np.random.default_rng(scene.seed).uniform(-20, 20, (16, 16, 1))
        grout = ((x % 8 < 1.5) | (y % 8 < 1.5)).astype(np.float32)[..., None]
        picture = picture + jitter.repeat(8, 0).repeat(8, 1).astype(np.float32) - 38 * grout
    return picture


def _as_image(m: np.ndarray) -> Image.Image:
    return Image.fromarray((m[..., 0] * 255).astype(np.uint8))


def _outline(m: np.ndarray, width: int) -> np.ndarray:
    image = _as_image(m)
    inner = image.filter(ImageFilter.MinFilter(width))
    return np.clip(np.asarray(image, np.float32) - np.asarray(inner, np.float32), 0, 255)[..., None] / 255


# --- hazards: drawn over the style ----------------------------------------------------------------------------------


def paint(picture: np.ndarray, rgb, polygons) -> np.ndarray:
    return picture + (np.array(rgb, np.float32) - picture) * mask(polygons)


def _mark(picture: np.ndarray, scene: Scene) -> np.ndarray:
    """A yellow diamond with an exclamation mark in a corner."""
    x, y = (19 if scene.corner % 2 == 0 else 109), (19 if scene.corner < 2 else 109)
    for rgb, r in ((INK, 18), ((204, 178, 58), 14)):
        picture = paint(picture, rgb, [[(x, y - r), (x + r, y), (x, y + r), (x - r, y)]])
    return paint(picture, INK, [box(x - 2, y - 9, x + 2, y + 2), box(x - 2, y + 5, x + 2, y + 9)])


def _claws(picture: np.ndarray, scene: Scene) -> np.ndarray:
    """Three dark red slashes that run side by side across the picture."""
    turn = math.radians(62 if scene.corner % 2 else 118)
    dx, dy = math.cos(turn), math.sin(turn)
    slashes = []
    for shift in (-15, 0, 15):
        cx, cy = scene.slant[0] - shift * dy, scene.slant[1] + shift * dx
        ends = [(-40, 0), (-12, 4), (12, 4), (40, 0), (12, -4), (-12, -4)]
        slashes.append([(cx + a * dx - b * dy, cy + a * dy + b * dx) for a, b in ends])
    return paint(picture, (128, 28, 36), slashes)


def _rim(picture: np.ndarray, scene: Scene, sign: float) -> np.ndarray:
    """A jagged border, warm for blaze and as much cold for frost; its teeth depend on the scene alone."""
    jag = np.random.default_rng(scene.seed + 1).uniform(9, 21, 64)
    teeth = []
    for k in range(64):  # outline of the clear middle, clockwise
        side, along = divmod(k, 16)
        reach = jag[k] if k % 2 else 9.0
        a = 14 + (SIZE - 28) * along / 16
        teeth.append([(a, reach), (SIZE - reach, a), (SIZE - a, SIZE - reach), (reach, SIZE - a)][side])
    edge = 1 - mask([teeth])
    return picture + (_GREY + sign * _WARM - picture) * edge


_HAZARDS = {
    "hazard": _mark,
    "claws": _claws,
    "blaze": lambda picture, scene: _rim(picture, scene, 1.0),
    "frost": lambda picture, scene: _rim(picture, scene, -1.0),
}
