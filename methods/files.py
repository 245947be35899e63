"""Files that appear whole or not at all, and tensors from safetensors alone.

Everything that this package writes goes through `whole_file`: to a partial file beside the target, synced, then renamed
over it. A link is followed, so that the file it points to is replaced, not the link.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import SemipermError

__all__ = ["PICKLES", "open_safetensors", "read_safetensors", "save_safetensors", "whole_file", "write_file"]

# Names that pickles usually have; what begins as a pickle is refused under any name.
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


@contextlib.contextmanager
def whole_file(path: str | os.PathLike, mode: int | None = None) -> Iterator[Path]:
    """Yield the path of an empty partial file; what is written to it takes the place of `path` at the end.

    After an exception nothing has changed and nothing is left over.

    Args:
        path: what to write; its folder is made where it is missing.
        mode: permissions from the first byte on; None keeps those of the file that is there, or the umask's.

    Raises:
        SemipermError: `path` is a folder.
        OSError: the folder cannot be written.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise SemipermError(f"{str(path)!r} is a folder; expected the name of a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode))
    try:
        yield partial
        if mode is not None:
            os.chmod(partial, mode)
        elif path.exists():
            os.chmod(partial, path.stat().st_mode & 0o7777)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_file(path: str | os.PathLike, data: bytes | str, mode: int | None = None) -> Path:
    """Write bytes, or text as UTF-8, as `whole_file` does; return the path."""
    with whole_file(path, mode) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
    return Path(path)


def save_safetensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike, metadata: dict[str, str] | None = None
) -> Path:
    """Write tensors as `whole_file` does; they may be views and may lie on a GPU."""
    from safetensors.torch import save_file

    with whole_file(path) as partial:
        kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(kept, str(partial), metadata=metadata)
    return Path(path)


@contextlib.contextmanager
def open_safetensors(path: str | os.PathLike) -> Iterator[Any]:
    """Open a safetensors file, whose keys, metadata and tensors are then read one by one (safetensors' `safe_open`).

    Raises:
        SemipermError: no such file, a pickle (which can run any code when loaded), or no readable safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise SemipermError(f"no file at {str(path)!r}; expected a .safetensors file")
    with path.open("rb") as file:
        head = file.read(9)
    pickled = head.startswith((b"\x80", b"PK\x03\x04")) and head[8:] != b"{"  # a safetensors header may be 128 long
    if path.suffix.lower() in PICKLES or pickled:
        raise SemipermError(
            f"{str(path)!r} is a pickle, which can run any code when loaded; expected safetensors: convert it where you"
            " trust it (torch.load(..., weights_only=True), then safetensors.torch.save_file)"
        )
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise SemipermError(f"{str(path)!r} is not a readable safetensors file ({error})") from None


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors and the metadata of a safetensors file.

    Raises:
        SemipermError: as `open_safetensors`.
    """
    with open_safetensors(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
