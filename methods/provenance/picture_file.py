"""PNG, JPEG and WebP as lists of chunks: metadata is put in and read out without decoding or changing the picture.

PNG    8-byte signature, then length | name | payload | CRC     text in iTXt, XMP in iTXt, C2PA in caBX
JPEG   FF marker | length | payload up to the scan              XMP in APP1, C2PA in APP11
WebP   RIFF | size | WEBP, then name | length | payload         XMP in "XMP ", C2PA in "C2PA"; VP8X says what is there
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass, replace

from ..errors import WatermarkError

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_XMP = "XML:com.adobe.xmp"
_JPEG_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_JPEG_ICC = b"ICC_PROFILE\0"
_TEXT = 1 << 20  # bytes of one metadata text; more is not ours, or wants to fill the memory
_SEGMENT = 65533  # bytes that a JPEG segment holds

# What may differ between two files of one picture. All else enters the digest.
_PNG_BESIDE = {b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"tIME", b"pHYs", b"caBX"}
_WEBP_BESIDE = {b"XMP ", b"EXIF", b"C2PA", b"VP8X"}


@dataclass(frozen=True)
class PictureFile:
    """A picture file taken apart.

    Args:
        format: "png", "jpeg" or "webp".
        chunks: (name, payload) in order; a JPEG marker's name is its second byte.
        tail: what follows them: a JPEG's scans, and bytes after the end.
    """

    format: str
    chunks: tuple[tuple[bytes, bytes], ...]
    tail: bytes = b""

    @property
    def mime(self) -> str:
        return f"image/{self.format}"

    @property
    def has_manifest(self) -> bool:
        """Whether a C2PA manifest is inside; it covers every byte, so nothing may be changed any more."""
        if self.format == "jpeg":
            return any(name == b"\xeb" and b"jumb" in payload[:32] for name, payload in self.chunks)
        return any(name in (b"caBX", b"C2PA") for name, _ in self.chunks)

    def digest(self) -> str:
        """SHA-256 of the picture as it is stored: other metadata, same digest; encoded anew, another."""
        total = hashlib.sha256(self.format.encode())
        for name, payload in self.chunks:
            if not self._beside(name, payload):
                total.update(name + struct.pack(">Q", len(payload)))
                total.update(payload)
        if self.format == "jpeg":
            total.update(self.tail)
        return total.hexdigest()

    def _beside(self, name: bytes, payload: bytes) -> bool:
        if self.format == "png":
            return name in _PNG_BESIDE
        if self.format == "webp":
            return name in _WEBP_BESIDE
        application = 0xE0 <= name[0] <= 0xEF and name[0] != 0xEE  # APP14 says how colours are stored
        return name == b"\xfe" or (application and not payload.startswith(_JPEG_ICC))

    def texts(self, keyword: str) -> list[str]:
        """A PNG's texts under a keyword, in order; other formats have none.

        Raises:
            WatermarkError: a damaged or huge one.
        """
        if self.format != "png":
            return []
        start = keyword.encode("latin-1") + b"\0"
        return [_png_text(n, p) for n, p in self.chunks if n in (b"tEXt", b"zTXt", b"iTXt") and p.startswith(start)]

    def with_text(self, keyword: str, text: str) -> PictureFile:
        """A PNG with this text alone under the keyword, the other chunks as they were."""
        start = keyword.encode("latin-1") + b"\0"
        chunk = b"iTXt", start + b"\0\0\0\0" + text.encode()
        kept = [c for c in self.chunks if not (c[0] in (b"tEXt", b"zTXt", b"iTXt") and c[1].startswith(start))]
        first = next((i for i, (name, _) in enumerate(kept) if name == b"IDAT"), len(kept))
        return replace(self, chunks=(*kept[:first], chunk, *kept[first:]))

    def xmp(self) -> str | None:
        """The XMP packet, or None.

        Raises:
            WatermarkError: a damaged or huge one.
        """
        if self.format == "png":
            return next(iter(self.texts(_PNG_XMP)), None)
        packets = [p for i, (_, p) in enumerate(self.chunks) if self._is_xmp(i)]
        return _decoded(packets[0].removeprefix(_JPEG_XMP)) if packets else None

    def with_xmp(self, packet: str) -> PictureFile:
        """The file with this XMP packet alone, the other chunks as they were.

        Raises:
            WatermarkError: a packet that does not fit into a JPEG segment.
        """
        if self.format == "png":
            return self.with_text(_PNG_XMP, packet)
        kept = [c for i, c in enumerate(self.chunks) if not self._is_xmp(i)]
        if self.format == "webp":
            return replace(self, chunks=(*_extended(kept), (b"XMP ", packet.encode())))
        payload = _JPEG_XMP + packet.encode()
        if len(payload) > _SEGMENT:
            raise WatermarkError(
                f"the JPEG's XMP metadata would take {len(payload)} bytes; a segment holds {_SEGMENT}: take metadata"
                " out, or save the picture as PNG"
            )
        first = 0
        while first < len(kept) and kept[first][0] in (b"\xe0", b"\xe1"):  # JFIF and Exif stand first
            first += 1
        return replace(self, chunks=(*kept[:first], (b"\xe1", payload), *kept[first:]))

    def _is_xmp(self, index: int) -> bool:
        name, payload = self.chunks[index]
        if self.format == "webp":
            return name == b"XMP "
        return name == b"\xe1" and payload.startswith(_JPEG_XMP)

    def to_bytes(self) -> bytes:
        """The whole file."""
        if self.format == "png":
            parts = [struct.pack(">I", len(p)) + n + p + struct.pack(">I", zlib.crc32(n + p)) for n, p in self.chunks]
            return b"".join((_PNG, *parts, self.tail))
        if self.format == "jpeg":
            parts = [b"\xff" + n + struct.pack(">H", len(p) + 2) + p for n, p in self.chunks]
            return b"".join((b"\xff\xd8", *parts, self.tail))
        body = b"WEBP" + b"".join(n + struct.pack("<I", len(p)) + p + bytes(len(p) % 2) for n, p in self.chunks)
        return b"RIFF" + struct.pack("<I", len(body)) + body + self.tail


def parse(data: bytes) -> PictureFile:
    """Take a PNG, JPEG or WebP file apart; `.to_bytes()` puts it together again.

    Raises:
        WatermarkError: another format, or a file that is cut off or damaged.
    """
    if data.startswith(_PNG):
        reader = _parse_png
    elif data.startswith(b"\xff\xd8\xff"):
        reader = _parse_jpeg
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        reader = _parse_webp
    else:
        raise WatermarkError("this is not a PNG, JPEG or WebP picture; provenance is kept in these formats alone")
    try:
        return reader(data)
    except (struct.error, IndexError):
        raise WatermarkError("the picture file is cut off; get a whole copy of it") from None


def _parse_png(data: bytes) -> PictureFile:
    chunks, at = [], len(_PNG)
    while not chunks or chunks[-1][0] != b"IEND":
        length, name = struct.unpack_from(">I4s", data, at)
        payload = data[at + 8 : at + 8 + length]
        (crc,) = struct.unpack_from(">I", data, at + 8 + length)
        if crc != zlib.crc32(name + payload):
            raise WatermarkError(f"the PNG file is damaged in its chunk {name!r}; get a whole copy of it")
        chunks.append((name, payload))
        at += 12 + length
    return PictureFile("png", tuple(chunks), data[at:])


def _parse_jpeg(data: bytes) -> PictureFile:
    chunks, at = [], 2
    while True:
        while data[at] == 0xFF and data[at + 1] == 0xFF:  # fill bytes
            at += 1
        if data[at] != 0xFF:
            raise WatermarkError("the JPEG file is damaged in its header; get a whole copy of it")
        if data[at + 1] == 0xDA:  # the first scan
            break
        (length,) = struct.unpack_from(">H", data, at + 2)
        if length < 2:
            raise WatermarkError("the JPEG file is damaged in its header; get a whole copy of it")
        chunks.append((data[at + 1 : at + 2], data[at + 4 : at + 2 + length]))
        at += 2 + length
    if b"\xff\xd9" not in data[at:]:
        raise IndexError
    return PictureFile("jpeg", tuple(chunks), data[at:])


def _parse_webp(data: bytes) -> PictureFile:
    (size,) = struct.unpack_from("<I", data, 4)
    end = 8 + size
    if end > len(data):
        raise IndexError
    chunks, at = [], 12
    while at < end:
        name, length = struct.unpack_from("<4sI", data, at)
        if at + 8 + length > end:
            raise IndexError
        chunks.append((name, data[at + 8 : at + 8 + length]))
        at += 8 + length + length % 2
    return PictureFile("webp", tuple(chunks), data[end:])


def _extended(chunks: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """WebP chunks with a VP8X header that announces XMP."""
    xmp, alpha = 0x04, 0x10
    names = [name for name, _ in chunks]
    if names[:1] == [b"VP8X"]:
        header = chunks[0][1]
        return [(b"VP8X", bytes([header[0] | xmp]) + header[1:]), *chunks[1:]]
    if b"VP8L" in names:
        (bits,) = struct.unpack_from("<I", chunks[names.index(b"VP8L")][1], 1)
        width, height, flags = bits & 0x3FFF, bits >> 14 & 0x3FFF, alpha if bits >> 28 & 1 else 0
    elif b"VP8 " in names:
        width, height = (side % (1 << 14) - 1 for side in struct.unpack_from("<HH", chunks[names.index(b"VP8 ")][1], 6))
        flags = 0
    else:
        raise WatermarkError("the WebP file holds no picture; get a whole copy of it")
    sides = width.to_bytes(3, "little") + height.to_bytes(3, "little")
    return [(b"VP8X", bytes([flags | xmp, 0, 0, 0]) + sides), *chunks]


def _png_text(name: bytes, payload: bytes) -> str:
    _, _, rest = payload.partition(b"\0")
    if name == b"tEXt":
        return rest[:_TEXT].decode("latin-1")
    compressed = name == b"zTXt" or rest[:1] == b"\1"
    text = rest[1:] if name == b"zTXt" else (rest[2:].split(b"\0", 2) + [b"", b""])[2]
    if compressed:
        inflater = zlib.decompressobj()
        try:
            text = inflater.decompress(text, _TEXT)
        except zlib.error:
            raise WatermarkError("a text of the PNG file is damaged; get a whole copy of it") from None
        if inflater.unconsumed_tail:
            raise WatermarkError(f"a text of the PNG file is longer than {_TEXT} bytes; it is not read")
    return text.decode("latin-1") if name == b"zTXt" else _decoded(text)


def _decoded(text: bytes) -> str:
    if len(text) > _TEXT:
        raise WatermarkError(f"a text of the file takes {len(text)} bytes; more than {_TEXT} are not read")
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise WatermarkError("a text of the file is not UTF-8; it was damaged, or written by another program") from None
