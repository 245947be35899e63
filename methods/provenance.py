"""Provenance beside the mark: what a file says of itself, in words that programs read.

The record is one JSON object. A PNG keeps it in the text chunk `semiperm-provenance`; PNG, JPEG and WebP keep it in
their XMP packet, together with IPTC's DigitalSourceType, which other programs know. Nothing of the picture is decoded
or changed, and all other metadata stays.

The record is no proof: who has the file can write another. It can be signed by a certificate (`provenance_c2pa`), and
it can be held against the mark in the picture; `examine` says what does not fit together.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from .errors import WatermarkError
from .provenance_files import PictureFile, parse

ALGORITHM = "semiperm.keyed-mark.1"  # not on C2PA's list of soft binding algorithms
GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
KEYWORD = "semiperm-provenance"
FORMAT_VERSION = 1
_NAMESPACE = "urn:semiperm:provenance:1"
_IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
_OURS = re.compile(f'<rdf:Description rdf:about="" xmlns:semiperm="{_NAMESPACE}">.*?</rdf:Description>\n?', re.DOTALL)
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
        image_sha256: digest of the stored picture; `embed` sets it.

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
    clone = Path(__file__).resolve().parent.parent / "pyproject.toml"
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


def write_provenance(path: str | os.PathLike, provenance: Provenance) -> None:
    """`embed` on a file, which is replaced whole or not at all.

    Raises:
        WatermarkError: as `embed`.
        OSError: the file cannot be read or written.
    """
    replace_file(path, embed(Path(path).read_bytes(), provenance))


def replace_file(path: str | os.PathLike, data: bytes) -> None:
    """Write beside the file, then rename; the file keeps its mode."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _merged(packet: str | None, record: str, source_type: str) -> str:
    """An XMP packet with our description; those of other programs in it stay."""
    packet = None if packet is None else _OURS.sub("", packet)
    source = "" if packet is not None and "DigitalSourceType" in packet else _SOURCE.format(escape(source_type))
    ours = (
        f'<rdf:Description rdf:about="" xmlns:semiperm="{_NAMESPACE}">{source}'
        f"<semiperm:record>{escape(record)}</semiperm:record></rdf:Description>\n"
    )
    if packet is None:
        return (
            '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n<x:xmpmeta xmlns:x="adobe:ns:meta/">'
            f'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">\n{ours}</rdf:RDF></x:xmpmeta>\n'
            '<?xpacket end="w"?>'
        )
    before, end, after = packet.rpartition("</rdf:RDF>")
    if not end:
        raise WatermarkError("the file's XMP metadata has no </rdf:RDF>; repair it, or take it out of the file")
    return before + ours + end + after


# ---- reading -------------------------------------------------------------------------------------------------------


def read_provenance(path: str | os.PathLike) -> Provenance | None:
    """The record of a file, or None.

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
    found = _records(parse(data))[0]
    return Provenance.from_json(found[0]) if found else None


def _records(file: PictureFile) -> tuple[list[str], str | None]:
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


@dataclass(frozen=True)
class Report:
    """What a file says of its origin.

    provenance: the record, or None. manifest: the `provenance_c2pa.Manifest`, or None. problems: what does not fit
    together, in words; none where all that is there agrees (also where nothing is there).
    """

    format: str
    provenance: Provenance | None
    manifest: object | None
    problems: tuple[str, ...]


def examine(data: bytes, *, trust: bytes | None = None, found: dict | None = None) -> Report:
    """Read all that a file says of its origin, and hold it against the file and against each other.

    Args:
        data: the whole file.
        trust: certificates (PEM) whose signatures count as trusted.
        found: what a detector saw in the picture: `verdict`, `key_id` and `unique_id` (16 hexadecimal digits), the
            last two None where unknown. None where nobody looked.

    Raises:
        WatermarkError: another format or a damaged file. Damaged metadata is a problem in the report, not an error.
    """
    file, problems, record, manifest = parse(data), [], None, None
    try:
        records, source_type = _records(file)
        record = Provenance.from_json(records[0]) if records else None
    except WatermarkError as error:
        records, source_type = [], None
        problems.append(str(error))
    if len(records) > 1:
        problems.append(f"the file holds {len(records)} provenance records that differ; the first one is shown")
    if record is not None:
        if record.image_sha256 is not None and record.image_sha256 != file.digest():
            problems.append(
                "the picture is not the one that its metadata was written for: it was edited or encoded anew,"
                " or the metadata was copied from another file"
            )
        if source_type is not None and source_type != record.digital_source_type:
            problems.append(f"XMP names the source type {source_type}, the record {record.digital_source_type}")
    if file.has_manifest:
        from .provenance_c2pa import read_manifest

        try:
            manifest = read_manifest(data, trust)
            problems += _against_manifest(record, manifest)
            if trust is not None and manifest.state == "Valid":
                problems.append("the C2PA manifest is signed by somebody whom no trusted certificate vouches for")
        except WatermarkError as error:
            problems.append(str(error))
    if found is not None:
        problems += _against_mark(record, manifest, found)
    return Report(file.format, record, manifest, tuple(problems))


def _against_manifest(record: Provenance | None, manifest) -> list[str]:
    problems = []
    if manifest.state == "Invalid":
        changed = any("mismatch" in code for code in manifest.failures)
        reason = "the file was changed after it was signed" if changed else "its signature does not hold"
        problems.append(f"the C2PA manifest is invalid: {reason} ({', '.join(manifest.failures) or 'no code given'})")
    if record is not None and manifest.binding != record.binding:
        theirs, ours = (value or "no mark" for value in (manifest.binding, record.binding))
        problems.append(f"the C2PA manifest names {theirs}, the metadata {ours}")
    return problems


def _against_mark(record: Provenance | None, manifest, found: dict) -> list[str]:
    claims = {}  # who says it -> key id and unique id
    if record is not None:
        claims["the metadata"] = record.key_id, record.unique_id
    if manifest is not None:
        named = manifest.binding
        claims["the C2PA manifest"] = (None, None) if named is None else (int(named[:3], 16), named[4:])
    problems = []
    if found["verdict"] == "content differs":
        problems.append("the mark is there, but the picture is not the one that it was made for")
    seen = found["key_id"], found["unique_id"]
    for name, claim in claims.items():
        if found["verdict"] == "absent":
            if claim[0] is not None:
                problems.append(f"{name} names {_mark(*claim)}, but none was found")
        elif seen[0] != claim[0] or (None not in (seen[1], claim[1]) and seen[1] != claim[1]):
            problems.append(f"{name} names {_mark(*claim)}, but the picture carries {_mark(*seen)}")
    return problems


def _mark(key_id: int | None, unique_id: str | None) -> str:
    if key_id is None:
        return "no mark"
    return f"a mark of key {key_id}" + (f" with unique id {unique_id}" if unique_id else "")
