"""The zoo: membranes that come with the package for its embedded models, found by name, each with a card.

    zoo/<model>/<concept>.safetensors             from words, in closed form
    zoo/<model>/<concept>-image.safetensors       image side
    zoo/<model>/<concept>-trained.safetensors     trained
    ... .json beside each                         its card

"zoo:robot" is a name where one model alone has a robot, "zoo:canvas-scenes/robot" wherever it is. A file without a
card, or other than its card says, is none of them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import MembraneError
from ..files import write_file
from .types import Membrane

__all__ = [
    "KINDS",
    "ZOO",
    "add_arena",
    "card_text",
    "file_digest",
    "located",
    "read_card",
    "write_card",
    "zoo_name",
    "zoo_names",
    "zoo_path",
]

ZOO = Path(__file__).resolve().parents[2] / "zoo"
PREFIX = "zoo:"
KINDS = ("text", "image", "trained")
# kind -> what the arena (`semiperm arena`) calls the methods that make such membranes
ARENA = {
    "text": ("closed_form/auto", "membranes/text"),
    "image": ("membranes/image",),
    "trained": ("membranes/trained", "latent_anchoring"),
}
_SUFFIX, _CARD = ".safetensors", ".json"
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def located(path: str | Path) -> str | Path:
    """The file behind a path or a name "zoo:..."; other paths come back as they are."""
    text = str(path)
    return zoo_path(text.removeprefix(PREFIX)) if text.startswith(PREFIX) else path


def zoo_name(concept: str, kind: str) -> str:
    """The name of one model's membrane: "quibble", "quibble-image", "quibble-trained".

    Raises:
        MembraneError: another kind.
    """
    if kind not in KINDS:
        raise MembraneError(f"kind {kind!r}; expected one of {', '.join(KINDS)}")
    stem = re.sub(r"[^\w]+", "-", concept.casefold()).strip("-")
    return stem if kind == "text" else f"{stem}-{kind}"


def zoo_names(folder: Path | None = None) -> list[str]:
    """ "<model>/<name>" of everything that has a card."""
    folder = ZOO if folder is None else Path(folder)
    files = folder.glob(f"*/*{_SUFFIX}")
    return sorted(f"{file.parent.name}/{file.stem}" for file in files if file.with_suffix(_CARD).exists())


def zoo_path(name: str, folder: Path | None = None) -> Path:
    """The file behind a name, with or without its model.

    Raises:
        MembraneError: no such name, one that several models have, or a file that is not what its card says.
    """
    folder = ZOO if folder is None else Path(folder)
    known = zoo_names(folder)
    found = [k for k in known if _NAME.fullmatch(name) and name in (k, k.partition("/")[2])]
    if len(found) != 1:
        if found:
            raise MembraneError(f"zoo:{name} is the name of {len(found)}; write one of zoo:{', zoo:'.join(found)}")
        some = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "") or "none yet: `semiperm zoo make` makes them"
        raise MembraneError(f"no membrane zoo:{name}; expected one of the {len(known)} in the zoo ({some})")
    path = folder / f"{found[0]}{_SUFFIX}"
    if file_digest(path) != read_card(path).get("sha256"):
        raise MembraneError(f"{path} is not the file that its card is of; make both again with `semiperm zoo make`")
    return path


def read_card(path: Path) -> dict[str, Any]:
    """The card of a membrane file.

    Raises:
        MembraneError: there is none, or it is no JSON.
    """
    card = path.with_suffix(_CARD)
    try:
        read = json.loads(card.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MembraneError(f"{card} is no readable card ({error}); make it again with `semiperm zoo make`") from None
    if not isinstance(read, dict):
        raise MembraneError(f"{card} holds {type(read).__name__}; expected an object: `semiperm zoo make` writes it")
    return read


def write_card(path: Path, membrane: Membrane, about: Mapping[str, Any], figures: Sequence[Mapping[str, Any]]) -> Path:
    """Write the card of a membrane file: what the membrane says of itself, and what was measured.

    Args:
        about: how it was made, such as the model's name, kind and command.
        figures: rows of an evaluation; each says by its own keys what it is of.
    """
    probe, side = membrane.probe, membrane.visual
    ranks = {pair.rank for pair in membrane.modules.values()} | {s.rank for s in (side.sites.values() if side else ())}
    card = {
        **about,
        "concept": membrane.concept,
        "phrases": list(membrane.phrases),
        "surrogate": membrane.surrogate,
        "method": membrane.method,
        "base_model": membrane.base_model,
        "modules": len(membrane.keys),
        "ranks": sorted(ranks),
        "detector": probe and {"false_closed": probe.false_closed, "false_open": probe.false_open},
        "image_side": side and {"beta": side.beta, "false_open": side.false_open, "false_closed": side.false_closed},
        "metadata": dict(membrane.metadata),
        "bytes": path.stat().st_size,
        "sha256": file_digest(path),
        "figures": [dict(row) for row in figures],
    }
    return _write(path, card)


def _write(path: Path, card: Mapping[str, Any]) -> Path:
    return write_file(path.with_suffix(_CARD), json.dumps(card, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def add_arena(path: Path, rows: Sequence[Mapping[str, Any]]) -> int:
    """Put into a card what the arena measured of membranes made as this one; returns the number of rows.

    The arena makes its own, of the plain name alone: its figures are of the method, those of the card of the file.

    Args:
        path: of the membrane file. rows: of the arena's JSON; those of other worlds, concepts and methods are left out.
    """
    card = read_card(path)
    own = [
        dict(row)
        for row in rows
        if row.get("world") == card["model"]
        and row.get("concept") == card["concept"]
        and row.get("method") in ("untouched", *ARENA[card["kind"]])
    ]
    if own:
        _write(path, card | {"arena": own})
    return len(own)


def card_text(card: Mapping[str, Any]) -> str:
    """A card as Markdown."""
    phrases = ", ".join(card["phrases"])
    facts = {
        "made for": card["model"],
        "takes out": phrases + (f", for {card['surrogate']}" if card["surrogate"] else ""),
        "kind": f"{card['kind']} ({card['method']})",
        "size": f"{card['modules']} layers, rank {'/'.join(map(str, card['ranks']))}, {card['bytes'] / 1024:.0f} KiB",
        "base model": card["base_model"] or "unknown",
        "made by": f"`{card['command']}`, in {card['seconds']:.1f} s on {card['machine']}",
    }
    lines = [f"# {card['concept']}", "", *(f"- {name}: {fact}" for name, fact in facts.items())]
    for title, rows in (("Measured of this file", card["figures"]), ("In the arena", card.get("arena", []))):
        if rows:
            shown = [key for key in rows[0] if any(_cell(row.get(key)) for row in rows)]
            table = [shown, ["---"] * len(shown), *([_cell(row.get(key)) or "-" for key in shown] for row in rows)]
            lines += ["", f"## {title}", "", *(f"| {' | '.join(row)} |" for row in table)]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(v, (int, float)) for v in value):  # value, low, high
        return f"{value[0]:.3f}" + (f" ({value[1]:.3f}-{value[2]:.3f})" if len(value) == 3 else "")
    if isinstance(value, (list, dict)):
        return ""
    return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)


def file_digest(path: Path) -> str:
    """Of a membrane file, as its card has it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
