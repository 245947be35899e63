"""Erase concepts by every method, and let the judges say what is left, on a world where the truth is known.

All methods get the same prompts and seeds, and are given the same words: every phrasing that methods may know, or the
bare names alone, while pictures are asked for in public or in reserved words (`World.askings`). The captions that ask
are the world's own, which no method is given. What is measured: scores.py.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from ...canvas.world import Judge, Shown, World, shown_of
from ..store import Store
from .cases import Case, Roles, check_asked, roles
from .methods import METHODS, Method, Told
from .scores import CELLS, Share, comparisons, outside, pool, scores

MAIN_METHOD = "closed_form/auto"


@dataclass(frozen=True)
class Look:
    """What the judges saw in one picture; of scenes of two things also the picture, 16 x 16 cells of RGB."""

    seen: dict[str, Shown]
    small: bytes = b""

    def plain(self) -> list:
        """What JSON can hold of it."""
        return [{name: asdict(shown) for name, shown in self.seen.items()}, base64.b64encode(self.small).decode()]

    @classmethod
    def of(cls, plain: list) -> Look:
        """The inverse of `plain`."""
        return cls({name: shown_of(kept) for name, kept in plain[0].items()}, base64.b64decode(plain[1]))


def by_group(world: World, sets: Iterable[Sequence[str]]) -> dict[str, list[tuple[str, ...]]]:
    """The sets of one concept, as "objects", "styles", ...: what erases objects need not erase styles."""
    groups: dict[str, list[tuple[str, ...]]] = {}
    for names in sets:
        if len(names) == 1:
            groups.setdefault(world.group(names[0]), []).append(tuple(names))
    return groups


def observe(
    pipe,
    judges: Mapping[str, Judge],
    cases: Sequence[Case],
    *,
    batch: int = 32,
    advance: Callable[[int], object] | None = None,
    **call,
) -> list[Look]:
    """Make each case's picture and say what the judges see in it.

    Args:
        pipe: a diffusers pipeline, called with lists of prompts and generators.
        advance: called with the number of pictures done.
        call: further arguments of the pipeline; `negative_prompt` as one string.
    """
    found = []
    for part, images in drawn(pipe, cases, batch=batch, **call):
        seen = {name: judge(images).shown for name, judge in judges.items()}
        for i, (case, image) in enumerate(zip(part, images, strict=True)):
            small = image.convert("RGB").reduce(image.width // CELLS).tobytes() if case.kind == "two" else b""
            found.append(Look({name: shown[i] for name, shown in seen.items()}, small))
        if advance is not None:
            advance(len(part))
    return found


def drawn(pipe, cases: Sequence[Case], *, batch: int = 32, **call) -> Iterator[tuple[Sequence[Case], list]]:
    """Each case's picture, a batch at a time, from the noise of its own seed; arguments as in `observe`."""
    import torch

    negative = call.pop("negative_prompt", None)
    for start in range(0, len(cases), batch):
        part = cases[start : start + batch]
        if negative is not None:
            call["negative_prompt"] = [negative] * len(part)
        generators = [torch.Generator("cpu").manual_seed(case.seed) for case in part]
        yield part, pipe([case.prompt for case in part], generator=generators, **call).images


def row(method: str, concept: str, got: dict[str, Share], untouched: dict[str, Share] | None = None) -> dict:
    """One line of the table; `ira_drop` and `cra_drop` are what the untouched model has more, on the same prompts."""
    line = {"method": method, "concept": concept, **{key: share.interval() for key, share in got.items()}}
    line["n"] = got["ua"].n
    if untouched is not None:
        for key in ("ira", "cra"):
            known = got[key].n and untouched[key].n
            line[f"{key}_drop"] = untouched[key].value - got[key].value if known else None
    return line


@dataclass(frozen=True)
class Run:
    """The pictures of one method and one set of concepts: looks by the number of the case, and with the negative
    prompt those of the cases that ask."""

    names: tuple[str, ...]
    roles: Roles
    looks: dict[int, Look]
    negative: dict[int, Look] | None

    def seen(self, judge: str, looks: dict[int, Look] | None = None) -> dict[int, Shown]:
        return {i: look.seen[judge] for i, look in (self.looks if looks is None else looks).items()}


def evaluate(
    pipe,
    world: World,
    judges: Mapping[str, Judge],
    cases: Sequence[Case],
    sets: Sequence[Sequence[str]] | None = None,
    *,
    methods: dict[str, Method] | None = None,
    main: str = MAIN_METHOD,
    words: str = "given",
    each: int | None = None,
    negative: bool = False,
    finished: Store | None = None,
    advance: Callable[[int], object] | None = None,
    **sampling,
) -> dict:
    """Erase each set of concepts by each method and score it against the untouched model on the same prompts and seeds.

    Args:
        judges: as `world.judges()`; all see the same pictures.
        sets: concepts erased together, one tuple a run, `world.suite` by default; sets of one concept are also pooled
            into rows "objects", "characters", "styles" and "hazards", where a group has several; these name their
            "concepts".
        methods: name -> context manager (pipe, Told) that yields extra pipeline arguments; METHODS by default.
        main: the method whose figures stand at the top of the result (the first one where it is not among `methods`).
        words: of `world.askings`: what methods are told; `cases` should ask accordingly.
        each: take for each set at most so many cases that ask for it, and as many others; see `roles`. None takes all.
        negative: also ask for each concept with a negative prompt that names it.

    Returns:
        {"ua": [value, low, high], and the other scores, "untouched": {...}, "n": prompts, "method", "rows": [{"method",
        "concept", "words", "judge", "world", "outside", ...}]}. The figures at the top are the first judge's. Where
        concepts of several groups were erased one at a time they are left out: one figure for all would hide what
        differs, and the rows of the groups hold them apart.

    Raises:
        MembraneError: unknown concepts, or concepts that no prompt asks for.
    """
    methods = METHODS if methods is None else methods
    finished = finished or Store(None, "evaluate")
    main = main if main in methods else next(iter(methods))
    sets = [tuple(names) for names in (world.suite if sets is None else sets)]
    check_asked(world, cases, [name for names in sets for name in names])  # errors before hours of work
    sets = [tuple(world.resolve(name)[0] for name in names) for names in sets]

    picks = {names: roles(world, cases, names, each) for names in sets}
    needed = sorted({i for pick in picks.values() for i in pick.all})

    def looked_at(run: str, part: Sequence[int], extra: Mapping, **call) -> dict[int, Look]:
        if (kept := finished.get(run)) is None:
            some = [cases[i] for i in part]
            looks = observe(pipe, judges, some, advance=advance, **{**sampling, **extra, **call})
            finished.put(run, [look.plain() for look in looks])
        else:
            looks = [Look.of(plain) for plain in kept]
            if advance is not None:
                advance(len(part))
        return dict(zip(part, looks, strict=True))

    bare = looked_at("untouched", needed, {})
    runs: dict[str, list[Run]] = {name: [] for name in ("untouched", *methods)}
    for names, pick in picks.items():
        others = [name for kind in ("object", "style", "hazard") for name in world.names(kind) if name not in names]
        told = Told({name: world.told(name, words) for name in names}, [world.phrases(name)[0] for name in others])
        for name, method in [("untouched", None), *methods.items()]:
            run = f"{name} {'+'.join(names)}"
            keys = [run] * (method is not None) + [f"{run} negative"] * negative
            fit = method is not None and any(finished.get(key) is None for key in keys)
            with method(pipe, told) if method is not None and fit else contextlib.nullcontext({}) as extra:
                looks = {i: bare[i] for i in pick.all} if method is None else looked_at(run, pick.all, extra)
                against = None
                if negative:
                    against = looked_at(keys[-1], pick.asks, extra, negative_prompt=", ".join(told.phrases))
            runs[name].append(Run(names, pick, looks, against))
    rows = [line for judge in judges for line in _rows(world, cases, runs, judge, words)]
    result = {"n": len(needed), "method": main, "rows": rows}
    groups = by_group(world, sets)
    if len(groups) > 1:
        return result
    whole, first = next(iter(groups.values()), sets), next(iter(judges))
    figures = {}
    for name in ("untouched", main):
        parts = [_scored(world, cases, run, bare, first) for run in runs[name] if run.names in whole]
        figures[name] = {key: share.interval() for key, share in pool(parts, len(cases)).items()}
    return {**figures[main], "untouched": figures["untouched"], **result}


def _scored(world: World, cases: Sequence[Case], run: Run, bare: dict[int, Look], judge: str) -> dict[str, Share]:
    seen, before = run.seen(judge), run.seen(judge, bare)
    against = None if run.negative is None else run.seen(judge, run.negative)
    found = scores(world, cases, run.roles, seen, run.names)
    return found | comparisons(cases, run.roles, seen, before, against, run.names)


def _rows(world: World, cases: Sequence[Case], runs: dict[str, list[Run]], judge: str, words: str) -> list[dict]:
    """The rows of one judge: of every set, and of the groups."""
    bare = {i: look for run in runs["untouched"] for i, look in run.looks.items()}
    got = {name: {run.names: _scored(world, cases, run, bare, judge) for run in some} for name, some in runs.items()}
    before, small_before = {i: look.seen[judge] for i, look in bare.items()}, {i: v.small for i, v in bare.items()}
    changed = {
        name: {
            run.names: outside(
                cases, run.roles, before, {i: v.small for i, v in run.looks.items()}, small_before, run.names
            )
            for run in some
        }
        for name, some in runs.items()
    }
    groups = by_group(world, got["untouched"])

    def line(name: str, concept: str, together: Sequence[tuple[str, ...]]) -> dict:
        """A row of one set, or of several pooled."""
        pooled, plain = (pool([got[run][names] for names in together], len(cases)) for run in (name, "untouched"))
        made = row(name, concept, pooled, None if name == "untouched" and concept not in groups else plain)
        values = [value for names in together for value in changed[name][names]]
        made["outside"] = round(sum(values) / len(values), 2) if values else None
        return made | {"words": words, "judge": judge, "world": world.name}

    rows = [line(name, "+".join(names), [names]) for name in got for names in got[name]]
    for label, group in groups.items():
        if len(group) > 1:
            rows += [{**line(name, label, group), "concepts": [names[0] for names in group]} for name in got]
    return rows
