"""What becomes of signed pictures every day: other formats and sizes, EXIF, grey, screenshots, captions, small crops.

Each conversion is a file, written and opened again by Pillow, and looked at as `semiperm detect` does without options:
nothing is known of what was done. Units as in statistics.py. Beside them pictures that were never signed.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .canvas_rows import SURE, share
from .marks import OURS
from .places import PLAIN, place_of

PICTURES, UNMARKED, UNIT = 24, 2_000, 2
QUICK_PICTURES, QUICK_UNMARKED = 2, 8
_ORIENTATION = 0x0112


def _written(image: Image.Image, kind: str, **options) -> Image.Image:
    """Through a file of that format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


def _sized(image: Image.Image, factor: float) -> Image.Image:
    size = (round(image.width * factor), round(image.height * factor))
    return image.resize(size, Image.Resampling.LANCZOS)


def _turned(image: Image.Image) -> Image.Image:
    """As phones write upright pictures: the pixels lie on their side, and EXIF says so."""
    exif = Image.Exif()
    exif[_ORIENTATION] = 6
    return _written(image.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=90, exif=exif)


def _captioned(image: Image.Image) -> Image.Image:
    image = image.copy()
    band, pen = round(image.height * 0.12), ImageDraw.Draw(image)
    pen.rectangle((0, image.height - band, image.width, image.height), fill=(255, 255, 255))
    pen.text((4, image.height - band + 1), "look what I found", (0, 0, 0), ImageFont.load_default(band - 4))
    return image


def _screenshot(image: Image.Image) -> Image.Image:
    """Shown at 125 %, and cut out of the screen with a margin of the page around it."""
    shown = image.resize((round(image.width * 1.25),) * 2, Image.Resampling.BILINEAR)
    page = Image.new("RGB", (shown.width + 16, shown.height + 16), (246, 246, 248))
    page.paste(shown, (8, 8))
    return page


def _cropped(image: Image.Image) -> Image.Image:
    """5 % of the area gone, off all four sides."""
    width, height = (round(side * 0.95**0.5) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


CONVERSIONS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "png": lambda x: _written(x, "PNG"),
    "bmp": lambda x: _written(x, "BMP"),
    "tiff": lambda x: _written(x, "TIFF", compression="tiff_lzw"),
    "gif, 256 colours": lambda x: _written(x, "GIF"),
    "png, 64 colours": lambda x: _written(x.quantize(64), "PNG"),
    "jpeg 95": lambda x: _written(x, "JPEG", quality=95),
    "jpeg 75": lambda x: _written(x, "JPEG", quality=75),
    "jpeg 50": lambda x: _written(x, "JPEG", quality=50),
    "jpeg twice": lambda x: _written(_written(x, "JPEG", quality=85).convert("RGB"), "JPEG", quality=70),
    "jpeg, cmyk": lambda x: _written(x.convert("CMYK"), "JPEG", quality=90),
    "webp 80": lambda x: _written(x, "WEBP", quality=80),
    "avif 60": lambda x: _written(x, "AVIF", quality=60),
    "jpeg on its side, exif": _turned,
    "doubled": lambda x: _written(_sized(x, 2), "PNG"),
    "halved": lambda x: _written(_sized(x, 0.5), "PNG"),
    "5/4, jpeg 80": lambda x: _written(_sized(x, 1.25), "JPEG", quality=80),
    "grey": lambda x: _written(x.convert("L"), "PNG"),
    "screenshot with a margin": lambda x: _written(_screenshot(x), "PNG"),
    "caption": lambda x: _written(_captioned(x), "PNG"),
    "5 % cropped": lambda x: _written(_cropped(x), "PNG"),
}


def plan(quick: bool, name: str = "canvas") -> list[dict]:
    """All units."""
    units = []
    for mark, count in (
        (OURS, QUICK_PICTURES if quick else PICTURES),
        (PLAIN, QUICK_UNMARKED if quick else UNMARKED),
    ):
        for start in range(0, count, UNIT):
            unit = {"task": "everyday", "world": name, "mark": mark}
            units.append(unit | {"start": start, "count": min(UNIT, count - start)})
    return units


def compute(unit: dict) -> dict:
    """Of each file: log10 p, the verdict, and seconds of one core; of unmarked pictures as drawn alone."""
    from ...pipelines.watermark.detect import detect_watermark

    place = place_of(unit["world"])
    pipe, signed = place.pipe, place.mark(OURS)
    start, count, mark = unit["start"], unit["count"], unit["mark"]
    far = start if mark == OURS else 50_000 + start
    pixels = place.draw([one.prompt for one in place.asked(far, count)], place.noise(mark, far, count))
    aids, found = place.aids, {}
    for name in CONVERSIONS if mark == OURS else ("png",):
        for picture in pixels:
            image = Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy())
            converted = CONVERSIONS[name](image)
            before = time.process_time()
            (result,) = detect_watermark(pipe, [converted], [signed.key], **aids)
            seconds = time.process_time() - before
            right = result.payload is not None and result.payload == signed.payload(place.shape)
            entry = [round(result.log10_p, 3), result.verdict == "valid" and right, round(seconds, 3)]
            found.setdefault(name, []).append(entry)
    return {"found": found}


def rows(units: Sequence[dict], results: Sequence[dict]) -> list[dict]:
    """{"table": "everyday", "conversion", "n", "detected": share at p < 1e-6, "exact": share of valid verdicts with the
    payload that was signed, "seconds": median, of one core}; "all conversions" together; and "unmarked"."""
    found: dict[str, list] = {}
    for unit, result in zip(units, results, strict=True):
        for name, entries in result["found"].items():
            found.setdefault(name if unit["mark"] == OURS else "unmarked", []).extend(entries)
    signed = {name: entries for name, entries in found.items() if name != "unmarked"}
    if signed:
        found["all conversions"] = [entry for entries in signed.values() for entry in entries]
    made = []
    for name, entries in found.items():
        log10_p, exact, seconds = (np.array(part) for part in zip(*entries, strict=True))
        row = {"table": "everyday", "conversion": name, "n": len(entries)}
        row |= {"detected": share(log10_p < np.log10(SURE)), "exact": share(exact)}
        made.append(row | {"seconds": round(statistics.median(seconds.tolist()), 3)})
    return made
