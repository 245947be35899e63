"""Categories of harm as data: a name, phrases, a preset and a rate of false alarms, in files that people edit.

name = "violence"
preset = "strong"         # of safe latent diffusion
false_alarms = 0.01       # share of harmless pictures on which its detectors may fire
phrases = ["violence", "blood"]
pictures = ["example.png"]   # optional, beside the file: what detectors are fitted from
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import GuidanceError
from .sld import PRESETS

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same module, before it was part of Python
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

__all__ = ["Category", "bundled_categories", "category_from_text", "load_category", "parse_category"]

_FOLDER = Path(__file__).parent / "categories"
_MOST = 64  # phrases: each costs a row of the text encoder, and a category of more is several


@dataclass(frozen=True)
class Category:
    """A category of harm.

    Args:
        name: of the category.
        phrases: words for it, at least one, the plainest first.
        preset: of safe latent diffusion, see `sld.PRESETS`.
        false_alarms: share of harmless pictures, above 0 to below 0.5, on which its detectors may fire.
        pictures: files that show it.

    Raises:
        GuidanceError: no name, no phrases, or a value outside its range.

    >>> Category("gore", ("gore", "entrails")).text
    'gore, entrails'
    """

    name: str
    phrases: tuple[str, ...]
    preset: str = "medium"
    false_alarms: float = 0.01
    pictures: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        phrases = (self.phrases,) if isinstance(self.phrases, str) else tuple(self.phrases)
        object.__setattr__(self, "phrases", tuple(p.strip() for p in phrases if isinstance(p, str) and p.strip()))
        object.__setattr__(self, "pictures", tuple(map(str, self.pictures)))
        if not isinstance(self.name, str) or not self.name.strip():
            raise GuidanceError(f"a category named {self.name!r}; expected a name")
        if not 0 < len(self.phrases) <= _MOST:
            raise GuidanceError(f"category {self.name!r} has {len(self.phrases)} phrases; expected 1 to {_MOST}")
        if self.preset not in PRESETS:
            raise GuidanceError(f"category {self.name!r}: preset={self.preset!r}; expected one of {', '.join(PRESETS)}")
        if not isinstance(self.false_alarms, (int, float)) or not 0 < self.false_alarms < 0.5:
            raise GuidanceError(
                f"category {self.name!r}: false_alarms={self.false_alarms!r}; expected a share above 0, below 0.5"
            )

    @property
    def text(self) -> str:
        """All phrases in one prompt, as safe latent diffusion takes them."""
        return ", ".join(self.phrases)

    def digest(self) -> str:
        """Of all that it says, for records."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def bundled_categories() -> dict[str, Category]:
    """The categories that come with the package, by name.

    >>> sorted(bundled_categories())[:3]
    ['harassment', 'hate', 'hazard']
    """
    found = [load_category(path) for path in sorted(_FOLDER.glob("*.toml"))]
    return {category.name: category for category in found}


def load_category(source: str | Path | Category) -> Category:
    """A category by the name of a bundled one, or from a .toml file.

    Raises:
        GuidanceError: neither; or a file that does not say what a category is.
    """
    if not isinstance(source, (str, Path)):  # by what it is not: it may come from another copy of this package
        return source
    path = Path(source)
    if path.suffix == ".toml":
        if not path.is_file():
            raise GuidanceError(f"no file at {str(path)!r}; expected a category's .toml file")
        return parse_category(path.read_text(encoding="utf-8"), str(path), path.parent)
    known = {p.stem.replace("_", " "): p for p in _FOLDER.glob("*.toml")}
    name = str(source).replace("_", " ").strip()
    if name not in known:
        raise GuidanceError(f"no category {name!r}; expected a .toml file, or one of {', '.join(sorted(known))}")
    return load_category(known[name])


def parse_category(text: str, source: str = "the text", folder: Path | None = None) -> Category:
    """A category from the text of a .toml file; `folder` is where its pictures lie.

    Raises:
        GuidanceError: no TOML, other keys than a category's, or values that no category has.
    """
    try:
        said: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise GuidanceError(
            f"{source} is no TOML ({error}); expected name, phrases, and what else a category has"
        ) from None
    unknown = sorted(set(said) - set(Category.__dataclass_fields__))
    missing = sorted({"name", "phrases"} - set(said))
    if unknown or missing:
        wrong = f"unknown {', '.join(unknown)}" if unknown else f"no {', '.join(missing)}"
        raise GuidanceError(f"{source}: {wrong}; a category has {', '.join(Category.__dataclass_fields__)}")
    if folder is not None:
        said["pictures"] = [str(folder / picture) for picture in said.get("pictures", ())]
    return Category(**said)


def category_from_text(text: str, name: str = "own") -> Category:
    """A category from what somebody typed: a .toml file's text, or phrases by lines or commas.

    Raises:
        GuidanceError: nothing was typed, or a .toml that is none.
    """
    if re.search(r"^\s*(name|phrases)\s*=", text, re.MULTILINE):
        return parse_category(text)
    return Category(name, tuple(part for line in text.splitlines() for part in line.split(",")))


def is_one(sources: Any) -> bool:
    """Whether what `as_categories` takes is one category, and no sequence of them."""
    return isinstance(sources, (str, Path)) or hasattr(sources, "phrases")


def as_categories(sources: Sequence[str | Path | Category] | str | Path | Category) -> tuple[Category, ...]:
    """Categories from names, files and categories, one or several.

    Raises:
        GuidanceError: none, or two of one name.
    """
    given: Any = sources
    found = tuple(load_category(source) for source in ([given] if is_one(given) else given))
    names = [category.name for category in found]
    if not found or len(set(names)) < len(names):
        raise GuidanceError(f"categories {names}; expected at least one, each name once")
    return found
