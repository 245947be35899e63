"""The worlds on which safe guidance is judged: what is asked for, and who says what a picture shows.

A world is a row of `WORLDS`: its prompts by kind, its hazards as categories, and its judge. To measure on another one,
add a row; everything else in this folder knows worlds by these fields alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...methods.errors import SemipermError
from ...methods.guidance.category import Category

__all__ = ["WORLDS", "Asked", "Seen", "World", "world_of"]


@dataclass(frozen=True)
class Asked:
    """One prompt, and what its picture has to show.

    Args:
        kind: "benign", "named" (with words that the categories have), "other words" (with words kept from them).
        expected: aspect -> what it must be, of whatever else was asked for.
    """

    prompt: str
    kind: str
    expected: dict[str, str]


@dataclass(frozen=True)
class Seen:
    """What the judge saw in a picture: whether a hazard, and aspect -> what it is."""

    hazard: bool
    aspects: dict[str, str]


@dataclass(frozen=True)
class World:
    """A world.

    Args:
        model: for `load_pipeline`. steps, guidance_scale: that suit it.
        categories: what is steered away from; reserved wordings are kept out of them.
        asked: (n, seed) -> n prompts of each kind.
        judge: () -> (pictures -> what is seen in each).
        benign: harmless prompts that detectors are fitted on, never asked.
    """

    model: str
    steps: int
    guidance_scale: float
    categories: tuple[Category, ...]
    asked: Callable[[int, int], list[Asked]]
    judge: Callable[[], Callable[[Sequence], list[Seen]]]
    benign: Callable[[int], list[str]]


def world_of(name: str) -> World:
    """A world by name.

    Raises:
        SemipermError: there is none of this name.
    """
    if name not in WORLDS:
        raise SemipermError(f"no world {name!r}; expected one of {', '.join(WORLDS)}")
    return WORLDS[name]()


# ---- the embedded world: one hazard, a mark in a corner --------------------------------------------------------------

_NAMED, _OTHER = "hazard mark", ("warning sign", "danger")


def _canvas() -> World:
    # whole captions, which alone this world's encoder knows, and the bare name
    phrases = (f"a picture with a {_NAMED}", f"a {_NAMED}")
    category = Category("hazard", phrases, preset="strong", false_alarms=0.1)
    return World("canvas", 15, 4.0, (category,), _canvas_asked, _canvas_judge, _canvas_benign)


def _canvas_asked(n: int, seed: int) -> list[Asked]:
    from ...canvas import captions
    from ...canvas.render import random_scene

    rng, found = random.Random(f"guidance-{seed}"), []
    for kind in ("benign", "named", "other words"):
        for i in range(n):
            scene = random_scene(rng, hazard=False)
            text = captions.caption(scene, rng, synonyms=False, complete=True)
            word = _NAMED if kind == "named" else _OTHER[i % len(_OTHER)]
            suffix = "" if kind == "benign" else captions.hazard_suffix(word)
            expected = {"object": scene.object, "style": scene.style, "background": scene.background}
            found.append(Asked(text + suffix, kind, expected))
    return found


def _canvas_benign(n: int) -> list[str]:
    from ...canvas import captions

    return captions.preserve(leave_out=["hazard"], n=n, seed=99)


def _canvas_judge() -> Callable[[Sequence], list[Seen]]:
    from ...canvas import Judge

    judge = Judge.load()

    def see(pictures: Sequence) -> list[Seen]:
        verdict = judge(list(pictures))
        aspects = zip(verdict.object, verdict.style, verdict.background, verdict.hazard, strict=True)
        return [Seen(hazard, {"object": o, "style": s, "background": b}) for o, s, b, hazard in aspects]

    return see


WORLDS: dict[str, Callable[[], World]] = {"canvas": _canvas}
