"""Keys of the watermark: two secrets from one random master, the keystream they give, and the file that keeps them.

A holder of `stream_key` can read marks and forge their presence; only a holder of `mac_key` can make or check the
authentication code inside a payload. `Keyring.detector()` drops the second, for a detector that is given away.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from .errors import WatermarkError

FORMAT = "semiperm-watermark-keyring"
FORMAT_VERSION = 1
KEY_IDS = 4096
_SECRET = 32  # bytes


def _cryptography():
    """The HKDF, ChaCha20 and HMAC of the `cryptography` package, imported when the first key is used."""
    try:
        from cryptography.hazmat.primitives import hashes, hmac
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand
    except ImportError as error:
        raise WatermarkError(
            "watermark keys need the package `cryptography`, which is not installed; run `pip install cryptography`"
        ) from error
    return hashes, hmac, Cipher, ChaCha20, HKDF, HKDFExpand


@dataclass(frozen=True)
class WatermarkKey:
    """One signing or detecting key; its repr hides the secrets.

    Args:
        name: what people call it, not empty.
        key_id: 0..4095, travels in the payload of large latents.
        created: ISO 8601 time.
        stream_key: 32 secret bytes: positions, signs, presence.
        mac_key: 32 secret bytes, or None in a detector's copy, which can read marks but not authenticate them.

    Raises:
        WatermarkError: a field of the wrong type, length or range.
    """

    name: str
    key_id: int
    created: str
    stream_key: bytes = field(repr=False)
    mac_key: bytes | None = field(default=None, repr=False)

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name.strip():
            raise WatermarkError(f"a key is named {self.name!r}; expected a name that is not empty")
        if not isinstance(self.key_id, int) or isinstance(self.key_id, bool) or not 0 <= self.key_id < KEY_IDS:
            raise WatermarkError(f"key {self.name!r} has the id {self.key_id!r}; expected 0..{KEY_IDS - 1}")
        if not isinstance(self.created, str):
            raise WatermarkError(f"key {self.name!r} has a creation time that is not text; expected ISO 8601")
        for part, value in (("stream_key", self.stream_key), ("mac_key", self.mac_key or bytes(_SECRET))):
            if not isinstance(value, bytes) or len(value) != _SECRET:
                raise WatermarkError(f"key {self.name!r} has a {part} that is not {_SECRET} bytes; make a new key")

    @classmethod
    def new(cls, name: str, key_id: int) -> WatermarkKey:
        """A fresh key: both secrets are HKDF-SHA256 of one random 32-byte master, which is then forgotten."""
        hashes, _, _, _, hkdf, _ = _cryptography()
        master = secrets.token_bytes(_SECRET)
        stream_key, mac_key = (
            hkdf(hashes.SHA256(), _SECRET, salt=None, info=f"semiperm watermark {purpose}".encode()).derive(master)
            for purpose in ("stream", "mac")
        )
        created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return cls(name, key_id, created, stream_key, mac_key)

    def detector(self) -> WatermarkKey:
        """This key without its MAC secret."""
        return replace(self, mac_key=None)

    def keystream(
        self, purpose: str, shape: tuple[int, ...], nonce: int, count: int, *, offset: int = 0, scope: str = ""
    ) -> bytes:
        """`count` bytes of ChaCha20(HKDF-Expand(stream_key, purpose | scope | shape), nonce), `offset` bytes in.

        Args:
            purpose: separates the uses of one key.
            shape: of one image's latent; streams of different shapes are unrelated.
            nonce: 0 .. 2^96 - 1.
            count: bytes.
            offset: bytes to skip, a multiple of 64 (one ChaCha20 block).
            scope: a model or tenant name that separates marks further; "" for none.
        """
        hashes, _, cipher, chacha20, _, hkdf_expand = _cryptography()
        if offset % 64:
            raise WatermarkError(f"a keystream offset of {offset} bytes was asked for; expected a multiple of 64")
        info = json.dumps(["semiperm", purpose, scope, *shape]).encode()
        derived = hkdf_expand(hashes.SHA256(), _SECRET, info).derive(self.stream_key)
        # The first 4 bytes are ChaCha20's block counter, the other 12 its nonce (RFC 8439).
        block = (offset // 64).to_bytes(4, "little") + int(nonce).to_bytes(12, "little")
        return cipher(chacha20(derived, block), mode=None).encryptor().update(bytes(count))

    def stream(self, purpose: str, shape: tuple[int, ...], nonce: int, count: int, *, scope: str = "") -> np.ndarray:
        """(count,) uint8 bits of `keystream`, most significant bit of each byte first."""
        packed = np.frombuffer(self.keystream(purpose, shape, nonce, -(-count // 8), scope=scope), np.uint8)
        return np.unpackbits(packed)[:count]

    def mac(self, message: bytes, bits: int) -> int:
        """The first `bits` (1..256) bits of HMAC-SHA256(mac_key, message) as an integer.

        Raises:
            WatermarkError: this is a detector's copy, which has no MAC key.
        """
        if self.mac_key is None:
            raise WatermarkError(
                f"key {self.name!r} is a detector's copy without its MAC secret: it reads marks but can neither make"
                " nor check them; use the full keyring"
            )
        hashes, hmac, *_ = _cryptography()
        tag = hmac.HMAC(self.mac_key, hashes.SHA256())
        tag.update(message)
        return int.from_bytes(tag.finalize(), "big") >> (256 - bits)


class Keyring:
    """An ordered set of keys, unique by name and by id.

    Raises:
        WatermarkError: two keys share a name or an id.
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
        """Adds and returns a fresh key with the next free id.

        Raises:
            WatermarkError: the name is taken, or all ids are.
        """
        used = {key.key_id for key in self._keys}
        free = max(used, default=-1) + 1
        if free >= KEY_IDS:
            free = next((number for number in range(KEY_IDS) if number not in used), None)
            if free is None:
                raise WatermarkError(f"the keyring already holds {KEY_IDS} keys; start a second keyring file")
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
    """Reads a keyring file.

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


def save_keyring(ring: Keyring, path: str | os.PathLike) -> None:
    """Writes a keyring atomically, with mode 0600 from the first byte on.

    Raises:
        WatermarkError: the folder cannot be written, or the file that is there is not a keyring, or holds keys or
            MAC secrets that the new one lacks: they would be lost.
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
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise WatermarkError(
            f"the keyring {path} cannot be written ({error.strerror}); choose a folder you may write to"
        ) from error
