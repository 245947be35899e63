"""The embedded models in ComfyUI's own classes, from the weights that the diffusers door reads too.

ComfyUI detects UNets by Stable Diffusion's exact sizes, so ours are put together here: its UNetModel under an SD1.5
configuration (schedule, prediction and latent scale are then SD1.5's, as in `canvas.denoiser.SCHEDULER`) and its VAE.
The transformer of Stable Diffusion 3 it detects and converts itself. Everything is float32.
"""

from fractions import Fraction
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from safetensors.torch import load_file
from torch import Tensor

from ...canvas import autoencoder, denoiser
from ...canvas.models import aid_files, model_of, weights_of
from ...methods.watermark.aids import aids_of_model
from ...methods.watermark.reader import model_fingerprint
from .clip import sd1_clip, sd3_clip


def load_canvas(name: str = "canvas", weights: Path | None = None):
    """Return (ModelPatcher, CLIP, VAE); the first two carry the attachment `semiperm_canvas`, the model its size, too.

    Args:
        name: of an embedded model, see `canvas.models`.
        weights: folder of its weights; None takes the shipped one.

    Raises: ValueError for another name, FileNotFoundError naming the missing file and the command that makes it.
    """
    folder = weights_of(name, weights)
    tokenizer = folder / "tokenizer"
    state = _first(folder) if model_of(name).edition == 1 else _second(name, folder)
    if "unet" in state:
        model, clip = _unet(state["unet"]), sd1_clip(state["text-first"], tokenizer)
    else:
        model, clip = _transformer(state["transformer"]), sd3_clip(state["text-first"], state["text-second"], tokenizer)
    model.set_attachments("semiperm_canvas", name)
    model.set_attachments("semiperm_native", autoencoder.CONFIG["sample_size"])  # for Detect Watermark
    drawn_by = state.get("unet", state.get("transformer"))
    aids = aids_of_model(aid_files(name, folder), lambda: model_fingerprint(drawn_by, state["vae"]))
    model.set_attachments("semiperm_aids", aids)  # for Detect Watermark, too
    clip.patcher.set_attachments("semiperm_canvas", name)
    return model, clip, _vae(state["vae"])


def _first(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The first edition's weights, by the second's names of parts."""
    files = {"unet": "unet", "text-first": "text_encoder", "vae": "vae"}
    return {
        part: {k: v.float() for k, v in load_file(str(folder / f"{file}.safetensors")).items()}
        for part, file in files.items()
    }


def _second(name: str, folder: Path) -> dict[str, dict[str, Tensor]]:
    from ...canvas.embedded import read_states

    return read_states(name, folder)


class _Ratio(Fraction):
    """A channel multiplier such as 3/2; ComfyUI wants its product with a width as an int."""

    def __mul__(self, width: int) -> int:
        return int(Fraction(self) * width)

    __rmul__ = __mul__


class _Config(comfy.supported_models.SD15):
    unet_config = {}  # SD1.5's sizes are not asked for
    unet_extra_config = {"num_heads": denoiser.CONFIG["attention_head_dim"], "num_head_channels": -1}


def _unet_config() -> dict:
    """Return `canvas.denoiser.CONFIG` in ComfyUI's words."""
    config = denoiser.CONFIG
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    attends = [int("CrossAttn" in kind) for kind in config["down_block_types"]]
    return {
        "image_size": 32,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "channel_mult": [_Ratio(width, widths[0]) for width in widths],
        "num_res_blocks": [layers] * len(widths),
        "transformer_depth": [depth for depth in attends for _ in range(layers)],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [depth for depth in attends for _ in range(layers + 1)],  # read from its end
        "context_dim": config["cross_attention_dim"],
        "adm_in_channels": None,
        "legacy": False,
        "use_checkpoint": False,
        "use_linear_in_transformer": False,
        "use_spatial_transformer": True,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
    }


def _unet(weights: dict[str, Tensor]) -> comfy.model_patcher.ModelPatcher:
    config = _Config(_unet_config())
    config.set_inference_dtype(torch.float32, None)
    offload = comfy.model_management.unet_offload_device()
    model = config.get_model({}, "", offload)
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    model.diffusion_model.load_state_dict({names[name]: tensor for name, tensor in weights.items()})
    model.eval()
    return comfy.model_patcher.ModelPatcher(
        model, load_device=comfy.model_management.get_torch_device(), offload_device=offload
    )


def _transformer(weights: dict[str, Tensor]) -> comfy.model_patcher.ModelPatcher:
    """ComfyUI's own detection and conversion of diffusers' names: a `model_base.SD3`, schedule shifted by 3."""
    model = comfy.sd.load_diffusion_model_state_dict(dict(weights), {"dtype": torch.float32})
    if model is None:
        raise ValueError("this ComfyUI does not recognise the weights of a Stable Diffusion 3; update it")
    return model


def _vae(weights: dict[str, Tensor]) -> comfy.sd.VAE:
    config = autoencoder.CONFIG
    widths, channels = config["block_out_channels"], weights["decoder.conv_in.weight"].shape[1]
    sizes = {
        "double_z": True,
        "z_channels": channels,
        "resolution": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    # SD3's autoencoder has no such convolutions, ComfyUI's class of other widths than SD's has: they change nothing
    for name, count in (("quant_conv", 2 * channels), ("post_quant_conv", channels)):
        weights = {f"{name}.weight": torch.eye(count)[..., None, None], f"{name}.bias": torch.zeros(count)} | weights
    vae = comfy.sd.VAE(sd=weights, config={"params": {"ddconfig": sizes, "embed_dim": channels}}, dtype=torch.float32)
    vae.latent_channels = channels
    return vae
