"""Which of diffusers' samplers keep the noise that carries the mark, as methods/watermark/samplers.py has it."""

from __future__ import annotations

import logging

from ...methods.errors import ModelError
from ...methods.watermark import samplers
from ..family import family_of

__all__ = ["check_eta", "check_scheduler"]

logger = logging.getLogger(__name__)
_FACE = "diffusers"
_SAME_STEPS = {  # as one that was measured; flow models were not
    "DDIMParallelScheduler": "DDIMScheduler",
    "FlowMatchEulerDiscreteScheduler": "EulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler": "HeunDiscreteScheduler",
}


def check_scheduler(pipe, steps: int | None = None) -> None:
    """Refuse a sampler that loses the mark, by noise of its own or as measured; warn of one that may.

    DDIM's `eta` is an argument of the pipeline's call and cannot be seen here: see `check_eta`.

    Args:
        steps: that the call will take; None where they are not known.

    Raises:
        ModelError: an ancestral or SDE sampler, or one that was not measured to keep the mark.
    """
    scheduler = pipe.scheduler
    name, config = type(scheduler).__name__, scheduler.config
    names = [_SAME_STEPS.get(c.__name__, c.__name__) for c in type(scheduler).__mro__]
    known = next((one for one in names if samplers.refusal(_FACE, one) is None), name)
    algorithm = getattr(config, "algorithm_type", None) or ""
    if algorithm.startswith("sde"):
        known = f"{name} with algorithm_type={algorithm!r}"
    elif getattr(config, "stochastic_sampling", False):
        known = f"{name} with stochastic_sampling=True"
    if said := samplers.refusal(_FACE, known, steps):
        good = "FlowMatchEulerDiscreteScheduler" if family_of(pipe).flow else "DDIMScheduler"
        raise ModelError(f"{said}: pipe.scheduler = {good}.from_config(pipe.scheduler.config)")
    if said := samplers.warning(_FACE, known, steps):
        logger.warning("Watermark: %s", said)


def check_eta(eta: float | None) -> None:
    """Refuse DDIM's `eta`, the noise that it adds, where it was measured to lose the mark.

    Raises:
        ModelError: a larger one than the largest that lost no picture.
    """
    if eta and eta > samplers.MOST_ETA:
        raise ModelError(
            f"eta is {eta}: noise added while sampling drowns the mark in the signed noise; expected eta=0"
            + (f", or up to {samplers.MOST_ETA:g}, at which no picture was lost" if samplers.MOST_ETA else "")
        )
