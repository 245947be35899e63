"""The layouts of adapter files that people have, each built small for a tiny real pipeline.

`LAYOUTS` is what docs/file_layouts.md lists (`page()`); test_file_layouts.py builds each, loads it, and compares.
`python tests/file_layouts.py` writes the page.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

PAGE = Path(__file__).resolve().parents[1] / "docs" / "file_layouts.md"
ATTENTION = ("attn1.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ff.net.0.proj", "proj_in")
JOINT = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.add_k_proj", "attn.to_out.0")
KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True)
class Layout:
    """One row of the page.

    Args:
        name: who writes such files.
        example: one of its keys.
        family: the tiny pipeline's.
        build: (pipe, folder) -> file or folder.
        reference: what gives the right answer: "diffusers" (load_lora_weights), "peft", "weights" (`edited`, the deltas
            that `build` leaves in `truth`) or "membranes" (the file's own).
        refused: a part of the message, where it is refused as it stands.
        because: the reason, for people.
        options: of import_membranes, with which it loads all the same.
        says: the layout's name in `semiperm inspect`.
    """

    name: str
    example: str
    family: str
    build: Callable
    reference: str = "truth"
    refused: str = ""
    because: str = ""
    options: dict = field(default_factory=dict)
    says: str = ""


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


_PAIR = {"lora_down.weight": noise(1, 4, 16), "lora_up.weight": noise(2, 16, 4)}
_TEXT = {"refused": "text_encoder='drop'", "options": {"text_encoder": "drop"},
         "because": "a membrane acts on the denoiser, not on a text encoder"}  # fmt: skip
_LORA = {"reference": "diffusers"}
_UNET, _AT = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0", "transformer_blocks.0.attn2.to_k"
_LOWER = "not low-rank"
LAYOUTS = (
    Layout("semiperm, packed", f"{_UNET}_attn2_to_k.lora_down.weight, metadata `semiperm`", "sd15", ours, "diffusers",
           says="semiperm membranes"),
    Layout("SPM", f"{_UNET}_attn2_to_k.lora_down.weight, metadata `prompts`", "sd15", spm, **_LORA, says="SPM"),
    Layout("kohya, SD 1.x", f"{_UNET}_attn2_to_k.lora_down.weight", "sd15", kohya_unet, **_LORA, says="kohya LoRA"),
    Layout("kohya, SD 2.x", f"{_UNET}_attn2_to_k.lora_down.weight", "sd2", kohya_unet, **_LORA, says="kohya LoRA"),
    Layout("kohya, SD 1.x, with the text encoder", "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
           "sd15", kohya_with_text, **_LORA, **_TEXT, says="kohya LoRA"),
    Layout("kohya, SDXL, SGM names", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight",
           "sdxl", sgm, **_LORA, says="kohya LoRA, SGM names"),
    Layout("kohya, SDXL, with both text encoders", "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
           "sdxl", sgm_with_text, **_LORA, **_TEXT, says="kohya LoRA, SGM names"),
    Layout("ComfyUI's own, SDXL", f"diffusion_model.input_blocks.4.1.{_AT}.lora_up.weight", "sdxl", comfy_dotted,
           says="ComfyUI LoRA"),
    Layout("diffusers, attention processors", "unet.….attn1.processor.to_k_lora.down.weight", "sd15", old_processors,
           **_LORA, says="diffusers LoRA, attention processors"),
    Layout("diffusers, before PEFT", f"unet.….{_AT}.lora.down.weight", "sd15", diffusers_old, **_LORA,
           says="diffusers LoRA"),
    Layout("diffusers, SD 1.x", f"unet.….{_AT}.lora_A.weight", "sd15", diffusers_peft, **_LORA,
           says="diffusers LoRA, PEFT names"),
    Layout("diffusers, SDXL", f"unet.….{_AT}.lora_A.weight", "sdxl", diffusers_peft, **_LORA,
           says="diffusers LoRA, PEFT names"),
    Layout("diffusers, with alpha in the header", "metadata `lora_adapter_metadata`", "sd15", diffusers_metadata,
           **_LORA, says="diffusers LoRA, PEFT names"),
    Layout("diffusers, with the text encoder", "text_encoder.text_model.….lora_A.weight", "sd15", diffusers_with_text,
           **_LORA, **_TEXT, says="diffusers LoRA, PEFT names"),
    Layout("PEFT folder", f"base_model.model.….{_AT}.lora_A.weight, `adapter_config.json`", "sd15", peft_folder, "peft",
           says="PEFT LoRA"),
    Layout("PEFT folder, rank and alpha by pattern", "`rank_pattern`, `alpha_pattern`", "sdxl", peft_patterns, "peft",
           says="PEFT LoRA"),
    Layout("PEFT folder, rank-stabilised", "`use_rslora`", "sd3", lambda p, f: peft_folder(p, f, use_rslora=True),
           "peft", says="PEFT LoRA"),
    Layout("diffusers, SD 3", "transformer.transformer_blocks.0.attn.to_k.lora_A.weight", "sd3", diffusers_peft,
           **_LORA, says="diffusers LoRA, PEFT names"),
    Layout("diffusers, SD 3, with alpha in the header", "metadata `lora_adapter_metadata`", "sd3", diffusers_metadata,
           **_LORA, says="diffusers LoRA, PEFT names"),
    Layout("diffusers and ai-toolkit, Flux", "transformer.transformer_blocks.0.attn.to_k.lora_A.weight", "flux",
           diffusers_peft, **_LORA, says="diffusers LoRA, PEFT names"),
    Layout("kohya, Flux", "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "flux", flux_kohya, **_LORA,
           says="kohya LoRA, Flux names"),
    Layout("kohya, Flux, with CLIP", "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "flux",
           flux_kohya_text, **_LORA, **_TEXT, says="kohya LoRA, Flux names"),
    Layout("ComfyUI and BFL names, Flux", "diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight", "flux",
           flux_comfy, **_LORA, says="ComfyUI LoRA"),
    Layout("BFL names with PEFT's parts, Flux", "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight", "flux",
           flux_comfy_peft, says="ComfyUI LoRA"),
    Layout("XLabs, Flux", "double_blocks.0.processor.qkv_lora1.down.weight", "flux", flux_xlabs, **_LORA,
           says="XLabs LoRA"),
    Layout("OneTrainer, Flux", "lora_transformer_transformer_blocks_0_attn_to_k.lora_down.weight", "flux", onetrainer,
           **_LORA, says="kohya LoRA, transformer names"),
    Layout("ESD, weights alone", f"….{_AT}.weight", "sd15", esd, says="edited weights, diffusers names"),
    Layout("ESD with the bias of attn2.to_out.0", "….transformer_blocks.0.attn2.to_out.0.bias", "sd15", esd_bias,
           refused="bias='drop'", because="a membrane's edit is of what the input asks for, and a bias has no input",
           options={"bias": "drop"}, says="edited weights, diffusers names"),
    Layout("UCE", f"….{_AT}.weight", "sd15", uce, says="edited weights, diffusers names"),
    Layout("UCE in half precision", f"….{_AT}.weight", "sdxl", uce_half, says="edited weights, diffusers names"),
    Layout("UCE, Flux", "context_embedder.weight", "flux", uce_flux, says="edited weights, diffusers names"),
    Layout("edited weights, Stability's names", f"model.diffusion_model.input_blocks.4.1.{_AT}.weight", "sd15",
           ldm_weights, says="edited weights, original names"),
    Layout("edited weights, ComfyUI's names", f"diffusion_model.input_blocks.4.1.{_AT}.weight", "sdxl", comfy_weights,
           says="edited weights, original names"),
    Layout("a whole edited UNet, diffusers' names", "conv_in.weight", "sd15", whole_unet,
           says="edited weights, diffusers names"),
    Layout("a whole checkpoint", "first_stage_model.….weight", "sd15", whole_checkpoint, refused="whole checkpoint",
           because="it is a model: load it as one"),
    Layout("edited norms", "….norm2.weight", "sd15", edited_norm, refused="belongs to no projection",
           because="a norm is no projection"),
    Layout("kohya, SD 3, original names", "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", "sd3", sd3_kohya,
           refused="matches no module", because="diffusers has no converter for these names"),
    Layout("Flux Control LoRA (BFL)", "double_blocks.0.img_attn.norm.query_norm.scale", "flux", flux_control,
           refused="Control LoRA", because="it replaces norms, too"),
    Layout("LoHa (LyCORIS)", "….hada_w1_a", "sd15", extra(hada_w1_a=noise(1, 4, 4)), refused="LoHa",
           because=f"a Hadamard product is {_LOWER}"),
    Layout("LoKr (LyCORIS)", "….lokr_w1", "sd15", extra(lokr_w1=noise(1, 4, 4)), refused="LoKr",
           because=f"a Kronecker product is {_LOWER}"),
    Layout("DoRA", "….dora_scale", "sd15", dora, refused="DoRA", because="it rescales the whole weight"),
    Layout("PEFT folder, DoRA", "`use_dora`", "sd15", lambda p, f: peft_folder(p, f, use_dora=True), refused="DoRA",
           because="it rescales the whole weight"),
    Layout("PEFT folder, PiSSA", "`init_lora_weights`", "sd15",
           lambda p, f: changed_config(peft_folder(p, f), init_lora_weights="pissa"), refused="base weights",
           because="its base weights differ from the model's"),
    Layout("LoCon: 3x3 convolutions", "….resnets_0_conv1.lora_down.weight", "sd15", convolutions,
           refused="3x3 convolution", because="membranes wrap linear layers and 1x1 convolutions"),
    Layout("LyCORIS full", "….diff", "sd15", extra(diff=noise(1, 4, 4)), refused="differences",
           because="it holds whole differences of weights"),
    Layout("OFT", "….oft_blocks", "sd15", extra(oft_blocks=noise(1, 4, 4, 4)), refused="OFT",
           because="it rotates the whole weight"),
    Layout("textual inversion", "emb_params", "sd15", embedding, refused="textual inversion",
           because="it holds words, no weights"),
    Layout("a pickle", "esd.pt", "sd15", pickle, refused="pickle", because="it can run any code when it is opened"),
    Layout("another architecture", "transformer.transformer_blocks.0.attn.to_k.lora_A.weight", "sd15", other_model,
           refused="belongs to another", because="its modules are not in this model"),
)  # fmt: skip


def changed_config(folder: Path, **settings) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def page() -> str:
    def verdict(layout: Layout) -> str:
        if not layout.refused:
            return "right"
        how = ", ".join(f'`{key}="{value}"`' for key, value in layout.options.items())
        return f"refused, because {layout.because}" + (f"; right without that part: {how}" if how else "")

    rows = "\n".join(f"| {row.name} | `{row.example}` | {verdict(row)} |".replace("``", "`") for row in LAYOUTS)
    right = sum(not row.refused for row in LAYOUTS)
    dropped = sum(bool(row.refused and row.options) for row in LAYOUTS)
    return f"""# Which adapter files load

`import_membranes(pipe, path)`, `semiperm generate --membrane` and `semiperm inspect` read what other tools write: {right}
of these {len(LAYOUTS)} layouts as they stand, {dropped} without a part that no membrane can carry, and the others are refused
with the reason. Names that are not a module's own go through diffusers' converters.

"Right" is tested: each file is built for a small real pipeline, loaded, and its effect on every weight compared with
`pipe.load_lora_weights`, with PEFT, or with the edited weights, to rounding. This page is written by
`python tests/file_layouts.py`, and a test keeps it true.

| written by | a key, or what tells it | loads |
|---|---|---|
{rows}

A LoRA's alpha is read wherever it was written down: `.alpha` beside the tensors, `adapter_config.json` beside the file,
or diffusers' header. Edited weights come in with the edit's own rank: what is below the rounding of the file, or the
noise of the solver that made it, is left out.

**Names.** A file that does not say what it erases (most do not; SPM's and semiperm's do) has no concept that a gate could
compare a prompt with, and its file name is never taken for one: gate `auto` leaves it always on, with a warning. Name it:
`import_membranes(pipe, path, "robot")`, `--concept robot`, or the input `concept` of Load Membrane.

**ComfyUI.** Load Membrane reads membrane, SPM and kohya files. Others become one by `save_membranes(import_membranes(pipe,
path), "mine.safetensors")`.
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
