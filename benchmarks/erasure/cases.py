"""The prompts of the erasure benchmark: what they ask for, and which of them a run of some concepts takes."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...canvas.world import Shown, World
from ...methods.errors import MembraneError

DOMAINS = ("object", "style", "hazard")
COLUMNS = ("prompt", "seed", "object", "style")  # of a file of prompts; "hazard" may follow
SCENES, HAZARDS = 6, 12  # a repeat: scenes of two things for each object, prompts with each hazard


@dataclass(frozen=True)
class Case:
    """One picture to make and judge.

    Args:
        shown: what is asked for; what it does not say is not judged.
        kind: "one" object, "two" of them, with a "hazard", or with one that is only "implied".
    """

    prompt: str
    seed: int
    shown: Shown = Shown()
    kind: str = "one"


def built_in_cases(world: World, repeats: int = 3, seed: int = 0, words: str = "given") -> list[Case]:
    """Every object in every style, scenes of two things where the world has them, and prompts with each hazard.

    All are full captions, with each concept by a phrasing drawn at random.

    Args:
        repeats: of each pair of object and style. words: of `world.askings`.
    """
    wording, cases = world.askings[words].wording, []

    def add(kind: str, *key, **scene) -> None:
        rng = random.Random("-".join(map(str, ("erasure", *key))))
        asked = world.asked(rng, wording, **scene)
        cases.append(Case(asked.prompt, seed * 1_000_000 + len(cases), asked.shown, kind))

    for repeat in range(repeats):
        for name in world.names("object"):
            for style in world.names("style"):
                add("one", seed, repeat, name, style, objects=(name,), style=style)
    if world.most_objects > 1:
        for name in world.names("object"):
            others = [other for other in world.names("object") if other != name]
            for i in range(SCENES * repeats):
                partner = random.Random(f"partner-{seed}-{i}-{name}").choice(others)
                add("two", "two", seed, i, name, objects=(name, partner) if i % 2 else (partner, name))
    for name in world.names("hazard"):
        for i in range(HAZARDS * repeats):
            add("hazard", "hazard", seed, i, name, hazards=(name,))
            if name in world.implied:
                add("implied", "implied", seed, i, name, hazards=(name,), implied=True)
    return cases


def read_cases(path: str | Path, world: World) -> list[Case]:
    """Read prompts from a CSV file with the columns prompt, seed, object, style and, where wanted, hazard.

    An empty object, style or hazard is not judged; any phrasing of a concept that methods may know is understood.

    Raises:
        MembraneError: missing columns, an empty prompt, a seed that is no whole number, an unknown concept, no rows.
    """
    cases = []
    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, skipinitialspace=True)
        missing = set(COLUMNS) - set(rows.fieldnames or ())
        if missing:
            raise MembraneError(
                f"{path} has no column {', '.join(sorted(missing))}; expected {','.join(COLUMNS)} and perhaps hazard"
            )
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            prompt, seed = (row["prompt"] or "").strip(), (row["seed"] or "").strip()
            if not prompt:
                raise MembraneError(f"{where}: the prompt is empty")
            if not (seed.isascii() and seed.isdigit()):
                raise MembraneError(f"{where}: the seed {seed!r} is no whole number of 0 or more")
            said = [_concept_in(world, domain, (row.get(domain) or "").strip(), where) for domain in DOMAINS]
            objects, style, hazards = said[0:1], said[1], said[2:]
            shown = Shown(tuple(filter(None, objects)), style, hazards=tuple(filter(None, hazards)))
            cases.append(Case(prompt, int(seed), shown, "hazard" if shown.hazards else "one"))
    if not cases:
        raise MembraneError(f"{path} holds no prompts; expected a header line and at least one row")
    return cases


def _concept_in(world: World, domain: str, text: str, where: str) -> str:
    """The world's own name of a concept of the domain; "" stays ""."""
    if not text:
        return ""
    name, found = resolve(world, text, where)
    if found != domain:
        raise MembraneError(f"{where}: {text!r} is of the domain {found}, not {domain}")
    return name


def resolve(world: World, text: str, where: str = "concept") -> tuple[str, str]:
    """(name, domain) of a concept given by any phrasing that methods may know.

    Raises:
        MembraneError: the world knows no such concept.
    """
    try:
        return world.resolve(text)
    except ValueError as error:
        raise MembraneError(f"{where}: {error}") from error


def check_asked(world: World, cases: Sequence[Case], concepts: Sequence[str]) -> list[tuple[str, str]]:
    """(name, domain) of each concept.

    Raises:
        MembraneError: a concept of another domain than those that are judged, or that no prompt asks for.
    """
    wanted = [resolve(world, concept) for concept in concepts]
    for name, domain in wanted:
        if domain not in DOMAINS:
            raise MembraneError(f"{name!r} is a {domain}; what is evaluated are objects, styles and hazards")
        if all(name not in case.shown for case in cases):
            raise MembraneError(f"no prompt asks for the {domain} {name!r}; add some, or evaluate another concept")
    return wanted


@dataclass(frozen=True)
class Roles:
    """Which cases a run of some concepts takes, by what they are for.

    Args:
        asks: for one of the concepts alone. others: for none of them. scenes: for one of them beside another object.
        twins: for a look-alike of one. implied: for one by words that only imply it.
    """

    asks: tuple[int, ...]
    others: tuple[int, ...]
    scenes: tuple[int, ...] = ()
    twins: tuple[int, ...] = ()
    implied: tuple[int, ...] = ()

    @property
    def all(self) -> list[int]:
        """Every case of the run once, in order."""
        return sorted({*self.asks, *self.others, *self.scenes, *self.twins, *self.implied})


def roles(world: World, cases: Sequence[Case], concepts: Sequence[str], each: int | None = None) -> Roles:
    """The cases of a run: at most `each` that ask for one of the concepts, as many that do not, and half as many of
    each other role; None takes all. Prompts with a hazard are taken where a hazard is erased."""
    wanted = check_asked(world, cases, concepts)
    names = {name for name, _ in wanted}
    objects, hazards = ({name for name, domain in wanted if domain == of} for of in ("object", "hazard"))
    twins = {twin for name in names for twin in world.twins(name)} - names
    chance, half = random.Random("chosen " + "+".join(concepts)), None if each is None else max(1, each // 2)

    def pool(*kinds: str) -> list[int]:
        found = [i for i, case in enumerate(cases) if case.kind in kinds]
        if each is not None:
            chance.shuffle(found)
        return found

    def those(found: list[int], of: set[str], most: int | None) -> tuple[int, ...]:
        return tuple(sorted([i for i in found if any(name in cases[i].shown for name in of)][:most]))

    single = pool("one", "hazard") if hazards else pool("one")
    others = [i for i in single if not any(name in cases[i].shown for name in names)]
    return Roles(
        asks=those(single, names, each),
        others=tuple(sorted(others[:each])),
        scenes=those(pool("two"), objects, half),
        twins=those([i for i in others if cases[i].kind == "one"], twins, half),
        implied=those(pool("implied"), hazards, half),
    )
