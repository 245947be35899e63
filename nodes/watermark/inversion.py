"""From a picture back to the noise it was drawn from, with a ComfyUI model: the sampler's path in reverse.

In ComfyUI's latents x = image + sigma noise, with the model's noise e (converted from v):

    x_next = x + (sigma_next - sigma) e

and for flow models, x = (1 - sigma) image + sigma noise, with their velocity in place of e. Both are Euler's steps
towards the noise. The prompt is unknown to a detector: the conditioning is that of the empty prompt, without guidance.

Where noise was added to another picture (a sampler's denoise below 1) the path is the same, all the way: on the canvas
it finds .76 of the signs at denoise .3 and .78 at .5 (5 steps), paths that end at the sampler's level no more.
"""

from __future__ import annotations

from dataclasses import replace

import comfy.model_base
import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import torch
from einops import rearrange
from torch import Tensor

from ...methods.errors import WatermarkError
from ...methods.watermark.config import DetectionConfig
from ...methods.watermark.detection import detect_in
from ...methods.watermark.keyring import Keyring
from ...methods.watermark.ladder import FIRST, inversion_times
from ..sockets import Detection, digest
from .noise import unsigned

NATIVE = "semiperm_native"  # attachment of models that say themselves how large they draw
AIDS = "semiperm_aids"  # and of those that bring what helps to read their marks: fields of `DetectionConfig`
_SIDES = {768: 512, 1024: 512}  # of UNets by the width of their text: SD1.x and SD2
_SIDE_OF_V = 768  # SD2's models that predict v
_LARGE = (comfy.model_base.SDXL, comfy.model_base.SDXLRefiner, comfy.model_base.SD3, comfy.model_base.Flux)


def native_side(model) -> int | None:
    """Side of the square that this model draws, in pixels; None where nothing is known.

    ComfyUI keeps no size with a model: these are the sizes that the families were trained at.
    """
    if side := model.get_attachment(NATIVE):
        return side
    if isinstance(model.model, _LARGE):
        return 1024
    config = getattr(model.model, "model_config", None)
    width = getattr(config, "unet_config", {}).get("context_dim")
    if width == 1024 and model.model.model_type == comfy.model_base.ModelType.V_PREDICTION:
        return _SIDE_OF_V
    return _SIDES.get(width) if type(model.model) is comfy.model_base.BaseModel else None


class ComfyInverter:
    """An `Inverter` (methods.watermark.search) over a ComfyUI model.

    Args:
        model: ModelPatcher of an SD1.x, SD2, SDXL, SD3 or Flux model, or of another picture model that predicts noise,
            v or a flow's velocity.
        vae: encodes the pictures.
        conditioning: CONDITIONING of the empty prompt; None: `clip` encodes it.
        clip: not needed with conditioning.

    Raises:
        WatermarkError: a model of another kind, a video model, or neither clip nor conditioning.
    """

    def __init__(self, model, vae, conditioning=None, clip=None):
        if clip is None and conditioning is None:
            raise WatermarkError("neither clip nor conditioning is connected; the detector needs the empty prompt")
        if conditioning is None:
            conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(""))
        self.model, self.vae, self.conditioning = unsigned(model), vae, conditioning
        self.sampling = model.get_model_object("model_sampling")
        self.flow = isinstance(self.sampling, comfy.model_sampling.CONST)
        known = (comfy.model_sampling.CONST, comfy.model_sampling.EPS)
        if not isinstance(self.sampling, known) or isinstance(self.sampling, comfy.model_sampling.X0):
            raise WatermarkError(
                f"{type(model.model).__name__} does not predict noise, v or a flow's velocity; expected a model of the"
                " SD1.x, SD2, SDXL, SD3 or Flux family"
            )
        if getattr(model.get_model_object("latent_format"), "latent_dimensions", 2) != 2:
            raise WatermarkError(
                f"{type(model.model).__name__} draws videos; this node reads pictures: in Python use"
                " semiperm.detect_watermark"
            )
        self.multiple = int(vae.spacial_compression_encode())
        self.native = native_side(model)
        self.aids = model.get_attachment(AIDS) or {}

    def encode(self, pixels: list[Tensor]) -> Tensor:
        """Pictures (3, H, W) in 0..1 of one size -> (B, C, h, w), scaled and shifted as the denoiser expects."""
        latents = self.vae.encode(rearrange(pixels, "b c h w -> b h w c"))
        channels = self.model.get_model_object("latent_format").latent_channels
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise WatermarkError(
                f"the VAE encodes to {tuple(latents.shape)}, the model denoises {channels} channels; connect the VAE"
                " of the model"
            )
        return self.model.model.process_latent_in(latents).float().cpu()

    def invert(self, latents: Tensor, steps: int) -> Tensor:
        """Estimate the noise with `steps` evaluations of the denoiser; 0 gives the latents back."""
        if not steps:
            return latents
        reverse = _Reverse(self, steps)
        guider = comfy.samplers.CFGGuider(self.model)
        guider.set_conds(self.conditioning, self.conditioning)  # cfg is 1: the second one is never evaluated
        # The guider moves the model to its device, prepares the conditioning and the hooks, and calls `reverse`.
        guider.sample(latents, torch.zeros_like(latents), reverse, reverse.levels, disable_pbar=True, seed=0)
        return reverse.noise.float().cpu()

    def level(self, share: float) -> float:
        """The sigma at a share of the schedule: 0 is the picture, 1 the noise."""
        if share <= 0:
            return 0.0
        if self.flow:
            return min(share, 1.0)
        return float(self.sampling.sigma(torch.tensor(share * (len(self.sampling.sigmas) - 1))))


class _Reverse(comfy.samplers.Sampler):
    """ComfyUI's SAMPLER, from the picture towards the noise; `noise` is what it found."""

    def __init__(self, inverter: ComfyInverter, steps: int):
        self.inverter = inverter
        shares = inversion_times(steps)
        if inverter.flow:
            shares[-1] = 1.0
        self.asked = [inverter.level(max(share, FIRST)) for share in shares[:-1]]
        self.levels = torch.tensor([inverter.level(share) for share in shares])

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
        x, ones = noise, noise.new_ones(len(noise))
        for asked, sigma, then in zip(self.asked, self.levels[:-1].tolist(), self.levels[1:].tolist(), strict=True):
            comfy.model_management.throw_exception_if_processing_interrupted()
            # The model divides by sqrt(1 + sigma^2); the denoiser shall see x as it is at its own level.
            told = x if self.inverter.flow else x * ((1 + asked**2) / (1 + sigma**2)) ** 0.5
            slope = (told - model_wrap(told, asked * ones, **extra_args)) / asked
            x = x + (then - sigma) * slope
        self.noise = x if self.inverter.flow else x / (1 + self.levels[-1].item() ** 2) ** 0.5
        return noise


def signed_size(width: int, height: int) -> tuple[int, int] | None:
    """The size of `DetectionConfig` from a node's two numbers, of which 0 is the picture's own.

    Raises:
        WatermarkError: one side without the other.
    """
    if bool(width) != bool(height):
        raise WatermarkError(f"the size that was drawn is {width} x {height}; expected both sides, or 0 and 0")
    return (height, width) if width else None


def detect_pictures(
    images: Tensor, ring: Keyring, inverter: ComfyInverter, config: DetectionConfig, mask: Tensor | None = None
) -> Detection:
    """`detect_in` with a ComfyUI model, and with what the model brings to read its marks (Load Canvas attaches it).

    Args:
        images: (B, H, W, C), ComfyUI's IMAGE. ring: the keys to try.
        mask: (1, H, W), white where the noise was signed.

    Raises:
        WatermarkError: several masks, or what `detect_in` refuses.
    """
    if mask is not None:
        if len(mask) > 1:
            raise WatermarkError(f"{len(mask)} masks were given; expected one for all pictures")
        mask = torch.nn.functional.interpolate(mask[None].float(), size=images.shape[1:3])[0, 0] > 0.5
    pixels = rearrange(images[..., :3], "b h w c -> b c h w").float().clamp(0, 1)
    config = replace(config, **inverter.aids)
    return Detection(detect_in(list(pixels), inverter, ring, config, mask=mask), digest(images))
