"""What a measurement needs to know of an embedded world, whichever edition it is of: names, words, scenes and judges.

Each edition implements `World` once (first_edition.py, second_edition.py); `editions.world_of` finds one by its model's
name. Nothing else tells editions apart.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from .models import model_of

NAME, PUBLIC, RESERVED = (
    "name",
    "public",
    "reserved",
)  # wordings: the plain name, what methods may know, what they may not


@dataclass(frozen=True)
class Shown:
    """What a picture holds, as it was asked for or as a judge sees it; "" and () say nothing.

    Args:
        objects: names, each once. colors: (object, colour); the object is "" where a judge does not say whose it is.
        places: (object, x, y) in pixels, where a judge says so. counts: (object, how many), where one is asked for.
        relations: (object, how it lies to, another object).
    """

    objects: tuple[str, ...] = ()
    style: str = ""
    background: str = ""
    colors: tuple[tuple[str, str], ...] = ()
    hazards: tuple[str, ...] = ()
    memorised: str = ""
    places: tuple[tuple[str, float, float], ...] = ()
    counts: tuple[tuple[str, int], ...] = ()
    relations: tuple[tuple[str, str, str], ...] = ()

    def names(self, domain: str) -> tuple[str, ...]:
        """The concepts of a domain ("object", "style", "background", "hazard", "memorised") in the picture."""
        if domain in ("object", "hazard"):
            return getattr(self, f"{domain}s")
        one = getattr(self, domain)
        return (one,) if one else ()

    def __contains__(self, name: str) -> bool:
        """Is the concept in the picture?"""
        return name != "" and name in (*self.objects, self.style, self.background, *self.hazards, self.memorised)


def shown_of(plain: dict) -> Shown:
    """What `dataclasses.asdict` made of a Shown, perhaps through JSON."""

    def fixed(value):
        return tuple(map(fixed, value)) if isinstance(value, (list, tuple)) else value

    return Shown(**{name: fixed(value) for name, value in plain.items()})


@dataclass(frozen=True)
class Asked:
    """A prompt, and what its picture has to show."""

    prompt: str
    shown: Shown


@dataclass(frozen=True)
class Sight:
    """What a judge saw in B pictures. features: (B, d), alike where the same things are shown."""

    shown: list[Shown]
    features: Tensor


@dataclass(frozen=True)
class Asking:
    """One way to test an eraser: what it is told of a concept, and in which wording pictures are then asked for.

    Args:
        told: NAME (its plain name alone) or PUBLIC (all phrasings that methods may know). wording: PUBLIC or RESERVED.
    """

    told: str
    wording: str


Judge = Callable[[Sequence[Any]], Sight]


class World(ABC):
    """A model whose pictures can be judged.

    Attributes:
        name: of the model, for `load_pipeline`. askings: by the word that rows have for them.
        suite: the concepts that are erased by default, together in one run each.
        most_objects: in one picture. lookalikes: pairs that differ in one feature.
        implied: hazard -> harmless words that together mean it. opposed: hazards; what leads away from one leads to the
            other.
    """

    askings: dict[str, Asking]
    suite: tuple[tuple[str, ...], ...]
    most_objects: int = 1
    lookalikes: tuple[tuple[str, str], ...] = ()
    implied: dict[str, tuple[str, str]] = {}
    opposed: tuple[str, ...] = ()

    def __init__(self, name: str):
        self.name = name

    @property
    def steps(self) -> int:
        """Denoising steps that suit the model."""
        return model_of(self.name).steps

    @property
    def guidance_scale(self) -> float:
        """The guidance scale that suits the model; 1 is none, and then there is no negative prompt either."""
        return model_of(self.name).guidance_scale

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one picture's latents."""
        return {"canvas": 4, "canvas-flow": 16}[model_of(self.name).autoencoder], 16, 16

    @abstractmethod
    def names(self, kind: str) -> tuple[str, ...]:
        """The names of a kind: "object", "character" (some of the objects), "style", "color", "background", "hazard"
        or "memorised"."""

    @abstractmethod
    def resolve(self, text: str) -> tuple[str, str]:
        """(name, domain) of a concept by any phrasing that methods may know; ValueError if there is none."""

    @abstractmethod
    def phrases(self, name: str) -> tuple[str, ...]:
        """The phrasings of a concept that methods may know, the plain name first."""

    @abstractmethod
    def reserved(self, name: str) -> tuple[str, ...]:
        """The phrasings that only an evaluation may ask by."""

    @abstractmethod
    def scene(
        self,
        rng: random.Random,
        *,
        objects: tuple[str, ...] | None = None,
        style: str | None = None,
        background: str | None = None,
        hazards: tuple[str, ...] = (),
        implied: bool = False,
        relation: str | None = None,
        count: int = 1,
        memorised: str = "",
    ) -> Any:
        """A scene; what is not given is drawn, but for hazards.

        Args:
            objects: one name, or two. implied: a caption says the hazards by harmless words that mean them together.
            relation: of the first object to the second; "" is none. count: of the one object.
            memorised: a memorised picture, which then is all there is.
        """

    @abstractmethod
    def caption(self, scene: Any, rng: random.Random, wording: str, hazards: str | None = None) -> str:
        """The scene in words that leave nothing out: NAME, PUBLIC or RESERVED ones.

        Args:
            hazards: another wording for its hazards.
        """

    @abstractmethod
    def mention(self, name: str) -> str:
        """The plain name of an object or hazard as a sentence says it, with its article."""

    @abstractmethod
    def benign(self, n: int) -> list[str]:
        """Harmless prompts to fit on, which no evaluation asks."""

    @abstractmethod
    def shown(self, scene: Any) -> Shown:
        """What a picture of the scene has to show."""

    @abstractmethod
    def draw(self, scene: Any) -> Image.Image:
        """The scene, drawn without the model."""

    @abstractmethod
    def plain(self, name: str) -> Any:
        """The scene of one object on its own, in the plainest look."""

    @abstractmethod
    def anything(self, rng: random.Random) -> Any:
        """A scene of all kinds that the models learn from."""

    @abstractmethod
    def judges(self) -> dict[str, Judge]:
        """The judges by name, the one whose word counts first; none of them was used to fit anything."""

    @abstractmethod
    def files(self) -> list[Path]:
        """The files of the model's and the judges' weights: figures are of these."""

    def asked(self, rng: random.Random, wording: str, hazard_wording: str | None = None, **scene: Any) -> Asked:
        """A prompt of a new scene (see `scene`) in one of the wordings."""
        drawn = self.scene(rng, **scene)
        return Asked(self.caption(drawn, rng, wording, hazard_wording), self.shown(drawn))

    def told(self, name: str, words: str) -> tuple[str, ...]:
        """What a method is told of a concept in one of `askings`."""
        return self.phrases(name)[: 1 if self.askings[words].told == NAME else None]

    def group(self, name: str) -> str:
        """The plural of the kind whose concepts are reported together: "objects", "characters", "styles", "hazards"."""
        return f"{self.resolve(name)[1]}s"

    def twins(self, name: str) -> tuple[str, ...]:
        """The look-alikes of a concept."""
        return tuple(other for pair in self.lookalikes if name in pair for other in pair if other != name)
