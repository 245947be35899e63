"""Record, manifest and mark of one picture held against the file and against each other."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import WatermarkError
from .c2pa import Manifest, read_manifest
from .picture_file import parse
from .record import Provenance, records_of

__all__ = ["Report", "examine"]


@dataclass(frozen=True)
class Report:
    """What a file says of its origin.

    provenance: the record, or None. manifest: the C2PA `Manifest`, or None. problems: what does not fit
    together, in words; none where all that is there agrees (also where nothing is there).
    """

    format: str
    provenance: Provenance | None
    manifest: Manifest | None
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
        records, source_type = records_of(file)
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


def _against_manifest(record: Provenance | None, manifest: Manifest) -> list[str]:
    problems = []
    if manifest.state == "Invalid":
        changed = any("mismatch" in code for code in manifest.failures)
        reason = "the file was changed after it was signed" if changed else "its signature does not hold"
        problems.append(f"the C2PA manifest is invalid: {reason} ({', '.join(manifest.failures) or 'no code given'})")
    if record is not None and manifest.binding != record.binding:
        theirs, ours = (value or "no mark" for value in (manifest.binding, record.binding))
        problems.append(f"the C2PA manifest names {theirs}, the metadata {ours}")
    return problems


def _against_mark(record: Provenance | None, manifest: Manifest | None, found: dict) -> list[str]:
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
