"""Keyrings in ComfyUI: where they lie, what a name stands for, and the key that signs.

They lie in user/__semiperm/keyrings, which the server does not hand out.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ...methods.errors import WatermarkError
from ...methods.watermark.keyring import Keyring, load_keyring, update_keyring
from ...methods.watermark.keys import WatermarkKey
from ..private import private_folder

SUFFIX = ".json"
DEFAULT = f"my_keys{SUFFIX}"  # offered before it is there, so that the first keyring can be made by a node
_SAFE = re.compile(r"[\w][\w .-]*", re.ASCII)


@dataclass(frozen=True)
class Keys:
    """What a KEYRING socket carries: all keys, to detect with, and the one that signs. Its repr has no secrets."""

    ring: Keyring
    key: WatermarkKey


def keyring_names() -> list[str]:
    """The keyring files there are, and the name of the first one to make."""
    found = {path.name for path in private_folder("keyrings").glob(f"*{SUFFIX}") if not path.name.startswith(".")}
    return sorted(found | {DEFAULT})


def keyring_path(name: str) -> Path:
    """The file behind a name, which may not exist yet.

    Raises:
        WatermarkError: a name that is no plain file name.
    """
    if not isinstance(name, str) or not _SAFE.fullmatch(name) or not name.endswith(SUFFIX):
        raise WatermarkError(
            f"{name!r} is no keyring's name; expected a plain file name such as {DEFAULT!r}: letters, digits, spaces,"
            f" '.', '_' and '-', ending in {SUFFIX}; keyrings lie in user/__semiperm/keyrings"
        )
    return private_folder("keyrings") / name


def fingerprint(name: str) -> str:
    """Changes when the file does. ComfyUI writes it into saved pictures, so it says nothing of the content."""
    path = keyring_path(name)
    return f"{path.stat().st_mtime_ns} {path.stat().st_size}" if path.exists() else ""


def open_keys(name: str, key_name: str = "", make_missing: bool = False) -> Keys:
    """Read a keyring and choose the key that signs.

    Args:
        name: of the file.
        key_name: "" is the newest key.
        make_missing: make the file, and the key in it, where they are not there yet. Nothing is ever replaced.

    Raises:
        WatermarkError: no such file or key, or a file that is readable by others, damaged or no keyring.
    """
    path, key_name = keyring_path(name), key_name.strip()
    if not path.exists() and not make_missing:
        raise WatermarkError(
            f"there is no keyring {name!r} in {path.parent}; expected one of {keyring_names()}: switch make_missing on"
            " to make it, or copy a keyring there (mode 0600) and refresh (key R)"
        )
    if make_missing:
        _make_private(path.parent)
        return update_keyring(path, lambda ring: Keys(ring, _found_or_made(ring, key_name, path.stem)))
    ring = load_keyring(path)
    names = [key.name for key in ring]
    if not names or (key_name and key_name not in names):
        raise WatermarkError(
            f"the keyring {name!r} has no key {key_name!r}; expected one of {names}: switch make_missing on to make it"
        )
    return Keys(ring, ring.get(key_name) if key_name else list(ring)[-1])


def _found_or_made(ring: Keyring, key_name: str, first: str) -> WatermarkKey:
    names = [key.name for key in ring]
    if not names or (key_name and key_name not in names):
        return ring.new(key_name or first)
    return ring.get(key_name) if key_name else list(ring)[-1]


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.name == "posix":
            folder.chmod(0o700)
    except OSError as error:
        raise WatermarkError(
            f"the folder {folder} cannot be made ({error.strerror}); check who may write to ComfyUI's user folder"
        ) from error


def keys_text(name: str, keys: Keys) -> str:
    """The keys by name, id, date and what each may do; the one that signs has an arrow. No secrets."""
    lines = [f"{name}: {len(keys.ring)} key{'' if len(keys.ring) == 1 else 's'}"]
    for key in keys.ring:
        may = "signs and detects" if key.mac_key is not None else "only detects"
        mark = "->" if key.key_id == keys.key.key_id else "  "
        lines.append(f"{mark} {key.name}  id {key.key_id}  {key.created[:10]}  {may}")
    return "\n".join(lines)
