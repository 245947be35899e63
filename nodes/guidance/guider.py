"""A guider for SamplerCustomAdvanced: prompt, negative prompt and categories in one batch, others' hooks run again."""

from __future__ import annotations

import comfy.samplers

from ...methods.errors import GuidanceError
from .patch import ATTACHMENT

__all__ = ["SafeGuider"]


class SafeGuider(comfy.samplers.CFGGuider):
    """CFGGuider on a model of `patch.guide_model`, whose guidance must be there.

    The batch, the categories and what is done with them are the model's; this class says so where a model has none, and
    keeps cfg 1 from dropping the negative prompt.
    """

    def __init__(self, model):
        if not model.get_attachment(ATTACHMENT):
            raise GuidanceError(
                "the model carries no safe guidance (or its strength is 0); expected one of Safe Guidance"
            )
        super().__init__(model)

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        """One calc_cond_batch of prompt and negative prompt, to which the model adds the categories."""
        options = model_options or {}
        positive, negative = self.conds.get("positive"), self.conds.get("negative")
        conds = [positive, negative]
        found = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, options)
        for hook in options.get("sampler_pre_cfg_function", []):
            found = hook(
                {"conds": conds, "conds_out": found, "cond_scale": self.cfg, "timestep": timestep, "input": x,
                 "sigma": timestep, "model": self.inner_model, "model_options": options}
            )  # fmt: skip
        return comfy.samplers.cfg_function(
            self.inner_model, found[0], found[1], self.cfg, x, timestep,
            model_options=options, cond=positive, uncond=negative,
        )  # fmt: skip
