"""The second world's scenes: one or two things with a relation, or up to three of a kind, and what else there is.

A scene is content and pose; `canvas.drawing.draw` makes the picture, `canvas.sentences.describe` the words.
"""

import math
import random
from dataclasses import dataclass

from . import language

SIZE = 128
RELATIONS = ("left", "right", "above", "below", "front")  # a caption may say "right" and "behind" the other way round
NOTHING = "nothing"  # a shapeless smudge, or bare ground: for the judges, and for what is left of an erased object


def _known(field: str, value: str, names) -> None:
    if value not in names:
        raise ValueError(f"{field}={value!r} is not on the canvas; choose from {', '.join(filter(None, names))}")


@dataclass(frozen=True)
class Thing:
    """One object. Positions and sizes are in pixels, the angle in degrees; a character's colour is not drawn."""

    object: str = "circle"
    color: str = "red"
    cx: float = 64.0
    cy: float = 64.0
    radius: float = 36.0
    angle: float = 0.0
    flip: bool = False
    seed: int = 0  # of a smudge

    def __post_init__(self):
        _known("object", self.object, (*language.OBJECTS, NOTHING))
        _known("color", self.color, language.COLORS)


@dataclass(frozen=True)
class Scene:
    """What a picture holds.

    Args:
        things: from front to back. relation: of the first to the second ("left", "right", "above", "below", "front"),
            "" where none holds. hazards: names of hazards drawn. implied: those of them that a caption may only imply.
        memorised: name of a memorised picture, which then is all there is. phase, corner, slant: of pattern, hazard
            mark and claw marks. seed: of the texture.
    """

    things: tuple[Thing, ...] = (Thing(),)
    relation: str = ""
    style: str = "flat"
    background: str = "sand"
    hazards: tuple[str, ...] = ()
    implied: tuple[str, ...] = ()
    memorised: str = ""
    phase: tuple[float, float] = (0.0, 0.0)
    corner: int = 0
    slant: tuple[float, float] = (64.0, 64.0)
    seed: int = 0

    def __post_init__(self):
        _known("style", self.style, language.STYLES)
        _known("background", self.background, language.BACKGROUNDS)
        _known("relation", self.relation, ("", *RELATIONS))
        _known("memorised", self.memorised, ("", *language.MEMORISED))
        for name in (*self.hazards, *self.implied):
            _known("hazard", name, language.HAZARDS)
        if set(language.OPPOSED) <= set(self.hazards):
            raise ValueError(f"a picture shows one of {' and '.join(language.OPPOSED)}, not both")

    @property
    def objects(self) -> tuple[str, ...]:
        """Names of the things, front to back, without smudges."""
        return tuple(t.object for t in self.things if t.object != NOTHING)


def random_scene(
    rng: random.Random,
    *,
    objects: tuple[str, ...] | None = None,
    relation: str | None = None,
    count: int | None = None,
    hazards: tuple[str, ...] | None = None,
    **fixed,
) -> Scene:
    """Draw a scene with random content and pose.

    Args:
        objects: one name, or two different ones; None draws them. relation: of the first to the second; "" places them
            anywhere; None draws it. count: how many of the one object, 1 to 3. hazards: names; None draws them.
        fixed: other fields of Scene.
    """
    if objects is None:
        kind = rng.random()
        two, several = kind < 0.38 and (count or 1) == 1, 0.38 <= kind < 0.52
        objects = tuple(rng.sample(language.OBJECTS, 2)) if two else (rng.choice(language.OBJECTS),)
        if count is None:
            count = rng.choice((2, 3)) if several else 1
    if len(objects) > 2 or (len(objects) == 2 and (count or 1) != 1):
        raise ValueError(f"expected one object, or two of one each, got {objects} with count={count}")
    if relation is None:
        relation = rng.choice((*RELATIONS, "")) if len(objects) == 2 else ""
    if len(objects) == 2:
        things = _pair(rng, objects, relation)
    else:
        things = _several(rng, objects[0], count or 1)
    if hazards is None:
        left_out = rng.choice(language.OPPOSED)
        rates = {h: 0.09 if h in language.OPPOSED else 0.05 for h in language.HAZARDS} | {left_out: 0.0}
        hazards = tuple(h for h, rate in rates.items() if rng.random() < rate)
    implied = tuple(h for h in hazards if h in language.IMPLIED and rng.random() < 0.5)
    choice = {
        "style": rng.choice(language.STYLES),
        "background": rng.choice(language.BACKGROUNDS),
        "implied": implied,
        "phase": (rng.random(), rng.random()),
        "corner": rng.randrange(4),
        "slant": (rng.uniform(40, 88), rng.uniform(40, 88)),
        "seed": rng.randrange(2**31),
    }
    return Scene(**{"things": things, "relation": relation, "hazards": hazards, **choice, **fixed})


def smudged(rng: random.Random, scene: Scene) -> Scene:
    """Return the scene with one of its things replaced by a smudge of its colour, or taken out."""
    place = rng.randrange(len(scene.things))
    thing = scene.things[place]
    smudge = Thing(NOTHING, thing.color, thing.cx, thing.cy, thing.radius, seed=rng.randrange(2**31))
    kept = list(scene.things)
    kept[place : place + 1] = [smudge] if rng.random() < 0.6 else []
    fields = {name: getattr(scene, name) for name in scene.__dataclass_fields__}
    return Scene(**{**fields, "things": tuple(kept), "relation": ""})


def _thing(rng: random.Random, name: str, color: str, cx: float, cy: float, radius: float) -> Thing:
    return Thing(name, color, cx, cy, radius, rng.uniform(-15, 15), rng.random() < 0.5, rng.randrange(2**31))


def _pair(rng: random.Random, names: tuple[str, ...], relation: str) -> tuple[Thing, ...]:
    colors = rng.choice(language.COLORS), rng.choice(language.COLORS)
    if relation == "front":
        colors = rng.sample(language.COLORS, 2)  # or they would melt into each other
        turn = rng.choice((0, math.pi / 4, -math.pi / 4)) + rng.choice((0, math.pi)) + rng.uniform(-0.2, 0.2)
        reach = rng.uniform(15, 18)
        x, y = reach * math.cos(turn), reach * math.sin(turn)
        radii = [rng.uniform(25, 28) for _ in names]
        places = [(64 + x, 64 + y), (64 - x, 64 - y)]
    else:
        side = relation or rng.choice(("left", "right", "above", "below"))
        far = [rng.uniform(29, 34) for _ in names]
        along = [rng.uniform(-9, 9) for _ in names]
        sign = -1 if side in ("left", "above") else 1
        places = [(sign * far[0], along[0]), (-sign * far[1], along[1])]
        if side in ("above", "below"):
            places = [(y, x) for x, y in places]
        places = [(64 + x, 64 + y) for x, y in places]
        radii = [rng.uniform(23, 27) for _ in names]
    return tuple(_thing(rng, n, c, *p, r) for n, c, p, r in zip(names, colors, places, radii, strict=True))


def _several(rng: random.Random, name: str, count: int) -> tuple[Thing, ...]:
    color = rng.choice(language.COLORS)
    if count == 1:
        return (_thing(rng, name, color, 64 + rng.uniform(-8, 8), 64 + rng.uniform(-8, 8), rng.uniform(30, 40)),)
    if count not in (2, 3):
        raise ValueError(f"count={count}: a canvas picture holds one to three of a kind")
    turn = rng.uniform(0, 2 * math.pi)
    reach, small, large = (31, 22, 26) if count == 2 else (34, 19, 22)
    out = []
    for k in range(count):
        a = turn + 2 * math.pi * k / count
        x, y = 64 + reach * math.cos(a) + rng.uniform(-3, 3), 64 + reach * math.sin(a) + rng.uniform(-3, 3)
        out.append(_thing(rng, name, color, x, y, rng.uniform(small, large)))
    return tuple(out)
