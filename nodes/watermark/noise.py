"""The mark in ComfyUI's noise: as a NOISE, and around a whole sampling run of a MODEL.

Both keep the magnitudes of the noise that ComfyUI draws from the seed and replace its signs. Nonce and unique id come
from that noise too: the same seed gives the same marked noise, whichever node signs, and another seed another nonce.
"""

from __future__ import annotations

import hashlib
import logging

import comfy.patcher_extension
import comfy.sample
import torch
from torch import Tensor

from ...methods.errors import ModelError, WatermarkError
from ...methods.watermark import samplers
from ...methods.watermark.keys import WatermarkKey
from ...methods.watermark.mark import KeyedMark, Payload, capacity
from ..progress import Progress
from .content import sample_bound

logger = logging.getLogger(__name__)

WRAPPER = "semiperm_watermark"
_OUTER = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
_FACE = "comfyui"
_WITH_ETA = {  # as much noise as `eta` says, 1 where it is left out
    *("euler_ancestral", "euler_ancestral_cfg_pp", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_2m_sde"),
    *("dpmpp_2m_sde_gpu", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "res_multistep_ancestral"),
}
_QUIET = {  # what is left of these without noise; the others are refused
    "euler_ancestral": "euler",
    "dpm_2_ancestral": "dpm_2",
    "res_multistep_ancestral": "res_multistep",
}


def check_sampler(sampler, steps: int | None = None) -> None:
    """Refuse a sampler that loses the mark, by noise of its own or as measured; warn of one that may.

    Args:
        sampler: ComfyUI's SAMPLER object.
        steps: from noise to picture; None where they are not known.

    Raises:
        ModelError: an ancestral or SDE sampler, or one that was not measured to keep the mark.
    """
    options = getattr(sampler, "extra_options", None) or {}
    function = getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", type(sampler).__name__)
    name = name.removeprefix("sample_").removesuffix("_function")
    noisy = options.get("eta", 1.0 if name in _WITH_ETA else 0.0) > 0 or options.get("s_churn", 0.0) > 0
    quiet = _QUIET.get(name, name) if not noisy else f"{name} with these settings"  # an ancestral one without its noise
    if said := samplers.refusal(_FACE, quiet, steps):
        raise ModelError(f"the sampler {said} (s_churn 0, eta 0)")
    if said := samplers.warning(_FACE, quiet, steps):
        logger.warning("Watermark: the sampler %s", said)


def whole_steps(sigmas: Tensor, sampling) -> int:
    """How many steps of this size lead from pure noise to the picture: more than are taken where denoise is below 1."""
    left = 1 - Progress(sampling).share(float(sigmas[0]))
    return round((len(sigmas) - 1) / max(left, 1e-3))


def signed_like(noise: Tensor, key: WatermarkKey, *, time: int = 0, scope: str = "", bound: bool = False) -> Tensor:
    """Noise with the same magnitudes and this key's signs: under a random key each image is exactly N(0, I).

    Args:
        noise: (B, C, H, W) or (B, C, F, H, W), standard normal. An image whose noise is zero (a sampler that goes on
            where another stopped) stays as it is.
        key: signs; it needs its MAC secret.
        time: seconds since 1970, for the payload where the size carries it; 0 for none.
        scope: separates marks of one key further.
        bound: say that content is bound, which `content.sample_bound` then does.

    Raises:
        WatermarkError: a latent too small for a mark, a key that can only detect, or noise that is no plain tensor.
    """
    if not isinstance(noise, Tensor) or noise.is_nested or noise.ndim not in (4, 5):
        given = f"shape {tuple(noise.shape)}" if isinstance(noise, Tensor) else type(noise).__name__
        raise WatermarkError(f"noise of {given} cannot be signed; expected (B, C, H, W) or (B, C, F, H, W)")
    mark, bits = KeyedMark(key, scope), capacity(noise.shape[1:])
    signed = []
    for image in noise.float().cpu():
        if not image.any():
            signed.append(image)
            continue
        drawn = hashlib.sha256(image.contiguous().numpy().tobytes()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(drawn[:8], "big") >> 1)
        unique_id = int.from_bytes(drawn[8:16], "big") % (1 << bits.unique_id)
        payload = Payload(unique_id, time=time if bits.time else 0)
        pattern = mark.sample((1, *image.shape), payload, generator, bound=bound)[0]
        signed.append(torch.copysign(image, pattern))
    return torch.stack(signed).to(noise)


class SignedNoise:
    """ComfyUI's NOISE, as RandomNoise makes it from the seed, but signed."""

    def __init__(self, seed: int, key: WatermarkKey, time: int = 0):
        self.seed, self.key, self.time = seed, key, time

    def generate_noise(self, input_latent: dict) -> Tensor:
        """The noise for this latent; images stand where `batch_index` says."""
        plain = comfy.sample.prepare_noise(input_latent["samples"], self.seed, input_latent.get("batch_index"))
        return signed_like(plain, self.key, time=self.time)


def sign_model(model, key: WatermarkKey, time: int = 0, vae=None):
    """Return a clone of the model whose sampling runs sign the noise that they are given; the last signature counts.

    Args:
        vae: where it is given, the mark also says what the picture shows: runs then draw two times or more.

    Raises:
        WatermarkError: a key that can only detect; when it samples, what `check_sampler` and `signed_like` refuse.
    """
    if key.mac_key is None:
        raise WatermarkError(f"key {key.name!r} can only detect; sign with the keyring that it was exported from")

    def sample(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        guider = executor.class_obj
        check_sampler(sampler, whole_steps(sigmas, guider.model_patcher.get_model_object("model_sampling")))
        signed = signed_like(noise, key, time=time, bound=vae is not None)
        conds = guider.conds

        def draw(noise: Tensor) -> Tensor:
            guider.conds = {name: [cond.copy() for cond in given] for name, given in conds.items()}  # a run fills them
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)

        return draw(signed) if vae is None or not signed.any() else sample_bound(draw, signed, key, vae)

    signing = unsigned(model)
    signing.add_wrapper_with_key(_OUTER, WRAPPER, sample)
    return signing


def unsigned(model):
    """Return a clone of the model without the signature."""
    clone = model.clone()
    clone.remove_wrappers_with_key(_OUTER, WRAPPER)
    return clone
