"""`semiperm detect` as a user runs it, with a stand-in for the model and the detector."""

import json
import math
import os
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, features
from semiperm.cli import app, common
from semiperm.cli import detect as detect_command
from semiperm.methods.errors import WatermarkError
from semiperm.methods.pictures import as_exif_says
from semiperm.methods.watermark.keyring import Keyring, load_keyring, save_keyring
from semiperm.methods.watermark.mark import Payload
from semiperm.pipelines.watermark import detect as watermark
from terminal import run
from typer.testing import CliRunner

KEYS = ["file", "verdict", "p_value", "log10_p", "payload", "key_id", "model_evaluations"]
MARKED, PLAIN, BROKEN = (10, 200, 10), (10, 10, 200), (200, 10, 10)  # what the stand-in goes by
TOO_LARGE = (192, 64)


@pytest.fixture
def keyring(tmp_path):
    file = tmp_path / "keys.json"
    ring = Keyring()
    ring.new("studio")
    save_keyring(ring, file)
    return file


@pytest.fixture
def detector(monkeypatch):
    """The stand-in; `.groups` counts the pictures of each call, `.loads` the models loaded."""
    seen = SimpleNamespace(groups=[], loads=[], rates=[])

    def detect(pipe, images, ring, batch_size, **options):
        seen.options, seen.images = options, images
        seen.rates.append(options.get("false_positive_rate", 1e-6))
        seen.groups.append(len(images))
        assert pipe == "the model" and batch_size * max(i.width * i.height for i in images) <= detect_command.PIXELS
        if any(image.size == TOO_LARGE for image in images):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        if any(image.getpixel((0, 0)) == BROKEN for image in images):
            raise WatermarkError("the picture is too small")
        return [result(image.getpixel((0, 0)) == MARKED, next(iter(ring)).key_id) for image in images]

    def result(marked, key_id):
        payload = Payload(unique_id=2**63 + 1, time=1_800_000_000, model=7) if marked else None
        p = (0.0, -400.0) if marked else (0.5, -0.301)
        return SimpleNamespace(
            verdict="valid" if marked else "absent", p_value=p[0], log10_p=p[1], payload=payload, bit_confidence=1.0,
            key_id=key_id if marked else None, key_name="studio" if marked else None, model_evaluations=int(marked),
            transform="as given", content_p_value=None, evidence=np.ones((4, 8, 8), np.float32) if marked else None,
        )  # fmt: skip

    monkeypatch.setattr(watermark, "detect_watermark", detect)
    monkeypatch.setattr(common, "load_model", lambda *a: seen.loads.append(a) or "the model")
    monkeypatch.setattr(detect_command, "aids_of", lambda *a: {})
    return seen


def picture(path, colour, size=(64, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def lines(result) -> list[str]:
    assert "Traceback" not in result.output and isinstance(result.exception, (SystemExit, type(None))), result.output
    got = result.stderr.strip().splitlines()
    assert all(line.startswith("error: ") for line in got), result.stderr
    return got


def test_files_and_folders(keyring, detector, tmp_path):
    one = picture(tmp_path / "one.png", MARKED)
    inside = [picture(tmp_path / "in" / name, PLAIN) for name in ("a.PNG", "b/c.webp", "d.jpg")]
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    result = run("detect", one, tmp_path / "in", inside[0], "--keyring", keyring, "--json")
    assert result.exit_code == 0 and lines(result) == [], result.output
    rows = json.loads(result.stdout)
    assert [row["file"] for row in rows] == [str(file) for file in (one, *inside)]
    assert all(list(row) == KEYS for row in rows)
    assert [row["verdict"] for row in rows] == ["valid", "absent", "absent", "absent"]
    key_id = load_keyring(keyring).get("studio").key_id
    assert rows[0]["key_id"] == key_id and rows[0]["log10_p"] == -400 and rows[0]["model_evaluations"] == 1
    payload = {"version": 1, "time": 1_800_000_000, "model": "00000007", "unique_id": "8000000000000001"}
    assert rows[0]["payload"] == payload and rows[1]["payload"] is None and rows[1]["key_id"] is None
    assert detector.loads == [("canvas", "auto", "auto")]


def test_the_table_names_key_and_id(keyring, detector, tmp_path):
    result = run("detect", picture(tmp_path / "one.png", MARKED), "--keyring", keyring)
    assert result.exit_code == 0, result.output
    shown = "".join(result.stdout.split())
    assert "valid" in shown and "1e-400" in shown and "studio" in shown


def test_pictures_go_in_groups(keyring, detector, tmp_path):
    for index in range(11):
        picture(tmp_path / "in" / f"{index:02d}.png", PLAIN, (64, 64) if index % 2 else (96, 64))
    result = run("detect", tmp_path / "in", "--keyring", keyring, "--json")
    assert result.exit_code == 0 and len(json.loads(result.stdout)) == 11, result.output
    assert detector.groups == [8, 3]


def huge_png() -> bytes:
    """A small PNG that says it is 60,000 x 60,000."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def test_pictures_that_fail_do_not_stop_the_others(keyring, detector, tmp_path):
    folder = tmp_path / "in"
    good = [picture(folder / name, MARKED) for name in ("a.png", "z.png")]
    whole = picture(folder / "c.jpg", PLAIN, (256, 256)).read_bytes()
    (folder / "c.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "d.png").write_text("not a picture")
    (folder / "e.png").write_bytes(huge_png())
    (folder / "f.png").write_bytes(b"")
    picture(folder / "g.png", BROKEN)
    picture(folder / "i.png", PLAIN, TOO_LARGE)
    cut = picture(folder / "h.png", PLAIN).read_bytes()
    (folder / "h.png").write_bytes(cut[:50])
    result = run("detect", folder, folder / "none.png", "--keyring", keyring, "--json")
    assert result.exit_code == 1
    assert [row["file"] for row in json.loads(result.stdout)] == [str(file) for file in good]
    errors = lines(result)
    assert [line.split(": ")[1].rpartition("/")[2] for line in errors] == [
        "c.jpg", "d.png", "e.png", "f.png", "g.png", "h.png", "i.png", "none.png",
    ]  # fmt: skip
    reasons = ("damaged", "not a picture", "too large", "not a picture", "small", "damaged", "memory", "no such file")
    for line, words in zip(errors, reasons, strict=True):
        assert words in line, line


def test_a_large_picture_is_refused_where_pillow_only_warns(keyring, detector, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64)
    files = picture(tmp_path / "a.png", PLAIN, (64, 80)), picture(tmp_path / "b.png", PLAIN)
    result = run("detect", *files, "--keyring", keyring, "--json")
    assert result.exit_code == 1 and len(json.loads(result.stdout)) == 1
    assert "a.png: too large" in lines(result)[0]


def test_no_model_is_loaded_for_nothing(keyring, detector, tmp_path):
    (tmp_path / "in").mkdir()
    for target, code in ((tmp_path / "in", 2), (tmp_path / "none.png", 1)):
        result = run("detect", target, "--keyring", keyring)
        assert result.exit_code == code and len(lines(result)) == 1
    assert not detector.loads


def test_our_own_bugs_keep_their_traceback(keyring, detector, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(watermark, "detect_watermark", fail)
    result = run("detect", picture(tmp_path / "a.png", PLAIN), "--keyring", keyring)
    assert isinstance(result.exception, RuntimeError)


@pytest.mark.parametrize("content", [b"", b'{"a": 1}', b"\x89PNG"])
def test_a_damaged_keyring_is_one_line(content, keyring, detector, tmp_path):
    keyring.write_bytes(content)
    result = run("detect", picture(tmp_path / "one.png", MARKED), "--keyring", keyring)
    assert result.exit_code == 2 and len(lines(result)) == 1
    assert keyring.read_bytes() == content


def test_resume(keyring, detector, tmp_path):
    folder, state = tmp_path / "in", tmp_path / "made" / "state.jsonl"
    picture(folder / "a.png", MARKED), picture(folder / "b.png", PLAIN)
    (folder / "c.png").write_text("not a picture")
    arguments = ("detect", folder, "--keyring", keyring, "--resume", state, "--json")
    first = run(*arguments)
    assert first.exit_code == 1 and len(detector.loads) == 1
    again = run(*arguments)
    assert again.stdout == first.stdout and again.exit_code == 1 and len(detector.loads) == 1

    picture(folder / "b.png", MARKED, (80, 64))  # another picture under the same name
    state.write_bytes(state.read_bytes()[:-9])  # stopped in the middle of a line
    changed = run(*arguments)
    assert [row["verdict"] for row in json.loads(changed.stdout)] == ["valid", "valid"] and len(detector.loads) == 2
    assert json.loads(run(*arguments).stdout) == json.loads(changed.stdout) and len(detector.loads) == 2

    ring = load_keyring(keyring)
    ring.new("other")
    save_keyring(ring, keyring)
    assert run(*arguments).exit_code == 1 and len(detector.loads) == 3  # p-values depend on the number of keys
    assert not [k for k in ring if k.stream_key.hex() in state.read_text()]


def test_resume_writes_into_no_other_file(keyring, detector, tmp_path):
    one = picture(tmp_path / "one.png", MARKED)
    for other in (one, keyring):
        before = other.read_bytes()
        result = run("detect", one, "--keyring", keyring, "--resume", other)
        assert result.exit_code == 2 and "--resume" in lines(result)[0]
        assert other.read_bytes() == before


def test_signed_on_the_canvas_and_found_again(tmp_path):
    """The whole way, by the real commands: keys, sign, detect; another key and a detector's copy."""

    def real(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    ring, other, copy = (tmp_path / name for name in ("keys.json", "other.json", "detector.json"))
    real("keys", "new", "--name", "studio", "--keyring", ring)
    real("keys", "new", "--name", "studio", "--keyring", other)
    real("keys", "export-detector", "--name", "studio", "--keyring", ring, "-o", copy)
    prompt = "a robot in striped style on a sky background"
    real("generate", "canvas", prompt, "--sign", "studio", "--keyring", ring, "-o", tmp_path / "a.png")
    real("generate", "canvas", prompt, "-o", tmp_path / "b.png")
    pictures = (tmp_path / "a.png", tmp_path / "b.png")
    verdicts = {}
    for keyring in (ring, other, copy):
        rows = json.loads(real("detect", *pictures, "--keyring", keyring, "--json"))
        verdicts[keyring.name] = [row["verdict"] for row in rows]
        if keyring == ring:
            assert rows[0]["p_value"] < 1e-6 < rows[1]["p_value"] and rows[0]["key_id"] == 0
    assert verdicts == {
        "keys.json": ["valid", "absent"],
        "other.json": ["absent", "absent"],
        "detector.json": ["unverified", "absent"],
    }


def test_options_reach_the_search_and_count_for_resuming(keyring, detector, tmp_path):
    resume, file = tmp_path / "found.jsonl", picture(tmp_path / "a.png", MARKED)
    assert run("detect", file, "--keyring", keyring, "--resume", resume).exit_code == 0
    assert detector.options == {"search": False, "size": None}
    before = sum(detector.groups)
    more = ("--search", "--size", "640x480")
    assert run("detect", file, "--keyring", keyring, "--resume", resume, *more).exit_code == 0
    assert detector.options == {"search": True, "size": (480, 640)} and sum(detector.groups) == 2 * before
    for text in ("640", "640x", "x480", "axb", "0x480"):
        wrong = run("detect", file, "--keyring", keyring, "--size", text)
        assert wrong.exit_code == 2 and "WIDTHxHEIGHT" in wrong.output


def test_what_was_undone_and_the_content_are_told(detector):
    found = SimpleNamespace(
        verdict="content differs",
        p_value=1e-9,
        log10_p=-9.0,
        payload=None,
        key_id=3,
        model_evaluations=5,
        transform="turned by 90 degrees",
        content_p_value=0.4,
    )
    told = detect_command.described(found)
    assert told["transform"] == "turned by 90 degrees" and told["content_p_value"] == 0.4
    found.transform, found.content_p_value = "as given", None
    assert set(detect_command.described(found)) == {
        "verdict",
        "p_value",
        "log10_p",
        "payload",
        "key_id",
        "model_evaluations",
    }


def found_in(result) -> list[dict]:
    assert result.exit_code == 0 and lines(result) == [], result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".JPG", ".avif", ".tif", ".dib", ""])
def test_every_kind_of_picture_in_a_folder_is_looked_at(suffix, keyring, detector, tmp_path):
    if suffix == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    name = {".jfif": "JPEG", ".jpe": "JPEG", ".JPG": "JPEG", ".avif": "AVIF", ".tif": "TIFF", ".dib": "BMP", "": "PNG"}
    (tmp_path / "in").mkdir()
    Image.new("RGB", (64, 64), PLAIN).save(tmp_path / "in" / f"a{suffix}", name[suffix])
    (tmp_path / "in" / "README").write_text("no picture")
    (tmp_path / "in" / "empty").touch()
    rows = found_in(run("detect", tmp_path / "in", "--keyring", keyring, "--json"))
    assert [row["file"] for row in rows] == [str(tmp_path / "in" / f"a{suffix}")]


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_all_pictures_of_a_file_are_looked_at_and_pay(suffix, keyring, detector, tmp_path):
    colours = [(i, i, 250 - i) for i in range(0, 120, 10)]
    colours[9] = MARKED
    frames = [Image.new("RGB", (64, 64), colour) for colour in colours]
    file, still = tmp_path / f"many{suffix}", tmp_path / f"still{suffix}"
    more = {".webp": {"lossless": True}, ".gif": {"duration": 50}}.get(suffix, {})
    frames[0].save(file, save_all=True, append_images=frames[1:], **more)
    frames[0].save(still, save_all=True, append_images=frames[1:4], **more)
    one = picture(tmp_path / "one.png", MARKED)
    marked, plain, single = found_in(run("detect", file, still, one, "--keyring", keyring, "--json"))
    assert (marked["verdict"], marked["frame"], marked["frames"]) == ("valid", 10, 12)
    assert marked["log10_p"] == pytest.approx(single["log10_p"] + math.log10(12)) and "frame" not in single
    assert plain["verdict"] == "absent" and plain["p_value"] == 1 and plain["frames"] == 4
    assert {round(1e-6 / rate) for rate in detector.rates} == {1, 12, 4}
    assert "picture 10 of 12" in run("detect", file, "--keyring", keyring).stdout


def test_still_pictures_of_a_file_are_looked_at_once(keyring, detector, tmp_path):
    frames = [Image.new("RGB", (64, 64), PLAIN)] * 30
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    (row,) = found_in(run("detect", tmp_path / "a.tif", "--keyring", keyring, "--json"))
    assert row["frames"] == 30 and sum(detector.groups) == 1


def test_a_file_damaged_behind_its_first_picture_is_an_error(keyring, detector, tmp_path):
    frames = [Image.effect_noise((64, 64), 50 + i).convert("RGB") for i in range(12)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    whole = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(whole[: int(len(whole) * 0.97)])
    result = run("detect", tmp_path / "a.gif", picture(tmp_path / "b.png", PLAIN), "--keyring", keyring, "--json")
    assert [row["file"] for row in json.loads(result.stdout)][-1] == str(tmp_path / "b.png")
    assert result.exit_code == len(lines(result)) <= 1


def test_the_orientation_of_a_file_reaches_the_detector(keyring, detector, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in (".jpg", ".png", ".webp", ".tif"):
        Image.new("RGB", (64, 64), PLAIN).save(tmp_path / f"a{suffix}", exif=exif)
        found_in(run("detect", tmp_path / f"a{suffix}", "--keyring", keyring, "--json"))
        assert detector.images[0].getexif()[0x0112] == 6 and as_exif_says(detector.images[0]) is not None, suffix


def test_deep_greys_are_no_blank_pages(keyring, detector, tmp_path):
    ramp = np.linspace(0, 1, 64 * 64).reshape(64, 64)
    kinds = {
        "a.png": Image.fromarray((ramp * 65535).astype(np.uint16)),
        "b.tif": Image.fromarray((ramp * 65535).astype(np.uint16)),
        "c.tif": Image.fromarray(ramp.astype(np.float32)),
        "d.tif": Image.fromarray((ramp * 255).astype(np.float32)),
        "e.tif": Image.fromarray((ramp * 255).astype(np.int32)),
        "f.tif": Image.fromarray((ramp * 65535).astype(np.int32)),
    }
    for name, image in kinds.items():
        image.save(tmp_path / name)
        found_in(run("detect", tmp_path / name, "--keyring", keyring, "--json"))
        seen = np.asarray(detector.images[0])
        assert seen.shape == (64, 64, 3) and np.abs(seen[..., 0] - ramp * 255).max() <= 1, name
    Image.fromarray(np.full((64, 64), np.nan, np.float32)).save(tmp_path / "g.tif")
    assert "NaN" in lines(run("detect", tmp_path / "g.tif", "--keyring", keyring))[0]


def test_rows_are_printed_as_they_are_found(keyring, detector, tmp_path, monkeypatch):
    files = [picture(tmp_path / f"{i:02d}.png", PLAIN) for i in range(9)] + [picture(tmp_path / "zz.png", MARKED)]
    real, seen = watermark.detect_watermark, []

    def stopped(pipe, images, *rest, **options):
        seen.append(len(images))
        if len(seen) > 1:
            raise KeyboardInterrupt
        return real(pipe, images, *rest, **options)

    monkeypatch.setattr(watermark, "detect_watermark", stopped)
    result = run("detect", *files, "--keyring", keyring)
    assert result.stdout.splitlines() == [f"{file}: absent, p 0.5" for file in files[:8]] and result.exit_code != 0


@pytest.mark.skipif(os.name != "posix", reason="names and pipes of POSIX")
def test_no_name_steers_the_terminal_and_no_pipe_blocks(keyring, detector, tmp_path):
    evil = picture(tmp_path / "a\x1b[31m\n\x9bb.png", PLAIN)
    bad = tmp_path / "c\x1b]0;d.png"
    bad.write_text("no picture")
    ring = load_keyring(keyring)
    data = json.loads(keyring.read_text())
    data["keys"][0]["name"] = "studio\x1b[2J"
    keyring.write_text(json.dumps(data))
    assert len(ring) == 1
    marked = picture(tmp_path / "m.png", MARKED)
    more = ("keys", "list"), ("keys", "new", "--name", "x\x1b")
    for arguments in (("detect", evil, bad, marked), ("detect", tmp_path / "no\x1b.png"), *more):
        result = run(*arguments, "--keyring", keyring)
        assert not [c for c in result.output if not c.isprintable() and c != "\n"], arguments
        assert "Traceback" not in result.output
    os.mkfifo(tmp_path / "pipe", 0o600)
    resume = ("--keyring", keyring, "--resume", tmp_path / "pipe")
    for where in (("--keyring", tmp_path / "pipe"), resume, ("--keyring", tmp_path)):
        result = run("detect", marked, *where)
        assert result.exit_code == 2 and len(lines(result)) == 1
        assert "a pipe" in lines(result)[0] or "a folder" in lines(result)[0]
    assert "no such file" in lines(run("detect", tmp_path / "pipe", "--keyring", keyring))[0]


def greenness(path) -> float:
    shown = np.asarray(Image.open(path).convert("RGB")).astype(float)[:64]
    return float((shown[..., 1] - shown[..., 0]).mean())


def test_heat_maps_are_written_once_and_again_where_one_is_missing(detector, keyring, tmp_path):
    for folder, colour in (("a", MARKED), ("b", PLAIN)):
        picture(tmp_path / folder / "x.png", colour)
    frames = [Image.new("RGB", (64, 64), colour) for colour in (PLAIN, MARKED)]
    frames[0].save(tmp_path / "a" / "moving.gif", save_all=True, append_images=frames[1:])
    maps, resume = tmp_path / "maps", tmp_path / "done.jsonl"
    command = ["detect", tmp_path / "a", tmp_path / "b", "--keyring", keyring, "--heatmap", maps, "--resume", resume]
    assert run(*command).exit_code == 0
    written = sorted(maps.iterdir())
    assert [path.name for path in written] == ["000-moving-heatmap.png", "001-x-heatmap.png", "002-x-heatmap.png"]
    assert [greenness(path) > 20 for path in written] == [True, True, False]  # of several pictures the best
    assert all(Image.open(path).size[1] > 64 for path in written)  # a caption is below
    said = [json.loads(Image.open(path).text["semiperm"]) for path in written]
    assert [one["verdict"] for one in said] == ["valid", "valid", "absent"]
    calls = len(detector.groups)
    assert run(*command).exit_code == 0 and len(detector.groups) == calls
    written[1].unlink()
    assert run(*command).exit_code == 0 and detector.groups[calls:] == [1] and written[1].exists()


def test_a_heat_map_never_replaces_a_picture(detector, keyring, tmp_path):
    picture(tmp_path / "x.png", PLAIN)
    original = picture(tmp_path / "x-heatmap.png", MARKED).read_bytes()
    done = run("detect", tmp_path, "--keyring", keyring, "--heatmap", tmp_path)
    assert done.exit_code == 2 and "would be replaced" in done.output
    assert (tmp_path / "x-heatmap.png").read_bytes() == original
