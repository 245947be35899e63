"""How often a step makes the host wait, on the path for GPUs: in an active step not more often than in another."""

import pytest
import torch
from semiperm.kernels import token_match_merge as kernel
from semiperm.methods.token_merging.config import NegativeTokenMergingConfig
from semiperm.pipelines.token_merging.apply import apply_negative_token_merging
from tiny_models import build, call
from torch.utils._python_dispatch import TorchDispatchMode

PICTURE = torch.rand(3, 24, 20, generator=torch.Generator().manual_seed(3))
# a number, a comparison or a list of places that the host reads; and numbers from a Python list, which it sends
WAITS = ("_local_scalar_dense", "equal.default", "nonzero", "lift_fresh", "masked_select", "unique")


class Waits(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        boolean = name.startswith("index") and any(
            t is not None and t.dtype is torch.bool for part in args if isinstance(part, (list, tuple)) for t in part
        )
        self.count += boolean or name.startswith(WAITS)
        return function(*args, **kwargs or {})


def waits(pipe) -> list[int]:
    """In each step of a run, by the calls of the scheduler."""
    step, counts, seen = pipe.scheduler.step, [], 0

    def counted(*args, **kwargs):
        nonlocal seen
        counts.append(mode.count - seen)
        seen = mode.count
        return step(*args, **kwargs)

    pipe.scheduler.step = counted
    try:
        with Waits() as mode:
            call(pipe, ["a photo of a robot"] * 2, negative_prompt=["", ""], steps=6)
    finally:
        del pipe.scheduler.step
    return counts


@pytest.mark.parametrize("mode", ["reference", "diversity"])
@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_an_active_step_waits_no_more_often_than_another(monkeypatch, family, mode):
    monkeypatch.setenv("SEMIPERM_KERNELS", "reference")
    monkeypatch.setattr(kernel, "_on_gpu", lambda x: True)
    pipe = build(family)
    bare = waits(pipe)
    given = {"reference": [PICTURE, 1 - PICTURE], "mask": torch.ones(24, 20)} if mode == "reference" else {}
    config = NegativeTokenMergingConfig(**given, threshold=-1.0, blocks=("",), end=0.6)
    with apply_negative_token_merging(pipe, config) as handle:
        waits(pipe)  # the reference is encoded, masks and rows are made
        mine = waits(pipe)
    active = [step["active"] for step in handle.report()["steps"]]
    assert len(mine) == len(bare) == len(active) and active[1] and not active[-1]
    beyond = [more - less for more, less in zip(mine, bare, strict=True)]
    assert len(set(beyond[1:])) == 1, f"{beyond}: the timestep alone, in every step"
