"""Membranes trained in ComfyUI's own Python: by the same core as on diffusers, to the same membranes."""

import json

import pytest
import torch
from comfy_server import in_comfyui

pytestmark = pytest.mark.comfy
PRESERVE = ["a flat star", "a striped heart on sand", "a sketch of a moon", "a dotted tree", "a ghost in fog"]
SETTINGS = dict(
    steps=4, learning_rate=0.01, warmup=1, batch_size=2, anchors=1, sampling_steps=4, validate_every=2,
    checkpoint_every=2, height=128, width=128,
)  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What check_training.py did, with the membranes that it wrote."""
    from semiperm import load_membranes

    folder = tmp_path_factory.mktemp("comfy")
    (folder / "settings.json").write_text(json.dumps(SETTINGS))
    (folder / "user").mkdir()
    target = folder / "trained.safetensors"
    figures = in_comfyui("check_training.py", folder / "settings.json", target, folder / "user")
    return figures | {"membrane": load_membranes(target)[0]}


def test_trained_as_on_diffusers(found):
    from semiperm import TrainingConfig, train_membranes
    from semiperm.canvas import load_pipeline

    config, ours = TrainingConfig(**SETTINGS | {"steps": 2, "validate_every": 0}), found["membrane"]
    (theirs,) = train_membranes(load_pipeline(), "robot|android", "tree", PRESERVE, config=config)
    assert ours.modules.keys() == theirs.modules.keys() and ours.base_model == theirs.base_model
    assert (ours.method, ours.phrases, ours.surrogate) == (theirs.method, theirs.phrases, theirs.surrogate)
    pairs = [(m.modules[key] for key in sorted(m.modules)) for m in (ours, theirs)]
    edits = [torch.cat([(p.up.flatten(1) @ p.down.flatten(1)).flatten() for p in own]) for own in pairs]
    # Adam makes a step of either sign out of a gradient that is nearly 0: a few numbers differ by rounding alone
    assert (edits[0] - edits[1]).norm() < 0.05 * edits[1].norm()


def test_previews_and_a_picture_of_its_course(found):
    assert [(value, total, kind) for value, total, kind, _ in found["previews"]] == [
        (1, 4, "JPEG"), (2, 4, "JPEG"), (4, 4, "JPEG")]  # fmt: skip
    assert all(size == [256, 128] for *_, size in found["previews"]), "untouched beside erased"
    assert found["course"][0] == 1 and found["course"][3] == 3 and found["course"][1] > 200
    assert found["kept"] == []


def test_the_model_is_left_as_it_was(found):
    assert found["untouched"] == found["after cancel"] == 0.0 < 1e-3 < found["effect"]


def test_cancelled_and_queued_again(found):
    """Whole files alone stay, and what comes of them are the bits of a run that was not cancelled."""
    assert [name.rpartition("/")[2] for name in found["cancelled"]] == ["checkpoint.safetensors", "log.jsonl"]
    assert found["folder"] == "__semiperm/training" and found["cancelled"][0].startswith(found["folder"])
    assert found["resumed"] == [True, [4]], "steps 3 and 4 alone"
    assert found["finished"] == [True, []]


def test_every_family_trains_the_layers_of_the_diffusers_face(found):
    import tiny_models
    from semiperm.pipelines.training.layers import trained_layers

    for family, keys in found["layers"].items():
        assert keys and not any("norm" in key for key in keys)
        theirs = {_kind(key) for key in trained_layers(tiny_models.build(family), "all")}
        assert {_kind(key) for key in keys} == theirs, family


def _kind(key: str) -> str:
    """Without the numbers of blocks, of which the two small models have different ones."""
    import re

    return re.sub(r"(down|up)_blocks_\d+|mid_block", "block", re.sub(r"(?<=s_)\d+", "n", key)).replace(
        "block_n", "block"
    )


def test_other_objectives_and_errors(found):
    assert found["hard"] == "latent_anchoring" and found["way"] == "latent_anchoring/trajectory"
    empty, at_work, size, wan = found["errors"]
    assert "write what to erase" in empty and "membranes are at work" in at_work
    assert "multiples of 8" in size and "no known projections" in wan
