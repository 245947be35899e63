"""`semiperm provenance`, and what `generate --sign` writes: records, manifests, and words for what does not fit."""

import io
import json
import os
import stat

import numpy as np
import pytest
from certificates import chain
from PIL import Image
from semiperm.cli import common
from semiperm.cli import detect as detect_command
from semiperm.methods.provenance.picture_file import parse
from semiperm.methods.provenance.record import ALGORITHM, GENERATED, Provenance, embed, extract, write_provenance
from semiperm.methods.watermark.keyring import Keyring, load_keyring, save_keyring
from terminal import fails, runs

RECORD = Provenance("canvas", generator_version="1", algorithm=ALGORITHM, key_id=3, unique_id="8000000000000001")


@pytest.fixture
def picture(tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
    return file


@pytest.fixture
def keyring(tmp_path):
    file, ring = tmp_path / "keys.json", Keyring()
    ring.new("studio")
    save_keyring(ring, file)
    return file


@pytest.fixture
def certificate(tmp_path):
    """--c2pa-cert and --c2pa-key; beside them authority.pem."""
    pytest.importorskip("c2pa")
    made = chain()
    for name in ("certificates", "private_key", "authority"):
        (tmp_path / f"{name}.pem").write_bytes(getattr(made, name))
    return "--c2pa-cert", tmp_path / "certificates.pem", "--c2pa-key", tmp_path / "private_key.pem"


def test_a_record_is_shown(picture):
    assert "no provenance record" in runs("provenance", picture)
    assert json.loads(runs("provenance", picture, "--json")) == {
        "file": str(picture), "format": "png", "provenance": None, "c2pa": None, "problems": [], "mark": None,
    }  # fmt: skip
    write_provenance(picture, RECORD)
    shown = json.loads(runs("provenance", picture, "--json"))
    assert shown["provenance"]["digitalSourceType"] == GENERATED and shown["provenance"]["key_id"] == 3
    table = "".join(runs("provenance", picture).split())
    assert "canvas" in table and "8000000000000001" in table and "doesnotfit" not in table


def test_a_changed_file_is_told_by_words_and_exit_code(picture):
    write_provenance(picture, RECORD)
    packet = parse(picture.read_bytes()).xmp()
    buffer = io.BytesIO()
    Image.open(picture).convert("L").save(buffer, "PNG")
    picture.write_bytes(parse(buffer.getvalue()).with_xmp(packet).to_bytes())
    assert "does not fit: the picture is not the one" in runs("provenance", picture, code=1)
    (problem,) = json.loads(runs("provenance", picture, "--json", code=1))["problems"]
    assert "edited or encoded anew" in problem


def test_texts_of_a_file_do_not_steer_the_terminal(picture):
    write_provenance(picture, Provenance("evil\x1b[31m[bold]\n\u202emodel"))
    table = runs("provenance", picture)
    assert "\x1b[31m" not in table and "\u202e" not in table and "[bold]" in table


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n\0\0", b"\xff\xd8\xff\xe0"])
def test_other_files_are_one_line(content, tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(content)
    assert "a.png" in fails("provenance", file)
    assert "none.png" in fails("provenance", tmp_path / "none.png")
    assert file.read_bytes() == content


def test_huge_files_are_not_read(tmp_path):
    file = tmp_path / "huge.png"
    with file.open("wb") as out:
        out.truncate(1 << 31)
    assert "2048 MiB" in fails("provenance", file)


def test_the_mark_is_compared(picture, keyring, monkeypatch):
    key_id = load_keyring(keyring).get("studio").key_id
    loaded = []
    monkeypatch.setattr(common, "load_model", lambda *a: loaded.append(a))

    def sees(**row):
        row = {"verdict": "valid", "p_value": 1e-9, "key_id": key_id, "payload": None} | row
        monkeypatch.setattr(detect_command, "look", lambda pipe, ring, files, options, seen: dict.fromkeys(files, row))

    write_provenance(picture, Provenance("canvas", algorithm=ALGORITHM, key_id=key_id, unique_id="0" * 15 + "1"))
    sees(payload={"unique_id": "0" * 15 + "1"})
    shown = json.loads(runs("provenance", picture, "--keyring", keyring, "--json"))
    assert shown["problems"] == [] and shown["mark"]["verdict"] == "valid" and shown["mark"]["p_value"] == 1e-9
    assert loaded == [("canvas", "auto", "auto")]
    sees(payload={"unique_id": "0" * 15 + "2"})
    assert "0002" in "".join(runs("provenance", picture, "--keyring", keyring, code=1).split())
    sees(verdict="absent", key_id=None)
    assert "none was found" in runs("provenance", picture, "--keyring", keyring, code=1)
    assert "keys" in fails("provenance", picture, "--keyring", picture.parent / "nokeys.json")


def generate(keyring, *options):
    return ("generate", "canvas", "a red circle", "a blue star", "--sign", "studio", "--keyring", keyring, *options)


def test_signed_pictures_say_where_they_come_from(untrained_canvas, keyring, tmp_path):
    runs(*generate(keyring, "--provider", "A Studio", "-o", tmp_path / "out"))
    for file in sorted((tmp_path / "out").iterdir()):
        with Image.open(file) as image:
            kept = json.loads(image.text["semiperm"])  # as it was before there were provenance records
        record = extract(file.read_bytes())
        assert (record.key_id, record.unique_id) == (kept["key_id"], kept["unique_id"]) and kept["prompt"]
        assert record.key_id == load_keyring(keyring).get("studio").key_id and record.algorithm == ALGORITHM
        assert (
            record.model == "canvas"
            and record.provider == "A Studio"
            and record.digital_source_type == GENERATED
            and record.time
        )
        assert json.loads(runs("provenance", file, "--json"))["problems"] == []
        assert b"studio" not in file.read_bytes()
    runs("generate", "canvas", "a red circle", "-o", tmp_path / "plain.png")
    assert extract((tmp_path / "plain.png").read_bytes()) is None


def test_signed_pictures_with_a_manifest(untrained_canvas, keyring, certificate, tmp_path):
    runs(*generate(keyring, *certificate, "-o", tmp_path / "out"))
    authority = tmp_path / "authority.pem"
    for file in sorted((tmp_path / "out").iterdir()):
        shown = json.loads(runs("provenance", file, "--trust", authority, "--json"))
        record, manifest = shown["provenance"], shown["c2pa"]
        assert manifest["state"] == "Trusted" and shown["problems"] == []
        assert manifest["binding"] == f"{record['key_id']:03x}-{record['unique_id']}"
        written = file.read_bytes()
        key = load_keyring(keyring).get("studio")
        secrets = (
            key.stream_key,
            key.mac_key,
            key.content_key,
            (tmp_path / "private_key.pem").read_bytes().splitlines()[1],
        )
        assert not [secret for secret in secrets if secret in written]
    table = "".join(runs("provenance", file).split())
    assert "Signer,Tests" in table and "Valid" in table
    changed = parse(written).with_text("prompt", "another").to_bytes()
    file.write_bytes(changed)
    assert "changed after it was signed" in " ".join(runs("provenance", file, code=1).split())


def test_credentials_are_checked_before_anything_is_drawn(keyring, certificate, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "load_model", lambda *_: pytest.fail("loaded a model for nothing"))
    out = ("-o", tmp_path / "out")
    assert "--c2pa-key" in fails(*generate(keyring, *certificate[:2], *out))
    assert "--c2pa-cert" in fails(*generate(keyring, *certificate[2:], *out))
    assert "--sign" in fails("generate", "canvas", "a red circle", *certificate, *out)
    assert "--sign" in fails("generate", "canvas", "a red circle", "--provider", "A Studio", *out)
    swapped = ("--c2pa-cert", certificate[3], "--c2pa-key", certificate[1])
    assert "certificate" in fails(*generate(keyring, *swapped, *out))
    assert not (tmp_path / "out").exists()


def test_a_manifest_that_fails_leaves_no_picture(untrained_canvas, keyring, certificate, tmp_path, monkeypatch):
    from semiperm.methods.errors import WatermarkError
    from semiperm.methods.provenance import c2pa as provenance_c2pa

    def fail(*_):
        raise WatermarkError("the C2PA manifest could not be signed")

    monkeypatch.setattr(provenance_c2pa, "sign", fail)
    assert "could not be signed" in fails(*generate(keyring, *certificate, "-o", tmp_path / "out"))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_file_that_cannot_be_replaced_stays(picture, monkeypatch):
    before = picture.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(PermissionError):
        write_provenance(picture, RECORD)
    assert picture.read_bytes() == before and embed(before, RECORD) != before
    assert [file.name for file in picture.parent.iterdir()] == ["a.png"]
    assert stat.S_IMODE(picture.stat().st_mode)


def test_on_the_canvas_record_and_mark_agree(tmp_path):
    """The whole way by the real commands: the record, the mark in the picture, and a record that was moved."""
    ring = tmp_path / "keys.json"
    runs("keys", "new", "--name", "studio", "--keyring", ring)
    prompts = ("a robot in striped style on a sky background", "a star in sketch style on sky")
    runs("generate", "canvas", *prompts, "--sign", "studio", "--keyring", ring, "-o", tmp_path / "out")
    first, second = sorted((tmp_path / "out").iterdir())
    shown = json.loads(runs("provenance", first, "--keyring", ring, "--json"))
    assert shown["problems"] == [] and shown["mark"]["verdict"] == "valid"
    write_provenance(first, extract(second.read_bytes()))  # writes a fresh digest: only the mark can tell
    assert json.loads(runs("provenance", first, "--json"))["problems"] == []
    told = " ".join(runs("provenance", first, "--keyring", ring, code=1).split())
    assert "but the picture carries a mark of key" in told


def test_bound_content_is_found_again(tmp_path):
    ring = tmp_path / "keys.json"
    runs("keys", "new", "--name", "studio", "--keyring", ring)
    sign = ("--sign", "studio", "--keyring", ring, "--bind-content")
    runs("generate", "canvas", "a blue star in flat style on sand", *sign, "-o", tmp_path / "a.png")
    (found,) = json.loads(runs("detect", tmp_path / "a.png", "--keyring", ring, "--json"))
    assert found["verdict"] == "valid" and found["content_p_value"] < 0.003
    assert extract((tmp_path / "a.png").read_bytes()).unique_id == str(found["payload"]["unique_id"])
    assert "--bind-content needs" in fails("generate", "canvas", "a star", "--bind-content", "-o", tmp_path / "b.png")
