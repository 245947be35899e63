"""Which samplers keep the noise that carries the mark, decided by measurement and not by their names.

A sampler without noise of its own draws one picture from one noise; that does not mean that the way back finds it. Each
one drew signed pictures of the canvas in 8 and in 25 steps at guidance 4, in 8 also at 7.5, and detection looked at
them as by default (`semiperm bench watermark --part samplers`, benchmarks/results/watermark_samplers.json; a test
compares):

    accepted     every picture was found from that number of steps on
    warned of    fewer steps than that, or some pictures lost at 25
    refused      half of the pictures or more lost in this number of steps; or it was never measured

The canvas's latents have 1,024 signs; larger ones lose less.
"""

from __future__ import annotations

__all__ = ["FEWEST", "LOSES_HALF", "MOST_ETA", "recommended", "refusal", "warning"]

SOME_LOST = 0  # in place of a number of steps: some pictures were lost at 25, too

# Face -> sampler (ComfyUI's function, diffusers' class) -> the fewest of the measured numbers of steps from which no
# picture was lost.
FEWEST: dict[str, dict[str, int]] = {
    "comfyui": {
        "euler": 8,
        "euler_cfg_pp": 25,
        "heun": 8,
        "heunpp2": 8,
        "dpm_2": 8,
        "lms": 25,
        "dpm_fast": 25,
        "dpm_adaptive": 8,
        "dpmpp_2m": 25,
        "dpmpp_2m_cfg_pp": 25,
        "ipndm": 25,
        "ipndm_v": 25,
        "deis": 25,
        "res_multistep": 25,
        "res_multistep_cfg_pp": 25,
        "gradient_estimation": 8,
        "gradient_estimation_cfg_pp": 8,
        "unipc": 8,
        "unipc_bh2": 8,
    },
    "diffusers": {
        "DDIMScheduler": 8,
        "DEISMultistepScheduler": 8,
        "DPMSolverMultistepScheduler": 8,
        "DPMSolverSinglestepScheduler": 8,
        "EulerDiscreteScheduler": 8,
        "HeunDiscreteScheduler": 8,
        "IPNDMScheduler": 25,
        "KDPM2DiscreteScheduler": 8,
        "LMSDiscreteScheduler": 25,
        "PNDMScheduler": 25,
        "UniPCMultistepScheduler": 8,
    },
}
LOSES_HALF: dict[str, set[str]] = {  # of the pictures or more, in 8 steps
    "comfyui": {"dpm_fast", "dpmpp_2m_cfg_pp", "ipndm", "res_multistep"},
    "diffusers": set(),
}
FEW = 8  # the fewest steps that were measured
MOST_ETA = 0.3  # of DDIM: the largest that lost no picture at 25 steps
_CALLED = {"ddim": "euler", "uni_pc": "unipc"}  # ComfyUI's names of samplers -> of the functions that they call
_RECOMMENDED = {  # in the order in which an error names them: the usual ones first
    "comfyui": ("euler", "ddim", "heun", "dpmpp_2m", "uni_pc", "deis"),
    "diffusers": ("DDIM", "EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep", "UniPCMultistep", "DEISMultistep"),
}


def recommended(face: str) -> str:
    """The usual samplers of which no picture was lost at any number of steps, for an error to name."""
    fewest, suffix = FEWEST[face], "Scheduler" if face == "diffusers" else ""
    least = min(steps for steps in fewest.values() if steps != SOME_LOST)
    good = [name for name in _RECOMMENDED[face] if fewest.get(_CALLED.get(name, name + suffix)) == least]
    return ", ".join(good)


def refusal(face: str, name: str, steps: int | None = None) -> str | None:
    """Why this sampler may not draw a signed picture; None where it may.

    Args:
        face: "comfyui" or "diffusers".
        steps: that it will take from noise to picture; None where that is not known.
    """
    if name not in FEWEST[face]:
        return (
            f"{name} is not known to keep the mark: noise added while sampling drowns it in the initial noise, and of"
            " some samplers without such noise the way back does not find it; expected one that was measured to, such"
            f" as {recommended(face)}"
        )
    if steps is not None and steps <= FEW and name in LOSES_HALF[face]:
        return (
            f"{name} lost the mark of half of the pictures or more in {FEW} steps, and this run has {steps}; expected"
            f" {FEWEST[face][name]} steps or more, or one of {recommended(face)}, which lost none in {FEW}"
        )
    return None


def warning(face: str, name: str, steps: int | None = None) -> str | None:
    """What to say before this sampler draws a signed picture; None where no picture was lost.

    Args:
        steps: as for `refusal`; where they are not known, only what is lost at 25 steps is told.
    """
    fewest = FEWEST[face][name]
    if fewest == SOME_LOST:
        return f"{name} lost the mark of some pictures even in 25 steps; {recommended(face)} lost none"
    if steps is not None and steps < FEW:
        return f"{name} was not measured in fewer than {FEW} steps, this run has {steps}: see whether the mark is there"
    if steps is not None and steps < fewest:
        return (
            f"{name} lost the mark of some pictures in {FEW} steps and of none in {fewest}, and this run has {steps};"
            f" take {fewest}, or one of {recommended(face)}, which lost none in {FEW}"
        )
    return None
