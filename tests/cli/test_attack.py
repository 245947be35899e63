"""`semiperm attack` as a user runs it."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from semiperm.cli import app
from semiperm.cli import attack as command
from semiperm.methods.attacks.pictures import ATTACKS, SUITE, attack
from typer.testing import CliRunner


def run(*arguments):
    return CliRunner().invoke(app, ["attack", *(str(argument) for argument in arguments)])


def lines(result) -> list[str]:
    assert "Traceback" not in result.output and isinstance(result.exception, (SystemExit, type(None))), result.output
    got = result.stderr.strip().splitlines()
    assert all(line.startswith("error: ") for line in got), result.stderr
    return got


@pytest.fixture
def photo(tmp_path):
    def write(name, size=(40, 24), seed=0):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(rows).save(path)
        return path

    return write


def pixels_of(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None].float() / 255


def test_one_file_a_picture_and_attack(photo, tmp_path):
    one, two = photo("in/one.png"), photo("in/two.png", (32, 48), 1)
    out = tmp_path / "out"
    texts = ("jpeg:25", "flip", "crop:0.25+noise:0.1")
    arguments = [tmp_path / "in", *(part for text in texts for part in ("--attack", text)), "-o", out]
    result = run(*arguments)
    assert result.exit_code == 0 and lines(result) == [] and "6 pictures" in result.stdout
    ends = ("jpeg-25", "flip", "crop-0.25_noise-0.1")
    assert sorted(p.name for p in out.iterdir()) == sorted(f"{s}-{e}.png" for s in ("one", "two") for e in ends)
    for seed, file in enumerate((one, two)):
        for text, end in zip(texts, ends, strict=True):
            made = out / f"{file.stem}-{end}.png"
            expected = attack(pixels_of(file), text, torch.Generator().manual_seed(seed))
            assert pixels_of(made).allclose(expected, atol=0.5001 / 255)
            record = json.loads(Image.open(made).text["semiperm"])
            assert record == {"attack": text, "seed": seed, "source": file.name}
    again = [p.read_bytes() for p in sorted(out.iterdir())]
    run(*arguments)
    assert again == [p.read_bytes() for p in sorted(out.iterdir())]
    run(one, "--attack", "noise:0.1", "-o", out, "--seed", 7)
    expected = attack(pixels_of(one), "noise:0.1", torch.Generator().manual_seed(7))
    assert pixels_of(out / "one-noise-0.1.png").allclose(expected, atol=0.5001 / 255)


def test_the_suite_and_its_grid(photo, tmp_path):
    files = [photo(f"in/{i}.png", (200 + i, 100), i) for i in range(command.ROWS + 2)]
    grid = tmp_path / "grid.png"
    result = run(files[0], files[1], "-o", tmp_path / "out", "--grid", grid)
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "out").iterdir())) == 2 * len(SUITE)
    image = Image.open(grid)
    step = command.CELL + command.GAP
    assert image.width == command.GAP + len(SUITE) * step
    first = image.crop((command.GAP, command.GAP + command.CAPTION, command.GAP + command.CELL, 999)).crop(
        (0, 0, 160, 80)
    )
    expected = Image.open(files[0])
    expected.thumbnail((command.CELL, command.CELL))
    assert np.array_equal(np.array(first), np.array(expected))
    assert json.loads(image.text["semiperm"])["attacks"] == list(SUITE)
    height = image.height
    result = run(*files, "--attack", "none", "-o", tmp_path / "out", "--grid", grid)
    per_row = command.CELL + command.CAPTION + command.GAP
    assert Image.open(grid).height == height + (command.ROWS - 2) * per_row  # the first ones only


def test_pictures_of_one_name_are_numbered(photo, tmp_path):
    files = photo("a/x.png"), photo("b/X.png", seed=1), photo("c/y.png", seed=2)
    assert run(*files, "--attack", "flip", "-o", tmp_path / "out").exit_code == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "000-x-flip.png",
        "001-X-flip.png",
        "002-y-flip.png",
    ]


def test_the_list_names_every_attack():
    result = run("--list")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in (*ATTACKS, "regenerate", "vae-reencode"))


def test_through_a_model(untrained_canvas, photo, tmp_path):
    one, small, out = photo("one.png", (128, 128)), photo("small.png", (4, 4)), tmp_path / "out"
    result = run(
        one, small, "--attack", "regenerate:0.1", "--attack", "flip+vae-reencode", "-o", out, "--model", "canvas"
    )
    assert result.exit_code == 1 and len(lines(result)) == 1 and "small.png" in lines(result)[0], result.output
    assert sorted(p.name for p in out.iterdir()) == ["one-flip_vae-reencode.png", "one-regenerate-0.1.png"]
    assert Image.open(out / "one-regenerate-0.1.png").size == (128, 128)
    result = run(one, "--attack", "vae-reencode", "-o", out)
    assert result.exit_code == 2 and "--model canvas" in lines(result)[0]


def test_pictures_that_cannot_be_read_are_left_out(photo, tmp_path):
    good, text, cut = photo("good.png"), tmp_path / "text.png", photo("cut.png")
    text.write_text("no picture")
    cut.write_bytes(cut.read_bytes()[:-200])
    huge = tmp_path / "huge.png"
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    huge.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)))
    bad = (text, cut, huge, tmp_path / "missing.png")
    result = run(*bad, good, "--attack", "flip", "-o", tmp_path / "out", "--grid", tmp_path / "grid.png")
    assert result.exit_code == 1 and len(lines(result)) == 4
    assert all(file.name in line for file, line in zip(bad, lines(result), strict=True))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good-flip.png"] and (tmp_path / "grid.png").exists()


def test_mistakes_are_one_line_and_nothing_is_lost(photo, tmp_path):
    one, taken = photo("one.png"), photo("one-flip.png", seed=1)
    before = {path: path.read_bytes() for path in (one, taken)}
    for arguments, words in (
        ((one, "--attack", "jepg", "-o", tmp_path / "out"), "did you mean jpeg"),
        ((one, "--attack", "jpeg:0", "-o", tmp_path / "out"), "from 1 to 100"),
        ((one, "-o", taken), "is a file"),
        ((one, taken, "--attack", "flip", "-o", tmp_path), "one of the pictures"),
        ((one, "-o", tmp_path / "out", "--grid", one), "one of the pictures"),
        ((one, "-o", tmp_path / "out", "--grid", tmp_path / "g.jpg"), "--grid"),
        ((tmp_path / "out", "-o", tmp_path / "out"), "no picture"),
    ):
        result = run(*arguments)
        assert (result.exit_code == 2 or words == "no picture") and words in result.stderr.replace(
            "no such", "no picture"
        )
        assert len(lines(result)) == 1
    assert before == {path: path.read_bytes() for path in before} and not (tmp_path / "out").exists()
