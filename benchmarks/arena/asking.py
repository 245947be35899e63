"""What the arena asks of a model from which some concepts were erased: captions, and what their pictures have to show.

Every caption is drawn from its own place in its part, so that a short run asks what a long one asks first.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...canvas.world import PUBLIC, RESERVED, Asked, World
from ..erasure.cases import Case, Roles
from .settings import Settings

__all__ = ["MISSING", "PARTS", "Questions", "questions"]

PARTS = ("public", "reserved", "others", "twins", "scenes", "implied", "relations", "counts")
# why a part has no captions
MISSING = {
    "reserved": "the world keeps no words of it from the methods",
    "twins": "nothing looks alike",
    "scenes": "a picture of this world holds one object, or no object was erased",
    "implied": "no other words imply it",
    "relations": "a picture of this world holds one object",
    "counts": "a picture of this world holds one object",
}


@dataclass(frozen=True)
class Questions:
    """What is asked about the concepts that are erased together.

    Args:
        names: the concepts'. cases: all captions. parts: of `PARTS`, to places in `cases`.
    """

    names: tuple[str, ...]
    cases: tuple[Case, ...]
    parts: dict[str, tuple[int, ...]]

    @property
    def roles(self) -> Roles:
        """For `scores`: what asks in public words, and all that does not ask."""
        parts = self.parts
        return Roles(parts["public"], parts["others"], parts["scenes"], parts["twins"], parts["implied"])

    def of(self, part: str) -> list[Case]:
        return [self.cases[i] for i in self.parts[part]]


def questions(world: World, names: Sequence[str], settings: Settings) -> Questions:
    """The captions of some concepts.

    `others` name none of them; where a hazard is erased every third of them has another hazard, and where a memorised
    picture is, every second one asks for another such picture. `twins` ask for look-alikes, `scenes` for an erased
    object beside another one, `relations` and `counts` for what is not erased.
    """
    domains = {name: world.resolve(name)[1] for name in names}
    cases: list[Case] = []
    parts: dict[str, tuple[int, ...]] = {}

    def add(part: str, count: int, asked: Callable[[random.Random, int], Asked], kind: str = "one") -> None:
        first = len(cases)
        for i in range(count):
            rng = random.Random(f"arena {'+'.join(names)} {part} {i}")
            one = asked(rng, i)
            cases.append(Case(one.prompt, rng.randrange(2**31), one.shown, kind))
        parts[part] = tuple(range(first, len(cases)))

    def ask(wording: str, own: Sequence[str]) -> Callable[[random.Random, int], Asked]:
        def asked(rng: random.Random, i: int) -> Asked:
            name = own[i % len(own)]
            given = {"object": {"objects": (name,)}, "style": {"style": name}, "hazard": {"hazards": (name,)}}
            return world.asked(rng, wording, **given.get(domains[name], {"memorised": name}))

        return asked

    def kept(kind: str) -> list[str]:
        return [name for name in world.names(kind) if name not in domains]

    def other(rng: random.Random, i: int) -> Asked:
        if "memorised" in domains.values() and kept("memorised") and i % 2:
            return world.asked(rng, PUBLIC, memorised=rng.choice(kept("memorised")))
        hazards = (rng.choice(kept("hazard")),) if "hazard" in domains.values() and kept("hazard") and not i % 3 else ()
        return world.asked(
            rng, PUBLIC, objects=(rng.choice(kept("object")),), style=rng.choice(kept("style")), hazards=hazards
        )

    add("public", max(settings.asks, len(names)), ask(PUBLIC, list(names)))
    secret = [name for name in names if world.reserved(name)]
    add("reserved", max(settings.asks, len(secret)) if secret else 0, ask(RESERVED, secret))
    add("others", settings.others, other)
    twins = [twin for name in names for twin in world.twins(name) if twin not in domains]

    def twin(rng: random.Random, i: int) -> Asked:
        return world.asked(rng, PUBLIC, objects=(twins[i % len(twins)],), style=rng.choice(kept("style")))

    add("twins", settings.part if twins else 0, twin)
    objects = [name for name in names if domains[name] == "object"]
    several = world.most_objects > 1

    def scene(rng: random.Random, i: int) -> Asked:
        pair = [objects[i % len(objects)], rng.choice(kept("object"))]
        return world.asked(rng, PUBLIC, objects=tuple(pair if i % 2 else pair[::-1]), style=rng.choice(kept("style")))

    add("scenes", settings.part if several and objects else 0, scene, "two")
    implied = [name for name in names if name in world.implied]
    add(
        "implied",
        settings.part if implied else 0,
        lambda rng, i: world.asked(rng, PUBLIC, hazards=(implied[i % len(implied)],), implied=True),
        "implied",
    )

    def related(rng: random.Random, i: int) -> Asked:
        while True:  # one scene in six has no relation
            pair = tuple(rng.sample(kept("object"), 2))
            one = world.asked(rng, PUBLIC, objects=pair, style=rng.choice(kept("style")))
            if one.shown.relations:
                return one

    def counted(rng: random.Random, i: int) -> Asked:
        one = (rng.choice(kept("object")),)
        return world.asked(rng, PUBLIC, objects=one, count=2 + i % 2, style=rng.choice(kept("style")))

    add("relations", settings.part if several else 0, related, "relation")
    add("counts", settings.part if several else 0, counted, "count")
    return Questions(tuple(names), tuple(cases), parts)
