"""Prompts that an adversary found: words before a harmless prompt, after which the model draws a hazard.

    found      five words of the vocabulary that do not name it, by gradient, exchanged one by one (GCG's search)
    learned    five embeddings, by gradient (textual inversion), which five words of the vocabulary stand for

Either is searched against the untouched model, and, as "..., adaptive", against the method that is judged while it is
at work. What the search wants is what the untouched model predicts for the same prompt with the hazard's name.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...canvas.world import NAME, Shown, World
from ...methods.attacks.prompts import PromptSearch
from ...methods.errors import SemipermError
from ...pipelines.attacks.encoding import OpenEncoder
from ...pipelines.attacks.prompts import find_prompts, learn_embedding
from ...pipelines.attacks.targets import Targets, targets_from_model
from .methods import Work
from .worlds import Asked

__all__ = ["ADAPTIVE", "KINDS", "Attack", "Attacker", "attacks_of"]

FOUND, LEARNED, ADAPTIVE = "found words", "learned words", ", adaptive"
KINDS = (FOUND, LEARNED, f"{FOUND}{ADAPTIVE}", f"{LEARNED}{ADAPTIVE}")


@dataclass(frozen=True)
class Attack:
    """How hard an adversary tries.

    Args:
        searches: for each hazard and kind, each for a scene of its own; what one finds is put before n / searches
            prompts.
        steps, learned_steps: of the two searches. tokens: words of each. points, learned_points: of the schedule at
            each step, out of `targets`.

    Raises:
        SemipermError: none of something.
    """

    searches: int = 4
    steps: int = 25  # of 32 exchanges each
    learned_steps: int = 200
    tokens: int = 5  # as many as UnlearnDiffAtk finds
    points: int = 8  # at two the exchanges followed the points: a loss of .0066 after 50 steps, .0032 after 25 with 8
    learned_points: int = 2
    targets: int = 24

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or value < 1:
                raise SemipermError(f"{name}={value!r} of an attack; expected a whole number, at least 1")


class Attacker:
    """Searches on a world's model; what the untouched one predicts is asked once.

    Args:
        work: whose pipeline is attacked, untouched when this is made.
        kept: (key, make) -> what was made and kept under the key.
        progress: called with each search.
    """

    def __init__(
        self,
        work: Work,
        attack: Attack,
        seed: int,
        kept: Callable[[str, Callable[[], Any]], Any],
        progress: Callable[[], None] | None = None,
    ):
        self.work, self.attack, self.seed, self.kept, self.progress = work, attack, seed, kept, progress
        self._spoken: list[str] = []
        self._targets: dict[tuple[str, int], Targets] = {}
        self._scenes = {
            (hazard, n): _scene(work.world, seed, hazard, n)
            for hazard in work.world.names("hazard")
            for n in range(attack.searches)
        }

    def prepare(self) -> None:
        """Ask the untouched model what it predicts for the hazards."""
        scale = self.work.call["guidance_scale"]
        for n, (key, (_, named)) in enumerate(self._scenes.items()):
            if key not in self._targets:
                count = self.attack.targets
                made = targets_from_model(self.work.pipe, named, count, guidance_scale=scale, seed=self.seed + n)
                self._targets[key] = made

    def asked(self, n: int, method: str = "") -> list[Asked]:
        """n prompts of each kind and hazard.

        Args:
            method: that is at work; "" searches against the untouched model.
        """
        found, calm = [], {}
        for hazard in self.work.world.names("hazard"):
            rng = random.Random(f"attacked-{self.seed}-{hazard}")
            calm[hazard] = [self.work.world.asked(rng, NAME) for _ in range(n)]
        # words that stand for something else must be said by nobody
        self._spoken = sorted({word for some in calm.values() for one in some for word in one.prompt.split()})
        for kind in (FOUND, LEARNED):
            for hazard, some in calm.items():
                prefixes = [self._prefix(kind, hazard, s, method) for s in range(min(n, self.attack.searches))]
                for i, one in enumerate(some):
                    said, learned = prefixes[i * len(prefixes) // n]
                    shown, name = replace(one.shown, hazards=(hazard,)), f"{kind}{ADAPTIVE if method else ''}"
                    found.append(Asked(f"{said} {one.prompt}", name, hazard, shown, learned))
        return found

    def _prefix(self, kind: str, hazard: str, n: int, method: str) -> tuple[str, Any]:
        """Words, and what they are read as."""
        plain = self.kept(f"{kind}, {hazard} {n}, {method}", lambda: self._search(kind, hazard, n))
        if self.progress is not None:
            self.progress()
        if kind == FOUND:
            return plain["said"], None
        return plain["said"], (tuple(plain["ids"]), torch.tensor(plain["tokens"]))

    def _search(self, kind: str, hazard: str, n: int) -> dict:
        pipe, attack, world = self.work.pipe, self.attack, self.work.world
        self.prepare()
        calm, _ = self._scenes[hazard, n]
        targets, seed = self._targets[hazard, n], self.seed + n
        if kind == FOUND:
            banned = [*_told(world), *(word for pair in world.implied.values() for word in pair)]
            search = PromptSearch("coordinate", attack.tokens, attack.steps, kept=4, seed=seed)
            best = find_prompts(pipe, targets, calm, search, without=banned, points=attack.points)[0]
            return {"said": best.prompt.removesuffix(calm).strip(), "loss": best.loss}
        steps, points = attack.learned_steps, attack.learned_points
        without = [*self._spoken, *_told(world)]
        made = learn_embedding(pipe, targets, calm, tokens=attack.tokens, steps=steps, points=points, without=without)
        said = OpenEncoder(pipe, attack.tokens).text_of(made.ids)
        return {"said": said, "ids": list(made.ids), "tokens": made.tokens.tolist(), "loss": min(made.losses)}


def attacks_of(hazards: Sequence[str], n: int, attack: Attack) -> list[Asked]:
    """As many prompts as `Attacker.asked` has, with nothing in them: to count batches."""
    count, found = min(n, attack.searches), []
    for kind in (FOUND, LEARNED):
        for hazard in hazards:
            each = [None if kind == FOUND else object() for _ in range(count)]
            found += [Asked("", kind, hazard, Shown(), each[i * count // n]) for i in range(n)]
    return found


def _scene(world: World, seed: int, hazard: str, n: int) -> tuple[str, str]:
    """A caption, and the same with the hazard's name."""
    calm = world.asked(random.Random(f"attack-{seed}-{hazard}-{n}"), NAME).prompt
    return calm, f"{calm}, {world.phrases(hazard)[0]}"


def _told(world: World) -> Sequence[str]:
    """What methods are told of the hazards, and what is asked by."""
    return [phrase for name in world.names("hazard") for phrase in (*world.phrases(name), *world.reserved(name))]
