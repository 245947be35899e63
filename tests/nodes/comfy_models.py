"""Small models of ComfyUI's own classes, with random weights, for checks that run in its Python."""

import comfy.model_patcher
import comfy.supported_models
import torch

WIDTH, POOLED = 64, 48


def small_model(family):
    """(ModelPatcher, latent channels) of "sdxl", "sd3", "flux" or "wan"."""
    torch.manual_seed(0)
    if family == "sdxl":
        config = {
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2],
            "num_res_blocks": [1, 1], "transformer_depth": [0, 1], "transformer_depth_middle": 1,
            "transformer_depth_output": [0, 0, 1, 1], "context_dim": WIDTH, "adm_in_channels": POOLED + 1536,
            "num_classes": "sequential", "legacy": False, "use_checkpoint": False, "use_linear_in_transformer": True,
            "use_spatial_transformer": True, "use_temporal_attention": False, "use_temporal_resblock": False,
            "num_head_channels": 32, "num_heads": -1,
        }  # fmt: skip
        base, channels = comfy.supported_models.SDXL, 4
    elif family == "sd3":
        config = {
            "input_size": None, "patch_size": 2, "in_channels": 16, "depth": 2, "num_blocks": 2,
            "pos_embed_max_size": 16, "adm_in_channels": POOLED, "qk_norm": None, "pos_embed_scaling_factor": None,
            "context_size": WIDTH,
            "context_embedder_config": {
                "target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": 128},
            },
        }  # fmt: skip
        base, channels = comfy.supported_models.SD3, 16
    elif family == "flux":
        config = {
            "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": POOLED, "context_in_dim": WIDTH,
            "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1,
            "axes_dim": [8, 12, 12], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": False,
        }  # fmt: skip
        base, channels = comfy.supported_models.FluxSchnell, 16
    else:
        config = {
            "image_model": "wan2.1", "model_type": "t2v", "dim": 64, "out_dim": 16, "ffn_dim": 96, "num_layers": 2,
            "num_heads": 2, "text_dim": WIDTH, "text_len": 32, "freq_dim": 32, "patch_size": (1, 2, 2),
            "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6, "in_dim": 16,
        }  # fmt: skip
        base, channels = comfy.supported_models.WAN21_T2V, 16

    class Config(base):
        unet_config = {}
        unet_extra_config = {}

    settings = Config(config)
    settings.set_inference_dtype(torch.float32, None)
    model = settings.get_model({}, "", "cpu")
    for parameter in model.diffusion_model.parameters():  # ComfyUI leaves them uninitialised
        parameter.copy_(torch.randn(parameter.shape) / max(1, parameter[0].numel()) ** 0.5)
    return comfy.model_patcher.ModelPatcher(model.eval(), torch.device("cpu"), torch.device("cpu")), channels
