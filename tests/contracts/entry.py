"""What a method says of itself to the contract matrix (tests/test_contracts.py): one `Entry`, and it is in.

A file of this folder with an `ENTRIES` list is found by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from semiperm.methods.errors import SemipermError
from tiny_models import FAMILIES

__all__ = ["ALL", "Entry", "Record", "RoundTrip"]

ALL = (*FAMILIES, "wan")


@dataclass(frozen=True)
class Record:
    """What a method's report has.

    Args:
        documented: the function that makes it in both faces; its docstring names every key.
        keys: of the report. rows: of each of its "rows". Its "steps" have "share", "sigma", "active".
        in_comfyui: (start, end) -> the report of a run of two steps of the ComfyUI face, called inside
            `comfy_stub.stand_in` (`comfy_stub.sample` runs a patch); None where the method has no node.
    """

    documented: Callable
    keys: frozenset[str]
    rows: frozenset[str]
    in_comfyui: Callable[[float, float], dict] | None = None


@dataclass(frozen=True)
class RoundTrip:
    """Something saved and loaded again.

    Args:
        path: the file. before, after: name -> tensor or plain value, of what was saved and of what was loaded.
        says: words that the file itself must contain, outside its tensors.
    """

    path: Path
    before: dict
    after: dict
    says: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """One method, in one mode.

    Args:
        name: of the test.
        public: its names in `semiperm`.
        families: of tiny_models that it takes.
        apply: (pipe, **settings) -> handle, at a strength that shows; settings are `strength`, `start`, `end` of its
            config. None for a method that acts through `inputs` alone.
        slot: entries of one slot replace one another, and are not composed.
        inputs: (pipe, images, seed, size) -> what the pipeline's call gets besides.
        cross_batch: the images of a batch act on each other by definition.
        size: of the pictures, in pixels.
        ready: (handle, size) called before the denoiser is compiled.
        files: folder -> `RoundTrip`, where the method has files.
        record: its report, where it has one.
        compiles: whether a graph of the whole denoiser (`torch.compile(denoiser)`) can hold it; if not, it refuses.
        refuses: pipe -> None; must raise `error`, since nothing would come of it.
    """

    name: str
    public: tuple[str, ...]
    families: tuple[str, ...] = FAMILIES
    apply: Callable | None = None
    slot: str = ""
    inputs: Callable[..., dict] | None = None
    cross_batch: bool = False
    size: int = 16
    ready: Callable | None = None
    files: Callable[[Path], RoundTrip] | None = None
    record: Record | None = None
    compiles: bool = True
    refuses: Callable | None = None
    error: type[SemipermError] = SemipermError
