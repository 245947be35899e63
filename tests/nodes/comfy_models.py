"""Small models of ComfyUI's own classes, with random weights, for checks that run in its Python."""

import zlib
from types import SimpleNamespace

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


class Words:
    """Stands in for ComfyUI's CLIP: every word is a token with a fixed random embedding."""

    LENGTH = {"l": 77, "g": 77, "t5xxl": 96}

    def __init__(self, family):
        self.family, self.names = family, {"sdxl": ("l", "g")}.get(family, ("l", "t5xxl"))
        self.cond_stage_model = SimpleNamespace()  # says of no encoder that it is absent
        one = SimpleNamespace(start_token=1, end_token=2)
        self.tokenizer = SimpleNamespace(clip_l=one, clip_g=one, t5xxl=SimpleNamespace(start_token=None, end_token=2))

    def tokenize(self, text):
        words = [3 + zlib.crc32(word.encode()) % 997 for word in text.replace(",", " ,").split()]
        found = {}
        for name in self.names:
            ids = ([1] if name != "t5xxl" else []) + words + [2]
            found[name] = [[(i, 1.0) for i in ids + [0] * (self.LENGTH[name] - len(ids))]]
        return found

    def _states(self, tokens, name, width):
        table = torch.randn(1000, width, generator=torch.Generator().manual_seed(len(name)))
        rows = table[torch.tensor([[pair[0] for pair in chunk] for chunk in tokens[name]])]
        if name == "t5xxl":
            return rows + 0.2 * rows.mean(1, keepdim=True)
        return rows + rows.cumsum(1) / torch.arange(1, rows.shape[1] + 1)[:, None]

    def encode_from_tokens(self, tokens, return_pooled=False):
        if self.family == "sdxl":
            states = torch.cat([self._states(tokens, "l", 24), self._states(tokens, "g", WIDTH - 24)], dim=2)
            states = states.reshape(1, -1, WIDTH)  # several chunks come out as one long prompt
        elif self.family == "sd3":
            states = torch.cat([self._states(tokens, "l", WIDTH), self._states(tokens, "t5xxl", WIDTH)], dim=1)
        else:
            states = self._states(tokens, "t5xxl", WIDTH)
        pooled = self._states(tokens, "l", POOLED).mean(1)[:1]
        return (states, pooled) if return_pooled else states
