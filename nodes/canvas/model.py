"""The embedded model in ComfyUI's own classes, from the weights that the diffusers door reads too.

ComfyUI detects models by Stable Diffusion's exact sizes, so the parts are put together here: its UNetModel under an
SD1.5 configuration (schedule, prediction and latent scale are then SD1.5's, as in `canvas.denoiser.SCHEDULER`), its
SDClipModel and its VAE. Everything is float32.
"""

from fractions import Fraction
from functools import partial
from pathlib import Path

import comfy.clip_model
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from torch import Tensor

from ...canvas import autoencoder, denoiser, text

WEIGHTS = Path(autoencoder.__file__).parent / "weights"
FILES = ("unet.safetensors", "text_encoder.safetensors", "vae.safetensors", "tokenizer/tokenizer.json")
HEADS = 4  # of the text encoder; its other sizes are read from the weights


def load_canvas(weights: Path | None = None):
    """Return (ModelPatcher, CLIP, VAE); the first two carry the attachment `semiperm_canvas`, the model its size, too.

    Args:
        weights: folder with unet, text_encoder, vae .safetensors and tokenizer/; None takes the shipped one.

    Raises: FileNotFoundError naming the missing file and what to do.
    """
    folder = Path(weights) if weights else WEIGHTS
    for name in FILES:
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder / name} is missing: install semiperm again, its weights are part of it")
    model = _model(_read(folder / "unet.safetensors"))
    clip = _clip(_read(folder / "text_encoder.safetensors"), folder / "tokenizer")
    model.set_attachments("semiperm_canvas", True)
    model.set_attachments("semiperm_native", autoencoder.CONFIG["sample_size"])  # for Detect Watermark
    clip.patcher.set_attachments("semiperm_canvas", True)
    return model, clip, _vae(_read(folder / "vae.safetensors"))


def _read(path: Path) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in comfy.utils.load_torch_file(str(path)).items()}


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


def _model(weights: dict[str, Tensor]) -> comfy.model_patcher.ModelPatcher:
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


class _TextModel(comfy.clip_model.CLIPTextModel):
    """ComfyUI's CLIP text model with our vocabulary, where it always takes CLIP's 49408 words."""

    def __init__(self, config: dict, dtype, device, operations):
        super().__init__(config, dtype, device, operations)
        size = config["vocab_size"], config["hidden_size"]
        self.set_input_embeddings(operations.Embedding(*size, dtype=dtype, device=device))


def _clip(weights: dict[str, Tensor], tokenizer: Path) -> comfy.sd.CLIP:
    from transformers import CLIPTokenizerFast  # the class that reads tokenizer.json in transformers 4 as well

    vocabulary, width = weights["embeddings.token_embedding.weight"].shape
    start, end = vocabulary - 2, vocabulary - 1  # the special tokens come last, see canvas.text
    config = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": sum(name.endswith("mlp.fc1.weight") for name in weights),
        "num_attention_heads": HEADS,
        "intermediate_size": weights["encoder.layers.0.mlp.fc1.weight"].shape[0],
        "hidden_act": "quick_gelu",
        "max_position_embeddings": text.MAX_LENGTH,
        "eos_token_id": end,
    }
    encoder = partial(
        comfy.sd1_clip.SDClipModel,
        textmodel_json_config=config,
        max_length=text.MAX_LENGTH,
        special_tokens={"start": start, "end": end, "pad": end},
        return_projected_pooled=False,
        model_class=_TextModel,
    )
    words = partial(
        comfy.sd1_clip.SDTokenizer,
        tokenizer_path=str(tokenizer),
        tokenizer_class=CLIPTokenizerFast,
        max_length=text.MAX_LENGTH,
        embedding_size=width,
    )
    clip = comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(
            partial(comfy.sd1_clip.SD1Tokenizer, tokenizer=words),
            partial(comfy.sd1_clip.SD1ClipModel, clip_model=encoder),
        ),
        parameters=sum(tensor.numel() for tensor in weights.values()),
        model_options={"dtype": torch.float32},
    )
    weights = {f"text_model.{name}": tensor for name, tensor in weights.items()}
    weights["text_projection.weight"] = torch.eye(width)  # SD1.5 has none; ComfyUI leaves it uninitialised
    clip.cond_stage_model.clip_l.transformer.load_state_dict(weights)
    return clip


def _vae(weights: dict[str, Tensor]) -> comfy.sd.VAE:
    config = autoencoder.CONFIG
    widths = config["block_out_channels"]
    sizes = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    params = {"ddconfig": sizes, "embed_dim": config["latent_channels"]}
    return comfy.sd.VAE(sd=weights, config={"params": params}, dtype=torch.float32)
