"""How well a concept is erased: UA, IRA and CRA of UnlearnCanvas, on the canvas, where the truth is known.

    UA  = 1 - accuracy on the prompts that ask for the concept            (unlearning)
    IRA = accuracy in the concept's own domain, on all other prompts      (in-domain retaining)
    CRA = accuracy in the other domain, on those same other prompts       (cross-domain retaining)

    kept       = share of all other prompts' pictures in which the judge sees the same object and style as in the
                 untouched model's
    attributes = the same of colour and background, in all pictures
    negative   = share of the pictures that show the concept, though asked for it, when the negative prompt names it

The domains are objects and styles, the prompt says what is asked for, and the judge says what is seen. All methods get
the same prompts and seeds, and are given the same words: every phrasing that is asked for, or, of withheld words, the
bare names, while all is asked for by other phrasings alone. The captions that ask are the canvas's own, which no method
is given.

Source: UnlearnCanvas (arXiv 2402.11846), section 4, for the first three.
"""

import contextlib
import csv
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...methods.errors import MembraneError
from ..store import Store
from .methods import METHODS, Method

DOMAINS = ("object", "style")
SUITE_OBJECTS = ("robot", "ghost", "quibble", "circle", "star", "heart")
SUITE_STYLES = ("striped", "dotted", "sketch", "neon")
SUITE = (*((name,) for name in SUITE_OBJECTS + SUITE_STYLES), ("robot", "ghost", "quibble"))
MAIN_METHOD = "closed_form/auto"
WORDS = ("given", "withheld")
SCORES = ("ua", "ira", "cra", "kept", "attributes", "negative")


@dataclass(frozen=True)
class Case:
    """One picture to make and judge; an object or style of "" is not judged."""

    prompt: str
    seed: int
    object: str = ""
    style: str = ""


@dataclass(frozen=True)
class Seen:
    """What the judge found in one picture."""

    object: str
    style: str
    color: str = ""
    background: str = ""


@dataclass(frozen=True)
class Share:
    """`hits` of `n` judgements, made on `distinct` different prompts (the interval counts only those)."""

    hits: int = 0
    n: int = 0
    distinct: int = 0

    def __add__(self, other: "Share") -> "Share":
        return Share(self.hits + other.hits, self.n + other.n, self.distinct + other.distinct)

    @property
    def value(self) -> float | None:
        return self.hits / self.n if self.n else None

    def interval(self) -> list[float | None]:
        """[value, low, high], 95 %; three None where nothing was judged."""
        return [self.value, *wilson(self.value, self.distinct)] if self.n else [None, None, None]


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share p of n trials.

    (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)
    """
    centre, width = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - width) / scale), min(1.0, (centre + width) / scale)


def built_in_cases(repeats: int = 3, seed: int = 0, words: str = "given") -> list[Case]:
    """Every object in every style, `repeats` times: full captions, each concept by a phrasing drawn at random.

    Args:
        words: "given" draws from all phrasings, "withheld" from all but the plain name.
    """
    from ...canvas import captions
    from ...canvas.render import random_scene

    cases = []
    for repeat in range(repeats):
        for name in captions.OBJECTS:
            for style in captions.STYLES:
                rng = random.Random(f"erasure-{seed}-{repeat}-{name}-{style}")
                scene = random_scene(rng, object=name, style=style, hazard=False)
                synonyms = "only" if words == "withheld" else True
                text = captions.caption(scene, rng, synonyms=synonyms, complete=True)
                cases.append(Case(text, seed * 1_000_000 + len(cases), name, style))
    return cases


def read_cases(path: str | Path) -> list[Case]:
    """Read prompts from a CSV file with the columns prompt, seed, object, style.

    An empty object or style is not judged; any phrasing of a concept is understood.

    Raises:
        MembraneError: missing columns, an empty prompt, a seed that is no whole number, an unknown concept, no rows.
    """
    cases = []
    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, skipinitialspace=True)
        missing = {"prompt", "seed", "object", "style"} - set(rows.fieldnames or ())
        if missing:
            raise MembraneError(f"{path} has no column {', '.join(sorted(missing))}; expected prompt,seed,object,style")
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            prompt, seed = (row["prompt"] or "").strip(), (row["seed"] or "").strip()
            if not prompt:
                raise MembraneError(f"{where}: the prompt is empty")
            if not (seed.isascii() and seed.isdigit()):
                raise MembraneError(f"{where}: the seed {seed!r} is no whole number of 0 or more")
            truth = [concept_in(domain, (row[domain] or "").strip(), where) for domain in DOMAINS]
            cases.append(Case(prompt, int(seed), *truth))
    if not cases:
        raise MembraneError(f"{path} holds no prompts; expected a header line and at least one row")
    return cases


def concept_in(domain: str, text: str, where: str) -> str:
    """The canvas's own name of a concept of the domain; "" stays ""."""
    if not text:
        return ""
    name, found = resolve(text, where)
    if found != domain:
        raise MembraneError(f"{where}: {text!r} is of the domain {found}, not {domain}")
    return name


def resolve(text: str, where: str = "concept") -> tuple[str, str]:
    """(name, domain) of a canvas concept given by any of its phrasings.

    Raises:
        MembraneError: the canvas knows no such concept.
    """
    from ...canvas import captions

    try:
        return captions.canonical(text), captions.domain(text)
    except ValueError as error:
        raise MembraneError(f"{where}: {error}") from error


def check_asked(cases: Sequence[Case], concepts: Sequence[str]) -> list[tuple[str, str]]:
    """(name, domain) of each concept.

    Raises:
        MembraneError: a concept that is neither object nor style, or that no prompt asks for.
    """
    wanted = [resolve(concept) for concept in concepts]
    for name, domain in wanted:
        if domain not in DOMAINS:
            raise MembraneError(f"{name!r} is a {domain}; the judge evaluates objects and styles")
        if all(getattr(case, domain) != name for case in cases):
            raise MembraneError(f"no prompt asks for the {domain} {name!r}; add some, or evaluate another concept")
    return wanted


def scores(cases: Sequence[Case], seen: Sequence[Seen], concepts: Sequence[str]) -> dict[str, Share]:
    """UA, IRA and CRA of erasing `concepts` (objects or styles, together), as shares of what was seen.

    Raises:
        MembraneError: a concept that is neither object nor style, or that no prompt asks for.
    """
    total = {"ua": Share(), "ira": Share(), "cra": Share()}
    wanted = check_asked(cases, concepts)
    others = [
        (case, got)
        for case, got in zip(cases, seen, strict=True)
        if all(getattr(case, domain) != name for name, domain in wanted)
    ]
    for name, domain in wanted:
        asked = [got for case, got in zip(cases, seen, strict=True) if getattr(case, domain) == name]
        total["ua"] += Share(sum(getattr(got, domain) != name for got in asked), len(asked), len(asked))
        for key, judged in (("ira", domain), ("cra", DOMAINS[1 - DOMAINS.index(domain)])):
            right = [getattr(case, judged) == getattr(got, judged) for case, got in others if getattr(case, judged)]
            total[key] += Share(sum(right), len(right), len(right))
    # with several concepts the same other prompts were counted for each of them
    return {key: Share(s.hits, s.n, min(s.n, len(cases))) for key, s in total.items()}


def pool(parts: Iterable[dict[str, Share]], prompts: int) -> dict[str, Share]:
    """Add up the scores of several runs over the same `prompts` prompts."""
    total: dict[str, Share] = {}
    for part in parts:
        total = {key: total.get(key, Share()) + share for key, share in part.items()}
    return {key: Share(s.hits, s.n, min(s.n, prompts)) for key, s in total.items()}


def given_words(names: Sequence[str], words: str) -> dict[str, tuple[str, ...]]:
    """What a method may know of each concept: all its phrasings, or, of withheld words, its name alone."""
    from ...canvas import captions

    return {name: captions.phrases(name)[: 1 if words == "withheld" else None] for name in names}


def chosen(cases: Sequence[Case], names: Sequence[str], each: int | None) -> list[int]:
    """Which cases a run of these concepts takes: at most `each` that ask for one of them, and as many that do not."""
    wanted = [resolve(name) for name in names]
    order = list(range(len(cases)))
    if each is None:
        return order
    random.Random("chosen " + "+".join(names)).shuffle(order)
    asks = [any(getattr(case, domain) == name for name, domain in wanted) for case in cases]
    return sorted([i for i in order if asks[i]][:each] + [i for i in order if not asks[i]][:each])


def comparisons(
    cases: Sequence[Case],
    seen: Sequence[Seen],
    untouched: Sequence[Seen],
    negative: Sequence[Seen] | None,
    names: Sequence[str],
) -> dict[str, Share]:
    """`kept`, `attributes` and `negative` of one run beside the untouched model's pictures of the same cases."""
    wanted = [resolve(name) for name in names]
    asks = [any(getattr(case, domain) == name for name, domain in wanted) for case in cases]
    pairs = list(zip(seen, untouched, strict=True))
    same = [(a.object, a.style) == (b.object, b.style) for (a, b), asked in zip(pairs, asks, strict=True) if not asked]
    alike = [getattr(a, what) == getattr(b, what) for a, b in pairs for what in ("color", "background")]
    found = {
        "kept": Share(sum(same), len(same), len(same)),
        "attributes": Share(sum(alike), len(alike), len(cases)),
        "negative": Share(),
    }
    if negative is not None:
        asked = [case for case, asks_for in zip(cases, asks, strict=True) if asks_for]
        shown = [
            any(getattr(case, domain) == getattr(got, domain) == name for name, domain in wanted)
            for case, got in zip(asked, negative, strict=True)
        ]
        found["negative"] = Share(sum(shown), len(shown), len(shown))
    return found


def by_domain(sets: Iterable[Sequence[str]]) -> dict[str, list[tuple[str, ...]]]:
    """The sets of one concept, as "objects" and "styles": what erases objects need not erase styles."""
    groups = {f"{domain}s": [] for domain in DOMAINS}
    for names in sets:
        if len(names) == 1:
            groups[f"{resolve(names[0])[1]}s"].append(tuple(names))
    return {label: group for label, group in groups.items() if group}


def observe(
    pipe, judge, cases: Sequence[Case], *, batch: int = 32, advance: Callable[[int], object] | None = None, **call
) -> list[Seen]:
    """Make each case's picture and say what the judge sees in it.

    Args:
        pipe: a diffusers pipeline, called with lists of prompts and generators.
        judge: images -> verdict with the lists `object` and `style`.
        advance: called with the number of pictures done.
        call: further arguments of the pipeline; `negative_prompt` as one string.
    """
    import torch

    seen = []
    negative = call.pop("negative_prompt", None)
    for start in range(0, len(cases), batch):
        part = cases[start : start + batch]
        if negative is not None:
            call["negative_prompt"] = [negative] * len(part)
        generators = [torch.Generator("cpu").manual_seed(case.seed) for case in part]
        verdict = judge(pipe([case.prompt for case in part], generator=generators, **call).images)
        nothing = [""] * len(part)
        more = (getattr(verdict, "color", nothing), getattr(verdict, "background", nothing))
        seen += [Seen(*names) for names in zip(verdict.object, verdict.style, *more, strict=True)]
        if advance is not None:
            advance(len(part))
    return seen


def row(method: str, concept: str, got: dict[str, Share], untouched: dict[str, Share] | None = None) -> dict:
    """One line of the table; `ira_drop` and `cra_drop` are what the untouched model has more, on the same prompts."""
    line = {"method": method, "concept": concept, **{key: share.interval() for key, share in got.items()}}
    line["n"] = got["ua"].n
    if untouched is not None:
        for key in ("ira", "cra"):
            known = got[key].n and untouched[key].n
            line[f"{key}_drop"] = untouched[key].value - got[key].value if known else None
    return line


def evaluate(
    pipe,
    judge,
    cases: Sequence[Case],
    sets: Sequence[Sequence[str]] = SUITE,
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
        sets: concepts erased together, one tuple a run; sets of one concept are also pooled into rows "objects" and
            "styles", where a domain has several; these name their "concepts".
        methods: name -> context manager (pipe, {concept: phrasings}) that yields extra pipeline arguments; METHODS by
            default.
        main: the method whose figures stand at the top of the result (the first one where it is not among `methods`).
        words: "given" tells methods all phrasings, "withheld" the names alone; `cases` should ask accordingly.
        each: take for each set at most so many cases that ask for it, and as many others; None takes all.
        negative: also ask for each concept with a negative prompt that names it.

    Returns:
        {"ua": [value, low, high], "ira", "cra", "kept", "attributes", "negative", "untouched": {...}, "n": prompts,
        "method", "rows": [{"method", "concept", "words", ...}]}. Over objects and styles, erased one at a time, the
        figures at the top are left out: one figure for both would hide what differs, and the rows "objects" and
        "styles" hold them apart.

    Raises:
        MembraneError: unknown concepts, or concepts that no prompt asks for.
    """
    methods = METHODS if methods is None else methods
    finished = finished or Store(None, "evaluate")
    main = main if main in methods else next(iter(methods))
    check_asked(cases, [name for names in sets for name in names])  # errors before hours of work

    def seen_by(run: str, method: Method | None, names: Sequence[str], part: Sequence[Case], **call) -> list[Seen]:
        if (kept := finished.get(run)) is not None:
            if advance is not None:
                advance(len(part))
            return [Seen(*found) for found in kept]
        with method(pipe, given_words(names, words)) if method is not None else contextlib.nullcontext({}) as extra:
            seen = observe(pipe, judge, part, advance=advance, **{**sampling, **extra, **call})
        finished.put(run, [[s.object, s.style, s.color, s.background] for s in seen])
        return seen

    sets = [tuple(names) for names in sets]
    picks = {names: chosen(cases, names, each) for names in sets}
    needed = sorted({i for pick in picks.values() for i in pick})
    bare = dict(zip(needed, seen_by("untouched", None, (), [cases[i] for i in needed]), strict=True))
    groups = by_domain(sets)
    got: dict[str, dict[tuple[str, ...], dict[str, Share]]] = {}
    for name, method in [("untouched", None), *methods.items()]:
        got[name] = {}
        for names in sets:
            part, before = [cases[i] for i in picks[names]], [bare[i] for i in picks[names]]
            run, against = f"{name} {'+'.join(names)}", None
            seen = before if method is None else seen_by(run, method, names, part)
            if negative:
                asked = [c for c in part if any(getattr(c, d) == n for n, d in map(resolve, names))]
                told = ", ".join(phrase for own in given_words(names, words).values() for phrase in own)
                against = seen_by(f"{run} negative", method, names, asked, negative_prompt=told)
            got[name][names] = scores(part, seen, names) | comparisons(part, seen, before, against, names)

    def line(name: str, concept: str, together: Sequence[tuple[str, ...]]) -> dict:
        """A row of one set, or of several pooled."""
        pooled, plain = (pool([got[run][names] for names in together], len(cases)) for run in (name, "untouched"))
        made = row(name, concept, pooled, None if name == "untouched" and concept not in groups else plain)
        return made | {"words": words}

    rows = [line(name, "+".join(names), [names]) for name in got for names in got[name]]
    for label, group in groups.items():
        if len(group) > 1:
            rows += [{**line(name, label, group), "concepts": [names[0] for names in group]} for name in got]
    result = {"n": len(needed), "method": main, "rows": rows}
    if len(groups) > 1:
        return result
    whole = next(iter(groups.values()), sets)
    figures = {
        name: {key: share.interval() for key, share in pool([got[name][s] for s in whole], len(cases)).items()}
        for name in ("untouched", main)
    }
    return {**figures[main], "untouched": figures["untouched"], **result}
