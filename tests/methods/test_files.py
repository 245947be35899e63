"""Files appear whole or not at all, and tensors come from safetensors alone."""

import os
import pickle

import pytest
import torch
from semiperm.methods.errors import SemipermError
from semiperm.methods.files import read_safetensors, save_safetensors, whole_file, write_file

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX modes and links")


def test_written_whole_into_a_new_folder(tmp_path):
    path = tmp_path / "a" / "b" / "c.txt"
    assert write_file(path, "é") == path and path.read_bytes() == "é".encode()
    assert write_file(path, b"two").read_bytes() == b"two" and os.listdir(path.parent) == ["c.txt"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path, error):
    path = write_file(tmp_path / "a.txt", "old")
    with pytest.raises(type(error)), whole_file(path) as partial:
        partial.write_text("half a fi")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_failed_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_file(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_file(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


@posix
def test_modes(tmp_path):
    plain, private = write_file(tmp_path / "a", ""), write_file(tmp_path / "b", "", mode=0o600)
    mask = os.umask(0)
    os.umask(mask)
    assert plain.stat().st_mode & 0o777 == 0o666 & ~mask and private.stat().st_mode & 0o777 == 0o600
    plain.chmod(0o640)
    assert write_file(plain, "again").stat().st_mode & 0o777 == 0o640, "an existing file keeps its mode"
    with whole_file(private, 0o600) as partial:
        assert partial.stat().st_mode & 0o777 == 0o600, "private from the first byte on"


@posix
def test_links_are_followed(tmp_path):
    real, link = write_file(tmp_path / "real", "old"), tmp_path / "link"
    link.symlink_to(real)
    write_file(link, "new")
    assert link.is_symlink() and real.read_text() == "new"


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(SemipermError, match="is a folder"):
        write_file(tmp_path, b"")


def test_tensors_round_trip(tmp_path):
    base = torch.randn(4, 6)
    given = {"a": base, "view": base.T[1:], "half": base.half()}
    tensors, metadata = read_safetensors(save_safetensors(given, tmp_path / "t.safetensors", {"k": "v"}))
    assert metadata == {"k": "v"} and all(torch.equal(tensors[name], tensor) for name, tensor in given.items())


@pytest.mark.parametrize("length", [128, 384])  # headers whose first byte is a pickle's
def test_a_header_that_begins_like_a_pickle_is_read(tmp_path, length):
    for padding in range(length):
        path = save_safetensors({"a": torch.zeros(1)}, tmp_path / "t.safetensors", {"k": "x" * padding})
        if path.read_bytes()[0] == 0x80:
            assert read_safetensors(path)[1]["k"] == "x" * padding
            return
    pytest.fail("no header began with 0x80")


def test_pickles_and_damaged_files_are_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "b.safetensors").write_bytes(b"PK\x03\x04rest")
    save_safetensors({"a": torch.zeros(1)}, tmp_path / "c.pt", {})
    for name in ("a.safetensors", "b.safetensors", "c.pt"):
        with pytest.raises(SemipermError, match="is a pickle"):
            read_safetensors(tmp_path / name)
    (tmp_path / "d.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(SemipermError, match="not a readable safetensors"):
        read_safetensors(tmp_path / "d.safetensors")
    with pytest.raises(SemipermError, match="no file at"):
        read_safetensors(tmp_path / "absent")
