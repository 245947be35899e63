"""The zoo: made for a world in a folder of its own, found by name in Python and on the command line."""

import json

import pytest
from semiperm import MembraneError, apply_membranes, load_membranes, remove_membranes
from semiperm.benchmarks.membranes import zoo as making
from semiperm.canvas.editions import world_of
from semiperm.cli import app, common
from semiperm.methods.membranes import zoo
from semiperm.methods.membranes.visual_fit import VisualConfig
from semiperm.methods.training.config import TrainingConfig
from semiperm.pipelines.membranes.adapters import import_membranes
from typer.testing import CliRunner

TRAINING = (
    '[training]\nsteps = 2\nbatch_size = 1\nanchors = 1\nlayers = "text"\nsampling_steps = 2\nvalidate_every = 1\n'
)


def run(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def made(untrained_canvas, tmp_path):
    """A zoo of one concept, from words and trained, and what the command said."""
    (tmp_path / "run.toml").write_text(TRAINING)
    folder = tmp_path / "zoo"
    command = ("zoo", "make", "--concept", "robot", "--kind", "text", "--kind", "trained", "--each", 1)
    command += ("--config", tmp_path / "run.toml", "--folder", folder, "--work", tmp_path / "work")
    return folder, command, run(*command)


def test_made_listed_and_shown(made, monkeypatch):
    folder, command, said = made
    assert zoo.zoo_names(folder) == ["canvas/robot", "canvas/robot-trained"]
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".safetensors", ".json"}
    assert len(list(folder.rglob("*.safetensors"))) == 2, "what a run goes on from lies elsewhere"
    assert (folder.parent / "work" / "canvas" / "robot-trained" / "checkpoint.safetensors").exists()
    assert "canvas/robot-trained" in said and f"{folder}: 2 membranes of canvas" in said
    for name, method in (("robot", "closed_form"), ("robot-trained", "latent_anchoring")):
        path = zoo.zoo_path(name, folder)
        (membrane,), card = load_membranes(path), zoo.read_card(path)
        assert method in membrane.method and card["method"] == membrane.method
        assert card["base_model"] == membrane.base_model and card["phrases"] == list(membrane.phrases)
        rows = {row["method"]: row for row in card["figures"]}
        assert set(rows) == {"untouched", f"zoo/{card['kind']}"}
        assert all(row["words"] == "withheld" and row["n"] == 1 for row in rows.values())
    listed = run("zoo", "list", "--folder", folder)
    assert "zoo:canvas/robot-trained" in listed.replace("\n", "")
    assert set(json.loads(run("zoo", "list", "--folder", folder, "--json"))) == set(zoo.zoo_names(folder))
    shown = run("zoo", "show", "robot-trained", "--folder", folder)
    assert shown.startswith("# robot\n") and "latent_anchoring" in shown and "| untouched |" in shown

    rows = [
        {"world": world, "concept": concept, "method": method, "ua": [0.75, 0.5, 0.9]}
        for world in ("canvas", "canvas-flow") for concept in ("robot", "ghost")
        for method in ("untouched", "closed_form/auto", "membranes/trained", "esd")
    ]  # fmt: skip
    arena = folder.parent / "arena.json"
    arena.write_text(json.dumps({"rows": rows}))
    assert run("zoo", "arena", arena, "--folder", folder).strip() == "4 rows in 2 of 2 cards"
    assert [row["method"] for row in zoo.read_card(zoo.zoo_path("robot", folder))["arena"]] == [
        "untouched", "closed_form/auto"]  # fmt: skip
    shown = run("zoo", "show", "robot-trained", "--folder", folder)
    assert "## In the arena" in shown and "| membranes/trained | 0.750 (0.500-0.900) |" in shown

    # nothing is made twice; a file that was lost is made again, alone
    before = {file.name: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    (folder / "canvas" / "robot.safetensors").unlink()
    monkeypatch.setattr(making, "evaluate", lambda *args, **kwargs: {"rows": []})
    run(*command)
    after = {file.name: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    assert after["robot-trained.safetensors"] == before["robot-trained.safetensors"]
    assert after["robot.safetensors"] > before["robot.safetensors"]


def test_loaded_by_name(made, untrained_canvas, monkeypatch):
    folder, _, _ = made
    monkeypatch.setattr(zoo, "ZOO", folder)
    (membrane,) = load_membranes("zoo:robot-trained")
    assert membrane.method == "latent_anchoring"
    assert import_membranes(untrained_canvas, "zoo:canvas/robot").concepts == ("robot",)
    path, strength = common.split_strength("zoo:robot:0.5")
    assert path == folder / "canvas" / "robot.safetensors" and strength == 0.5
    assert common.split_strength("zoo:robot-trained") == (folder / "canvas" / "robot-trained.safetensors", 1.0)
    apply_membranes(untrained_canvas, membrane)  # which holds it against this model's weights
    remove_membranes(untrained_canvas)

    for name in ("cat", "../canvas/robot", "canvas/robot.safetensors", ""):
        with pytest.raises(MembraneError, match=r"no membrane zoo:.*canvas/robot"):
            load_membranes(f"zoo:{name}")
    other = folder / "canvas-flow"
    other.mkdir()
    for suffix in (".safetensors", ".json"):
        (other / f"robot{suffix}").write_bytes((folder / "canvas" / f"robot{suffix}").read_bytes())
    with pytest.raises(MembraneError, match="zoo:canvas-flow/robot, zoo:canvas/robot"):
        load_membranes("zoo:robot")
    (other / "robot.safetensors").write_bytes(b"other")
    with pytest.raises(MembraneError, match="not the file that its card is of"):
        load_membranes("zoo:canvas-flow/robot")
    (other / "robot.json").unlink()
    assert load_membranes("zoo:robot").concepts == ("robot",), "a file without a card is none of the zoo"


def test_an_empty_zoo_says_how_it_is_made(tmp_path, monkeypatch):
    assert "semiperm zoo make" in run("zoo", "list", "--folder", tmp_path)
    monkeypatch.setattr(zoo, "ZOO", tmp_path)
    with pytest.raises(MembraneError, match="none yet: `semiperm zoo make`"):
        load_membranes("zoo:robot")
    with pytest.raises(MembraneError, match="kinds sound"):
        making.ZooConfig(kinds=("sound",))
    assert zoo.zoo_name("Mickey the mouse", "image") == "mickey-the-mouse-image"


def test_the_image_side_is_one_of_the_kinds(untrained_canvas, tmp_path):
    few = VisualConfig(samples=4, background=4, steps=2, false_open=0.5, validation=1, tokens=8)
    config = making.ZooConfig(("robot",), ("image",), 0, TrainingConfig(), few)
    world = world_of("canvas")
    (path,) = making.make_zoo(untrained_canvas, world, tmp_path, config)
    (membrane,), card = load_membranes(path), zoo.read_card(path)
    assert path.name == "robot-image.safetensors" and membrane.visual is not None
    assert card["image_side"]["false_open"] == 0.5 and card["figures"] == [] and card["modules"] > 0
    assert zoo.card_text(card).startswith("# robot\n")
