"""Finished work on disk, so that a stopped run goes on where it was: one JSON line each, under the settings it had."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from ..methods.errors import SemipermError

__all__ = ["Store", "code_digest", "digest"]

FORMAT = 1
_ROOT = Path(__file__).resolve().parent.parent


def digest(*parts: object) -> str:
    """16 hex digits that change when any of the parts does: bytes, paths (their content), or anything JSON can hold."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            part = part.read_bytes()
        elif not isinstance(part, bytes):
            part = json.dumps(part, sort_keys=True).encode()
        total.update(len(part).to_bytes(8, "big") + part)
    return total.hexdigest()[:16]


@functools.cache
def code_digest() -> str:
    """A digest of every source file of every code folder: what was computed by other code is computed again."""
    folders = sorted(path.parent for path in _ROOT.glob("*/__init__.py"))
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    return digest(*(part for file in files for part in (file.relative_to(_ROOT).as_posix(), file)))


class Store:
    """Values by key, in memory and, where there is a path, as lines of a file.

    A line that a stopped run left half written is not one of them; neither is what was kept under other settings,
    though it stays in the file.

    Args:
        path: the file, made with the first value; None keeps nothing on disk.
        kind: what the file is for, such as "detect": a file of another kind is refused and left as it is.
        settings: whatever changes the values beside the code (which is always part of them): anything JSON can hold.

    Raises:
        SemipermError: the file is another kind of file.
    """

    def __init__(self, path: str | Path | None, kind: str, settings: object = None):
        self._path = Path(path) if path is not None else None
        self._header = json.dumps({"semiperm": kind, "format": FORMAT})
        self._settings = digest(settings, code_digest())
        self._values: dict[str, Any] = {}
        if self._path is None or not self._path.exists():
            return
        if not self._path.is_file():  # reading a pipe might never end
            raise SemipermError(f"--resume {self._path} is a folder, a pipe or a device; give the name of a file")
        text = self._path.read_text(encoding="utf-8", errors="replace")
        if self._header.startswith(text):  # stopped in its first line
            self._path.write_text(self._header + "\n", encoding="utf-8")
            return
        header, *lines = text.splitlines()
        if header != self._header:
            raise SemipermError(f"--resume {self._path} was not written by `semiperm {kind}`; give another file")
        for line in lines:
            try:
                entry = json.loads(line)
                if entry["settings"] == self._settings:
                    self._values[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
                continue  # left half written: computed again
        if text and not text.endswith("\n"):
            self._append("")  # the next line must not continue the torn one

    def get(self, key: str) -> Any | None:
        """The value, or None."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep a value (anything JSON can hold but None), on disk at once."""
        self._values[key] = value
        if self._path is None:
            return
        if not self._path.exists() or not self._path.stat().st_size:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._append(self._header)
        self._append(json.dumps({"settings": self._settings, "key": key, "value": value}))

    def _append(self, line: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
