"""The mark as methods of a pipeline."""

from __future__ import annotations

from . import content, detect, noise, sign

__all__ = ["WatermarkMixin"]


class WatermarkMixin:
    """The mark as methods of a pipeline: put it before any diffusers pipeline class of a supported family.

    A method is the function of the same name.

    >>> from diffusers import StableDiffusionPipeline
    >>> class Marked(WatermarkMixin, StableDiffusionPipeline): ...
    >>> marked = Marked(**pipe.components, requires_safety_checker=False)
    >>> image = marked("a star", latents=marked.sign_noise(key), num_inference_steps=2).images[0]
    >>> [result.model_evaluations for result in marked.detect_watermark(image, [key], ladder=(1,))]
    [1]
    """

    sign_noise = sign.sign_noise
    replace_noise = noise.replace_noise
    detect_watermark = detect.detect_watermark
    generate_bound = content.generate_bound
