"""Watermark keys: derivation, keystream, secrecy, and the keyring file."""

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from semiperm.methods.errors import SemipermError, WatermarkError
from semiperm.methods.watermark.keyring import Keyring, load_keyring, save_keyring, update_keyring
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
    yield "format version", json.dumps(data | {"version": 4})
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


def test_a_key_has_a_third_secret_that_detectors_lack():
    key, old = WatermarkKey.new("a", 1), fixed()
    assert len({key.stream_key, key.mac_key, key.content_key}) == 3 and key.formats == key.layouts == (3,)
    assert old.content_key not in (None, old.stream_key, old.mac_key) and replace(old, since=1).formats == (3, 2, 1)
    assert old.content_key.hex()[:16] == "173a4a516f124530"  # frozen: pictures of old keys depend on it
    for one in (key, old):
        assert one.detector().content_key is None and one.detector().mac_key is None
        assert repr(one.content_key)[2:-1] not in repr(one)
        for purpose in ("binding 2", "content 2"):
            assert one.stream(purpose, (4, 8, 8), 0, 64).any()
            with pytest.raises(WatermarkError, match="needs the full keyring"):
                one.detector().stream(purpose, (4, 8, 8), 0, 64)
    changed = WatermarkKey(key.name, 1, "", bytes(32), key.mac_key, key.content_key)
    assert (changed.stream("content 2", (5,), 0, 999) == key.stream("content 2", (5,), 0, 999)).all()
    with pytest.raises(WatermarkError, match="expected both or neither"):
        WatermarkKey("a", 1, "", bytes(32), None, bytes(32))


@pytest.mark.parametrize("version", [1, 2])
def test_old_keyrings_are_read_and_written_in_the_newest_version(version, tmp_path):
    path = tmp_path / "ring.json"
    save_keyring(Keyring([fixed(), fixed("bob", 4, mac=False)]), path)
    data = json.loads(path.read_text())
    assert data["version"] == 3
    for record in data["keys"]:
        del record["since"]
        if version == 1:
            del record["content_key"]
    path.write_text(json.dumps(data | {"version": version}))
    ring = load_keyring(path)
    assert list(ring) == [replace(fixed(), since=1), replace(fixed("bob", 4, mac=False), since=version)]
    update_keyring(path, lambda ring: ring.new("carol"))
    assert json.loads(path.read_text())["version"] == 3 and list(load_keyring(path))[:2] == list(ring)
    with pytest.raises(WatermarkError, match="would lose key"):  # then it would not read its old pictures
        save_keyring(Keyring([fixed(), *list(ring)[1:], load_keyring(path).get("carol")]), path)


@pytest.mark.parametrize("since", [0, 4, True, "3"])
def test_a_key_of_a_later_format_is_refused(since):
    with pytest.raises(WatermarkError, match="of format .*; this release reads 1..3"):
        replace(fixed(), since=since)


def add(path, first, count):
    """Of one process among several."""
    for i in range(first, first + count):
        update_keyring(path, lambda ring, i=i: ring.new(f"key {i}"))


@pytest.mark.parametrize("writers, each", [(4, 4), pytest.param(8, 50, marks=pytest.mark.slow)])
def test_writers_at_the_same_time_lose_no_key(writers, each, tmp_path):
    real = tmp_path / "there" / "ring.json"
    save_keyring(Keyring([fixed("first", 0)]), real)
    link = tmp_path / "link.json"
    link.symlink_to(real)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_keys; test_keys.add(*eval(sys.argv[2]))"
    here = os.path.dirname(__file__)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    started = [
        subprocess.Popen([sys.executable, "-c", code, here, repr((str(path), number * each, each))], env=env)
        for number, path in enumerate([real, link] * (writers // 2))
    ]
    assert [process.wait() for process in started] == [0] * writers
    ring = load_keyring(real)
    assert {key.name for key in ring} == {"first", *(f"key {i}" for i in range(writers * each))}
    assert len({key.key_id for key in ring}) == len(ring) and link.is_symlink()
    assert os.listdir(real.parent) == ["ring.json"]  # no lock is left


def test_a_lock_that_nobody_gives_back_is_an_error(tmp_path, monkeypatch):
    from semiperm.methods import files

    path = tmp_path / "ring.json"
    with files.locked(path), pytest.raises(SemipermError, match="held by another program"):
        with files.locked(path, patience=0.02):
            pass
    (tmp_path / ".ring.json.lock").touch()  # of a program that was killed
    save_keyring(Keyring([fixed()]), path)
    assert os.listdir(tmp_path) == ["ring.json"]


def test_an_update_that_fails_or_changes_nothing_writes_nothing(tmp_path):
    path = tmp_path / "ring.json"
    save_keyring(Keyring([fixed()]), path)
    before = path.stat()
    assert update_keyring(path, lambda ring: len(ring)) == 1
    with pytest.raises(WatermarkError, match="exists already"):
        update_keyring(path, lambda ring: ring.new("b"), fresh=True)
    with pytest.raises(ZeroDivisionError):
        update_keyring(path, lambda ring: ring.new("b") and 1 / 0)
    assert path.stat() == before and os.listdir(tmp_path) == ["ring.json"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
def test_folders_and_pipes_are_no_keyrings_and_deep_files_no_tracebacks(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "pipe", "is a pipe")):
        for use in (load_keyring, lambda path: update_keyring(path, len), lambda path: save_keyring(Keyring(), path)):
            with pytest.raises(WatermarkError, match=words):
                use(path)
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    deep.chmod(0o600)
    with pytest.raises(WatermarkError, match="not whole JSON"):
        load_keyring(deep)
    with pytest.raises(WatermarkError, match="control characters"):
        Keyring().new("a\x1b[31m")
