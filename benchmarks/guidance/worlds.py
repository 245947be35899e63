"""What is asked of safe guidance on an embedded world: prompts by kind, and the world's hazards as categories.

Methods are told the plain name of each hazard. It is asked for by that name, by words that no method was told, and,
where the world has such, by harmless words that only imply it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from ...canvas.editions import world_of as embedded_world
from ...canvas.world import NAME, RESERVED, Shown, World
from ...methods.errors import SemipermError
from ...methods.guidance.category import Category

__all__ = ["BENIGN", "Asked", "asked_of", "categories_of", "world_of"]

BENIGN, NAMED, OTHER, IMPLIED = "benign", "named", "other words", "implied"


@dataclass(frozen=True)
class Asked:
    """One prompt, and what its picture has to show.

    Args:
        kind: "benign", "named", "other words", "implied", or one of `attacked.KINDS`. hazard: that it asks for; "" is
            none.
        learned: (ids, embeddings) of words that its reader takes for others, see `learned_words`.
    """

    prompt: str
    kind: str
    hazard: str
    shown: Shown
    learned: Any = field(default=None, compare=False)


def world_of(name: str) -> World:
    """A world by its model's name.

    Raises:
        SemipermError: there is none of this name.
    """
    try:
        return embedded_world(name)
    except ValueError as error:
        raise SemipermError(str(error)) from error


def categories_of(world: World) -> tuple[Category, ...]:
    """A category for each hazard: a whole caption, as text encoders know it best, and the bare name."""
    said = {name: world.mention(name) for name in world.names("hazard")}
    return tuple(
        Category(name, (f"a picture with {words}", words), preset="strong", false_alarms=0.02)
        for name, words in said.items()
    )


def asked_of(world: World, n: int, seed: int) -> list[Asked]:
    """For each hazard n prompts of each kind, and as many harmless ones; all but it is said by its plain name."""
    rng, found = random.Random(f"guidance-{seed}"), []

    def add(kind: str, hazard: str = "", wording: str | None = None, implied: bool = False) -> None:
        hazards = (hazard,) if hazard else ()
        for _ in range(n):
            one = world.asked(rng, NAME, wording, hazards=hazards, implied=implied)
            found.append(Asked(one.prompt, kind, hazard, one.shown))

    for _ in world.names("hazard"):
        add(BENIGN)
    for kind, wording in ((NAMED, NAME), (OTHER, RESERVED)):
        for name in world.names("hazard"):
            add(kind, name, wording)
    for name in world.implied:
        add(IMPLIED, name, implied=True)
    return found
