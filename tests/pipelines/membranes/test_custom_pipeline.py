"""The ready classes, and diffusers' own door for custom pipelines."""

from pathlib import Path

import pytest
import semiperm.pipelines
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from semiperm.methods.errors import ModelError
from semiperm.methods.membranes.config import MembraneConfig
from semiperm.methods.membranes.file import save_membranes
from semiperm.pipelines.loaders import load_pipeline
from semiperm.pipelines.membranes.pipelines import (
    MembraneFluxPipeline,
    MembraneStableDiffusion3Pipeline,
    MembraneStableDiffusionPipeline,
    MembraneStableDiffusionXLPipeline,
)
from tiny_models import LENGTH, build, call

READY = {
    "sd15": MembraneStableDiffusionPipeline,
    "sd2": MembraneStableDiffusionPipeline,
    "sdxl": MembraneStableDiffusionXLPipeline,
    "sd3": MembraneStableDiffusion3Pipeline,
    "flux": MembraneFluxPipeline,
}
CUSTOM = Path(semiperm.pipelines.__file__).parent / "custom"
ERASE = {
    "surrogate": "cat",
    "templates": ("a photo of {}", "{} in the garden"),
    "preserve": ("a photo of a house", "a dog by the river"),
    "max_sequence_length": LENGTH,
}


@pytest.fixture(scope="module", params=READY)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    build(request.param).save_pretrained(folder)
    return request.param, folder


def images(pipe):
    return call(pipe, ["a photo of a robot"], negative_prompt=[""])


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_three_doors_give_the_same_pipeline(saved, tmp_path):
    family, folder = saved
    plain = quiet(load_pipeline(folder))
    untouched = images(plain)

    ready = quiet(READY[family].from_pretrained(folder))
    assert torch.equal(images(ready), untouched)
    robot = ready.erase_concepts(["robot"], **ERASE)
    assert not ready.membranes and torch.equal(images(ready), untouched)  # computed, not applied
    handle = ready.apply_membranes(robot, MembraneConfig(gate="always"))
    erased = images(ready)
    assert not torch.equal(erased, untouched)
    assert handle.report()["concepts"] == ["robot"] and ready.membranes.concepts == ("robot",)
    assert ready.membrane_handle is handle
    file = save_membranes(ready.membranes, tmp_path / "robot.safetensors")
    ready.remove_membranes()
    assert torch.equal(images(ready), untouched) and not ready.membranes and ready.membrane_handle is None

    custom = quiet(DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(CUSTOM), trust_remote_code=True))
    assert type(custom) is READY[family]
    assert torch.equal(images(custom), untouched)
    custom.apply_membranes(custom.import_membranes(file), MembraneConfig(gate="always"))
    assert torch.equal(images(custom), erased)

    custom.save_pretrained(tmp_path / "again")
    again = quiet(DiffusionPipeline.from_pretrained(tmp_path / "again"))
    assert type(again) is type(plain) and torch.equal(images(again), untouched)


def test_erasing_one_more_keeps_the_first():
    pipe = MembraneStableDiffusionPipeline(**build("sd15").components, requires_safety_checker=False)
    pipe.apply_membranes(pipe.erase_concepts("robot", **ERASE))
    pipe.apply_membranes(pipe.membranes + pipe.erase_concepts("dog", **ERASE))
    assert pipe.membranes.concepts == ("robot", "dog")


def test_loader_says_what_is_wrong(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"\x80")
    save_file({"a.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / "empty").mkdir()
    for name, says in {
        "model.ckpt": "pickle",
        "other.safetensors": "no checkpoint of",
        "empty": "no model_index.json",
        "missing": "no model at",
    }.items():
        with pytest.raises(ModelError, match=says):
            load_pipeline(tmp_path / name)
