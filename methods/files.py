"""Files that appear whole or not at all, and tensors from safetensors alone.

Everything that this package writes goes through `whole_file`: to a partial file beside the target, synced, then renamed
over it. A link is followed, so that the file it points to is replaced, not the link. What is read, changed and written
again is held with `locked`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import SemipermError

__all__ = ["PICKLES", "locked", "open_safetensors", "read_safetensors", "save_safetensors", "whole_file", "write_file"]

_PATIENCE = 60.0  # seconds that a lock is waited for: others hold it for the time of one read and one write
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


@contextlib.contextmanager
def locked(path: str | os.PathLike, patience: float = _PATIENCE) -> Iterator[None]:
    """Hold `path` alone while it is read, changed and written: other processes and threads that ask wait.

    The lock is the operating system's, on `.<name>.lock` beside the file that a link leads to. It ends with the
    process that holds it, so that none can be left over; the file goes with it where the system lets it.

    Args:
        path: what is going to be written; its folder is made where it is missing.
        patience: seconds to wait.

    Raises:
        SemipermError: somebody held it all that time.
        OSError: the folder cannot be written, or its file system knows no locks.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside, until = path.with_name(f".{path.name}.lock"), time.monotonic() + patience
    while True:
        descriptor = os.open(beside, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if _taken(descriptor) and _same(descriptor, beside):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if time.monotonic() > until:
            raise SemipermError(f"{str(path)!r} was held by another program for {patience:g} s; try again")
        time.sleep(0.005)
    try:
        yield
    finally:
        if os.name == "posix":  # elsewhere a file that is open stays
            beside.unlink(missing_ok=True)
        os.close(descriptor)


def _taken(descriptor: int) -> bool:
    if os.name == "posix":
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
    import msvcrt

    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except PermissionError:
        return False
    return True


def _same(descriptor: int, path: Path) -> bool:
    """Whether the file that was locked is still the one of that name: its last holder may have taken it away."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def save_safetensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike, metadata: dict[str, str] | None = None
) -> Path:
    """Write tensors as `whole_file` does; they may be views and may lie on a GPU.

    Raises:
        OSError: it cannot be written, e.g. on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with whole_file(path) as partial:
        kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        try:
            save_file(kept, str(partial), metadata=metadata)
        except SafetensorError as error:  # a full disk, mostly
            raise OSError(f"{str(path)!r} could not be written ({error})") from error
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
