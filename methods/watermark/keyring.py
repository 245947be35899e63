"""The file that keeps watermark keys: readable by its owner alone, written whole, never emptied by mistake."""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import WatermarkError
from ..files import write_file
from .keys import KEY_IDS, WatermarkKey

__all__ = ["Keyring", "load_keyring", "save_keyring"]

FORMAT = "semiperm-watermark-keyring"
FORMAT_VERSION = 1


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
            self._add(key)

    def _add(self, key: WatermarkKey):
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
            WatermarkError: the name is taken, or all ids are.
        """
        used = {key.key_id for key in self._keys}
        if len(used) == KEY_IDS:
            raise WatermarkError(f"the keyring already holds {KEY_IDS} keys; start a second keyring file")
        free = max(used, default=-1) + 1
        if free == KEY_IDS:
            free = min(set(range(KEY_IDS)) - used)
        key = WatermarkKey.new(name, free)
        self._add(key)
        return key

    def detector(self) -> Keyring:
        """The same keys without their MAC secrets."""
        return Keyring(key.detector() for key in self._keys)


def _decode(record: dict) -> WatermarkKey:
    mac = record["mac_key"]
    return WatermarkKey(
        record["name"],
        record["key_id"],
        record["created"],
        base64.b64decode(record["stream_key"], validate=True),
        None if mac is None else base64.b64decode(mac, validate=True),
    )


def load_keyring(path: str | os.PathLike) -> Keyring:
    """Read a keyring file.

    Args:
        path: as `save_keyring` or `semiperm keys new` wrote it.

    Raises:
        WatermarkError: no such file, readable by others (POSIX), truncated, corrupted or not a keyring. The file
            itself is never touched.
    """
    path = Path(path)
    try:
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
    except ValueError:  # without `from`: the decoder's message may quote the file, and the file holds secrets
        raise WatermarkError(
            f"the keyring {path} ({len(content)} bytes) is not whole JSON; it is truncated, corrupted or another kind"
            " of file: restore it from a copy (it was left as it is)"
        ) from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise WatermarkError(f"{path} is JSON but not a keyring of this package; expected a file made with `keys new`")
    if data.get("version") != FORMAT_VERSION:
        raise WatermarkError(
            f"the keyring {path} has format version {data.get('version')!r}; this release reads {FORMAT_VERSION}:"
            " update the package"
        )
    try:
        return Keyring(_decode(record) for record in data["keys"])
    except WatermarkError as error:
        raise WatermarkError(f"the keyring {path} is corrupted: {error}") from None
    except (KeyError, TypeError, AttributeError, binascii.Error, ValueError):
        raise WatermarkError(
            f"the keyring {path} is corrupted: a key's record is incomplete or not base64; restore it from a copy (it"
            " was left as it is)"
        ) from None


def save_keyring(ring: Keyring, path: str | os.PathLike) -> Path:
    """Write a keyring whole or not at all, with mode 0600 from the first byte on; return the path.

    Args:
        ring: what to write.
        path: of the file; missing folders are made.

    Raises:
        WatermarkError: the folder cannot be written, or the file that is there is not a keyring, or holds keys or
            MAC secrets that the new one lacks: they would be lost.

    >>> ring = Keyring()
    >>> key = ring.new("studio")
    >>> load_keyring(save_keyring(ring, "keys.json")).get("studio") == key
    True
    """
    path = Path(path)
    keys = {(key.name, key.stream_key): key for key in ring}
    if path.exists():
        for old in load_keyring(path):
            new = keys.get((old.name, old.stream_key))
            if new is None or (old.mac_key is not None and new.mac_key != old.mac_key):
                raise WatermarkError(
                    f"saving to {path} would lose key {old.name!r} or its MAC secret; load that keyring and add to it,"
                    " or choose another file"
                )

    def text(secret: bytes | None) -> str | None:
        return None if secret is None else base64.b64encode(secret).decode()

    records = [
        {
            "name": key.name,
            "key_id": key.key_id,
            "created": key.created,
            "stream_key": text(key.stream_key),
            "mac_key": text(key.mac_key),
        }
        for key in ring
    ]
    content = json.dumps({"format": FORMAT, "version": FORMAT_VERSION, "keys": records}, indent=1) + "\n"
    try:
        return write_file(path, content, mode=0o600)
    except OSError as error:
        raise WatermarkError(
            f"the keyring {path} cannot be written ({error.strerror}); choose a folder you may write to"
        ) from error
