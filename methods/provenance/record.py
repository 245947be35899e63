"""Provenance beside the mark: what a file says of itself, in words that programs read.

The record is one JSON object. A PNG keeps it in the text chunk `semiperm-provenance`; PNG, JPEG and WebP keep it in
their XMP packet, together with IPTC's DigitalSourceType, which other programs know. Nothing of the picture is decoded
or changed, and all other metadata stays.

The record is no proof: who has the file can write another. It can be signed by a certificate (`c2pa`), and it
can be held against the mark in the picture; `examine` says what does not fit together.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from ..errors import WatermarkError
from ..files import write_file
from .picture_file import PictureFile, parse

ALGORITHM = "semiperm.keyed-mark.1"  # not on C2PA's list of soft binding algorithms
GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
KEYWORD = "semiperm-provenance"
FORMAT_VERSION = 1
_NAMESPACE = "urn:semiperm:provenance:1"
_IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_OURS = re.compile(
    f'<rdf:Description (?:xmlns:rdf="{_RDF}" )?rdf:about="" xmlns:semiperm="{_NAMESPACE}">.*?</rdf:Description>\n?',
    re.DOTALL,
)
# Where descriptions of a packet end, whatever its prefix for RDF is; or an element that is closed at once.
_END = re.compile(r"</(?:[\w.-]+:)?RDF\s*>|<((?:[\w.-]+:)?RDF)((?:\s[^<>]*?)?)/>")
_SOURCE = f'<Iptc4xmpExt:DigitalSourceType xmlns:Iptc4xmpExt="{_IPTC}">{{}}</Iptc4xmpExt:DigitalSourceType>'


@dataclass(frozen=True)
class Provenance:
    """What a file says of itself. Nothing in it is secret.

    Args:
        model: name of the model; a path would tell of your disk.
        generator, generator_version: the program.
        provider: who offers it, or None.
        algorithm: of the mark, or None without one.
        key_id: of the mark's key, 0..4095, or None.
        unique_id: of the mark's payload, 16 hexadecimal digits, or None.
        time: of generation, ISO 8601 in UTC.
        digital_source_type: IPTC's term, a URL.
        image_sha256: digest of the stored picture; `write_provenance` sets it.

    Raises:
        WatermarkError: a field of the wrong type or range.
    """

    model: str
    generator: str = "semiperm"
    generator_version: str = ""
    provider: str | None = None
    algorithm: str | None = None
    key_id: int | None = None
    unique_id: str | None = None
    time: str = ""
    digital_source_type: str = GENERATED
    image_sha256: str | None = None

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and "None" in field.type:
                continue
            right = int if field.name == "key_id" else str
            if type(value) is not right or (right is int and not 0 <= value < 4096):
                expected = "a whole number in 0..4095" if right is int else "text"
                raise WatermarkError(f"the provenance record has {field.name}={value!r}; expected {expected}")
        if self.unique_id is not None and not re.fullmatch("[0-9a-f]{16}", self.unique_id):
            raise WatermarkError(f"the unique id is {self.unique_id!r}; expected 16 hexadecimal digits")

    @property
    def binding(self) -> str | None:
        """The mark in one word, as a C2PA soft binding holds it: key id and unique id, in hexadecimal."""
        return None if self.unique_id is None or self.key_id is None else f"{self.key_id:03x}-{self.unique_id}"

    def to_json(self) -> str:
        record = {"format": KEYWORD, "version": FORMAT_VERSION, **asdict(self)}
        record["digitalSourceType"] = record.pop("digital_source_type")
        return json.dumps({name: value for name, value in record.items() if value is not None}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Provenance:
        """Read a record; fields that this release does not know are left out.

        Raises:
            WatermarkError: not a record, or one of a newer format.
        """
        try:
            record = json.loads(text)
            if record["format"] != KEYWORD or not isinstance(record["version"], int):
                raise KeyError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise WatermarkError("the provenance record is damaged: not the JSON that this program writes") from None
        if record["version"] > FORMAT_VERSION:
            raise WatermarkError(
                f"the provenance record has version {record['version']}; this release reads {FORMAT_VERSION}: update it"
            )
        record["digital_source_type"] = record.get("digitalSourceType", "")
        known = {field.name for field in fields(cls)}
        try:
            return cls(**{name: value for name, value in record.items() if name in known})
        except TypeError:
            raise WatermarkError("the provenance record is damaged: it names no model") from None


def describe(model: str, key=None, payload=None, *, provider: str | None = None) -> Provenance:
    """The record of a picture made now.

    Args:
        model: as given to the program; of a path, only the last part is kept.
        key: the `WatermarkKey` that signed the noise; its id alone is used. None without a mark.
        payload: the mark's `Payload`; its time, where it has one, is the record's.
        provider: who offers the program, or None.
    """
    seconds = payload.time if payload is not None else 0
    made = datetime.fromtimestamp(seconds, timezone.utc) if seconds else datetime.now(timezone.utc)
    return Provenance(
        model=Path(model).name if os.path.isabs(model) or Path(model).exists() else model,
        generator_version=package_version(),
        provider=provider,
        algorithm=None if key is None else ALGORITHM,
        key_id=None if key is None else key.key_id,
        unique_id=None if payload is None else f"{payload.unique_id:016x}",
        time=made.strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def package_version() -> str:
    """This package's version, installed or run from a clone."""
    clone = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if clone.is_file():
        found = re.search(r'^version = "(.+?)"', clone.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1]
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("semiperm")
    except PackageNotFoundError:
        return "unknown"


# ---- writing -------------------------------------------------------------------------------------------------------


def embed(data: bytes, provenance: Provenance) -> bytes:
    """Put a record into a PNG, JPEG or WebP file, in place of an earlier one.

    Args:
        data: the whole file; its picture and all other metadata stay as they are.
        provenance: its `image_sha256` is set to the digest of this picture.

    Raises:
        WatermarkError: another format, a damaged file, or one with a C2PA manifest, which the change would break.
    """
    file = parse(data)
    if file.has_manifest:
        raise WatermarkError("the picture is signed (C2PA) already; write the provenance record first and sign last")
    text = replace(provenance, image_sha256=file.digest()).to_json()
    file = file.with_xmp(_merged(file.xmp(), text, provenance.digital_source_type))
    if file.format == "png":
        file = file.with_text(KEYWORD, text)
    return file.to_bytes()


def write_provenance(path: str | os.PathLike, provenance: Provenance) -> Path:
    """Put a record into a PNG, JPEG or WebP file, which is replaced whole or not at all; return its path.

    Args:
        path: of the picture; its pixels and all other metadata stay as they are.
        provenance: its `image_sha256` is set to the digest of this picture.

    Raises:
        WatermarkError: another format, a damaged file, or one with a C2PA manifest, which the change would break.
        OSError: the file cannot be read or written.

    >>> write_provenance(picture_path, Provenance(model="canvas", key_id=3)).name
    'picture.png'
    >>> read_provenance(picture_path).key_id
    3
    """
    return write_file(path, embed(Path(path).read_bytes(), provenance))


def _merged(packet: str | None, record: str, source_type: str) -> str:
    """An XMP packet with our description; those of other programs in it stay."""
    packet = None if packet is None else _OURS.sub("", packet)
    source = "" if packet is not None and "DigitalSourceType" in packet else _SOURCE.format(escape(source_type))
    ours = (
        f'<rdf:Description xmlns:rdf="{_RDF}" rdf:about="" xmlns:semiperm="{_NAMESPACE}">{source}'
        f"<semiperm:record>{escape(record)}</semiperm:record></rdf:Description>\n"
    )
    if packet is None:
        return (
            '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n<x:xmpmeta xmlns:x="adobe:ns:meta/">'
            f'<rdf:RDF xmlns:rdf="{_RDF}">\n{ours}</rdf:RDF></x:xmpmeta>\n'
            '<?xpacket end="w"?>'
        )
    ends = list(_END.finditer(packet))
    if not ends:
        raise WatermarkError("the file's XMP metadata has no rdf:RDF element; repair it, or take it out of the file")
    name, attributes = ends[-1].groups()
    inside = ours + ends[-1].group() if name is None else f"<{name}{attributes}>{ours}</{name}>"
    return packet[: ends[-1].start()] + inside + packet[ends[-1].end() :]


# ---- reading -------------------------------------------------------------------------------------------------------


def read_provenance(path: str | os.PathLike) -> Provenance | None:
    """The record of a PNG, JPEG or WebP file, or None where it has none; a record alone proves nothing.

    Args:
        path: of the picture.

    Raises:
        WatermarkError: another format, a damaged file or record.
        OSError: the file cannot be read.
    """
    return extract(Path(path).read_bytes())


def extract(data: bytes) -> Provenance | None:
    """The record in a file's bytes, or None; of several, the first.

    Raises:
        WatermarkError: another format, a damaged file or record.
    """
    found = records_of(parse(data))[0]
    return Provenance.from_json(found[0]) if found else None


def records_of(file: PictureFile) -> tuple[list[str], str | None]:
    """The different records of a file as text, and the source type that its XMP names."""
    records, source_type = file.texts(KEYWORD), None
    packet = file.xmp()
    if packet is not None and (_NAMESPACE in packet or _IPTC in packet):
        if "<!DOCTYPE" in packet or "<!ENTITY" in packet:
            raise WatermarkError("the file's XMP metadata declares XML entities; it is not read")
        try:
            tree = ElementTree.fromstring(packet.replace("\ufeff", "").strip())
        except ElementTree.ParseError:
            raise WatermarkError("the file's XMP metadata is damaged: not XML") from None
        records += _values(tree, _NAMESPACE, "record")
        source_type = next(iter(_values(tree, _IPTC, "DigitalSourceType")), None)
    return list(dict.fromkeys(records)), source_type


def _values(tree, namespace: str, name: str) -> list[str]:
    tag = f"{{{namespace}}}{name}"
    found = [(element.text or "").strip() for element in tree.iter(tag)]
    return found + [element.attrib[tag] for element in tree.iter() if tag in element.attrib]
