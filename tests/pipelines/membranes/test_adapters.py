"""Membranes as plain LoRA, and other people's adapters as membranes."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from semiperm.methods.errors import MembraneError, SemipermError
from semiperm.methods.membranes.config import MembraneConfig
from semiperm.methods.membranes.file import save_membranes
from semiperm.methods.membranes.types import LowRank, Membrane
from semiperm.pipelines.family import denoiser_of
from semiperm.pipelines.membranes.adapters import export_lora, import_membranes
from semiperm.pipelines.membranes.apply import apply_membranes, remove_membranes
from semiperm.pipelines.text import module_keys, text_projections
from tiny_models import FAMILIES, build, call

ALWAYS = MembraneConfig(gate="always")
CLOSE = 1e-5  # PEFT adds in another order


def images(pipe):
    return call(pipe, ["a photo of a robot"], negative_prompt=[""])


def distance(a, b):
    return float((a - b).norm() / b.norm())


def membranes(pipe, count=2):
    noise = torch.Generator().manual_seed(0)
    tokens, pooled = text_projections(pipe)
    stack = []
    for k in range(count):
        modules = {}
        for key, module in (tokens | pooled).items():
            out, width = module.weight.shape
            down = torch.randn(k + 1, width, generator=noise) / width**0.5
            modules[key] = LowRank(down, torch.randn(out, k + 1, generator=noise) * 0.3, 1.0)
        stack.append(Membrane(f"concept {k}", modules))
    return stack


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_lora_loads_anywhere(family, tmp_path):
    pipe = build(family)
    stack = membranes(pipe)
    with apply_membranes(pipe, stack, ALWAYS):
        ours = images(pipe)
    file = export_lora(pipe, stack, tmp_path / "erased.safetensors")
    pipe.load_lora_weights(str(file))
    assert distance(images(pipe), ours) < CLOSE
    pipe.unload_lora_weights()
    back = import_membranes(pipe, file, concept="both")
    assert back.concepts == ("both",)
    with apply_membranes(pipe, back, ALWAYS):
        assert distance(images(pipe), ours) < CLOSE


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_membrane_file_itself_is_a_lora(family, tmp_path):
    pipe = build(family)
    stack = membranes(pipe)
    with apply_membranes(pipe, stack, ALWAYS):
        ours = images(pipe)
    file = save_membranes(stack, tmp_path / "erased.safetensors")
    pipe.load_lora_weights(str(file))
    assert distance(images(pipe), ours) < CLOSE


def test_membranes_beside_a_lora(tmp_path):
    pipe = build("sd15")
    first, second = membranes(pipe)
    with apply_membranes(pipe, [first, second], ALWAYS):
        both = images(pipe)
    file = export_lora(pipe, [second], tmp_path / "second.safetensors")
    apply_membranes(pipe, first, ALWAYS)
    alone = images(pipe)
    pipe.load_lora_weights(str(file))  # after: PEFT wraps our hooked layers
    assert distance(images(pipe), both) < CLOSE
    pipe.unload_lora_weights()
    assert distance(images(pipe), alone) < CLOSE
    remove_membranes(pipe)
    pipe.load_lora_weights(str(file))
    apply_membranes(pipe, first, ALWAYS)  # before: our hooks are on PEFT's layers
    assert distance(images(pipe), both) < CLOSE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_edited_weights_come_in_as_membranes(tmp_path, dtype):
    """A UCE or ESD checkpoint: the edited weights alone, under diffusers' names."""
    pipe, edited = build("sd15"), build("sd15")
    tensors = {}
    noise = torch.Generator().manual_seed(1)
    for path, module in edited.unet.named_modules():
        if path.endswith(("attn2.to_k", "attn2.to_v")):
            out, width = module.weight.shape
            module.weight += torch.randn(out, 1, generator=noise) @ torch.randn(1, width, generator=noise) * 0.1
            tensors[f"{path}.weight"] = module.weight.to(dtype).contiguous()
    save_file(tensors, tmp_path / "robot.safetensors")
    stack = import_membranes(pipe, tmp_path / "robot.safetensors", rank=1 if dtype == torch.float16 else None)
    assert stack.concepts == ("robot",) and {pair.rank for pair in stack[0].modules.values()} == {1}
    apply_membranes(pipe, stack, ALWAYS)
    assert distance(images(pipe), images(edited)) < (1e-5 if dtype == torch.float32 else 1e-3)


def test_diffusers_and_kohya_loras_come_in(tmp_path):
    pipe = build("sd15")
    first, _ = membranes(pipe)
    with apply_membranes(pipe, first, ALWAYS):
        ours = images(pipe)
    paths = {key: path for key, (path, _) in module_keys(denoiser_of(pipe)[0], "unet").items()}
    kohya, old = {}, {}
    for key, pair in first.modules.items():
        kohya |= {f"{key}.lora_down.weight": pair.down, f"{key}.lora_up.weight": pair.up * 2}
        kohya[f"{key}.alpha"] = torch.tensor(pair.alpha / 2)
        old |= {f"unet.{paths[key]}.lora.down.weight": pair.down, f"unet.{paths[key]}.lora.up.weight": pair.up}
    for name, tensors in {"kohya": kohya, "old": old}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        stack = import_membranes(pipe, tmp_path / f"{name}.safetensors")
        assert stack.concepts == (name,)
        with apply_membranes(pipe, stack, ALWAYS):
            assert distance(images(pipe), ours) < CLOSE


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"mid_block.attentions.0.nothing.weight": torch.ones(2, 2)}, "matches no module"),
        ({"unet.nothing.lora_A.weight": torch.ones(1, 2)}, "matches no projection"),
        ({"mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.ones(2, 2)}, "wrong base model"),
        ({"mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.full((32, 32), float("nan"))}, "NaN"),
        ({"mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.bias": torch.ones(32)}, "bias"),
        ({"mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": torch.ones(1, 32)}, "incomplete"),
    ],
)
def test_wrong_files_say_so(tensors, says, tmp_path):
    pipe = build("sd15")
    save_file(tensors, tmp_path / "wrong.safetensors")
    with pytest.raises(SemipermError, match=says):
        import_membranes(pipe, tmp_path / "wrong.safetensors")


def test_pickle_and_unchanged_weights_are_refused(tmp_path):
    pipe = build("sd15")
    (tmp_path / "esd.pt").write_bytes(b"\x80")
    with pytest.raises(SemipermError, match="pickle"):
        import_membranes(pipe, tmp_path / "esd.pt")
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    save_file({key: pipe.unet.state_dict()[key].clone()}, tmp_path / "same.safetensors")
    with pytest.raises(MembraneError, match="equal the base model's"):
        import_membranes(pipe, tmp_path / "same.safetensors")


def test_export_needs_membranes_of_this_pipeline(tmp_path):
    pipe = build("sd15")
    with pytest.raises(MembraneError, match="at least one"):
        export_lora(pipe, [], tmp_path / "a.safetensors")
    with pytest.raises(MembraneError, match="wrong pipeline"):
        export_lora(pipe, membranes(build("sd3")), tmp_path / "a.safetensors")
    file = export_lora(pipe, membranes(pipe), tmp_path / "a.safetensors")
    assert all(key.startswith("unet.") for key in load_file(file))
