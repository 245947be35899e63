"""One world's arena: who takes part, which concepts, where finished cells are kept; its rows, what is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...canvas.world import World
from ...methods.errors import SemipermError
from ..erasure.methods import Method
from ..store import Store, digest
from .contestants import LEFT_OUT, contestants
from .run import Arena, settings_of
from .scoring import missing_of, rows_of
from .settings import SETS, Settings, chosen, many

__all__ = ["Entry", "enter", "measure", "plan"]


@dataclass(frozen=True)
class Entry:
    """What takes part on a world, and what is erased.

    Args:
        methods: name -> `Method`. sets: of concepts erased together. missing: what was wanted and cannot be.
        stamps: method -> what tells its cells apart, see `Arena`.
    """

    methods: dict[str, Method]
    sets: list[tuple[str, ...]]
    missing: list[dict] = field(default_factory=list)
    stamps: dict[str, str] = field(default_factory=dict)


def plan(
    world: World,
    quick: bool = False,
    methods: Sequence[str] = (),
    concepts: Sequence[str] = (),
    sets: Sequence[int] | None = None,
    files: Mapping[str, tuple[Path, Callable[[Any], Any]]] | None = None,
) -> Entry:
    """Who takes part on a world, and what is erased.

    Args:
        quick: fewer of both where nothing is named.
        methods: names; () takes all of them.
        concepts: by any phrasing that methods may know; () takes the world's own.
        sets: sizes of sets of concepts that are erased at once; None takes 3, or 3, 10 and 30, where no concepts are
            named.
        files: name -> (path of trained membranes, what loads them for a pipeline).

    Raises:
        SemipermError: an unknown method or concept.
    """
    files = dict(files or {})
    known = contestants(world.guidance_scale > 1, {name: load for name, (_, load) in files.items()})
    if unknown := [name for name in methods if name not in known]:
        raise SemipermError(f"no method is called {unknown[0]!r}; choose from {', '.join(known)}")
    taken = methods or [name for name in known if not (quick and name in LEFT_OUT)]
    found = [_concept(world, concept) for concept in concepts] or chosen(world, quick)
    sizes = (() if concepts else SETS[:1] if quick else SETS) if sets is None else sets
    missing = [
        {"world": world.name, "concept": name, "part": "left out of a quick run", "why": why}
        for name, why in LEFT_OUT.items()
        if quick and name not in taken
    ]
    for size in sizes:
        if names := many(world, size):
            found.append(names)
        else:
            why = "the world has not so many concepts with something left to ask for"
            missing.append({"world": world.name, "concept": f"{size} at once", "part": "all", "why": why})
    stamps = {name: digest(path) if path.is_file() else str(path) for name, (path, _) in files.items()}
    return Entry({name: known[name] for name in taken}, list(dict.fromkeys(found)), missing, stamps)


def _concept(world: World, text: str) -> tuple[str, ...]:
    try:
        name, domain = world.resolve(text)
    except ValueError as error:
        raise SemipermError(f"{world.name}: {error}") from error
    if domain not in ("object", "style", "hazard", "memorised"):
        raise SemipermError(
            f"{text!r} is a {domain}; what the arena erases are objects, styles, hazards and memorised pictures"
        )
    return (name,)


def enter(
    world: World, load: Callable[[], Any], entry: Entry, settings: Settings, resume: Path | None = None, **call
) -> Arena:
    """The arena of a world.

    Args:
        load: makes a pipeline of its model. resume: file of finished cells; several worlds, and parts of a long run,
            may share one. call: of the pipelines.
    """
    call = {"num_inference_steps": world.steps, "guidance_scale": world.guidance_scale, **call}
    kept = {"settings": settings_of(settings), "call": call, "world": [world.name, digest(*world.files())]}
    store = Store(resume, "arena", kept)
    return Arena(world, load, world.judges(), entry.methods, settings, store, call=call, stamps=entry.stamps)


def measure(arena: Arena, entry: Entry) -> dict[str, list[dict]]:
    """Run it: {"rows", "missing"}, see scoring.py."""
    found = list(arena.run(entry.sets))
    missing = [*entry.missing, *missing_of(arena.world, [asked for asked, _ in found])]
    return {"rows": rows_of(arena.world, list(arena.judges), found), "missing": missing}
