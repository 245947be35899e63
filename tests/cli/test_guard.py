"""`generate --guard`, `semiperm guard` and `inspect` of a picture, on the embedded model."""

import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from terminal import fails, run, runs

QUICK = ("--steps", "3", "--device", "cpu")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guard")
    (folder / "key").write_text("a secret that is long enough\n")
    path = folder / "robot.png"
    runs("generate", "canvas", "a robot with a warning sign", "--guard", "hazard:0.5", "--guard-by", "sld,safree",
         "--guard-key", folder / "key", *QUICK, "-o", path)  # fmt: skip
    return path


def test_the_picture_says_what_the_guard_did(picture):
    record = json.loads(Image.open(picture).text["semiperm"])
    guard = record["guard"]
    assert guard["algorithms"] == ["sld", "safree"] and guard["categories"] == ["hazard"] and guard["strength"] == 0.5
    assert guard["evaluations"] == 3 and len(guard["rows"]) == 1 and len(guard["hmac"]) == 64
    shown = runs("inspect", picture)
    assert "guard: sld, safree away from hazard" in shown and "not checked" in shown
    assert json.loads(runs("inspect", picture, "--json"))["guard"] == guard


def test_a_changed_record_is_detected(picture, tmp_path):
    key = picture.parent / "key"
    assert "seal: intact" in runs("inspect", picture, "--guard-key", key)
    image = Image.open(picture)
    record = json.loads(image.text["semiperm"])
    record["guard"]["rows"][0]["fired"] = 0.125
    info, changed = PngInfo(), tmp_path / "changed.png"
    info.add_text("semiperm", json.dumps(record))
    image.save(changed, pnginfo=info)
    result = run("inspect", changed, "--guard-key", key)
    assert result.exit_code == 1 and "BROKEN" in result.output


def test_categories_are_listed(tmp_path):
    rows = json.loads(runs("guard", "list", "--json"))
    assert {"violence", "sexual", "hazard"} < {row["category"] for row in rows}
    own = tmp_path / "own.toml"
    own.write_text('name = "mine"\nphrases = ["this", "that"]\n')
    assert "this, that" in runs("guard", "list", own)


def test_detectors_are_fitted_listed_and_used(tmp_path):
    path, prompts, benign = tmp_path / "d.safetensors", tmp_path / "p.txt", tmp_path / "b.txt"
    prompts.write_text("a warning sign\na robot with a hazard mark\na star with a warning sign\n")
    benign.write_text("\n".join(f"a {thing} on {ground}" for thing in ("robot", "ghost", "star", "heart", "circle")
                                for ground in ("sky", "fog", "sand", "a red ground")))  # fmt: skip
    runs("guard", "fit", "canvas", "hazard", "-o", path, "--prompts", prompts, "--benign", benign,
         "--false-alarms", "0.3", "--steps", "4", "--device", "cpu")  # fmt: skip
    (row,) = json.loads(runs("guard", "list", path, "--json"))
    assert row["category"] == "hazard" and row["text"] and row["picture"] and len(row["model"]) > 8
    out = tmp_path / "x.png"
    runs(
        "generate",
        "canvas",
        "a robot with a warning sign",
        "--guard",
        "hazard",
        "--guard-detectors",
        path,
        *QUICK,
        "-o",
        out,
    )
    (image,) = json.loads(Image.open(out).text["semiperm"])["guard"]["rows"]
    assert image["text_score"] > 0 and image["picture_score"] is not None
    assert "text" in runs("inspect", out)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--guard", "wickedness"), "no category"),
        (("--guard", "hazard:much"), "expected CATEGORY"),
        (("--guard", "hazard", "--guard", "hate:0.5"), "strengths differ"),
        (("--guard", "hazard", "--guard-by", "magic"), "no algorithm"),
        (("--when-unsafe", "refuse"), "need --guard"),
        (("--guard", "hazard", "--when-unsafe", "refuse"), "picture detector"),
        (("--guard", "hazard", "--guidance", "1"), "it is off"),
    ],
)
def test_mistakes_are_one_line_and_no_picture(arguments, words, tmp_path):
    out = tmp_path / "x.png"
    assert words in fails("generate", "canvas", "a robot", *arguments, *QUICK, "-o", out)
    assert not out.exists()


def test_a_picture_that_says_nothing(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    assert "says nothing" in fails("inspect", tmp_path / "plain.png")
    assert "there is no" in fails("guard", "list", tmp_path / "none.toml")
