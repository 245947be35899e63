"""The mark in the noise that img2img and inpainting add to a picture, in unmodified diffusers pipelines.

noise = sign_noise(img2img, key, height=512, width=512)
with replace_noise(img2img, noise):
    picture = img2img("a fox", image=photo, strength=0.6).images[0]
result = detect_watermark(img2img, picture, keyring)[0]  # after inpainting with mask=mask: the rest carries no mark

The detector is not told the strength: inverting all the way finds the signs as well, to .002, as the best of three
estimates at the strength's own level in as many evaluations (canvas, 16 pictures, 25 steps of DDIM, guidance 4):

    strength                              .12   .2    .3    .5    .7
    5 evaluations, all the way           .704  .747  .773  .798  .800
    5 evaluations, to the level          .695  .736  .761  .793  .799
    2 evaluations, all the way           .703  .743  .764  .793  .798
    2 evaluations, to the level          .699  .738  .763  .795  .796
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import Tensor

from ...methods.errors import WatermarkError
from ..family import Pipeline, family_of
from .samplers import check_eta, check_scheduler

__all__ = ["replace_noise"]


@contextmanager
def replace_noise(pipe: Pipeline, noise: Tensor) -> Iterator[None]:
    """Make one call of an img2img or inpainting pipeline add `noise` instead of noise that it draws.

    Args:
        pipe: img2img or inpainting pipeline of the SD1.x, SD2, SDXL, SD3 or Flux family with a deterministic sampler,
            called with `eta=0` or a small one (`check_eta`). As before afterwards, whatever happens inside.
        noise: (B, C, H, W), for Flux packed (B, N, C) too, from `sign_noise`; B counts every picture of the call.

    Raises:
        ModelError: an unsupported pipeline, or a sampler or an `eta` that loses the mark.
        WatermarkError: another shape than the call's, a second call, `latents=` or `padding_mask_crop` given to
            the call, one that adds no noise, or no call: no picture has the mark.

    >>> from diffusers import AutoPipelineForImage2Image
    >>> img2img = AutoPipelineForImage2Image.from_pipe(pipe)
    >>> with replace_noise(img2img, sign_noise(img2img, key)):
    ...     image = img2img("a star", image=picture, strength=0.7, num_inference_steps=4).images[0]
    """
    check_scheduler(pipe)
    if not isinstance(noise, Tensor) or not noise.is_floating_point() or noise.ndim < 3 or not noise.isfinite().all():
        given = f"shape {tuple(noise.shape)}, {noise.dtype}" if isinstance(noise, Tensor) else type(noise).__name__
        raise WatermarkError(f"the noise is {given}; expected finite floating point noise from sign_noise(pipe, key)")
    call = _Call(pipe, noise)
    with (
        _replaced(pipe, "prepare_latents", call.prepare),
        _replaced(pipe, "prepare_extra_step_kwargs", call.extra),
        _replaced(getattr(pipe, "mask_processor", None), "get_crop_region", call.crop),
    ):
        yield
    if not call.used:
        raise WatermarkError(
            f"the signed noise was not used: no call of this {type(pipe).__name__} added noise to a picture, so what"
            " came out carries no mark; call the pipeline that was given to replace_noise, once, inside the block"
        )


@contextmanager
def _replaced(target: Any, name: str, wrapper: Callable) -> Iterator[None]:
    """Shadow a method of one object for this thread; where there is none, nothing happens."""
    thread = threading.get_ident()
    original = getattr(target, name, None)
    if original is None:
        yield
        return
    had, before = name in vars(target), vars(target).get(name)

    def method(*args, **kwargs):
        if threading.get_ident() != thread:  # another pipeline may share the scheduler
            return original(*args, **kwargs)
        return wrapper(original, *args, **kwargs)

    vars(target)[name] = method
    try:
        yield
    finally:
        vars(target).pop(name, None)
        if had:
            vars(target)[name] = before


class _Call:
    """One call of the pipeline: our noise for its own, wherever that appears."""

    def __init__(self, pipe: Pipeline, noise: Tensor):
        self.pipe, self.noise, self.used = pipe, noise, False

    def prepare(self, original: Callable, *args, **kwargs) -> Any:
        """`prepare_latents` encodes the picture, draws noise and mixes both; inpainting keeps the noise for later."""
        name, scheduler = type(self.pipe).__name__, self.pipe.scheduler
        if self.used:
            raise WatermarkError(
                f"{name} was called a second time with the same signed noise: pictures would share their nonce and"
                " noise; sign noise for every call"
            )
        check_scheduler(self.pipe)
        if inspect.signature(original).bind(*args, **kwargs).arguments.get("latents") is not None:
            raise WatermarkError(f"{name} was given latents= beside the signed noise; leave latents= out")
        mixed: list[Tensor] = []
        mix = _mixer(self, mixed)
        with _replaced(scheduler, "add_noise", mix), _replaced(scheduler, "scale_noise", mix):
            prepared = original(*args, **kwargs)
        parts = [prepared] if isinstance(prepared, Tensor) else list(prepared)
        if mixed:  # inpainting adds the same noise again, step by step, to what it keeps
            parts[1:] = [self.like(part) if self._is(part, mixed[0]) else part for part in parts[1:]]
        else:  # inpainting at strength 1 starts from the noise alone
            scale = getattr(scheduler, "init_noise_sigma", 1.0)
            if len(parts) < 2 or parts[0].shape != parts[1].shape or not parts[0].equal(parts[1] * scale):
                raise WatermarkError(
                    f"{name} added no noise to a picture, so the signed noise has no place in it; a text-to-image"
                    " pipeline takes it as latents=, a refiner that continues (denoising_start) signs in the first"
                )
            ours = self.like(parts[1])
            parts[:2] = ours * scale, ours
        self.used = True
        return parts[0] if isinstance(prepared, Tensor) else type(prepared)(parts)

    def extra(self, original: Callable, *args, **kwargs) -> dict:
        found = original(*args, **kwargs)
        check_eta(found.get("eta"))
        return found

    def crop(self, original: Callable, *args, **kwargs) -> NoReturn:
        raise WatermarkError(
            "padding_mask_crop draws an enlarged crop and shrinks it back into the picture, where no detector finds the"
            " mark; leave it out, or inpaint the crop as a picture of its own"
        )

    def _is(self, part: Any, drawn: Tensor) -> bool:
        if not isinstance(part, Tensor) or part.numel() != drawn.numel():
            return False
        return part is drawn or (part.ndim < drawn.ndim and part.equal(family_of(self.pipe).pack(self.pipe, drawn)))

    def like(self, drawn: Tensor) -> Tensor:
        """Our noise in the shape (packed or not), dtype and place of what the pipeline drew."""
        ours = self.noise
        if ours.ndim == 3 and drawn.ndim == 4:
            scale = self.pipe.vae_scale_factor
            ours = family_of(self.pipe).unpack(self.pipe, ours, drawn.shape[2] * scale, drawn.shape[3] * scale)
        elif ours.ndim == 4 and drawn.ndim == 3:
            ours = family_of(self.pipe).pack(self.pipe, ours)
        if ours.shape != drawn.shape:
            raise WatermarkError(
                f"the signed noise has shape {tuple(self.noise.shape)}, but {type(self.pipe).__name__} adds noise of"
                f" shape {tuple(drawn.shape)}; expected sign_noise(pipe, key, batch, height, width) for every picture"
                " of the call, num_images_per_prompt included, at its size"
            )
        return ours.to(drawn.device, drawn.dtype)


def _mixer(call: _Call, mixed: list[Tensor]) -> Callable:
    def mix(original: Callable, *args, **kwargs) -> Any:
        bound = inspect.signature(original).bind(*args, **kwargs)
        mixed.append(bound.arguments["noise"])
        bound.arguments["noise"] = call.like(mixed[0])
        return original(*bound.args, **bound.kwargs)

    return mix
