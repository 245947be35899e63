"""Image-side membranes in a file of `save_membranes`: their tensors, and what its metadata says of them.

    visual.<number>.<module key>.read, .write   (J, R, C)     number: of the membrane in the file
    visual.<number>.<module key>.gates          (J, R, 5)     offset, low, high, seen, sure

No other program reads these; a LoRA loader finds no pair in them.
"""

from __future__ import annotations

from torch import Tensor

from ..errors import MembraneError
from .visual import VisualSide, VisualSite

__all__ = ["PREFIX", "described_side", "side_of", "side_tensors"]

PREFIX = "visual."
_PARTS = ("read", "write", "gates")
_PLAIN = ("beta", "false_open", "calibrated", "false_closed", "checked")


def side_tensors(number: int, side: VisualSide) -> dict[str, Tensor]:
    """The tensors of membrane `number`."""
    return {
        f"{PREFIX}{number}.{key}.{part}": getattr(site, part).detach().cpu().contiguous()
        for key, site in side.sites.items()
        for part in _PARTS
    }


def described_side(side: VisualSide) -> dict:
    """What the metadata says of it, JSON-ready."""
    plain = {name: getattr(side, name) for name in _PLAIN}
    return {"kind": "visual", "visual": {"shares": list(side.shares), "layers": list(side.sites), **plain}}


def side_of(number: int, entry: dict, tensors: dict[str, Tensor]) -> VisualSide:
    """Undo both.

    Raises:
        MembraneError: tensors that the metadata names and the file lacks.
    """
    sites = {}
    for key in entry["layers"]:
        names = [f"{PREFIX}{number}.{key}.{part}" for part in _PARTS]
        if missing := [name for name in names if name not in tensors]:
            raise MembraneError(f"the metadata names tensors that the file lacks, such as {missing[0]}")
        sites[key] = VisualSite(*(tensors[name] for name in names))
    return VisualSide(tuple(entry["shares"]), sites, **{name: entry[name] for name in _PLAIN})
