"""Which of diffusers' samplers keep the noise that carries the mark."""

from __future__ import annotations

from ...methods.errors import ModelError
from ..family import family_of

__all__ = ["check_scheduler"]

# Samplers without noise of their own, as diffusers configures them. Any other one is refused: to be wrong here would
# lose marks unnoticed.
_DETERMINISTIC = {
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
}


def check_scheduler(pipe) -> None:
    """Refuse a sampler that adds noise on its way: the picture would forget the noise that carries the mark.

    DDIM's `eta` is an argument of the pipeline's call and cannot be seen here: leave it at 0. `replace_noise` sees it.

    Raises:
        ModelError: an ancestral or SDE sampler, or one that is not known to be deterministic.
    """
    scheduler = pipe.scheduler
    names = {c.__name__ for c in type(scheduler).__mro__}
    name, config = type(scheduler).__name__, scheduler.config
    algorithm = getattr(config, "algorithm_type", None) or ""
    if algorithm.startswith("sde"):
        name += f" with algorithm_type={algorithm!r}"
    elif getattr(config, "stochastic_sampling", False):
        name += " with stochastic_sampling=True"
    elif names & _DETERMINISTIC:
        return
    flow = family_of(pipe).flow
    good = "FlowMatchEulerDiscreteScheduler" if flow else "DDIMScheduler"
    raise ModelError(
        f"{name} is not known to be deterministic: noise added while sampling drowns the mark in the initial noise;"
        f" expected a sampler without noise of its own: pipe.scheduler = {good}.from_config(pipe.scheduler.config)"
        f"{'' if flow else ', or Euler, Heun, DPM-Solver++, UniPC, LMS, DEIS'}"
    )
