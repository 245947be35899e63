"""Provenance records: put in and read out without touching the picture, and problems found where things do not fit."""

import hashlib
import io
import json
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from semiperm.methods.errors import WatermarkError
from semiperm.methods.provenance import record as module
from semiperm.methods.provenance.examine import examine
from semiperm.methods.provenance.picture_file import parse
from semiperm.methods.provenance.record import GENERATED, KEYWORD, Provenance, describe, embed, extract
from semiperm.methods.watermark.keys import WatermarkKey
from semiperm.methods.watermark.mark import Payload

RECORD = Provenance("canvas", generator_version="1", algorithm=module.ALGORITHM, key_id=3, unique_id="8000000000000001", time="2026-11-23T06:00:00Z")  # fmt: skip # noqa: E501
FORMATS = ("PNG", "JPEG", "WEBP", "WEBP lossless", "WEBP alpha")


def pixels(seed=0, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (24, 33, channels), dtype=np.uint8)


def picture(name="PNG", seed=0, **options) -> bytes:
    buffer = io.BytesIO()
    options |= {"lossless": True} if "lossless" in name or "alpha" in name else {}
    Image.fromarray(pixels(seed, 4 if "alpha" in name else 3)).save(buffer, name.split()[0], **options)
    return buffer.getvalue()


def seen(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return np.asarray(image)


@pytest.mark.parametrize("name", FORMATS)
def test_the_record_comes_back_and_the_picture_stays(name):
    plain = picture(name)
    marked = embed(plain, RECORD)
    assert extract(plain) is None
    assert extract(marked) == replace(RECORD, image_sha256=parse(plain).digest())
    assert np.array_equal(seen(marked), seen(plain)) and parse(marked).digest() == parse(plain).digest()
    with Image.open(io.BytesIO(marked)) as image:
        image.load()
        assert GENERATED in str(image.info)  # other programs find IPTC's term
        if name == "PNG":
            assert json.loads(image.text[KEYWORD])["digitalSourceType"] == GENERATED
    report = examine(marked)
    assert report.problems == () and report.manifest is None and report.format == name.split()[0].lower()


@pytest.mark.parametrize("name", FORMATS)
def test_a_second_record_replaces_the_first(name):
    once = embed(picture(name), RECORD)
    other = replace(RECORD, key_id=4, model='another <model> & "more" é]]>')
    twice = embed(once, other)
    assert extract(twice).key_id == 4 and extract(twice).model == other.model
    assert examine(twice).problems == ()
    assert embed(twice, RECORD) == once


@pytest.mark.parametrize("name", FORMATS)
def test_taking_apart_and_together_is_the_identity(name):
    data = picture(name) + b"trailing bytes"
    assert parse(data).to_bytes() == data


def test_other_chunks_of_a_png_stay():
    info = PngInfo()
    info.add_text("prompt", '{"1": 2}')
    info.add_itxt("workflow", "é", zip=True)
    info.add_text("zipped", "z" * 99, zip=True)
    info.add(b"eXIf", b"MM\0*\0\0\0\x08\0\0\0\0\0\0")
    plain = picture(pnginfo=info, icc_profile=b"profile", dpi=(72, 72))
    marked = embed(plain, RECORD)
    before, after = parse(plain).chunks, parse(marked).chunks
    assert [chunk for chunk in after if chunk in before] == list(before) and len(after) == len(before) + 2
    assert [name for name, _ in after].index(b"IDAT") > [name for name, _ in after].index(b"iTXt")
    file = parse(marked)
    assert (file.texts("prompt"), file.texts("workflow"), file.texts("zipped")) == (['{"1": 2}'], ["é"], ["z" * 99])


def test_other_xmp_exif_and_icc_stay():
    others = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:format>x</dc:format>'
        "</rdf:Description></rdf:RDF></x:xmpmeta>"
    )
    exif = Image.Exif()
    exif[0x0131] = "a camera"
    for name in ("PNG", "JPEG", "WEBP", "WEBP alpha"):
        options = {"exif": exif.tobytes(), "icc_profile": b"a profile"}
        plain = parse(picture(name, **options)).with_xmp(others).to_bytes()
        assert parse(plain).xmp() == others
        marked = embed(embed(plain, RECORD), RECORD)
        packet = parse(marked).xmp()
        assert "<dc:format>x</dc:format>" in packet and packet.count("semiperm:record>") == 2
        with Image.open(io.BytesIO(marked)) as image:
            image.load()
            assert image.getexif()[0x0131] == "a camera" and image.info["icc_profile"] == b"a profile"
        assert extract(marked).key_id == 3 and np.array_equal(seen(marked), seen(plain))


@pytest.mark.parametrize("name", FORMATS)
def test_a_changed_picture_does_not_fit(name):
    marked = embed(picture(name), RECORD)
    other = parse(picture(name, seed=1)).with_xmp(parse(marked).xmp()).to_bytes()  # metadata copied over
    assert extract(other).key_id == 3
    (problem,) = examine(other).problems
    assert "edited or encoded anew" in problem


def test_metadata_does_not_change_the_digest_but_what_is_drawn_does():
    plain = parse(picture())
    assert plain.with_text("prompt", "x").digest() == plain.digest()
    for name, payload in ((b"tRNS", bytes(6)), (b"gAMA", bytes(4))):
        assert replace(plain, chunks=(plain.chunks[0], (name, payload), *plain.chunks[1:])).digest() != plain.digest()
    jpeg = parse(picture("JPEG"))
    assert replace(jpeg, chunks=((b"\xfe", b"comment"), *jpeg.chunks)).digest() == jpeg.digest()
    assert parse(picture("JPEG", icc_profile=b"a profile")).digest() != jpeg.digest()
    assert replace(jpeg, tail=jpeg.tail[:-9] + b"\0" + jpeg.tail[-8:]).digest() != jpeg.digest()
    assert len({parse(picture(name)).digest() for name in FORMATS}) == len(FORMATS)


def test_records_that_differ_are_told():
    marked = embed(picture(), RECORD)
    two = parse(marked).with_text(KEYWORD, replace(extract(marked), key_id=9).to_json()).to_bytes()
    report = examine(two)
    assert report.provenance.key_id == 9 and "2 provenance records" in report.problems[0]
    camera = GENERATED.replace("trainedAlgorithmicMedia", "digitalCapture")
    file = parse(marked)
    relabelled = file.with_xmp(file.xmp().replace(f"{GENERATED}</Iptc", f"{camera}</Iptc")).to_bytes()
    assert any(camera in problem for problem in examine(relabelled).problems)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"format": "semiperm-provenance"}', '{"format": "semiperm-provenance", "version": 1}',
     '{"format": "semiperm-provenance", "version": 2, "model": "x"}', "[" * 100_000,
     '{"format": "semiperm-provenance", "version": 1, "model": 3}',
     '{"format": "semiperm-provenance", "version": 1, "model": "x", "key_id": 4096}',
     '{"format": "semiperm-provenance", "version": 1, "model": "x", "unique_id": "x"}'],
)  # fmt: skip
def test_damaged_records_are_problems_not_errors(text):
    data = parse(picture()).with_text(KEYWORD, text).to_bytes()
    with pytest.raises(WatermarkError):
        extract(data)
    report = examine(data)
    assert report.provenance is None and len(report.problems) == 1


def test_fields_of_later_releases_are_left_out():
    text = RECORD.to_json()[:-1] + ', "colour": "red"}'
    assert Provenance.from_json(text) == RECORD


@pytest.mark.parametrize("name", FORMATS)
def test_cut_off_files_are_errors(name):
    data = embed(picture(name), RECORD)
    cuts = sorted({0, 3, 9, 13, 30, 60, len(data) // 2, len(data) - 3})
    for cut in cuts:
        with pytest.raises(WatermarkError):
            embed(data[:cut], RECORD)


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_raise_no_other_error(name):
    generator, data = np.random.default_rng(0), embed(picture(name), RECORD)
    for _ in range(200):
        damaged, at = bytearray(data), int(generator.integers(len(data)))
        damaged[at : at + int(generator.integers(9))] = generator.bytes(int(generator.integers(9)))
        if name == "PNG":  # right checksums, or nothing else would be looked at
            start = 8
            while start + 12 <= len(damaged):
                end = start + 8 + int.from_bytes(damaged[start : start + 4], "big")
                damaged[end : end + 4] = struct.pack(">I", zlib.crc32(damaged[start + 4 : end]))
                start = end + 4
        for read in (examine, extract, lambda data: embed(data, RECORD)):
            try:
                read(bytes(damaged))
            except WatermarkError:
                pass


def test_not_a_picture_and_damaged_ones():
    for data in (b"", b"not a picture", b"GIF89a", b"RIFF\0\0\0\0WAVE"):
        with pytest.raises(WatermarkError, match="PNG, JPEG or WebP"):
            parse(data)
    data = bytearray(picture())
    data[40] ^= 1
    with pytest.raises(WatermarkError, match="damaged"):
        parse(bytes(data))
    with pytest.raises(WatermarkError):
        parse(b"RIFF" + struct.pack("<I", 4) + b"WEBP").with_xmp("x")


def test_a_text_that_would_fill_the_memory_is_not_read():
    bomb = zlib.compress(bytes(50 << 20))
    file = parse(picture())
    chunk = b"iTXt", KEYWORD.encode() + b"\0\1\0\0\0" + bomb
    data = replace(file, chunks=(file.chunks[0], chunk, *file.chunks[1:])).to_bytes()
    with pytest.raises(WatermarkError, match="longer"):
        extract(data)
    entities = '<!DOCTYPE x [<!ENTITY a "aa">]><x xmlns:semiperm="urn:semiperm:provenance:1">&a;</x>'
    with pytest.raises(WatermarkError, match="entities"):
        extract(file.with_xmp(entities).to_bytes())
    assert examine(file.with_xmp(entities).to_bytes()).problems


@pytest.mark.parametrize(
    "rdf",
    [
        '<rdf:RDF xmlns:rdf="{0}"/>',
        '<rdf:RDF xmlns:rdf="{0}" />',
        '<r:RDF xmlns:r="{0}"><r:Description xmlns:dc="urn:dc"><dc:format>x</dc:format></r:Description></r:RDF >',
        '<RDF xmlns="{0}"><Description about="" xmlns:dc="urn:dc"><dc:format>x</dc:format></Description></RDF>',
    ],
)
def test_every_way_to_write_rdf_is_taken(rdf):
    """An element that is closed at once, and other prefixes than rdf, are as valid."""
    packet = '<x:xmpmeta xmlns:x="adobe:ns:meta/">' + rdf.format("http://www.w3.org/1999/02/22-rdf-syntax-ns#")
    plain = parse(picture()).with_xmp(packet + "</x:xmpmeta>").to_bytes()
    marked = embed(embed(plain, RECORD), RECORD)
    said = parse(marked).xmp()
    assert extract(marked).key_id == 3 and said.count("semiperm:record>") == 2
    assert ("<dc:format>x</dc:format>" in said) == ("dc:format" in rdf)
    assert examine(marked).problems == ()


def test_xmp_that_does_not_fit_into_a_jpeg():
    packet = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF>' + "a" * 65400 + "</rdf:RDF></x:xmpmeta>"
    plain = parse(picture("JPEG")).with_xmp(packet).to_bytes()
    with pytest.raises(WatermarkError, match="65533"):
        embed(plain, RECORD)
    with pytest.raises(WatermarkError, match="rdf:RDF"):
        embed(parse(picture()).with_xmp("<x/>").to_bytes(), RECORD)


def test_files_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    file.write_bytes(picture())
    file.chmod(0o640)
    module.write_provenance(file, RECORD)
    assert module.read_provenance(file).key_id == 3
    assert file.stat().st_mode & 0o777 == 0o640 and list(tmp_path.iterdir()) == [file]
    before = file.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        module.write_provenance(file, replace(RECORD, key_id=5))
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
    with pytest.raises(WatermarkError):
        file.write_bytes(b"not a picture")
        module.write_provenance(file, RECORD)
    assert file.read_bytes() == b"not a picture"


def test_a_record_names_the_key_and_no_secret(tmp_path):
    key = WatermarkKey.new("studio", 7)
    record = describe("canvas", key, Payload(unique_id=255, time=1_800_000_000), provider="a provider")
    assert (record.key_id, record.unique_id, record.time) == (7, "00000000000000ff", "2027-01-15T08:00:00Z")
    assert record.binding == "007-00000000000000ff" and record.generator_version
    data = embed(picture(), record)
    for secret in (key.stream_key, key.mac_key, key.content_key):
        assert secret not in data and secret.hex().encode() not in data
    assert b"studio" not in data
    assert describe(str(tmp_path), key).model == tmp_path.name  # a path would tell of the disk
    assert describe("owner/model").model == "owner/model" and describe("owner/model").algorithm is None
    assert describe("canvas").time.endswith("Z") and describe("canvas").binding is None


@pytest.mark.parametrize(
    "fields", [{"model": 3}, {"model": None}, {"key_id": -1}, {"key_id": True}, {"unique_id": "ABC"}, {"time": None}]
)
def test_wrong_fields_are_named(fields):
    with pytest.raises(WatermarkError, match=next(iter(fields)).replace("_", ".")):
        Provenance(**({"model": "canvas"} | fields))


@pytest.mark.parametrize(
    "found, words",
    [
        ({"verdict": "valid", "key_id": 3, "unique_id": RECORD.unique_id}, None),
        ({"verdict": "unverified", "key_id": 3, "unique_id": None}, None),
        ({"verdict": "absent", "key_id": None, "unique_id": None}, "none was found"),
        ({"verdict": "content differs", "key_id": 3, "unique_id": RECORD.unique_id}, "not the one"),
        ({"verdict": "valid", "key_id": 4, "unique_id": RECORD.unique_id}, "a mark of key 4"),
        ({"verdict": "valid", "key_id": 3, "unique_id": "0" * 16}, "unique id 0000000000000000"),
    ],
)
def test_the_record_is_held_against_the_mark(found, words):
    problems = examine(embed(picture(), RECORD), found=found).problems
    assert (words is None) == (problems == ())
    assert words is None or words in problems[0]
    assert examine(picture(), found=found).problems in ((), problems[:1])  # a file without a record claims nothing


def test_a_record_that_names_the_key_alone():
    data = embed(picture(), replace(RECORD, unique_id=None))
    found = {"verdict": "unverified", "key_id": 3, "unique_id": RECORD.unique_id}
    assert examine(data, found=found).problems == ()
    assert "a mark of key 4" in examine(data, found=found | {"key_id": 4}).problems[0]
    assert "none was found" in examine(data, found=found | {"verdict": "absent", "key_id": None}).problems[0]


def test_a_record_without_a_mark_does_not_fit_a_marked_picture():
    plain = replace(RECORD, key_id=None, unique_id=None, algorithm=None)
    found = {"verdict": "valid", "key_id": 3, "unique_id": RECORD.unique_id}
    assert "names no mark" in examine(embed(picture(), plain), found=found).problems[0]
    assert examine(embed(picture(), plain), found={**found, "verdict": "absent"}).problems == ()


def test_the_digest_is_the_documented_one():
    file = parse(picture())
    total = hashlib.sha256(b"png")
    for name, payload in file.chunks:
        total.update(name + struct.pack(">Q", len(payload)) + payload)
    assert file.digest() == total.hexdigest()
