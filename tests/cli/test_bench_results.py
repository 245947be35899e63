"""`semiperm bench results`: the page is written from the files, and known to be stale when they change."""

import json
import re
import shutil

import pytest
from semiperm.benchmarks.page.results import SECTIONS
from semiperm.cli import app
from typer.testing import CliRunner


@pytest.fixture
def clone(root, tmp_path, monkeypatch):
    """A folder with the figures' files, and nothing else."""
    shutil.copytree(root / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, ["bench", "results", *arguments])


def test_writes_and_checks(clone, root):
    missing = run("--check")
    assert missing.exit_code == 1 and "run: semiperm bench results" in missing.stderr
    assert run().exit_code == 0
    text = (clone / "docs" / "results.md").read_text(encoding="utf-8")
    assert text == (root / "docs" / "results.md").read_text(encoding="utf-8")
    assert all(f"(../benchmarks/results/{name}.json)" in text for name in SECTIONS)
    assert run("--check").exit_code == 0

    file = clone / "benchmarks" / "results" / "erasure_canvas-scenes.json"
    figures = json.loads(file.read_text(encoding="utf-8"))
    next(row for row in figures["rows"] if row["concept"] == "styles")["ua"][0] = 0.123
    file.write_text(json.dumps(figures), encoding="utf-8")
    stale = run("--check")
    assert stale.exit_code == 1 and "docs/results.md is stale" in stale.stderr
    assert (clone / "docs" / "results.md").read_text(encoding="utf-8") == text  # --check writes nothing
    assert run("--out", "page.md").exit_code == 0 and "| 12.3 (" in (clone / "page.md").read_text(encoding="utf-8")


SHARE, NONE = [0.5, 0.25, 0.75], [None, None, None]
MADE = {"machine": "a CPU", "versions": {"torch": "2"}, "num_inference_steps": 7, "guidance_scale": 4.0}


def erasure_of(world):
    keys = ("ua", "ira", "cra", "kept", "attributes", "negative", "twin", "scene", "other", "implied")
    rows = [
        {"method": method, "concept": group, "concepts": names, "words": words, "judge": judge, "n": 4}
        | dict.fromkeys(keys, NONE)
        | {"ua": [0.9 if judge == "first" else 0.8, 0.1, 1.0], shown: SHARE}
        | {"outside": 1.5 if group == "characters" and method != "untouched" else None}
        for words in ("public", "reserved")
        for group, names, shown in (("characters", ["robot"], "other"), ("hazards", ["claws", "frost"], "implied"))
        for method in ("untouched", "closed_form/always")
        for judge in ("first", "second")
    ]
    asked = {"withhold": True, "negative": False, "repeats": 3, "each": 8, "concepts": []}
    return {"world": world, "asked": asked, "rows": rows, **MADE}


def at_once_of(world):
    rows = [
        {"method": method, "concept": "robot", "words": words, "judge": judge, "n": 4}
        | dict.fromkeys(("ua", "ira", "cra", "kept", "attributes", "negative"), NONE)
        | {"ua": [0.9 if method == "membrane/always" else 0.1, 0.0, 1.0]}
        for words in ("public", "reserved")
        for method in ("untouched", "membrane/auto", "membrane/always")
        for judge in ("first", "second")
    ]
    asked = {"each": 8, "repeats": 1, "concepts": ["robot"], "stack": ["robot", *"abcdefghi"]}
    return {"world": world, "asked": asked, "rows": rows, **MADE}


def guidance_of(world):
    rows = [
        {"method": method, "categories": scope, "kind": kind, "category": category, "judge": judge, "n": 2}
        | {"hazard": [0.125 if category else 0.625, 0.0, 1.0], "others": SHARE, "accuracy": SHARE}
        for method, scope in (("untouched", "all"), ("SAFREE", "all"), ("SAFREE", "one"))
        for judge in ("first", "second")
        for kind in ("benign", "named", "other words", "implied")
        for category in ("", *(("blaze", "frost") if kind != "benign" else ()))
    ]
    return {"world": world, "n": 2, "rows": rows, "attack": None, "methods": [], **MADE}


def held_out_of(world):
    about = {"world": world, "steps": 7, "guidance_scale": 4.0, "machine": "a CPU", "versions": {}, "judge": "first"}
    about |= {"images": 8, "similarity": 0.5, "style_kept": SHARE, "background_kept": SHARE, "shown": SHARE}
    bare = {"name": "untouched", "reference": "quibble", "role": "calibration", "config": {}}
    held = {"name": "negative_token_merging", "reference": "ghost", "role": "held out", "config": {"strength": 1.5}}
    return [bare | about, held | about]


def watermark_of(world):
    about = {"machine": "a CPU", "versions": {}, "world": world, "n": 8, "evaluations": 1.0}
    about |= dict.fromkeys(("tpr", "detected", "exact", "object", "style", "background"), SHARE)
    about |= dict.fromkeys(("distance", "interval", "p_value", "forged", "caught", "valid", "draws"))
    rows = [{"table": "attack", "mark": "semiperm", "attack": name} for name in ("none", "mean")]
    rows += [
        {"table": "guidance", "guidance": 4.0, "agreement": {"5": 0.875}},
        {"table": "quality", "mark": "semiperm"},
    ]
    rows += [{"table": "decoder", "latents": "encoder", "agreement": 0.8}, {"table": "forgery", "attack": "reprompt"}]
    rows += [{"table": "everyday", "conversion": "grey", "seconds": 1.5}]
    return [row | about for row in rows]


def token_merging_of(world):
    about = {"world": world, "steps": 7, "machine": "a CPU", "versions": {}, "images": 8, "similarity": 0.5}
    about |= dict.fromkeys(("shown", "style_kept", "background_kept", "object_kept"), SHARE)
    about |= {"feature_distance": 0.25, "pixel_distance": 0.75, "config": {"strength": 2.2}}
    about["name"] = "negative_token_merging"
    return [
        {"mode": mode, "domain": domain, "judge": judge} | about
        for mode, domain in (("reference", "characters"), ("diversity", "objects"), ("diversity", "characters"))
        for judge in ("first", "second")
    ]


def check_of(model):
    """Of two judges: the first sees all, the second half; hazards alone are of one judge."""
    group = {"n": 8, "objects": 1.0, "style": 1.0}
    first = {
        "public pairs": group,
        "public two": {"n": 4, "objects": 0.25},
        "implied claws": {"n": 2, "hazard drawn": 1},
    }
    second = {"public pairs": group | {"objects": 0.5}, "public two": {"n": 4, "objects": 0.25}}
    noise = {"n": 3, "mean_sign_agreement": 0.75, "share_p_below_1e-6": 1.0, "autoencoder_roundtrip": 0.05}
    names = ("objects", "color", "style", "background", "hazards", "memorised", "front")
    painted = dict.fromkeys(("removed", "smudge", "blurred", "smeared"), 0.125)
    judge = {"n": 40, **dict.fromkeys(names, 0.875), "place": 1.25, "painted_out": painted}
    trust = {"first": judge, "second": judge, "agreement": {"style": 0.625}}
    return {"model": model, "samples": {"first": first, "second": second}, "noise": noise, "judges": trust}


def arena_of(world):
    """Two methods on one character: one that works, one that is not made for the model."""
    figures = ("ua", "reserved", "ira", "cra", "kept", "attributes", "twin", "scene", "other", "implied", "relation")
    about = {"world": world, "judge": "first", "together": 1, "concepts": ["robot"], "of": "file"}
    about |= dict.fromkeys((*figures, "count"), NONE) | {"surfaces": {"hard prompts": SHARE, "redrawn": NONE}}
    about |= {"psnr": [41.25, 40.0, 50.0], "seconds": 1.25, "bytes": 2500, "step": [1.011, 1.0, 1.02], "why": {}}
    works = about | {"method": "closed_form/auto", "ua": SHARE, "robust": SHARE, "quality": [0.75, 0.5, 0.9]}
    failed = about | dict.fromkeys(("psnr", "seconds", "bytes", "of", "step"))
    failed |= {"method": "gloce", "surfaces": {"hard prompts": NONE, "redrawn": NONE}, "robust": NONE, "quality": NONE}
    failed["why"] = {"made": "ModelError: no UNet", "public": "ModelError: no UNet"}
    rows = [
        row | {"pooled": pooled, "concept": "characters" if pooled else "robot"}
        for row in (works, failed)
        for pooled in (False, True)
    ]
    published = {"what": "other styles kept", "source": "somebody (arXiv 1)", "published": {"SPM": 90.8, "UCE": 39.4}}
    published |= {"world": world, "judge": "first", "arena": {"SPM": 0.9, "UCE": 0.4}, "falls": False, "rho": 1.0}
    missing = [{"world": world, "concept": "robot", "part": "twins", "why": "nothing looks alike"}]
    return {"quick": True, "rows": rows, "missing": missing, "orderings": [published], **MADE}


def test_a_world_stands_on_the_page_as_soon_as_it_has_a_file(clone):
    page, results = clone / "docs" / "results.md", clone / "benchmarks" / "results"
    for world in ("canvas-scenes", "canvas-flow", "canvas-turbo"):
        for file in results.glob(f"*_{world}.json"):
            file.unlink()
    assert run().exit_code == 0
    bare = page.read_text(encoding="utf-8")
    assert "canvas-flow" not in bare and "## Erasure, on scenes" not in bare
    made = {
        "canvas": check_of,
        "erasure": erasure_of,
        "erasure_10": at_once_of,
        "trained_10": at_once_of,
        "arena": arena_of,
        "guidance": guidance_of,
        "held_out": held_out_of,
        "negative_token_merging": token_merging_of,
        "watermark": watermark_of,
    }
    for stem, of in made.items():
        for world in ("canvas-flow", "canvas-turbo"):
            (results / f"{stem}_{world}.json").write_text(json.dumps(of(world)), encoding="utf-8")
    assert run("--check").exit_code == 1 and run().exit_code == 0
    text = page.read_text(encoding="utf-8")
    for stem in made:
        assert f"[{stem}_canvas-flow.json](../benchmarks/results/{stem}_canvas-flow.json)" in text
        assert text.index(f"{stem}_canvas-flow.json") < text.index(f"{stem}_canvas-turbo.json")
    assert "canvas-scenes" not in text
    command = "evaluate canvas-flow --suite --withhold --steps 7 --repeats 3 --each 8 --json"
    assert command in text and "Hazards (claws, frost), told the name, asked in reserved words:" in text
    assert "| method | UA | other object kept | outside | UA, second judge |" in text
    assert "| membranes, gate always | 90.0 (10.0 to 100.0) | 50.0 (25.0 to 75.0) | 1.5 | 80.0 |" in text
    assert "| method | UA | UA, implied | UA, second judge |" in text
    assert "canvas-flow --membrane 10.safetensors --withhold --gate auto --gate always --steps 7 --each 8" in text
    assert "and 9 words that this world does not draw (a, b, c, d, e, f, ...)." in text
    assert text.count("| 10 membranes, gate always | 90.0 (0.0 to 100.0) |") == 16  # two worlds, words, judges, makers
    assert "10 membranes of one `semiperm train`, by name alone" in text
    assert "guidance --world canvas-flow -n 2 --steps 7 --json" in text
    assert "| SAFREE | one | 62.5 (0.0 to 100.0) |" in text
    assert "| ghost | negative token merging | 50.0 (25.0 to 75.0) | 0.500 |" in text and "strength 1.5" in text
    assert "guidance 4: 5 steps 87.5" in text and "| grey | 8 | 50.0 (25.0 to 75.0) |" in text
    assert "bench watermark --world canvas-flow --part repaint --resume" in text  # not measured yet
    assert "| characters | negative token merging | 0.250 | 0.750 | 50.0 (25.0 to 75.0) |" in text
    assert "bench token-merging --world canvas-flow --steps 7 --json" in text
    assert (
        "| % | n | canvas-flow | canvas-turbo |" in text and "canvas check canvas-flow --pictures 4 --marks 3" in text
    )
    assert "| one thing: it and no other, asked in public words | 8 | 100.0 / 50.0 | 100.0 / 50.0 |" in text
    assert "| claws when implied | 2 | 100.0 | 100.0 |" in text and "They agree: style 62.5." in text
    assert "## The arena" not in bare and "`semiperm arena --quick --world canvas-turbo --json" in text
    assert "| closed_form/auto | 50.0 (25.0 to 75.0) | 41.2 (40.0 to 50.0) |" in text and "| gloce | - | - |" in text
    assert "| closed_form/auto | 1.2 | 1.011 (1.000 to 1.020) | 2.5 kB (file) |" in text
    assert "- gloce: ModelError: no UNet (robot)" in text and "- twins: nothing looks alike (robot)" in text
    assert "| SPM 90.8, UCE 39.4 | SPM 90.0, UCE 40.0 | 1.00 |" in text
    for line in bare.splitlines():
        assert line in text  # and nothing of the first edition is gone


def test_outside_a_clone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run()
    assert result.exit_code == 2 and "folder of a clone" in result.stderr


def test_needs_nothing_heavy(root):
    files = list((root / "benchmarks" / "page").glob("*.py"))
    assert len(files) > 5
    for file in files:
        assert not re.search(
            r"^\s*(from|import) (torch|numpy|diffusers)", file.read_text(encoding="utf-8"), re.MULTILINE
        )
