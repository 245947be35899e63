"""Adapter files as other tools write them, each built small for a tiny real pipeline.

A builder takes (pipe, folder) and returns the file, or the folder that it wrote. `file_layouts.LAYOUTS` lists them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

ATTENTION = ("attn1.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ff.net.0.proj", "proj_in")
JOINT = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.add_k_proj", "attn.to_out.0")
KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.2


def denoiser(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def projections(pipe, ends=None) -> dict[str, torch.nn.Module]:
    ends = ends or (ATTENTION if hasattr(pipe, "unet") else JOINT)
    return {path: module for path, module in denoiser(pipe).named_modules() if path.endswith(ends)}


def pairs(pipe, rank: int = 4, ends=None) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found = {}
    for seed, (path, module) in enumerate(projections(pipe, ends).items()):
        out, width, *tail = module.weight.shape
        found[path] = noise(2 * seed, rank, width, *tail), noise(2 * seed + 1, out, rank, *tail)
    return found


def text_pairs(pipe, attribute: str = "text_encoder", rank: int = 4):
    encoder = getattr(pipe, attribute)
    paths = [path for path, _ in encoder.named_modules() if path.endswith(("self_attn.q_proj", "mlp.fc1"))]
    modules = dict(encoder.named_modules())
    return {p: (noise(7, rank, modules[p].in_features), noise(8, modules[p].out_features, rank)) for p in paths}


def named(found, spell: Callable[[str], str], suffixes=KOHYA, alpha: float | None = None) -> dict[str, torch.Tensor]:
    tensors = {}
    for path, both in found.items():
        tensors |= {spell(path) + suffix: tensor for suffix, tensor in zip(suffixes, both, strict=True)}
        if alpha is not None:
            tensors[f"{spell(path)}.alpha"] = torch.tensor(alpha)
    return tensors


def kohya(prefix: str) -> Callable[[str], str]:
    return lambda path: prefix + path.replace(".", "_")


def written(folder: Path, tensors, metadata=None, name: str = "adapter.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, folder / name, metadata=metadata)
    return folder / name


def original(pipe, path: str) -> str:
    """A UNet path as Stability's code and SGM name it: the inverse of what diffusers converts."""
    per_block = pipe.unet.config.layers_per_block + 1
    side, _, rest = path.partition(".")
    if side == "mid_block":
        return f"middle_block.1.{rest.split('.', 2)[2]}"
    block, _, layer, inner = rest.split(".", 3)
    if side == "down_blocks":
        return f"input_blocks.{1 + int(block) * per_block + int(layer)}.1.{inner}"
    return f"output_blocks.{int(block) * per_block + int(layer)}.1.{inner}"


# ---- LoRA of a UNet ------------------------------------------------------------------------------------------------


def spm(pipe, folder):
    tensors = named(pairs(pipe, rank=1), kohya("lora_unet_"), alpha=1.0)
    return written(folder, tensors, {"prompts": "robot,android", "rank": "1", "alpha": "1.0"}, "robot_last.safetensors")


def ours(pipe, folder):
    from semiperm.methods.membranes.file import save_membranes
    from semiperm.methods.membranes.types import LowRank, Membrane
    from semiperm.pipelines.text import module_keys

    keys = {path: key for key, (path, _) in module_keys(denoiser(pipe), "unet").items()}
    modules = {keys[path]: LowRank(down, up, 8.0) for path, (down, up) in pairs(pipe).items()}
    folder.mkdir(parents=True)
    return save_membranes(Membrane("robot", modules), folder / "erased.safetensors")


def kohya_unet(pipe, folder, alpha: float = 1.0):
    return written(folder, named(pairs(pipe), kohya("lora_unet_"), alpha=alpha), {"ss_network_dim": "4"})


def kohya_with_text(pipe, folder):
    tensors = named(pairs(pipe), kohya("lora_unet_"), alpha=2.0)
    return written(folder, tensors | named(text_pairs(pipe), kohya("lora_te_"), alpha=2.0))


def sgm(pipe, folder):
    return written(folder, named(pairs(pipe), lambda path: kohya("lora_unet_")(original(pipe, path)), alpha=2.0))


def sgm_with_text(pipe, folder):
    tensors = named(pairs(pipe), lambda path: kohya("lora_unet_")(original(pipe, path)), alpha=2.0)
    for attribute, prefix in (("text_encoder", "lora_te1_"), ("text_encoder_2", "lora_te2_")):
        tensors |= named(text_pairs(pipe, attribute), kohya(prefix), alpha=2.0)
    return written(folder, tensors)


def comfy_dotted(pipe, folder):
    return written(folder, named(pairs(pipe), lambda path: f"diffusion_model.{original(pipe, path)}", alpha=2.0))


def old_processors(pipe, folder):
    def spell(path):
        where, _, leaf = path.rpartition(".to_")
        return f"unet.{where}.processor.to_{leaf.removesuffix('.0')}_lora"

    return written(folder, named(pairs(pipe, ends=ATTENTION[:4]), spell, (".down.weight", ".up.weight")))


def diffusers_old(pipe, folder):
    return written(folder, named(pairs(pipe), lambda path: f"unet.{path}", (".lora.down.weight", ".lora.up.weight")))


def diffusers_peft(pipe, folder, metadata=None):
    attribute = "unet" if hasattr(pipe, "unet") else "transformer"
    return written(folder, named(pairs(pipe), lambda path: f"{attribute}.{path}", PEFT), metadata)


def diffusers_metadata(pipe, folder):
    """As pipe.save_lora_weights(..., unet_lora_adapter_metadata=...) writes it."""
    attribute = "unet" if hasattr(pipe, "unet") else "transformer"
    config = {"r": 4, "lora_alpha": 16, "target_modules": sorted(projections(pipe)), "alpha_pattern": {}}
    header = {f"{attribute}.{key}": value for key, value in config.items()}
    return diffusers_peft(pipe, folder, {"format": "pt", "lora_adapter_metadata": json.dumps(header)})


def diffusers_with_text(pipe, folder):
    tensors = named(pairs(pipe), lambda path: f"unet.{path}", PEFT)
    return written(folder, tensors | named(text_pairs(pipe), lambda path: f"text_encoder.{path}", PEFT))


def peft_folder(pipe, folder, **settings):
    """As PeftModel.save_pretrained writes it, by PEFT itself."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        targets = sorted(projections(pipe))
        config = LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False, **settings)
        model = get_peft_model(denoiser(pipe), config)
        model.save_pretrained(str(folder))
    model.unload()
    return folder


def peft_patterns(pipe, folder):
    return peft_folder(pipe, folder, rank_pattern={"attn2.to_k": 2}, alpha_pattern={"attn2.to_k": 6, "to_v": 1})


# ---- LoRA of a transformer -----------------------------------------------------------------------------------------


def flux_kohya_tensors(pipe) -> dict[str, torch.Tensor]:
    width = denoiser(pipe).inner_dim
    shapes = {
        "double_blocks_0_img_attn_qkv": (3 * width, width),
        "double_blocks_0_txt_attn_qkv": (3 * width, width),
        "double_blocks_0_img_attn_proj": (width, width),
        "double_blocks_0_img_mlp_0": (4 * width, width),
        "single_blocks_0_linear2": (width, 5 * width),
    }
    found = {key: (noise(3, 4, wide), noise(4, out, 4)) for key, (out, wide) in shapes.items()}
    return named(found, lambda key: f"lora_unet_{key}", alpha=2.0)


def flux_kohya(pipe, folder):
    return written(folder, flux_kohya_tensors(pipe))


def flux_kohya_text(pipe, folder):
    return written(folder, flux_kohya_tensors(pipe) | named(text_pairs(pipe), kohya("lora_te1_"), alpha=2.0))


def flux_comfy(pipe, folder, suffixes=KOHYA):
    tensors = {}
    for key, tensor in flux_kohya_tensors(pipe).items():
        where, dot, leaf = key.removeprefix("lora_unet_").partition(".")
        for piece in ("double_blocks_0_", "single_blocks_0_", "img_attn_", "txt_attn_", "img_mlp_"):
            where = where.replace(piece, piece[:-1].replace("blocks_", "blocks.") + ".")
        leaf = leaf.replace("lora_down", suffixes[0][1:7]) if suffixes is PEFT else leaf
        leaf = leaf.replace("lora_up", suffixes[1][1:7]) if suffixes is PEFT else leaf
        tensors[f"diffusion_model.{where}{dot}{leaf}"] = tensor
    return written(folder, tensors)


def flux_comfy_peft(pipe, folder):
    return flux_comfy(pipe, folder, PEFT)


def flux_xlabs(pipe, folder):
    width = denoiser(pipe).inner_dim
    shapes = {"qkv_lora1": 3 * width, "qkv_lora2": 3 * width, "proj_lora1": width, "proj_lora2": width}
    found = {key: (noise(5, 4, width), noise(6, out, 4)) for key, out in shapes.items()}
    return written(folder, named(found, lambda k: f"double_blocks.0.processor.{k}", (".down.weight", ".up.weight")))


def onetrainer(pipe, folder):
    return written(folder, named(pairs(pipe), kohya("lora_transformer_"), alpha=2.0))


def flux_control(pipe, folder):
    tensors = named(pairs(pipe), lambda path: f"transformer.{path}", PEFT)
    return written(folder, tensors | {"double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(16)})


def sd3_kohya(pipe, folder):
    found = {"joint_blocks_0_x_block_attn_qkv": (noise(1, 4, 32), noise(2, 96, 4))}
    return written(folder, named(found, lambda key: f"lora_unet_{key}", alpha=2.0))


# ---- edited weights ------------------------------------------------------------------------------------------------


def edited(pipe, ends=("attn2.to_k", "attn2.to_v"), rank: int = 1, dtype=torch.float32) -> dict[str, torch.Tensor]:
    found = {}
    for seed, (path, module) in enumerate(projections(pipe, ends).items()):
        out, width, *_ = module.weight.shape
        moved = module.weight.double() + noise(seed, out, rank).double() @ noise(seed + 99, rank, width).double()
        found[f"{path}.weight"] = moved.to(dtype)
    return found


def esd(pipe, folder, bias: bool = False):
    """Fine-tuned attn2 as ESD-x saves it: full rank, with the bias of to_out.0."""
    found = edited(pipe, ATTENTION[1:4], rank=32)
    for path, module in projections(pipe, ("attn2.to_out.0",)).items():
        found[f"{path}.bias"] = module.bias + (noise(1, *module.bias.shape) * 0.01 if bias else 0)
    return written(folder, found)


def esd_bias(pipe, folder):
    return esd(pipe, folder, bias=True)


def uce(pipe, folder):
    return written(folder, edited(pipe))


def uce_half(pipe, folder):
    return written(folder, edited(pipe, dtype=torch.float16))


def uce_flux(pipe, folder):
    return written(folder, edited(pipe, ("context_embedder", "text_embedder.linear_1")))


def ldm_weights(pipe, folder, prefix: str = "model.diffusion_model."):
    return written(folder, {f"{prefix}{original(pipe, key)}": tensor for key, tensor in edited(pipe).items()})


def comfy_weights(pipe, folder):
    return ldm_weights(pipe, folder, "diffusion_model.")


def whole_unet(pipe, folder):
    return written(folder, dict(denoiser(pipe).state_dict()) | edited(pipe), name="diffusion_model.safetensors")


def whole_checkpoint(pipe, folder):
    tensors = {f"model.diffusion_model.{original(pipe, key)}": tensor for key, tensor in edited(pipe).items()}
    return written(folder, tensors | {"first_stage_model.decoder.conv_in.weight": torch.ones(8, 4, 3, 3)})


def edited_norm(pipe, folder):
    where = next(path for path, _ in denoiser(pipe).named_modules() if path.endswith("norm2"))
    return written(folder, edited(pipe) | {f"{where}.weight": denoiser(pipe).state_dict()[f"{where}.weight"] + 0.1})


# ---- what is no low-rank edit of projections -----------------------------------------------------------------------


def extra(**tensors) -> Callable:
    """A kohya file with one more key beside each module's, or only that."""

    def build(pipe, folder):
        name = kohya("lora_unet_")(next(iter(projections(pipe))))
        return written(folder, {f"{name}.{key}": tensor for key, tensor in tensors.items()})

    return build


def dora(pipe, folder):
    found = named(pairs(pipe), kohya("lora_unet_"), alpha=4.0)
    scales = {key.replace("lora_up.weight", "dora_scale"): torch.ones(1, 4) for key in found if "lora_up" in key}
    return written(folder, found | scales)


def convolutions(pipe, folder):
    found = named(pairs(pipe), kohya("lora_unet_"), alpha=4.0)
    path, module = next((p, m) for p, m in denoiser(pipe).named_modules() if p.endswith("resnets.0.conv1"))
    out, width, *kernel = module.weight.shape
    return written(folder, found | named({path: (noise(1, 4, width, *kernel), noise(2, out, 4, 1, 1))},
                                         kohya("lora_unet_"), alpha=4.0))  # fmt: skip


def embedding(pipe, folder):
    return written(folder, {"emb_params": torch.ones(2, 32)})


def pickle(pipe, folder):
    folder.mkdir(parents=True)
    torch.save({"x": torch.ones(1)}, folder / "esd.pt")
    return folder / "esd.pt"


def other_model(pipe, folder):
    from tiny_models import build

    return diffusers_peft(build("sd3"), folder)


def changed_config(folder: Path, **settings) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder
