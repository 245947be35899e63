"""The layouts of adapter files that people have, each built small for a tiny real pipeline.

`LAYOUTS` is what docs/file_layouts.md lists (`page()`); test_file_layouts.py builds each, loads it, and compares.
`python tests/file_layouts.py` writes the page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import adapter_files as files

PAGE = Path(__file__).resolve().parents[1] / "docs" / "file_layouts.md"


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


_TEXT = {"refused": "text_encoder='drop'", "options": {"text_encoder": "drop"},
         "because": "a membrane acts on the denoiser, not on a text encoder"}  # fmt: skip
_LORA = {"reference": "diffusers"}
_UNET, _AT = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0", "transformer_blocks.0.attn2.to_k"
_LOWER = "not low-rank"
LAYOUTS = (
    Layout("semiperm, packed", f"{_UNET}_attn2_to_k.lora_down.weight`, metadata `semiperm", "sd15", files.ours,
           "diffusers", says="semiperm membranes"),
    Layout("SPM", f"{_UNET}_attn2_to_k.lora_down.weight`, metadata `prompts", "sd15", files.spm, **_LORA, says="SPM"),
    Layout("kohya, SD 1.x", f"{_UNET}_attn2_to_k.lora_down.weight", "sd15", files.kohya_unet, **_LORA,
           says="kohya LoRA"),
    Layout("kohya, SD 2.x", f"{_UNET}_attn2_to_k.lora_down.weight", "sd2", files.kohya_unet, **_LORA,
           says="kohya LoRA"),
    Layout("kohya, SD 1.x, with the text encoder", "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
           "sd15", files.kohya_with_text, **_LORA, **_TEXT, says="kohya LoRA"),
    Layout("kohya, SDXL, SGM names", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight",
           "sdxl", files.sgm, **_LORA, says="kohya LoRA, SGM names"),
    Layout("kohya, SDXL, with both text encoders", "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
           "sdxl", files.sgm_with_text, **_LORA, **_TEXT, says="kohya LoRA, SGM names"),
    Layout("ComfyUI's own, SDXL", f"diffusion_model.input_blocks.4.1.{_AT}.lora_up.weight", "sdxl", files.comfy_dotted,
           says="ComfyUI LoRA"),
    Layout("diffusers, attention processors", "unet.….attn1.processor.to_k_lora.down.weight", "sd15",
           files.old_processors, **_LORA, says="diffusers LoRA, attention processors"),
    Layout("diffusers, before PEFT", f"unet.….{_AT}.lora.down.weight", "sd15", files.diffusers_old, **_LORA,
           says="diffusers LoRA"),
    Layout("diffusers, SD 1.x", f"unet.….{_AT}.lora_A.weight", "sd15", files.diffusers_peft, **_LORA,
           says="diffusers LoRA, PEFT names"),
    Layout("diffusers, SDXL", f"unet.….{_AT}.lora_A.weight", "sdxl", files.diffusers_peft, **_LORA,
           says="diffusers LoRA, PEFT names"),
    Layout("diffusers, with alpha in the header", "lora_adapter_metadata", "sd15", files.diffusers_metadata,
           **_LORA, says="diffusers LoRA, PEFT names"),
    Layout("diffusers, with the text encoder", "text_encoder.text_model.….lora_A.weight", "sd15",
           files.diffusers_with_text, **_LORA, **_TEXT, says="diffusers LoRA, PEFT names"),
    Layout("PEFT folder", f"base_model.model.….{_AT}.lora_A.weight`, `adapter_config.json", "sd15", files.peft_folder,
           "peft", says="PEFT LoRA"),
    Layout("PEFT folder, rank and alpha by pattern", "rank_pattern`, `alpha_pattern", "sdxl", files.peft_patterns,
           "peft", says="PEFT LoRA"),
    Layout("PEFT folder, rank-stabilised", "use_rslora", "sd3", lambda p, f: files.peft_folder(p, f, use_rslora=True),
           "peft", says="PEFT LoRA"),
    Layout("diffusers, SD 3", "transformer.transformer_blocks.0.attn.to_k.lora_A.weight", "sd3", files.diffusers_peft,
           **_LORA, says="diffusers LoRA, PEFT names"),
    Layout("diffusers, SD 3, with alpha in the header", "lora_adapter_metadata", "sd3", files.diffusers_metadata,
           **_LORA, says="diffusers LoRA, PEFT names"),
    Layout("diffusers and ai-toolkit, Flux", "transformer.transformer_blocks.0.attn.to_k.lora_A.weight", "flux",
           files.diffusers_peft, **_LORA, says="diffusers LoRA, PEFT names"),
    Layout("kohya, Flux", "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "flux", files.flux_kohya, **_LORA,
           says="kohya LoRA, Flux names"),
    Layout("kohya, Flux, with CLIP", "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "flux",
           files.flux_kohya_text, **_LORA, **_TEXT, says="kohya LoRA, Flux names"),
    Layout("ComfyUI and BFL names, Flux", "diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight", "flux",
           files.flux_comfy, **_LORA, says="ComfyUI LoRA"),
    Layout("BFL names with PEFT's parts, Flux", "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight", "flux",
           files.flux_comfy_peft, says="ComfyUI LoRA"),
    Layout("XLabs, Flux", "double_blocks.0.processor.qkv_lora1.down.weight", "flux", files.flux_xlabs, **_LORA,
           says="XLabs LoRA"),
    Layout("OneTrainer, Flux", "lora_transformer_transformer_blocks_0_attn_to_k.lora_down.weight", "flux",
           files.onetrainer, **_LORA, says="kohya LoRA, transformer names"),
    Layout("ESD, weights alone", f"….{_AT}.weight", "sd15", files.esd, says="edited weights, diffusers names"),
    Layout("ESD with the bias of attn2.to_out.0", "….transformer_blocks.0.attn2.to_out.0.bias", "sd15", files.esd_bias,
           refused="bias='drop'", because="a membrane's edit is of what the input asks for, and a bias has no input",
           options={"bias": "drop"}, says="edited weights, diffusers names"),
    Layout("UCE", f"….{_AT}.weight", "sd15", files.uce, says="edited weights, diffusers names"),
    Layout("UCE in half precision", f"….{_AT}.weight", "sdxl", files.uce_half, says="edited weights, diffusers names"),
    Layout("UCE, Flux", "context_embedder.weight", "flux", files.uce_flux, says="edited weights, diffusers names"),
    Layout("edited weights, Stability's names", f"model.diffusion_model.input_blocks.4.1.{_AT}.weight", "sd15",
           files.ldm_weights, says="edited weights, original names"),
    Layout("edited weights, ComfyUI's names", f"diffusion_model.input_blocks.4.1.{_AT}.weight", "sdxl",
           files.comfy_weights, says="edited weights, original names"),
    Layout("a whole edited UNet, diffusers' names", "conv_in.weight", "sd15", files.whole_unet,
           says="edited weights, diffusers names"),
    Layout("a whole checkpoint", "first_stage_model.….weight", "sd15", files.whole_checkpoint,
           refused="whole checkpoint", because="it is a model: load it as one"),
    Layout("edited norms", "….norm2.weight", "sd15", files.edited_norm, refused="belongs to no projection",
           because="a norm is no projection"),
    Layout("kohya, SD 3, original names", "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", "sd3",
           files.sd3_kohya, refused="matches no module", because="diffusers has no converter for these names"),
    Layout("Flux Control LoRA (BFL)", "double_blocks.0.img_attn.norm.query_norm.scale", "flux", files.flux_control,
           refused="Control LoRA", because="it replaces norms, too"),
    Layout("LoHa (LyCORIS)", "….hada_w1_a", "sd15", files.extra(hada_w1_a=files.noise(1, 4, 4)), refused="LoHa",
           because=f"a Hadamard product is {_LOWER}"),
    Layout("LoKr (LyCORIS)", "….lokr_w1", "sd15", files.extra(lokr_w1=files.noise(1, 4, 4)), refused="LoKr",
           because=f"a Kronecker product is {_LOWER}"),
    Layout("DoRA", "….dora_scale", "sd15", files.dora, refused="DoRA", because="it rescales the whole weight"),
    Layout("PEFT folder, DoRA", "use_dora", "sd15", lambda p, f: files.peft_folder(p, f, use_dora=True), refused="DoRA",
           because="it rescales the whole weight"),
    Layout("PEFT folder, PiSSA", "init_lora_weights", "sd15",
           lambda p, f: files.changed_config(files.peft_folder(p, f), init_lora_weights="pissa"),
           refused="base weights", because="its base weights differ from the model's"),
    Layout("LoCon: 3x3 convolutions", "….resnets_0_conv1.lora_down.weight", "sd15", files.convolutions,
           refused="3x3 convolution", because="membranes wrap linear layers and 1x1 convolutions"),
    Layout("LyCORIS full", "….diff", "sd15", files.extra(diff=files.noise(1, 4, 4)), refused="differences",
           because="it holds whole differences of weights"),
    Layout("OFT", "….oft_blocks", "sd15", files.extra(oft_blocks=files.noise(1, 4, 4, 4)), refused="OFT",
           because="it rotates the whole weight"),
    Layout("textual inversion", "emb_params", "sd15", files.embedding, refused="textual inversion",
           because="it holds words, no weights"),
    Layout("a pickle", "esd.pt", "sd15", files.pickle, refused="pickle",
           because="it can run any code when it is opened"),
    Layout("another architecture", "transformer.transformer_blocks.0.attn.to_k.lora_A.weight", "sd15",
           files.other_model, refused="belongs to another", because="its modules are not in this model"),
)  # fmt: skip


def page() -> str:
    def verdict(layout: Layout) -> str:
        if not layout.refused:
            return "right"
        how = ", ".join(f'`{key}="{value}"`' for key, value in layout.options.items())
        return f"refused, because {layout.because}" + (f"; right without that part: {how}" if how else "")

    rows = "\n".join(f"| {row.name} | `{row.example}` | {verdict(row)} |" for row in LAYOUTS)
    right = sum(not row.refused for row in LAYOUTS)
    dropped = sum(bool(row.refused and row.options) for row in LAYOUTS)
    return f"""# Which adapter files load

`import_membranes(pipe, path)`, `semiperm generate --membrane` and `semiperm inspect` read what other tools write:
{right} of these {len(LAYOUTS)} layouts as they stand, {dropped} without a part that no membrane can carry; the
others are refused with the reason. Names that are not a module's own go through diffusers' converters.

"Right" is tested: each file is built for a small real pipeline, loaded, and its effect on every weight compared with
`pipe.load_lora_weights`, with PEFT, or with the edited weights, to rounding. This page is written by
`python tests/file_layouts.py`, and a test keeps it true.

| written by | a key, or what tells it | loads |
|---|---|---|
{rows}

A LoRA's alpha is read wherever it was written down: `.alpha` beside the tensors, `adapter_config.json` beside the file,
or diffusers' header. Edited weights come in with the edit's own rank: what is below the rounding of the file, or the
noise of the solver that made it, is left out.

**Names.** A file that does not say what it erases (most do not; SPM's and semiperm's do) has no concept that a gate
could compare a prompt with, and its file name is never taken for one: gate `auto` leaves it always on, with a warning.
Name it: `import_membranes(pipe, path, "robot")`, `--concept robot`, or the input `concept` of Load Membrane.

**ComfyUI.** Load Membrane reads membrane, SPM and kohya files. Any other becomes one by
`save_membranes(import_membranes(pipe, path), "mine.safetensors")`.
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
