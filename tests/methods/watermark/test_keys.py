"""Watermark keys: derivation, keystream, secrecy, and the keyring file."""

import json
import os
import stat

import numpy as np
import pytest
from semiperm.methods.errors import WatermarkError
from semiperm.methods.watermark.keyring import Keyring, load_keyring, save_keyring
from semiperm.methods.watermark.keys import WatermarkKey


def fixed(name="alice", key_id=3, mac=True):
    return WatermarkKey(name, key_id, "2026-01-01T00:00:00+00:00", bytes(range(32)), b"m" * 32 if mac else None)


def test_a_new_key_has_two_unrelated_secrets_and_hides_them():
    key, other = WatermarkKey.new("alice", 3), WatermarkKey.new("alice", 3)
    assert len({key.stream_key, key.mac_key, other.stream_key, other.mac_key}) == 4
    for text in (repr(key), str(key), repr(Keyring([key]))):
        assert "alice" in text and repr(key.stream_key)[2:-1] not in text and "stream_key" not in text


def test_the_stream_is_chacha20_and_every_input_changes_it():
    key = fixed()
    base = key.stream("a", (4, 8, 8), 0, 1000)
    assert base.shape == (1000,) and base.dtype == np.uint8 and set(base) == {0, 1}
    assert (base == key.stream("a", (4, 8, 8), 0, 1003)[:1000]).all()
    others = [key.stream("b", (4, 8, 8), 0, 1000), key.stream("a", (8, 4, 8), 0, 1000)]
    others += [key.stream("a", (4, 8, 8), 1, 1000), key.stream("a", (4, 8, 8), 0, 1000, scope="model")]
    for other in others:
        assert 0.42 < (other == base).mean() < 0.58
    whole = key.keystream("a", (4, 8, 8), 9, 256)
    assert key.keystream("a", (4, 8, 8), 9, 128, offset=128) == whole[128:]
    with pytest.raises(WatermarkError, match="multiple of 64"):
        key.keystream("a", (4, 8, 8), 9, 1, offset=1)


def test_the_format_is_frozen():
    """Marks outlive releases: this stream must never change."""
    assert fixed().keystream("a", (4, 8, 8), 5, 8).hex() == "a868daa79d89abda"


def test_a_detector_reads_but_has_no_mac():
    key = fixed()
    detector = key.detector()
    assert detector.stream_key == key.stream_key and detector.mac_key is None
    assert key.mac(b"x", 48) == key.mac(b"x", 256) >> 208 != key.mac(b"y", 48)
    with pytest.raises(WatermarkError, match="detector's copy"):
        detector.mac(b"x", 48)


@pytest.mark.parametrize("change", [{"name": ""}, {"key_id": 4096}, {"key_id": True}, {"stream_key": b"short"}])
def test_bad_fields_are_refused(change):
    values = {"name": "a", "key_id": 1, "created": "", "stream_key": bytes(32)} | change
    with pytest.raises(WatermarkError):
        WatermarkKey(**values)


def test_a_keyring_finds_numbers_and_keeps_keys_apart():
    ring = Keyring()
    first, second = ring.new("a"), ring.new("b")
    assert (first.key_id, second.key_id) == (0, 1) and list(ring) == [first, second] and len(ring) == 2
    assert ring.get("b") is second and ring.get(0) is first
    with pytest.raises(WatermarkError, match="collides"):
        ring.new("a")
    with pytest.raises(WatermarkError, match="no key 'c'"):
        ring.get("c")
    full = Keyring(fixed(f"k{i}", i) for i in range(1, 4096))
    assert full.new("last").key_id == 0
    with pytest.raises(WatermarkError, match="4096 keys"):
        full.new("more")


def test_a_keyring_file_is_private_from_the_start_and_round_trips(tmp_path, monkeypatch):
    path, ring = tmp_path / "ring.json", Keyring([fixed(), fixed("bob", 4, mac=False)])
    modes, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (modes.append(stat.S_IMODE(os.stat(a).st_mode)), replace(a, b)))
    save_keyring(ring, path)
    assert modes == [0o600] and os.listdir(tmp_path) == ["ring.json"]
    assert list(load_keyring(path)) == list(ring)
    ring.new("carol")
    save_keyring(ring, path)
    assert len(load_keyring(path)) == 3


def test_a_save_that_would_lose_keys_is_refused(tmp_path):
    path, ring = tmp_path / "ring.json", Keyring([fixed()])
    save_keyring(ring, path)
    before = path.read_bytes()
    for poorer in (Keyring(), ring.detector()):
        with pytest.raises(WatermarkError, match="would lose key 'alice'"):
            save_keyring(poorer, path)
    assert path.read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises(WatermarkError, match="cannot be written"):
        save_keyring(ring, tmp_path / "file" / "ring.json")


@pytest.mark.skipif(os.name != "posix", reason="POSIX modes")
def test_a_keyring_others_can_read_is_refused(tmp_path):
    path = tmp_path / "ring.json"
    save_keyring(Keyring([fixed()]), path)
    path.chmod(0o640)
    with pytest.raises(WatermarkError, match="chmod 600"):
        load_keyring(path)


def broken(text):
    data = json.loads(text)
    record = data["keys"][0]
    secret = record["stream_key"]
    yield "whole JSON", text[: len(text) // 2]
    yield "whole JSON", "\x00\x01" + text
    yield "not a keyring", json.dumps([1])
    yield "not a keyring", json.dumps({"keys": []})
    yield "format version", json.dumps(data | {"version": 2})
    yield "corrupted", json.dumps({name: value for name, value in data.items() if name != "keys"})
    yield "corrupted", json.dumps(data | {"keys": [record | {"stream_key": secret[:-9]}]})
    yield "corrupted", json.dumps(data | {"keys": [record | {"stream_key": "*" + secret}]})
    yield "corrupted", json.dumps(data | {"keys": [record | {"key_id": "x"}]})
    yield "corrupted", json.dumps(data | {"keys": [record, record]})


def test_broken_files_give_clear_errors_without_secrets_and_stay(tmp_path):
    path = tmp_path / "ring.json"
    with pytest.raises(WatermarkError, match="cannot be read"):
        load_keyring(path)
    save_keyring(Keyring([fixed()]), path)
    text = path.read_text()
    secret = json.loads(text)["keys"][0]["stream_key"]
    for expected, content in broken(text):
        path.write_text(content)
        with pytest.raises(WatermarkError, match=expected) as caught:
            load_keyring(path)
        assert secret[:12] not in str(caught.value) and path.read_text() == content
        with pytest.raises(WatermarkError):
            save_keyring(Keyring([fixed()]), path)
        assert path.read_text() == content
