"""A ComfyUI MODEL and CLIP as what a training run asks of a model: `methods.training.model.TrainedModel`.

Nodes run in torch's inference mode, whose tensors keep no gradient, and models that were loaded there have weights of
that kind. Training leaves the mode, and gives the denoiser's weights new names for the same memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import torch
from einops import rearrange
from torch import Tensor, nn

from ...methods.errors import MembraneError
from ...methods.text_space import TextFeatures
from ...methods.training.model import Embedding
from ..membranes.concept_text import encoder_of

logger = logging.getLogger(__name__)

__all__ = ["PIXELS", "ComfyModel"]

PIXELS = 8  # of a picture in one latent cell, as ComfyUI's Empty Latent Image has it


class ComfyModel:
    """A loaded model, called by hand: any rows, each with its own text and its own noise level.

    Noise levels are ComfyUI's sigmas: of noise beside an image of its own size, or for flow models the share of noise.

    Args:
        model: ModelPatcher, our hooks on it.
        width, height: of the pictures, in pixels.

    Raises:
        MembraneError: a model that predicts something else than noise, v or flow; a size that it cannot draw.
    """

    def __init__(self, model, clip, width: int, height: int):
        self.model, self.sampling = model, model.get_model_object("model_sampling")
        self.kind = _kind(self.sampling)
        if width < PIXELS or height < PIXELS or width % PIXELS or height % PIXELS:
            raise MembraneError(f"pictures of {width} x {height} pixels; expected multiples of {PIXELS}")
        self.shape = (model.model.latent_format.latent_channels, height // PIXELS, width // PIXELS)
        self._encoder: Callable = encoder_of(model, clip)[0]
        self._length: int | None = None

    @property
    def device(self) -> torch.device:
        return self.model.load_device

    def load(self) -> None:
        """Put the denoiser where it works, again after other models had the place, and its weights into autograd."""
        with torch.inference_mode():  # ComfyUI writes into weights that it made there
            comfy.model_management.load_models_gpu([self.model], force_full_load=True)
        _leave_inference_mode(self.model.model.diffusion_model)

    def texts(self, captions: Sequence[str]) -> TextFeatures:
        """As the denoiser is given them."""
        with torch.inference_mode():  # as `load`
            made = self._encoder(captions)
        return replace(made, hidden=made.hidden.clone(), pooled=None if made.pooled is None else made.pooled.clone())

    def encode(self, caption: str) -> Embedding:
        if self._length is None:
            self._length = self.texts([""]).hidden.shape[1]  # a longer text of T5's would not stack with others
        made = self.texts([caption])
        return made.hidden[0, : self._length], None if made.pooled is None else made.pooled[0]

    def times(self, steps: int, latents: Tensor) -> Tensor:
        share = torch.linspace(1.0, 0.0, steps + 1)[:-1]
        if self.kind == "flow":
            sigmas = [float(self.sampling.percent_to_sigma(1.0 - float(s))) for s in share]
        else:
            timesteps = (share * len(self.sampling.sigmas) - 1).round()
            sigmas = self.sampling.sigma(timesteps).tolist()
        return torch.tensor([*sigmas, 0.0])

    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        image = 1 - times if self.kind == "flow" else (1 + times.square()).rsqrt()
        noise = times if self.kind == "flow" else times * image
        return rearrange(image, "b -> b 1 1 1"), rearrange(noise, "b -> b 1 1 1")

    def __call__(self, latents: Tensor, times: Tensor, hidden: Tensor, pooled: Tensor | None) -> Tensor:
        times = times.to(latents.device)
        image, noise = self.levels(times)
        given = latents if self.kind == "flow" else latents / image
        told: dict = {"cross_attn": hidden.to(self.device), "model_conds": {}}
        told |= {} if pooled is None else {"pooled_output": pooled.to(self.device)}
        conds = comfy.samplers.encode_model_conds(
            self.model.model.extra_conds, [told], given, self.device, "positive", latent_image=torch.zeros_like(given)
        )[0]["model_conds"]
        rows = len(latents)
        inputs = {name: c.process_cond(batch_size=rows, device=self.device, area=None) for name, c in conds.items()}
        inputs = {name: getattr(c, "cond", c) for name, c in inputs.items()}
        options = {"sigmas": times, "cond_or_uncond": [0]}
        options = {**self.model.model_options.get("transformer_options", {}), **options}
        clean = self.model.model.apply_model(given, times, **inputs, transformer_options=options).float()
        if self.kind == "v_prediction":
            return (image * latents - clean) / noise
        return (given - clean) / rearrange(times, "b -> b 1 1 1")


def _kind(sampling) -> str:
    known = comfy.model_sampling
    if isinstance(sampling, known.CONST):
        return "flow"
    if isinstance(sampling, known.EPS) and isinstance(sampling, known.ModelSamplingDiscrete):
        if not isinstance(sampling, (known.EDM, known.X0)):
            return "v_prediction" if isinstance(sampling, known.V_PREDICTION) else "epsilon"
    raise MembraneError(
        f"the model samples as {type(sampling).__bases__[-1].__name__}; expected one that predicts noise, v or flow, as"
        " SD1.x, SD2, SDXL, SD3 and Flux do"
    )


def _leave_inference_mode(module: nn.Module) -> None:
    """Put others over the same memory in the place of inference mode's tensors; autograd takes those."""
    for layer in module.modules():
        for name, own in list(layer._parameters.items()):
            if own is not None and own.is_inference() and (alias := _alias(own)) is not None:
                layer._parameters[name] = nn.Parameter(alias, requires_grad=False)
        for name, own in list(layer._buffers.items()):
            if own is not None and own.is_inference() and (alias := _alias(own)) is not None:
                layer._buffers[name] = alias
    module.requires_grad_(False)


def _alias(tensor: Tensor) -> Tensor | None:
    try:
        return torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(tensor.detach()))
    except (BufferError, RuntimeError, TypeError) as error:
        # 8-bit floats: ComfyUI casts them in each call, and what it makes then is of autograd's kind
        logger.debug("no alias of %s: %s", tensor.dtype, error)
        return None
