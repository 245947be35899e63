"""The window means the same steps in both faces, shift or not: by ComfyUI's own sampling classes, and by their record.

tests/data/windows.json holds what ComfyUI's classes said of these schedules; `SEMIPERM_RECORD=1 pytest -m comfy
tests/pipelines/test_window.py` writes it anew where ComfyUI is at hand.
"""

import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from semiperm.methods.errors import SemipermError
from semiperm.methods.schedule import Window, flow_share
from semiperm.pipelines.family import FAMILIES
from semiperm.pipelines.scheduler import share_of, sigma_of

RECORD = Path(__file__).resolve().parents[1] / "data" / "windows.json"
FAMILY = {family.name: family for family in FAMILIES}
WINDOWS = [[0.0, 0.2], [0.0, 0.5], [0.2, 0.6], [0.5, 1.0], [0.04, 0.08], [0.0, 1.0]]
STEPS = 25
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def schedules() -> dict:
    """name -> (family, scheduler after set_timesteps, image tokens, ComfyUI's class, its shift)."""
    made = {}
    for name, scheduler in {
        "SD1.5, DDIM": DDIMScheduler(**SD, steps_offset=1),
        "SD1.5, Euler": EulerDiscreteScheduler(**SD, timestep_spacing="linspace"),
        "SD1.5, Karras": EulerDiscreteScheduler(**SD, use_karras_sigmas=True),
    }.items():
        scheduler.set_timesteps(STEPS)
        made[name] = "SD1.x or SD2", scheduler, 0, "discrete", None
    for shift in (1.0, 3.0):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(STEPS)
        made[f"SD3, shift {shift:g}"] = "SD3", scheduler, 0, "flow", shift
    for tokens in (1024, 4096):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
        scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / STEPS, STEPS).tolist(), mu=mu)
        made[f"Flux, {tokens} tokens"] = "Flux", scheduler, tokens, "flux", mu
    return made


SCHEDULES = schedules()


def diffusers_side(name: str, dtype=torch.float32) -> tuple[list[float], list[float]]:
    """(shares, sigmas) of each step, from the timesteps that the denoiser is given."""
    family, scheduler, tokens, *_ = SCHEDULES[name]
    family, pipe = FAMILY[family], SimpleNamespace(scheduler=scheduler)
    given = [(t * family.noise_timestep / 1000).to(dtype).reshape(1) for t in scheduler.timesteps]
    return [share_of(pipe.scheduler, family, t, tokens) for t in given], [
        sigma_of(pipe.scheduler, family, t) for t in given
    ]


def active(shares) -> list[list[bool]]:
    return [[bool(Window(*window).contains(share)) for share in shares] for window in WINDOWS]


@pytest.mark.parametrize("name", SCHEDULES)
def test_active_steps_are_those_of_comfyui(name):
    shares, _ = diffusers_side(name)
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))[name]
    # Karras: the timesteps are fractions, between which ComfyUI interpolates log sigma and we alphas_cumprod
    assert shares == pytest.approx(recorded["shares"], abs=1e-3 if "Karras" in name else 2e-5)
    assert active(shares) == recorded["active"]


@pytest.mark.parametrize("name", [name for name in SCHEDULES if not name.startswith("SD1.5")])
def test_half_precision_timesteps_change_no_step(name):
    exact, _ = diffusers_side(name)
    assert active(diffusers_side(name, torch.bfloat16)[0]) == active(exact)


@pytest.mark.comfy
def test_comfyui_agrees_with_the_record(tmp_path):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nodes"))
    from comfy_server import in_comfyui

    cases = []
    for name, (*_, kind, shift) in SCHEDULES.items():
        cases.append({"kind": kind, "shift": shift, "sigmas": diffusers_side(name)[1], "windows": WINDOWS})
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(cases), encoding="utf-8")
    found = dict(zip(SCHEDULES, in_comfyui("check_window.py", file), strict=True))
    if os.environ.get("SEMIPERM_RECORD"):
        kept = {n: {"shares": [round(s, 7) for s in f["shares"]], "active": f["active"]} for n, f in found.items()}
        RECORD.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    for name, one in found.items():
        assert one["active"] == one["core"] == recorded[name]["active"], name


def test_the_example_of_sd3():
    """Shift 3, 25 steps: end=0.2 is five steps of unshifted time (it was eleven by the shifted one)."""
    shares, _ = diffusers_side("SD3, shift 3")
    counts = [sum(steps) for steps in active(shares)]
    assert counts[0] == counts[-1] // 5 and abs(counts[1] - STEPS / 2) <= 1


@pytest.mark.parametrize("edge", [0.0, 0.2, 0.5, 1.0])
def test_two_windows_that_share_an_edge_share_no_step(edge):
    shares = [k / 25 for k in range(26)]
    parts = [Window(*w) for w in ((0.0, edge), (edge, 1.0)) if w[0] < w[1]]
    inside = [[bool(part.contains(share)) for share in shares] for part in parts]
    assert [sum(column) for column in zip(*inside, strict=True)] == [1] * 26


def test_numbers_and_tensors_agree():
    window = Window(0.2, 0.6)
    shares = torch.linspace(0, 1, 51)
    assert window.contains(shares).tolist() == [bool(window.contains(float(share))) for share in shares]
    assert Window().whole and not window.whole


@pytest.mark.parametrize("wrong", [(0.5, 0.5), (0.6, 0.2), (-0.1, 0.5), (0.0, 1.1), (math.nan, 1.0)])
def test_wrong_windows_are_refused(wrong):
    with pytest.raises(SemipermError, match="0 <= start < end <= 1"):
        Window(*wrong)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 6.0])
def test_the_shift_is_undone(shift):
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    sigma = shift * u / (1 + (shift - 1) * u)
    torch.testing.assert_close(flow_share(sigma, shift), 1 - u, atol=1e-12, rtol=0)
