"""How much of everything the arena draws. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...canvas.world import World

__all__ = ["FULL", "QUICK", "SETS", "Settings", "chosen", "many"]

SETS = (3, 10, 30)  # concepts erased together
_LEFT = {"object": 2, "style": 1}  # that are never erased together with the others: what is kept has to show something
_KINDS = ("object", "style", "hazard", "memorised")


@dataclass(frozen=True)
class Settings:
    """Counts of pictures, and how hard the attacker tries.

    Args:
        asks: pictures that ask for the concept, in public and again in reserved words.
        others: that ask for none. part: of each other part: scenes, look-alikes, relations, counts, implied hazards.
        attacked: of each surface. searches: kinds of a search for words, see `PromptSearch`.
        search_steps, embedding_steps, inversion_steps: of the attacker. points: of the diffusion process that a search
            looks at, in all.
        steps: of a picture; None is the model's own.
        rounds: of the timing of a step.
        minutes: after these nothing new is begun; None waits for everything.
    """

    asks: int = 16
    others: int = 24
    part: int = 12
    attacked: int = 8
    searches: tuple[str, ...] = ("relaxed", "projected", "coordinate", "genetic")
    search_steps: int = 100
    embedding_steps: int = 200
    inversion_steps: int = 20
    points: int = 32
    steps: int | None = None
    rounds: int = 9
    minutes: float | None = None


FULL = Settings()
# A picture of 25 steps takes about .6 s on two quiet cores, of 10 steps .25 s: some 45 pictures and the searches make
# half a minute for a method and a concept, so that some 40 of these, and their fits, are done in time.
QUICK = Settings(
    asks=5, others=6, part=3, attacked=3, searches=("relaxed",), search_steps=30, embedding_steps=30,
    inversion_steps=10, points=16, steps=10, rounds=2, minutes=25.0,
)  # fmt: skip


def chosen(world: World, quick: bool) -> list[tuple[str, ...]]:
    """The concepts erased one at a time where none are named: the world's suite and its memorised pictures; quick: the
    first character, the first style, the first memorised picture."""
    alone = [names for names in world.suite if len(names) == 1]
    memorised = [(name,) for name in world.names("memorised")]
    if not quick:
        return alone + memorised
    first = (next((names for names in alone if names[0] in world.names(kind)), None) for kind in ("character", "style"))
    return [names for names in first if names] + memorised[:1]


def many(world: World, count: int) -> tuple[str, ...]:
    """`count` concepts to erase at once, of each kind in proportion; () where the world has not so many. Smaller ones
    are parts of larger ones."""
    ranked: list[tuple[float, str]] = []
    for kind in _KINDS:
        names: Sequence[str] = world.names(kind)
        names = names[: len(names) - _LEFT.get(kind, 0)]
        ranked += [((i + 0.5) / len(names), name) for i, name in enumerate(names)]
    names = tuple(name for _, name in sorted(ranked))
    return names[:count] if len(names) >= count else ()
