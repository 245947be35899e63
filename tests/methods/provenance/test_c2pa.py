"""C2PA manifests with certificates made here: sign last, verify, and find every later change."""

import io
from dataclasses import replace

import numpy as np
import pytest
from certificates import chain, new_key, pem_of
from cryptography.x509.oid import ExtendedKeyUsageOID
from PIL import Image
from semiperm.methods.errors import WatermarkError
from semiperm.methods.provenance.c2pa import Credentials, load_credentials, read_manifest, sign
from semiperm.methods.provenance.examine import examine
from semiperm.methods.provenance.picture_file import parse
from semiperm.methods.provenance.record import ALGORITHM, GENERATED, KEYWORD, Provenance, embed, extract

c2pa = pytest.importorskip("c2pa")
RECORD = Provenance("canvas", generator_version="1", algorithm=ALGORITHM, key_id=3, unique_id="8000000000000001", time="2026-11-23T06:00:00Z")  # fmt: skip # noqa: E501
FORMATS = ("PNG", "JPEG", "WEBP")


@pytest.fixture(scope="module")
def certificates():
    return chain()


@pytest.fixture(scope="module")
def credentials(certificates):
    return Credentials(certificates.certificates, certificates.private_key, "es256")


def picture(name="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 33, 3), dtype=np.uint8)).save(buffer, name)
    return buffer.getvalue()


def save(tmp_path, certificates) -> tuple:
    files = tmp_path / "cert.pem", tmp_path / "key.pem"
    files[0].write_bytes(certificates.certificates)
    files[1].write_bytes(certificates.private_key)
    return files


@pytest.mark.parametrize("name", FORMATS)
def test_signed_and_verified(name, credentials, certificates):
    marked = embed(picture(name), RECORD)
    signed = sign(marked, credentials)
    manifest = read_manifest(signed)
    assert (manifest.state, manifest.failures) == ("Valid", ())  # anybody may have signed
    assert read_manifest(signed, certificates.authority).state == "Trusted"
    assert manifest.binding == RECORD.binding == "003-8000000000000001"
    assert (manifest.model, manifest.source_type, manifest.time) == ("canvas", GENERATED, RECORD.time)
    assert manifest.signer == "Signer, Tests" and manifest.generator == "semiperm 1"
    assert extract(signed) == extract(marked) and parse(signed).digest() == parse(marked).digest()
    report = examine(signed, trust=certificates.authority)
    assert report.problems == () and report.manifest.state == "Trusted"
    with Image.open(io.BytesIO(signed)) as image:
        image.load()


def test_the_manifest_holds_the_standard_assertions(credentials):
    signed = sign(embed(picture(), RECORD), credentials)
    with c2pa.Reader("image/png", io.BytesIO(signed)) as reader:
        active = reader.get_active_manifest()
    assertions = {assertion["label"]: assertion["data"] for assertion in active["assertions"]}
    created, marked = assertions["c2pa.actions.v2"]["actions"]
    assert created["action"] == "c2pa.created" and created["digitalSourceType"] == GENERATED
    assert marked["action"] == "c2pa.watermarked.bound"
    binding = assertions["c2pa.soft-binding"]
    assert binding["alg"] == ALGORITHM and binding["blocks"][0]["value"] == RECORD.binding


def test_a_record_without_a_mark_has_no_soft_binding(credentials):
    plain = replace(RECORD, algorithm=None, key_id=None, unique_id=None, time="")
    signed = sign(embed(picture(), plain), credentials)
    assert read_manifest(signed).binding is None and b"c2pa.soft-binding" not in signed
    assert examine(signed).problems == ()


@pytest.mark.parametrize("name", FORMATS)
def test_every_later_change_is_found(name, credentials):
    signed = sign(embed(picture(name), RECORD), credentials)
    other = replace(extract(signed), key_id=4).to_json()
    file = parse(signed)
    packet = file.xmp().replace('"key_id": 3', '"key_id": 4')
    changed = file.with_xmp(packet)
    if name == "PNG":
        changed = changed.with_text(KEYWORD, other)
    report = examine(changed.to_bytes())
    assert report.manifest.state == "Invalid" and report.provenance.key_id == 4
    words = " ".join(report.problems)
    assert "changed after it was signed" in words and "names 003-8000000000000001, the metadata 004-" in words
    if name == "JPEG":  # a bit of the picture
        data = bytearray(signed)
        data[-20] ^= 1
        problems = " ".join(examine(bytes(data)).problems)
        assert "changed after it was signed" in problems and "edited or encoded anew" in problems


def test_a_manifest_moved_to_another_picture_is_invalid(credentials):
    signed = parse(sign(embed(picture(), RECORD), credentials))
    manifest = next(chunk for chunk in signed.chunks if chunk[0] == b"caBX")
    other = parse(picture())
    moved = replace(other, chunks=(other.chunks[0], manifest, *other.chunks[1:])).to_bytes()
    assert "changed after it was signed" in examine(moved).problems[0]


def test_nothing_is_written_after_signing_nor_signed_twice(credentials):
    signed = sign(embed(picture(), RECORD), credentials)
    with pytest.raises(WatermarkError, match="sign last"):
        embed(signed, RECORD)
    with pytest.raises(WatermarkError, match="already"):
        sign(signed, credentials)
    with pytest.raises(WatermarkError, match="no provenance record"):
        sign(picture(), credentials)
    with pytest.raises(WatermarkError, match="cannot be read"):
        read_manifest(picture())


def test_somebody_elses_signature_is_valid_but_not_trusted(credentials):
    signed = sign(embed(picture(), RECORD), credentials)
    report = examine(signed, trust=chain().authority)
    assert report.manifest.state == "Valid" and "no trusted certificate" in report.problems[0]
    assert examine(signed, trust=b"not a certificate").problems


def test_a_damaged_manifest_is_a_problem_not_an_error(credentials):
    signed = parse(sign(embed(picture(), RECORD), credentials))
    broken = [(n, p[: len(p) // 2] if n == b"caBX" else p) for n, p in signed.chunks]
    report = examine(replace(signed, chunks=tuple(broken)).to_bytes())
    assert report.provenance.key_id == 3 and report.manifest is None or report.manifest.state == "Invalid"
    assert report.problems


@pytest.mark.parametrize("kind", ["p256", "p384", "p521", "ed25519", "rsa2048"])
def test_every_kind_of_key_signs(kind, tmp_path):
    loaded = load_credentials(*save(tmp_path, chain(kind)))
    assert read_manifest(sign(embed(picture(), RECORD), loaded)).state == "Valid"
    assert loaded.private_key.decode() not in repr(loaded) and repr(loaded.private_key) not in repr(loaded)


def test_credentials_that_cannot_sign(tmp_path, certificates):
    cert, key = save(tmp_path, certificates)
    cases = [
        (tmp_path / "none.pem", key, "No such file"),
        (key, key, "no certificate"),
        (cert, cert, "no private key"),
        (cert, tmp_path, "directory"),
    ]
    other, locked, weak = (tmp_path / name for name in ("other.pem", "locked.pem", "weak.pem"))
    other.write_bytes(pem_of(new_key()))
    locked.write_bytes(pem_of(new_key(), b"password"))
    weak.write_bytes(pem_of(new_key("rsa1024")))
    cases += [(cert, other, "not that of the first"), (cert, locked, "password"), (cert, weak, "2048 bits")]
    for certificate, private_key, words in cases:
        with pytest.raises(WatermarkError, match=words) as error:
            load_credentials(certificate, private_key)
        assert "PRIVATE" not in str(error.value)
    for days in ((-9, -1), (1, 9)):
        with pytest.raises(WatermarkError, match="not today"):
            load_credentials(*save(tmp_path, chain(days=days)))


def test_a_certificate_for_something_else_is_refused(tmp_path):
    loaded = load_credentials(*save(tmp_path, chain(purpose=ExtendedKeyUsageOID.SERVER_AUTH)))
    with pytest.raises(WatermarkError, match="C2PA"):
        sign(embed(picture(), RECORD), loaded)


def test_without_the_library_the_error_names_it(credentials, monkeypatch):
    import sys

    signed = sign(embed(picture(), RECORD), credentials)
    monkeypatch.setitem(sys.modules, "c2pa", None)
    for call in (lambda: sign(embed(picture(), RECORD), credentials), lambda: read_manifest(signed)):
        with pytest.raises(WatermarkError, match="pip install c2pa-python"):
            call()
    report = examine(signed)  # the record is shown all the same
    assert report.provenance.key_id == 3 and "c2pa-python" in report.problems[0]
