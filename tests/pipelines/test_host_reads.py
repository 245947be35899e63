"""How often a method waits for the device that the timesteps are on: once a step, and once a run for the schedule."""

import sys

import pytest
import torch
from contracts.membranes import strong
from contracts.token_merging import away
from semiperm.methods.membranes.config import MembraneConfig
from semiperm.pipelines.membranes.apply import apply_membranes
from tiny_models import build, call

READS = (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.__float__, torch.Tensor.__bool__)


class OnDevice(torch.Tensor):
    """A tensor that counts how often its numbers are fetched."""

    count = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        plain = [arg.as_subclass(torch.Tensor) if isinstance(arg, OnDevice) else arg for arg in args]
        if func in READS:
            # what the CPU's own algorithm reads is no wait; tests/pipelines/token_merging/test_waits.py has the GPU's
            cls.count += not sys._getframe(1).f_code.co_filename.endswith("token_match_cpu.py")
            return func(*plain, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


def reads(pipe, steps: int) -> int:
    set_timesteps = type(pipe.scheduler).set_timesteps

    def on_device(*args, **kwargs):
        set_timesteps(pipe.scheduler, *args, **kwargs)
        pipe.scheduler.timesteps = pipe.scheduler.timesteps.as_subclass(OnDevice)

    pipe.scheduler.set_timesteps = on_device
    OnDevice.count = 0
    try:
        call(pipe, ["a photo of a robot"], negative_prompt=["a cat"], steps=steps)
    finally:
        del pipe.scheduler.set_timesteps
    return OnDevice.count


METHODS = {
    "membranes": lambda pipe: apply_membranes(pipe, strong(pipe), MembraneConfig(gate="always")),
    "membranes-window": lambda pipe: apply_membranes(pipe, strong(pipe), MembraneConfig(gate="always", end=0.5)),
    "merging": lambda pipe: away(pipe, end=0.5),
}


@pytest.mark.parametrize(
    ("method", "each", "once"), [("membranes", 0, 0), ("membranes-window", 1, 1), ("merging", 1, 2)]
)
@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_one_read_a_step(family, method, each, once):
    pipe = build(family)
    bare = [reads(pipe, steps) for steps in (3, 6)]
    with METHODS[method](pipe):
        found = [reads(pipe, steps) for steps in (3, 6)]
    more = [with_method - without for with_method, without in zip(found, bare, strict=True)]
    assert more[1] - more[0] == 3 * each, "a wait for each step"
    assert more[0] == 3 * each + once, "and one for the schedule, one to see whether anything was pushed"
