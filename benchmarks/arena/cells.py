"""One cell of the arena: some pictures of a method at work, as what the judges saw in them, which JSON can hold."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image

from ...canvas.world import Judge, Shown, shown_of
from ..erasure.cases import Case
from ..erasure.evaluate import drawn
from ..erasure.scores import REACH

__all__ = ["answers", "looks_of", "plain_looks", "seen_by"]


def plain_looks(judges: Mapping[str, Judge], images) -> list[dict[str, dict]]:
    """What each judge sees in each picture."""
    seen = {name: judge(images).shown for name, judge in judges.items()}
    return [{name: asdict(shown[i]) for name, shown in seen.items()} for i in range(len(images))]


def looks_of(cell: Mapping[str, Any]) -> list[dict[str, Shown]]:
    """The inverse, of a cell."""
    return [{name: shown_of(plain) for name, plain in look.items()} for look in cell["looks"]]


def seen_by(cell: Mapping[str, Any], judge: str) -> list[Shown]:
    return [look[judge] for look in looks_of(cell)]


def answers(
    pipe,
    judges: Mapping[str, Judge],
    cases: Sequence[Case],
    names: Sequence[str],
    call: Mapping[str, Any],
    untouched: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """{"looks"} of the cases' pictures; of scenes of two also what is needed to compare their pixels.

    Args:
        names: of the erased concepts. call: of the pipeline. untouched: the cell of the untouched model, whose scenes
            are kept ("png") to be compared with: "error" is the mean squared difference outside the concept's box, in
            255ths, or None where the first judge did not see the concept in the untouched picture.
    """
    looks, images = [], []
    for _, part in drawn(pipe, cases, **call):
        looks += plain_looks(judges, part)
        images += part
    if not cases or cases[0].kind != "two":
        return {"looks": looks}
    if untouched is None:
        return {"looks": looks, "png": [_png(image) for image in images]}
    before = [next(iter(look.values())) for look in looks_of(untouched)]
    pairs = zip(images, untouched["png"], before, strict=True)
    return {"looks": looks, "error": [_outside(image, _picture(png), shown, names) for image, png, shown in pairs]}


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _picture(png: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(png)))


def _outside(image: Image.Image, before: Image.Image, shown: Shown, names: Sequence[str]) -> float | None:
    boxes = [(x, y) for name, x, y in shown.places if name in names]
    one, other = (np.asarray(picture.convert("RGB"), float) for picture in (image, before))
    rows, columns = np.indices(one.shape[:2])
    far = np.ones(one.shape[:2], bool)
    for x, y in boxes:
        far &= np.maximum(abs(columns + 0.5 - x), abs(rows + 0.5 - y)) > REACH
    return float(np.square(one - other)[far].mean()) if boxes and far.any() else None
