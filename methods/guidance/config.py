"""What safe guidance is set to, in every face: categories, algorithms, strength, window, detectors."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from ..errors import GuidanceError
from ..schedule import Window
from .adavd import AdaVD
from .algorithm import Algorithm
from .category import Category, as_categories
from .detectors import DetectorPair, PictureDetector
from .nag import NAG
from .safree import SAFREE
from .sld import SLD

__all__ = ["ALGORITHMS", "SafeGuidanceConfig"]

ALGORITHMS: dict[str, type[Algorithm]] = {cls.NAME: cls for cls in (SLD, SAFREE, AdaVD, NAG)}
_UNSAFE = ("guide", "refuse", "raise")


@dataclass(frozen=True, eq=False)
class SafeGuidanceConfig:
    """What to steer away from, how, how strongly, and when.

    Args:
        categories: names of bundled categories, .toml files, or `Category`s; one or several.
        algorithms: names ("sld", "safree", "adavd", "nag") or `SLD(...)` and so on; one or several that act together.
        strength: a factor on each algorithm's change; 0 is exactly the untouched model, 1 is the papers'.
        start, end: the `Window` of the noise schedule in which they act, 0 pure noise, 1 the image.
        detectors: `DetectorPair`s of these categories: an image is guided only from when one of its category fires.
            Without any, every image is guided in every step of the window.
        when_unsafe: what follows where a picture detector still fires at `hopeless` of the schedule: "guide" goes on,
            "refuse" ends that image as plain grey, "raise" raises a `GuidanceError`.
        hopeless: share of the schedule.

    Raises:
        GuidanceError: unknown names, nothing to do, or values outside their range.
        SemipermError: a window out of order.

    >>> SafeGuidanceConfig("violence", "sld").algorithms[0].preset
    'strong'
    """

    categories: Sequence[str | Path | Category] | str | Path | Category
    algorithms: Sequence[str | Algorithm] | str | Algorithm = "sld"
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    detectors: Sequence[DetectorPair] = ()
    when_unsafe: str = "guide"
    hopeless: float = 0.5

    def __post_init__(self) -> None:
        categories = as_categories(self.categories)
        given: Any = [self.algorithms] if isinstance(self.algorithms, (str, Algorithm)) else self.algorithms
        algorithms = tuple(_algorithm(one, categories) for one in given)
        names = [one.NAME for one in algorithms]
        if not algorithms or len(set(names)) < len(names):
            raise GuidanceError(f"algorithms {names}; expected at least one of {', '.join(ALGORITHMS)}, each once")
        # above 4 every algorithm of these destroys pictures, and a mistyped percentage is likelier
        if not (isinstance(self.strength, (int, float)) and math.isfinite(self.strength) and 0 <= self.strength <= 4):
            raise GuidanceError(f"strength={self.strength!r}; expected 0 (the untouched model) to 4, 1 as the papers")
        if not (isinstance(self.hopeless, (int, float)) and 0 <= self.hopeless <= 1):
            raise GuidanceError(f"hopeless={self.hopeless!r}; expected a share of the schedule, 0 to 1")
        Window(self.start, self.end)
        detectors = tuple(self.detectors)
        known = {category.name for category in categories}
        if strangers := [pair.category for pair in detectors if pair.category not in known]:
            raise GuidanceError(
                f"detectors of {', '.join(strangers)}, but the categories are {', '.join(sorted(known))}"
            )
        if self.when_unsafe not in _UNSAFE:
            raise GuidanceError(f"when_unsafe={self.when_unsafe!r}; expected one of {', '.join(_UNSAFE)}")
        if self.when_unsafe != "guide" and not any(pair.picture for pair in detectors):
            raise GuidanceError(
                f"when_unsafe={self.when_unsafe!r} without a picture detector, which alone sees what is unsafe; fit one"
                " (`semiperm guard fit`)"
            )
        for name, value in (("categories", categories), ("algorithms", algorithms), ("detectors", detectors)):
            object.__setattr__(self, name, value)

    @property
    def window(self) -> Window:
        return Window(self.start, self.end)

    @property
    def chosen(self) -> tuple[Category, ...]:
        """`categories`, read."""
        return cast("tuple[Category, ...]", self.categories)

    @property
    def acting(self) -> tuple[Algorithm, ...]:
        """`algorithms`, made."""
        return cast("tuple[Algorithm, ...]", self.algorithms)

    @property
    def phrases(self) -> tuple[str, ...]:
        """Those of all categories."""
        return tuple(phrase for category in self.chosen for phrase in category.phrases)

    def having(self, seam: str) -> tuple[Algorithm, ...]:
        """The algorithms that act at a seam."""
        return tuple(one for one in self.acting if seam in one.SEAMS)

    def combine(self, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """What attention over the prompt and over the harm gives, combined by every algorithm of that seam.

        Args:
            positive, negative: (B, N, C).

        Returns:
            (B, N, C), and (B,) how much that is changed: |combined - positive| / |positive|.
        """
        combined = positive
        for algorithm in self.having("outputs"):
            combined = algorithm.combine(combined.contiguous(), negative.contiguous(), self.strength)
        norm = positive.float().flatten(1).norm(dim=1).clamp_min(1e-12)
        return combined, (combined.float() - positive.float()).flatten(1).norm(dim=1) / norm

    @functools.cached_property
    def seeing(self) -> tuple[tuple[str, PictureDetector], ...]:
        """(category, its picture detector) of those that have one."""
        return tuple((pair.category, pair.picture) for pair in self.detectors if pair.picture is not None)

    def ended(self, above: Tensor, share: float) -> Tensor | None:
        """Which pictures end here because what they show cannot be guided away any more: (B,) bool, or None.

        Args:
            above: (B, D), how far the picture detectors' scores lie above their thresholds. share: of the schedule.

        Raises:
            GuidanceError: one does, and `when_unsafe` is "raise".
        """
        if self.when_unsafe == "guide" or share < self.hopeless:
            return None
        fired = above > 0
        unsafe = fired.any(dim=1)
        if self.when_unsafe == "raise" and bool(unsafe.any()):
            names = [name for (name, _), some in zip(self.seeing, fired.any(dim=0).tolist(), strict=True) if some]
            raise GuidanceError(
                f"image {', '.join(map(str, unsafe.nonzero()[:, 0].tolist()))} of this run still looks like"
                f" {', '.join(names)} at {share:.2g} of the schedule; it was ended (when_unsafe='raise')"
            )
        return unsafe.cpu()

    def digest(self) -> str:
        """Of all settings but the categories', for records."""
        said = {
            "algorithms": [one.settings() for one in self.acting],
            "strength": self.strength,
            "window": [self.start, self.end],
            "detectors": [[pair.category, pair.false_alarms, pair.model] for pair in self.detectors],
            "when_unsafe": [self.when_unsafe, self.hopeless],
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    def categories_digest(self) -> str:
        """Of the categories, for records."""
        return hashlib.sha256("".join(category.digest() for category in self.chosen).encode()).hexdigest()[:16]


def _algorithm(one: str | Algorithm, categories: Sequence[Category]) -> Algorithm:
    if isinstance(one, str):
        if one not in ALGORITHMS:
            raise GuidanceError(f"no algorithm {one!r}; expected one of {', '.join(ALGORITHMS)}")
        if one == SLD.NAME:  # the strongest that a category asks for
            ranks = list(("weak", "medium", "strong", "max"))
            return SLD(max((category.preset for category in categories), key=ranks.index))
        return ALGORITHMS[one]()
    if not hasattr(one, "SEAMS"):
        raise GuidanceError(f"algorithms has {one!r}; expected a name or an algorithm, such as SLD('strong')")
    return one
