"""The one store of finished work: it survives being stopped anywhere, and knows when the code has changed."""

import json

import pytest
from semiperm.benchmarks import store
from semiperm.benchmarks.store import Store, code_digest, digest
from semiperm.methods.errors import SemipermError


def filled(path, settings=None):
    kept = Store(path, "test", settings)
    kept.put("a", {"n": 1})
    kept.put("b", [2])
    return kept


def test_what_was_put_is_there_again(tmp_path):
    path = tmp_path / "sub" / "work.jsonl"
    assert filled(path).get("a") == {"n": 1}
    again = Store(path, "test")
    assert (again.get("a"), again.get("b"), again.get("c")) == ({"n": 1}, [2], None)


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert filled(None).get("b") == [2] and not list(tmp_path.iterdir())


def test_stopped_after_any_byte_it_goes_on(tmp_path):
    path = tmp_path / "work.jsonl"
    filled(path)
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        torn = Store(path, "test")
        lost = [key for key in "ab" if torn.get(key) is None]
        for key in lost:
            torn.put(key, "again")
        again = Store(path, "test")
        assert [key for key in "ab" if again.get(key) is None] == []
        assert all(again.get(key) == "again" for key in lost)


def test_other_settings_do_not_count_and_are_kept(tmp_path):
    path = tmp_path / "work.jsonl"
    filled(path, {"steps": 1})
    other = Store(path, "test", {"steps": 2})
    assert other.get("a") is None
    other.put("a", 3)
    assert Store(path, "test", {"steps": 1}).get("a") == {"n": 1} and Store(path, "test", {"steps": 2}).get("a") == 3


@pytest.mark.parametrize("content", ["{}\n", "notes\n", '{"semiperm": "detect", "format": 1}\n', "\x00\xff"])
def test_other_files_are_left_as_they_are(tmp_path, content):
    path = tmp_path / "work.jsonl"
    path.write_text(content, encoding="latin-1")
    before = path.read_bytes()
    with pytest.raises(SemipermError, match=r"--resume .* was not written by `semiperm test`"):
        Store(path, "test")
    assert path.read_bytes() == before


@pytest.mark.parametrize("place", ["methods/deep/er/new.py", "kernels/new.py", "canvas/new.py", "pipelines/x/new.py"])
def test_the_digest_covers_every_source_file_of_every_code_folder(tmp_path, monkeypatch, place):
    for folder in ("methods", "kernels", "canvas", "pipelines"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("")
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(store, "_ROOT", tmp_path)
    of = code_digest.__wrapped__
    before = of()
    file = tmp_path / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("x = 1\n")
    added = of()
    file.write_text("x = 2\n")
    assert len({before, added, of()}) == 3
    (tmp_path / "docs" / "note.py").write_text("")
    file.rename(file.with_name("old.py"))
    assert of() not in (before, added)


def test_results_of_other_code_are_not_used(tmp_path, monkeypatch):
    path = tmp_path / "work.jsonl"
    filled(path)
    monkeypatch.setattr(store, "code_digest", lambda: "other")
    assert Store(path, "test").get("a") is None


def test_digest_tells_parts_apart(tmp_path):
    (tmp_path / "f").write_bytes(b"ab")
    assert digest(b"ab") == digest(tmp_path / "f") and digest(b"a", b"b") != digest(b"ab")
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) and len(digest()) == 16
    assert json.loads(json.dumps(digest("é")))
