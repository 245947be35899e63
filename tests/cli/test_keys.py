"""`semiperm keys`, and signing with `generate`: nothing secret is shown, nothing is written over."""

import base64
import json
import os

import pytest
from PIL import Image
from semiperm.cli import common
from semiperm.methods.watermark.keyring import load_keyring
from terminal import fails, runs

POSIX = pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")


@pytest.fixture
def keyring(tmp_path):
    file = tmp_path / "made" / "keys.json"
    runs("keys", "new", "--name", "studio", "--keyring", file)
    return file


@pytest.fixture
def detector(keyring, tmp_path):
    file = tmp_path / "detector.json"
    runs("keys", "export-detector", "--name", "studio", "--keyring", keyring, "-o", file)
    return file


def secrets_of(*files) -> list[bytes]:
    """The secrets of keyrings, raw and as text writes them."""
    keys = [key for file in files for key in load_keyring(file)]
    raw = [s for key in keys for s in (key.stream_key, key.mac_key, key.content_key) if s is not None]
    return [form for s in raw for form in (s, s.hex().encode(), base64.b64encode(s)[:-1], repr(s).encode())]


def test_new_keys_are_added_and_listed(keyring):
    assert "second key" in runs("keys", "new", "--name", "second key", "--keyring", keyring)
    rows = json.loads(runs("keys", "list", "--keyring", keyring, "--json"))
    assert [row["name"] for row in rows] == ["studio", "second key"]
    assert all(row["may_sign"] and 0 <= row["key_id"] < 4096 and row["created"] for row in rows)
    assert rows[0]["key_id"] != rows[1]["key_id"]
    table = runs("keys", "list", "--keyring", keyring)
    assert "studio" in table and "sign and detect" in table


@POSIX
def test_keyrings_are_private(keyring, detector):
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in (keyring, detector))
    keyring.chmod(0o644)
    assert "chmod" in fails("keys", "list", "--keyring", keyring)


def test_no_command_shows_a_secret(keyring, tmp_path):
    shown = runs("keys", "new", "--name", "b", "--keyring", keyring) + runs("keys", "list", "--keyring", keyring)
    shown += runs("keys", "list", "--keyring", keyring, "--json")
    shown += runs("keys", "export-detector", "--name", "b", "--keyring", keyring, "-o", tmp_path / "b.json")
    assert not [secret for secret in secrets_of(keyring) if secret in shown.encode()]


def test_a_name_is_given_once(keyring):
    before = keyring.read_bytes()
    assert "studio" in fails("keys", "new", "--name", "studio", "--keyring", keyring)
    assert keyring.read_bytes() == before


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
@pytest.mark.parametrize("command", [("new", "--name", "b"), ("list",)])
def test_a_damaged_keyring_is_left_alone(keyring, damage, command):
    whole = keyring.read_bytes()
    keyring.write_bytes({"truncated": whole[: len(whole) // 2], "foreign": b'{"a": 1}', "empty": b""}[damage])
    before = keyring.read_bytes()
    assert str(keyring.name) in fails("keys", *command, "--keyring", keyring)
    assert keyring.read_bytes() == before
    assert [file.name for file in keyring.parent.iterdir()] == [keyring.name]


def test_a_detector_copy_cannot_seal(keyring, detector):
    full, copy = load_keyring(keyring).get("studio"), load_keyring(detector).get("studio")
    assert copy.stream_key == full.stream_key and copy.key_id == full.key_id
    assert copy.mac_key is copy.content_key is None
    assert not json.loads(runs("keys", "list", "--keyring", detector, "--json"))[0]["may_sign"]
    hidden = [form for s in (full.mac_key, full.content_key) for form in (s, s.hex().encode(), base64.b64encode(s))]
    assert not [secret for secret in hidden if secret in detector.read_bytes()]


def test_no_keyring_is_written_over(keyring, detector):
    before = keyring.read_bytes()
    for output in (keyring, detector):
        line = fails("keys", "export-detector", "--name", "studio", "--keyring", keyring, "-o", output)
        assert "exists" in line
    assert "nobody" in fails("keys", "export-detector", "--name", "nobody", "--keyring", keyring, "-o", "x.json")
    assert keyring.read_bytes() == before


def test_a_missing_keyring_is_one_line(tmp_path):
    assert "none.json" in fails("keys", "list", "--keyring", tmp_path / "none.json")
    assert not list(tmp_path.iterdir())


def generate(*options):
    return ("generate", "canvas", "a red circle", "a blue star", *options)


def test_signing_mistakes_are_one_line(keyring, detector, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "load_model", lambda *_: pytest.fail("loaded a model for nothing"))
    out = ("-o", tmp_path / "out")
    assert "--keyring" in fails(*generate("--sign", "studio", *out))
    assert "--sign" in fails(*generate("--keyring", keyring, *out))
    assert "--seed" in fails(*generate("--sign", "studio", "--keyring", keyring, "--seed", 3, *out))
    assert "studio" in fails(*generate("--sign", "nobody", "--keyring", keyring, *out))
    assert "only detect" in fails(*generate("--sign", "studio", "--keyring", detector, *out))
    assert not (tmp_path / "out").exists()


def test_signed_pictures_keep_their_ids_and_no_secret(untrained_canvas, keyring, tmp_path, monkeypatch):
    from semiperm.pipelines.watermark import sign as watermark

    sign, noises = watermark.sign_noise, []

    def spy(*arguments, **options):
        noises.append(sign(*arguments, **options))
        return noises[-1]

    monkeypatch.setattr(watermark, "sign_noise", spy)
    runs(*generate("--sign", "studio", "--keyring", keyring, "-o", tmp_path / "out"))
    files = sorted((tmp_path / "out").iterdir())
    records = [json.loads(Image.open(file).text["semiperm"]) for file in files]
    key_id = load_keyring(keyring).get("studio").key_id
    assert len(records) == 2 and all(record["key_id"] == key_id and "seed" not in record for record in records)
    assert records[0]["unique_id"] != records[1]["unique_id"] and noises[0][0].ne(noises[0][1]).any()
    written = b"".join(file.read_bytes() for file in files) + json.dumps(records).encode()
    assert not [secret for secret in secrets_of(keyring) if secret in written]


def test_a_test_certificate_signs_and_is_trusted_by_its_authority_alone(tmp_path):
    pytest.importorskip("c2pa")
    from semiperm.methods.provenance.c2pa import load_credentials, read_manifest, sign
    from semiperm.methods.provenance.record import Provenance, embed

    folder = tmp_path / "certificate"
    assert "trusted by nobody" in runs("keys", "test-certificate", "-o", folder, "--name", "Trial", "--days", 2)
    assert sorted(file.name for file in folder.iterdir()) == ["authority.pem", "chain.pem", "key.pem"]
    if os.name == "posix":
        assert [(folder / name).stat().st_mode & 0o077 for name in ("key.pem",)] == [0]
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    record = Provenance(generator="semiperm", model="canvas")
    signed = sign(embed(picture.read_bytes(), record), load_credentials(folder / "chain.pem", folder / "key.pem"))
    manifest = read_manifest(signed)
    assert manifest.state == "Valid" and "Trial" in manifest.signer
    assert read_manifest(signed, (folder / "authority.pem").read_bytes()).state == "Trusted"


def test_a_test_certificate_is_not_written_over(tmp_path):
    runs("keys", "test-certificate", "-o", tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert "exists already" in fails("keys", "test-certificate", "-o", tmp_path)
    assert "1 to 64 characters" in fails("keys", "test-certificate", "-o", tmp_path / "other", "--name", "x" * 65)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
