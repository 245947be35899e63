"""Negative token merging as methods of a pipeline."""

from __future__ import annotations

from . import apply

__all__ = ["TokenMergingMixin"]


class TokenMergingMixin:
    """Pushing away as methods of a pipeline: put it before any diffusers pipeline class of a supported family.

    A method is the function of the same name.

    >>> from diffusers import StableDiffusionPipeline
    >>> class Pushed(TokenMergingMixin, StableDiffusionPipeline): ...
    >>> pushed = Pushed(**pipe.components, requires_safety_checker=False)
    >>> with pushed.apply_negative_token_merging():
    ...     images = pushed("a star", num_images_per_prompt=2, num_inference_steps=2).images
    """

    apply_negative_token_merging = apply.apply_negative_token_merging
    remove_negative_token_merging = apply.remove_negative_token_merging
