"""Safe guidance as methods of a pipeline."""

from __future__ import annotations

from . import apply, fit

__all__ = ["SafeGuidanceMixin"]


class SafeGuidanceMixin:
    """Safe guidance as methods of a pipeline: put it before any diffusers pipeline class of a supported family.

    A method is the function of the same name.

    >>> from diffusers import StableDiffusionPipeline
    >>> class Guided(SafeGuidanceMixin, StableDiffusionPipeline): ...
    >>> guided = Guided(**pipe.components, requires_safety_checker=False)
    >>> with guided.apply_safe_guidance(SafeGuidanceConfig("hazard")):
    ...     images = guided("a star", num_inference_steps=2).images
    """

    apply_safe_guidance = apply.apply_safe_guidance
    fit_detectors = fit.fit_detectors
    remove_safe_guidance = apply.remove_safe_guidance
