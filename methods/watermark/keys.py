"""Keys of the watermark: three secrets from one random master, and the keystreams they give.

A holder of `stream_key` can read marks and forge their presence; only a holder of `mac_key` can make or check the
authentication code inside a payload, and only a holder of `content_key` can write or check what a picture shows.
`Keyring.detector()` drops these two, for a detector that is given away.

Formats of pictures: in format 1 what a picture shows was written with `stream_key`, and the code did not say which
format it was; in format 2 it is written with `content_key`, and the code is of a message that names the format; in
format 3 the nonce lies otherwise and is longer (fields.py). A key knows the format it was made in, and reads pictures
of that and all later ones; it writes the newest. Keys made before format 2 had two secrets; their content secret is
derived from the MAC secret.
"""

from __future__ import annotations

import datetime
import json
import secrets
from dataclasses import dataclass, field, replace

import numpy as np

from ..errors import WatermarkError
from ..packages import install_command

KEY_IDS = 4096  # the 12 bits that a large payload has for it
FORMAT = 3  # of the pictures that are signed
CONTENT_PURPOSES = ("binding 2", "content 2")  # of keystreams that come from the content secret
_SECRET = 32  # bytes: the key of ChaCha20, and of HMAC-SHA256


def layout_of(form: int) -> int:
    """The newest format whose latents are laid out as those of this one: 1 and 2 differ in their seals alone."""
    return max(2, form)


def _cryptography():
    """The HKDF, ChaCha20 and HMAC of the `cryptography` package, imported when the first key is used."""
    try:
        from cryptography.hazmat.primitives import hashes, hmac
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand
    except ImportError as error:
        raise WatermarkError(
            "watermark keys need the package `cryptography`, which this Python lacks; run"
            f" `{install_command('cryptography')}`"
        ) from error
    return hashes, hmac, Cipher, ChaCha20, HKDF, HKDFExpand


def _expanded(secret: bytes, info: str) -> bytes:
    hashes, _, _, _, _, hkdf_expand = _cryptography()
    return hkdf_expand(hashes.SHA256(), _SECRET, info.encode()).derive(secret)


@dataclass(frozen=True)
class WatermarkKey:
    """One signing or detecting key; its repr hides the secrets.

    Without `content_key` a key that has a MAC secret gets one that is derived from it.

    Args:
        name: what people call it, not empty.
        key_id: 0..4095, travels in the payload of large latents.
        created: ISO 8601 time.
        stream_key: 32 secret bytes: positions, signs, presence.
        mac_key: 32 secret bytes, or None in a detector's copy, which can read marks but not authenticate them.
        content_key: 32 secret bytes: what a picture shows. None in a detector's copy.
        since: the format of pictures, 1..3, that was the newest when the key was made: older ones it never signed.

    Raises:
        WatermarkError: a field of the wrong type, length or range, or a content secret without the MAC's.
    """

    name: str
    key_id: int
    created: str
    stream_key: bytes = field(repr=False)
    mac_key: bytes | None = field(default=None, repr=False)
    content_key: bytes | None = field(default=None, repr=False)
    since: int = FORMAT

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name.strip():
            raise WatermarkError(f"a key is named {self.name!r}; expected a name that is not empty")
        if not isinstance(self.key_id, int) or isinstance(self.key_id, bool) or not 0 <= self.key_id < KEY_IDS:
            raise WatermarkError(f"key {self.name!r} has the id {self.key_id!r}; expected 0..{KEY_IDS - 1}")
        if not isinstance(self.since, int) or isinstance(self.since, bool) or not 1 <= self.since <= FORMAT:
            raise WatermarkError(
                f"key {self.name!r} was made for pictures of format {self.since!r}; this release reads 1..{FORMAT}:"
                " update the package"
            )
        if not isinstance(self.created, str):
            raise WatermarkError(f"key {self.name!r} has a creation time that is not text; expected ISO 8601")
        for part in ("stream_key", "mac_key", "content_key"):
            value = getattr(self, part)
            if value is None and part != "stream_key":
                continue
            if not isinstance(value, bytes) or len(value) != _SECRET:
                raise WatermarkError(f"key {self.name!r} has a {part} that is not {_SECRET} bytes; make a new key")
        if self.mac_key is None and self.content_key is not None:
            raise WatermarkError(f"key {self.name!r} has a content secret but no MAC secret; expected both or neither")
        if self.mac_key is not None and self.content_key is None:
            object.__setattr__(self, "content_key", _expanded(self.mac_key, "semiperm watermark content"))

    @property
    def formats(self) -> tuple[int, ...]:
        """Formats of pictures that this key may have signed, the newest first."""
        return tuple(range(FORMAT, self.since - 1, -1))

    @property
    def layouts(self) -> tuple[int, ...]:
        """`layout_of` these formats, each once."""
        return tuple(dict.fromkeys(map(layout_of, self.formats)))

    @classmethod
    def new(cls, name: str, key_id: int) -> WatermarkKey:
        """A fresh key: its secrets are HKDF-SHA256 of one random 32-byte master, which is then forgotten."""
        hashes, _, _, _, hkdf, _ = _cryptography()
        master = secrets.token_bytes(_SECRET)
        stream_key, mac_key, content_key = (
            hkdf(hashes.SHA256(), _SECRET, salt=None, info=f"semiperm watermark {purpose}".encode()).derive(master)
            for purpose in ("stream", "mac", "content")
        )
        created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return cls(name, key_id, created, stream_key, mac_key, content_key)

    def detector(self) -> WatermarkKey:
        """This key without its MAC and content secrets."""
        return replace(self, mac_key=None, content_key=None)

    def keystream(
        self, purpose: str, shape: tuple[int, ...], nonce: int, count: int, *, offset: int = 0, scope: str = ""
    ) -> bytes:
        """`count` bytes of ChaCha20(HKDF-Expand(secret, purpose | scope | shape), nonce), `offset` bytes in.

        The secret is `stream_key`, or `content_key` for the purposes of `CONTENT_PURPOSES`.

        Args:
            purpose: separates the uses of one key.
            shape: of one image's latent; streams of different shapes are unrelated.
            nonce: 0 .. 2^96 - 1.
            count: bytes.
            offset: bytes to skip, a multiple of 64 (one ChaCha20 block).
            scope: a model or tenant name that separates marks further; "" for none.

        Raises:
            WatermarkError: another offset, or a content purpose in a detector's copy.
        """
        _, _, cipher, chacha20, _, _ = _cryptography()
        if offset % 64:
            raise WatermarkError(f"a keystream offset of {offset} bytes was asked for; expected a multiple of 64")
        secret = self.content_key if purpose in CONTENT_PURPOSES else self.stream_key
        if secret is None:
            raise WatermarkError(f"key {self.name!r} is a detector's copy: what a picture shows needs the full keyring")
        derived = _expanded(secret, json.dumps(["semiperm", purpose, scope, *shape]))
        # The first 4 bytes are ChaCha20's block counter, the other 12 its nonce (RFC 8439).
        block = (offset // 64).to_bytes(4, "little") + int(nonce).to_bytes(12, "little")
        return cipher(chacha20(derived, block), mode=None).encryptor().update(bytes(count))

    def stream(self, purpose: str, shape: tuple[int, ...], nonce: int, count: int, *, scope: str = "") -> np.ndarray:
        """(count,) uint8 bits of `keystream`, most significant bit of each byte first."""
        octets = np.frombuffer(self.keystream(purpose, shape, nonce, -(-count // 8), scope=scope), np.uint8)
        return np.unpackbits(octets)[:count]

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
