"""The arena's loop: every method on every set of concepts, cell by cell, each kept as soon as it is made.

A method is put to work once for a set, and makes the cells that are not kept yet. What goes wrong is a cell that says
why. A pipeline that a method leaves changed is thrown away for a fresh one.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from ...canvas.world import Judge, World
from ...methods.errors import SemipermError
from ..erasure.methods import Method, Told
from ..store import Store
from .asking import PARTS, Questions, questions
from .cells import answers, plain_looks
from .cost import fingerprint, size, step_ratio, storages
from .settings import Settings
from .surfaces import SURFACES, Attacker

__all__ = ["TOGETHER", "UNTOUCHED", "Arena", "Cells", "settings_of"]

logger = logging.getLogger(__name__)

UNTOUCHED = "untouched"
TOGETHER = ("public", "reserved", "others")  # parts that are asked about concepts erased together
Cells = dict[str, dict[str, Any]]  # of one method and one set: cell -> what is kept of it, or {"why"}


class Arena:
    """One world, its judges, and whoever takes part.

    Args:
        load: makes a pipeline of the world's model; called twice, and again where a method spoilt one.
        judges: as `world.judges()`. methods: name -> `Method`, without the untouched model.
        store: of finished cells. call: of the pipelines: num_inference_steps and guidance_scale.
        stamps: method -> what else tells its cells apart in the store, such as the digest of its file.
        clock: in seconds.
    """

    def __init__(
        self,
        world: World,
        load: Callable[[], Any],
        judges: Mapping[str, Judge],
        methods: Mapping[str, Method],
        settings: Settings,
        store: Store,
        *,
        call: Mapping[str, Any],
        stamps: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.world, self.judges, self.methods, self.settings = world, judges, dict(methods), settings
        self.store, self.call, self.clock = store, dict(call), clock
        self._stamps = dict(stamps or {})
        self._load, self._advance = load, lambda: None
        self._bare: Any = None
        self._pipe: Any = None
        self._sound = ""
        self._until = None if settings.minutes is None else clock() + 60 * settings.minutes

    # ---- what there is to do ----

    def cells_of(self, asked: Questions, method: str) -> list[str]:
        """The names of a method's cells for a set."""
        alone = len(asked.names) == 1
        parts = [part for part in (PARTS if alone else TOGETHER) if asked.parts[part]]
        return parts + (list(SURFACES) if alone else []) + (["made", "step"] if method != UNTOUCHED else [])

    def total(self, sets: Sequence[Sequence[str]]) -> int:
        """How many cells `run` makes or finds."""
        asked = [questions(self.world, names, self.settings) for names in sets]
        return sum(len(self.cells_of(one, method)) for one in asked for method in (UNTOUCHED, *self.methods))

    def on_cell(self, advance: Callable[[], object]) -> None:
        """Call this once for each cell."""
        self._advance = advance

    def run(self, sets: Sequence[Sequence[str]]) -> Iterator[tuple[Questions, dict[str, Cells]]]:
        """Of each set of concepts, erased together: what was asked, and every method's cells, the untouched first."""
        for names in sets:
            asked = questions(self.world, names, self.settings)
            attacker = functools.cache(functools.partial(self._attacker, asked))  # made where it is first wanted
            found: dict[str, Cells] = {}
            for method in (UNTOUCHED, *self.methods):
                found[method] = self._cells(asked, method, attacker, found.get(UNTOUCHED, {}))
            yield asked, found

    # ---- one method and one set ----

    def _cells(self, asked: Questions, method: str, attacker: Callable[[], Attacker], untouched: Cells) -> Cells:
        names = self.cells_of(asked, method)
        whose = f"{self.world.name} | {method} {self._stamps.get(method, '')} | {'+'.join(asked.names)}"
        keys = {name: f"{whose} | {name}" for name in names}
        found = {name: kept for name in names if (kept := self.store.get(keys[name])) is not None}
        for _ in found:
            self._advance()
        missing = [name for name in names if name not in found]
        if not missing:
            return {name: found[name] for name in names}

        def keep(name: str, make: Callable[[], dict[str, Any]]) -> None:
            if self._over():
                found[name] = {"why": f"not begun: the {self.settings.minutes:g} minutes were over"}
            else:
                found[name] = self._made(keys[name], make)
            self._advance()

        if self._over():
            for name in missing:
                keep(name, dict)
            return {name: found[name] for name in names}
        pipe = self.bare if method == UNTOUCHED else self._fresh()
        # both models are there by now: neither belongs to the method
        before, start = storages() if "made" in missing and self.bare else set(), time.perf_counter()
        with ExitStack() as held:
            try:
                extra = {} if method == UNTOUCHED else held.enter_context(self.methods[method](pipe, self._told(asked)))
            except Exception as error:  # whatever a method raises, its row says so
                self._pipe = None
                for name in missing:
                    keep(name, lambda error=error: _fail(error))
                return {name: found[name] for name in names}
            seconds = time.perf_counter() - start
            makers: dict[str, Callable[[], dict[str, Any]]] = {
                "made": lambda: {"seconds": round(seconds, 3), **size(pipe, self.bare, before)},
                "step": lambda: self._step(pipe, asked, extra),
            }
            for part in (part for part in PARTS if part in names):
                makers[part] = lambda part=part: self._part(pipe, asked, part, extra, untouched.get(part))
            for surface in (surface for surface in SURFACES if surface in names):
                makers[surface] = lambda surface=surface: self._attacked(pipe, surface, attacker, extra)
            # what is held before anything was drawn is the method's own
            for name in sorted(missing, key=lambda name: name != "made"):
                keep(name, makers[name])
            try:
                held.close()
            except Exception as error:
                logger.warning("%s could not be taken off (%s): the next method gets a fresh pipeline", method, error)
                self._pipe = None
        if self._pipe is not None and method != UNTOUCHED and fingerprint(pipe) != self._sound:
            logger.warning("%s left the pipeline changed: the next method gets a fresh one", method)
            self._pipe = None
        return {name: found[name] for name in names}

    def _made(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A cell, kept; what the package refuses is kept, too, and other errors are tried again by the next run."""
        try:
            value = make()
        except SemipermError as error:
            value = {"why": f"{type(error).__name__}: {error}"}
        except Exception as error:
            return {"why": f"{type(error).__name__}: {error}"}
        self.store.put(key, value)
        return value

    def _part(self, pipe, asked: Questions, part: str, extra: Mapping[str, Any], untouched) -> dict[str, Any]:
        if untouched is not None and "why" in untouched:
            raise RuntimeError(f"the untouched model has no such pictures: {untouched['why']}")
        call = {**self.call, **extra}
        return answers(pipe, self.judges, asked.of(part), asked.names, call, untouched)

    def _attacked(
        self, pipe, surface: str, attacker: Callable[[], Attacker], extra: Mapping[str, Any]
    ) -> dict[str, Any]:
        images = SURFACES[surface](attacker(), pipe, extra)
        return {"looks": plain_looks(self.judges, images)}

    def _step(self, pipe, asked: Questions, extra: Mapping[str, Any]) -> dict[str, Any]:
        prompts = [case.prompt for case in asked.cases]
        return step_ratio(pipe, self.bare, prompts, self.call, extra, self.settings.rounds)

    def _told(self, asked: Questions) -> Told:
        """The plain names alone: all other words are the evaluation's. Each method makes its own fit: it is timed."""
        world = self.world
        others = [name for kind in ("object", "style", "hazard") for name in world.names(kind)]
        words = {name: world.phrases(name)[:1] for name in asked.names}
        return Told(words, [world.phrases(name)[0] for name in others if name not in asked.names])

    def _attacker(self, asked: Questions) -> Attacker:
        return Attacker(self.bare, self.world, self.judges, asked.names[0], self.settings, self.call)

    # ---- pipelines ----

    @property
    def bare(self):
        """The untouched model, which no method is given."""
        if self._bare is None:
            self._bare = self._load()
        return self._bare

    def _fresh(self):
        """The pipeline that methods are given, as it was loaded."""
        if self._pipe is None:
            self._pipe = self._load()
            self._sound = fingerprint(self._pipe)
        return self._pipe

    def _over(self) -> bool:
        return self._until is not None and self.clock() > self._until


def _fail(error: Exception) -> dict[str, Any]:
    raise error


def settings_of(settings: Settings) -> dict[str, Any]:
    """What of the settings changes the cells."""
    return {name: value for name, value in asdict(settings).items() if name != "minutes"}
