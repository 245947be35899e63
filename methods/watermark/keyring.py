"""The file that keeps watermark keys: readable by its owner alone, written whole, never emptied by mistake.

Who changes a keyring does it through `update_keyring`, which holds the file from reading to writing: two that add a key
at the same time both find theirs in it.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from ..errors import SemipermError, WatermarkError
from ..files import locked, write_file
from .keys import KEY_IDS, WatermarkKey

__all__ = ["Keyring", "load_keyring", "save_keyring", "update_keyring"]

_T = TypeVar("_T")

FORMAT = "semiperm-watermark-keyring"
# 1 had no content secret; it is derived where such a file is read. 2 did not say since which format a key has been.
FORMAT_VERSION = 3
_READABLE = (1, 2, 3)


class Keyring:
    """An ordered set of keys, unique by name and by id.

    Args:
        keys: in this order; () is the empty keyring.

    Raises:
        WatermarkError: two keys share a name or an id.

    >>> ring = Keyring()
    >>> ring.new("studio").key_id, ring.new("archive").key_id
    (0, 1)
    >>> ring.get("archive").name, len(ring.detector())
    ('archive', 2)
    """

    def __init__(self, keys: Iterable[WatermarkKey] = ()):
        self._keys: list[WatermarkKey] = []
        for key in keys:
            self.add(key)

    def add(self, key: WatermarkKey) -> None:
        """Add a key at the end.

        Raises:
            WatermarkError: another one has its name or its id.
        """
        for other in self._keys:
            if other.name == key.name or other.key_id == key.key_id:
                raise WatermarkError(
                    f"the keyring already holds key {other.name!r} with id {other.key_id}; {key.name!r} with id"
                    f" {key.key_id} collides with it: choose another name"
                )
        self._keys.append(key)

    def __iter__(self) -> Iterator[WatermarkKey]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"Keyring({self._keys!r})"

    def get(self, name_or_id: str | int) -> WatermarkKey:
        """The key of that name or id.

        Raises:
            WatermarkError: there is none.
        """
        for key in self._keys:
            if name_or_id in (key.name, key.key_id):
                return key
        names = ", ".join(repr(key.name) for key in self._keys[:8]) or "no keys"
        raise WatermarkError(f"the keyring has no key {name_or_id!r}; it holds {names}: make it with `keys new`")

    def new(self, name: str) -> WatermarkKey:
        """Add and return a fresh key with the next free id.

        Raises:
            WatermarkError: the name is taken, or holds control characters, or all ids are taken.
        """
        if isinstance(name, str) and not name.isprintable():
            raise WatermarkError(f"a key is to be named {name!r}; expected a name without control characters")
        used = {key.key_id for key in self._keys}
        if len(used) == KEY_IDS:
            raise WatermarkError(f"the keyring already holds {KEY_IDS} keys; start a second keyring file")
        free = max(used, default=-1) + 1
        if free == KEY_IDS:
            free = min(set(range(KEY_IDS)) - used)
        key = WatermarkKey.new(name, free)
        self.add(key)
        return key

    def detector(self) -> Keyring:
        """The same keys without their MAC and content secrets."""
        return Keyring(key.detector() for key in self._keys)


def _decode(record: dict, version: int) -> WatermarkKey:
    named = (record[name] for name in ("name", "key_id", "created"))
    texts = record["stream_key"], record["mac_key"], record["content_key"] if version > 1 else None
    parts = [None if text is None else base64.b64decode(text, validate=True) for text in texts]
    key = WatermarkKey(*named, *parts, since=record["since"] if version > 2 else version)
    # A key of a file of version 1 that was written again as 2: no secret of its own says so.
    derived = version == 2 and key.mac_key is not None and replace(key, content_key=None).content_key == key.content_key
    return replace(key, since=1) if derived else key


def load_keyring(path: str | os.PathLike) -> Keyring:
    """Read a keyring file.

    Args:
        path: as `save_keyring` or `semiperm keys new` wrote it.

    Raises:
        WatermarkError: no such file, not a plain file, readable by others (POSIX), truncated, corrupted or not a
            keyring. The file itself is never touched.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe might never end
            kind = "a folder" if path.is_dir() else "a pipe or a device"
            raise WatermarkError(f"the keyring {path} is {kind}; expected the name of a file, such as keys.json")
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise WatermarkError(
                f"the keyring {path} can be read by other users (mode {path.stat().st_mode & 0o777:04o}; expected"
                f" 0600); run `chmod 600 {path}`"
            )
        content = path.read_bytes()
    except OSError as error:
        raise WatermarkError(
            f"the keyring {path} cannot be read ({error.strerror}); check the path, or make one with `keys new`"
        ) from error
    try:
        data = json.loads(content.decode("utf-8"))
    except (
        ValueError,
        RecursionError,
    ):  # without `from`: the decoder's message may quote the file, and the file holds secrets
        raise WatermarkError(
            f"the keyring {path} ({len(content)} bytes) is not whole JSON; it is truncated, corrupted or another kind"
            " of file: restore it from a copy (it was left as it is)"
        ) from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise WatermarkError(f"{path} is JSON but not a keyring of this package; expected a file made with `keys new`")
    version = data.get("version")
    if version not in _READABLE or isinstance(version, (bool, float)):
        raise WatermarkError(
            f"the keyring {path} has format version {version!r}; this release reads {FORMAT_VERSION} and older: update"
            " the package"
        )
    try:
        return Keyring(_decode(record, version) for record in data["keys"])
    except WatermarkError as error:
        raise WatermarkError(f"the keyring {path} is corrupted: {error}") from None
    except (KeyError, TypeError, AttributeError, binascii.Error, ValueError):
        raise WatermarkError(
            f"the keyring {path} is corrupted: a key's record is incomplete or not base64; restore it from a copy (it"
            " was left as it is)"
        ) from None


def save_keyring(ring: Keyring, path: str | os.PathLike) -> Path:
    """Write a keyring whole or not at all, with mode 0600 from the first byte on; return the path.

    To add to a keyring that others may add to as well, use `update_keyring`.

    Args:
        ring: what to write.
        path: of the file; missing folders are made.

    Raises:
        WatermarkError: the folder cannot be written, or the file that is there is not a keyring, or holds keys or
            secrets that the new one lacks: they would be lost.

    >>> ring = Keyring()
    >>> key = ring.new("studio")
    >>> load_keyring(save_keyring(ring, "keys.json")).get("studio") == key
    True
    """
    path = Path(path)
    with _held(path):
        _check_nothing_lost(ring, path)
        _write(ring, path)
    return path


def update_keyring(path: str | os.PathLike, change: Callable[[Keyring], _T], *, fresh: bool = False) -> _T:
    """Read a keyring, or start one, change it and write it, held against all others who do; a link is followed.

    Args:
        path: of the file; what `change` leaves as it was is not written.
        change: of the keyring in hand; what it returns is returned.
        fresh: refuse a file that is there already.

    Raises:
        WatermarkError: as `load_keyring` and `save_keyring`; or there is a file and `fresh`.

    >>> update_keyring("keys.json", lambda ring: ring.new("archive")).name
    'archive'
    """
    path = Path(path)
    with _held(path):
        there = os.path.lexists(path)
        if there and fresh:  # it might be the only copy of somebody's keys
            raise WatermarkError(f"{path} exists already; give a new name: a keyring is never written over")
        ring = load_keyring(path) if path.exists() else Keyring()
        before = list(ring)
        result = change(ring)
        if not there or list(ring) != before:
            _check_nothing_lost(ring, path)
            _write(ring, path)
    return result


@contextmanager
def _held(path: Path) -> Iterator[None]:
    if path.is_dir():
        raise WatermarkError(f"the keyring {path} is a folder; expected the name of a file, such as keys.json")
    try:
        with locked(path):
            yield
    except OSError as error:
        raise WatermarkError(
            f"the keyring {path} cannot be written ({error.strerror}); choose a folder you may write to"
        ) from error
    except WatermarkError:
        raise
    except SemipermError as error:
        raise WatermarkError(f"the keyring {error}") from error


def _check_nothing_lost(ring: Keyring, path: Path) -> None:
    keys = {(key.name, key.stream_key): key for key in ring}
    for old in load_keyring(path) if path.exists() else ():
        new = keys.get((old.name, old.stream_key))
        lacks = new is None or (old.mac_key, old.content_key) not in ((None, None), (new.mac_key, new.content_key))
        if lacks or new.since > old.since:  # then its old pictures would not be read
            raise WatermarkError(
                f"saving to {path} would lose key {old.name!r} or its secrets; load that keyring and add to it, or"
                " choose another file"
            )


def _write(ring: Keyring, path: Path) -> None:
    def text(secret: bytes | None) -> str | None:
        return None if secret is None else base64.b64encode(secret).decode()

    records = [
        {
            "name": key.name,
            "key_id": key.key_id,
            "created": key.created,
            "stream_key": text(key.stream_key),
            "mac_key": text(key.mac_key),
            "content_key": text(key.content_key),
            "since": key.since,
        }
        for key in ring
    ]
    content = json.dumps({"format": FORMAT, "version": FORMAT_VERSION, "keys": records}, indent=1) + "\n"
    write_file(path, content, mode=0o600)
