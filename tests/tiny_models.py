"""Small real diffusers pipelines with random weights and real tokenizers, without downloads.

`build(family)` for a family in `FAMILIES` returns a freshly built pipeline; the same seed gives the same weights.
"""

from __future__ import annotations

import functools
import json

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

FAMILIES = ("sd15", "sd2", "sdxl", "sd3", "flux")
SIZE = 16  # pixels: 8x8 latents, the VAE halves once
LENGTH = 40  # text positions
CORPUS = (
    "a photo of a robot in the garden",
    "a painting of a machine android on a red ground",
    "a drawing of a cat and a dog by the river",
    "a picture of a house in the style of van gogh",
    "the robot walks, the cat sleeps, the dog runs",
    "a bowl of fruit on a wooden table in the morning light",
    "an old car parked beside a tree under a blue sky",
    "two people reading books in a quiet room",
)


@functools.cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator([line.lower() for line in CORPUS], trainer)
    state = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(state["vocab"])  # the trainer breaks ties otherwise in every process
    tokens += [f"{c}</w>" for c in sorted(alphabet) if f"{c}</w>" not in state["vocab"]]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    merges = sorted((tuple(pair) for pair in state["merges"]), key=lambda pair: (len(pair[0] + pair[1]), pair))
    return {token: i for i, token in enumerate(tokens)}, merges


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's own tokenizer over a byte-pair vocabulary trained on `CORPUS`; any text encodes."""
    vocabulary, merges = _vocabulary()
    return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), model_max_length=LENGTH)


def t5_tokenizer() -> T5Tokenizer:
    """T5's own tokenizer over the words of `CORPUS` and single letters."""
    words = sorted({word for line in CORPUS for word in line.replace(",", "").lower().split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in words if word != "a"] + [("▁a", -3.0)]
    pieces += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=LENGTH)


def _clip_config(vocabulary: int, hidden: int, projection: int, layers: int = 2) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        projection_dim=projection,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


def _t5(hidden: int, vocabulary: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=hidden,
            d_kv=8,
            d_ff=2 * hidden,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
    )


def _vae(latent_channels: int = 4, shift_factor: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=SIZE,
        shift_factor=shift_factor,
        use_quant_conv=latent_channels == 4,
        use_post_quant_conv=latent_channels == 4,
    )


def _ddim() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def _unet(cross_attention_dim: int, **kwargs) -> UNet2DConditionModel:
    defaults = {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "sample_size": SIZE // 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(cross_attention_dim=cross_attention_dim, **(defaults | kwargs))


def _build_sd(family: str) -> StableDiffusionPipeline:
    tokenizer = clip_tokenizer()
    linear = {"use_linear_projection": True, "attention_head_dim": (2, 4)} if family == "sd2" else {}
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_clip_config(len(tokenizer), 32, 32)),
        tokenizer=tokenizer,
        unet=_unet(32, **linear),
        scheduler=_ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _build_sdxl() -> StableDiffusionXLPipeline:
    tokenizer = clip_tokenizer()
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_clip_config(len(tokenizer), 32, 32)),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(len(tokenizer), 32, 24)),
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(),
        unet=_unet(
            64,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
            transformer_layers_per_block=(1, 2),
        ),
        scheduler=_ddim(),
        add_watermarker=False,
    )


def _build_sd3() -> StableDiffusion3Pipeline:
    tokenizer, t5 = clip_tokenizer(), t5_tokenizer()
    config = _clip_config(len(tokenizer), 32, 32)
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=SIZE // 2,
            patch_size=1,
            in_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            out_channels=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(16, shift_factor=0.0),
        text_encoder=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=_t5(64, len(t5)),
        tokenizer_3=t5,
    )


def _build_flux() -> FluxPipeline:
    tokenizer, t5 = clip_tokenizer(), t5_tokenizer()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(shift_factor=0.0),
        text_encoder=CLIPTextModel(_clip_config(len(tokenizer), 32, 32)),
        tokenizer=tokenizer,
        text_encoder_2=_t5(64, len(t5)),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=64,
            pooled_projection_dim=32,
            axes_dims_rope=[4, 4, 8],
        ),
    )


def build(family: str, seed: int = 0, dtype: torch.dtype = torch.float32):
    """Build one tiny pipeline of `family` ("sd15", "sd2", "sdxl", "sd3", "flux") with weights drawn from `seed`."""
    builders = {"sdxl": _build_sdxl, "sd3": _build_sd3, "flux": _build_flux}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = builders[family]() if family in builders else _build_sd(family)
        _enliven(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe if dtype == torch.float32 else pipe.to(dtype=dtype)


def _enliven(pipe) -> None:
    """Make the random text matter: default initialisations leave zero-initialised and near-silent text paths."""
    with torch.no_grad():
        for name, component in pipe.components.items():
            if not isinstance(component, torch.nn.Module) or name == "vae":
                continue
            component.eval().requires_grad_(False)
            for key, parameter in component.named_parameters():
                if name.startswith("text_encoder") and "embed" in key and parameter.ndim == 2:
                    parameter.normal_(std=1.0 if "position" not in key else 0.1)
                elif parameter.ndim == 2 and not parameter.any():
                    parameter.normal_(std=0.05)


def build_wan(seed: int = 0):
    """A tiny WanPipeline: two frames of latents from five of video."""
    tokenizer = t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = WanPipeline(
            tokenizer=tokenizer,
            text_encoder=UMT5EncoderModel(
                UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
            ),
            vae=AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=WanTransformer3DModel(
                patch_size=(1, 2, 2),
                num_attention_heads=2,
                attention_head_dim=12,
                text_dim=32,
                freq_dim=32,
                ffn_dim=32,
                num_layers=2,
                rope_max_seq_len=32,
            ),
        )
        _enliven(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def byte_tokenizer():
    """Qwen's own tokenizer over single bytes, with a chat template that says the words alone."""
    from transformers import Qwen2Tokenizer

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    tokenizer = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def flux2_parts(seed: int = 0) -> dict:
    """The parts of a tiny modular FLUX.2 klein, without its autoencoder."""
    from diffusers import Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text = Qwen3Config(  # the layers that are read are the 9th, 18th and 27th
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=27,
            num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        )  # fmt: skip
        transformer = Flux2Transformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=48, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
        )  # fmt: skip
        parts = {"text_encoder": Qwen3ForCausalLM(text), "transformer": transformer}
    return _still(parts) | {"tokenizer": tokenizer, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}


def qwenimage_parts(seed: int = 0) -> dict:
    """The parts of a tiny modular Qwen-Image, without its autoencoder."""
    from diffusers import QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = byte_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [1, 1, 2], "type": "mrope"},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "text_encoder": Qwen2_5_VLForConditionalGeneration(config),
            "transformer": QwenImageTransformer2DModel(
                in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
                joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
            ),
        }  # fmt: skip
    return _still(parts) | {"tokenizer": tokenizer, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}


def _still(parts: dict) -> dict:
    return {name: part.eval().requires_grad_(False) for name, part in parts.items()}


def call(
    pipe,
    prompt,
    *,
    negative_prompt=None,
    seed: int = 0,
    steps: int = 2,
    guidance_scale: float = 3.0,
    size: int = SIZE,
    **kwargs,
):
    """Run `pipe` on CPU and return its latents (B, ...); image i starts from the noise of seed + i.

    Args:
        size: of the picture, in pixels; Wan, whose latents are an eighth, draws twice that.
    """
    count = len(prompt) if isinstance(prompt, list) else 1
    if prompt is None:
        count = kwargs["prompt_embeds"].shape[0]
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    if "Flux" in type(pipe).__name__:
        kwargs |= {
            "true_cfg_scale": guidance_scale if negative_prompt is not None else 1.0,
            "max_sequence_length": LENGTH,
        }
    else:
        kwargs |= {"guidance_scale": guidance_scale}
    if "Diffusion3" in type(pipe).__name__ or "Wan" in type(pipe).__name__:
        kwargs |= {"max_sequence_length": LENGTH}
    if "Wan" in type(pipe).__name__:
        kwargs |= {"num_frames": 5}
        size *= 2
    return pipe(
        prompt,
        negative_prompt=negative_prompt,
        height=size,
        width=size,
        num_inference_steps=steps,
        generator=generators,
        output_type="latent",
        **kwargs,
    )[0]
