"""Membranes carried over to a fine-tuned copy: the copy learns the other style, and what is lost is counted."""

import dataclasses

import pytest
import tiny_models
import torch
from semiperm.benchmarks.membranes import transfer
from semiperm.benchmarks.membranes.transfer import TransferConfig, compared, fine_tune, run, shifted
from semiperm.canvas.editions import world_of
from semiperm.canvas.world import Asking, Shown, Sight
from semiperm.methods.errors import MembraneError
from semiperm.methods.membranes.closed_form import closed_form_membrane
from semiperm.pipelines.family import denoiser_of
from semiperm.pipelines.text import text_projections
from semiperm.pipelines.weights import weights_of

SIZE = tiny_models.SIZE


class SmallWorld:
    """The first world's scenes at the size of a tiny model."""

    def __init__(self):
        self.world = world_of("canvas")
        self.name, self.askings = "tiny", {"withheld": Asking("name", "reserved")}

    def __getattr__(self, name):
        return getattr(self.world, name)

    def draw(self, scene):
        return self.world.draw(scene).resize((SIZE, SIZE))

    def files(self):
        return []

    def judges(self):
        """Sees a robot in every picture."""

        def judge(images):
            seen = [Shown(("robot",), "flat") for _ in images]
            return Sight(seen, torch.zeros(len(seen), 1))

        return {"judge": judge}


def built(family="sd15"):
    return tiny_models.build(family)


def edit_of(pipe):
    tokens, _ = (weights_of(pipe, group) for group in text_projections(pipe))
    width = next(iter(tokens.values())).shape[1]
    generator = torch.Generator().manual_seed(0)
    edit = [torch.randn(*s, generator=generator).double() * 0.05 for s in ((width, 1), (1, width))]
    return closed_form_membrane(tokens, edit, "robot", phrases=("robot",), surrogate="")


QUICK = TransferConfig(steps=6, learning_rate=2e-3, batch_size=4, pictures=8, each=1)


def test_shifts_change_colours_or_light_alone():
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    colours, texture = (shifted(pixels, shift, 1.0) for shift in transfer.SHIFTS)
    torch.testing.assert_close(colours[:, 1], pixels[:, 0])
    torch.testing.assert_close(texture[..., :4, :4], pixels[..., :4, :4])
    torch.testing.assert_close(texture[..., :4, 4:], pixels[..., :4, 4:] / 2)
    half = shifted(pixels, "colours", 0.5)
    torch.testing.assert_close(half, (pixels + colours) / 2)
    for wrong in ({"shift": "sound"}, {"strength": 0.0}, {"steps": 0}):
        with pytest.raises(MembraneError, match="expected"):
            TransferConfig(**wrong)


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_the_copy_learns_and_the_original_stays(family, tmp_path):
    pipe, world = built(family), SmallWorld()
    denoiser, _ = denoiser_of(pipe)
    before = {name: t.clone() for name, t in denoiser.state_dict().items()}
    whole = fine_tune(pipe, world, QUICK, tmp_path / "whole")
    assert all(torch.equal(t, before[name]) for name, t in denoiser.state_dict().items())
    assert any((t - before[name]).abs().max() > 1e-3 for name, t in whole.items())

    class Killed(Exception):
        pass

    steps = []

    def kill(count):
        steps.append(count)
        if len(steps) == 6:
            raise Killed

    with pytest.raises(Killed):
        fine_tune(pipe, world, QUICK, tmp_path / "killed", kill)  # after the last checkpoint
    again = fine_tune(pipe, world, QUICK, tmp_path / "killed", pytest.fail)  # nothing is left to train
    assert all(torch.equal(t, whole[name]) for name, t in again.items())
    assert all(torch.equal(t, before[name]) for name, t in denoiser.state_dict().items())


def test_both_models_are_measured_and_a_second_run_draws_nothing(tmp_path, monkeypatch):
    pipe, world = built(), SmallWorld()
    made = {"robot": [edit_of(pipe)]}
    call = {"num_inference_steps": 1, "height": SIZE, "width": SIZE}
    drawn = []
    result = run(pipe, world, made, QUICK, tmp_path, drawn.append, **call)
    (row,) = result["rows"]
    assert row["concept"] == "robot" and row["ua_original"][0] == row["ua_copy"][0] == 0.0 and row["ua_lost"] == 0.0
    assert result["shift"] == "colours" and result["world"] == "tiny" and sum(drawn) > QUICK.steps
    monkeypatch.setattr(type(pipe), "__call__", lambda *args, **kwargs: pytest.fail("a picture was drawn again"))
    assert run(pipe, world, made, QUICK, tmp_path, **call)["rows"] == result["rows"]
    with pytest.raises(MembraneError, match="no membranes"):
        run(pipe, world, {}, QUICK)
    other = dataclasses.replace(QUICK, shift="texture")
    with pytest.raises(pytest.fail.Exception, match="drawn again"):
        run(pipe, world, made, other, tmp_path, **call)


def test_points_lost_are_differences():
    def rows(ua, ira_drop, bare):
        line = {"concept": "robot", "judge": "j", "ira": [0.9, 0.8, 1.0], "n": 4}
        return [
            line | {"method": "untouched", "ua": [bare, 0.0, 1.0]},
            line | {"method": "membrane", "ua": [ua, 0.0, 1.0], "ira_drop": ira_drop},
        ]

    (row,) = compared({"original": rows(0.95, 0.01, 0.0), "copy": rows(0.9, 0.03, 0.1)})
    assert row["ua_lost"] == pytest.approx(0.05) and row["kept_lost"] == pytest.approx(0.02)
    assert row["untouched_ua_copy"][0] == 0.1
