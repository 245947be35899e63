"""Keys of the watermark: two secrets from one random master, the keystream they give, and the file that keeps them.

A holder of `stream_key` can read marks and forge their presence; only a holder of `mac_key` can make or check the
authentication code inside a payload. `Keyring.detector()` drops the second, for a detector that is given away.
"""

from __future__ import annotations

import datetime
import json
import secrets
from dataclasses import dataclass, field, replace

import numpy as np

from ..errors import WatermarkError

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
