"""Every layout of docs/file_layouts.md: built, loaded, its effect compared with diffusers', PEFT's or the weights."""

import pytest
import torch
from adapter_files import denoiser, original
from file_layouts import LAYOUTS, PAGE, Layout, page
from safetensors.torch import load_file, save_file
from semiperm.methods.errors import SemipermError
from semiperm.methods.membranes.layouts import read_adapter
from semiperm.methods.membranes.packing import pack
from semiperm.pipelines.membranes.adapters import import_membranes
from semiperm.pipelines.text import module_keys
from tiny_models import build

TO_ROUNDING = 2e-6  # of a delta's norm: float32 products of one file in another order


def ours(pipe, stack) -> dict[str, torch.Tensor]:
    """What membranes with open gates add to each weight."""
    attribute = "unet" if hasattr(pipe, "unet") else "transformer"
    keys = module_keys(denoiser(pipe), attribute)
    deltas = {}
    for key in stack.module_keys:
        down, up, _ = pack(stack, key)
        deltas[keys[key][0]] = up.T.double() @ down.double()
    return deltas


def by_diffusers(pipe, path) -> dict[str, torch.Tensor]:
    pipe.load_lora_weights(str(path))
    return by_peft_layers(denoiser(pipe))


def by_peft(pipe, folder) -> dict[str, torch.Tensor]:
    from peft import PeftModel

    return by_peft_layers(PeftModel.from_pretrained(denoiser(pipe), str(folder)).base_model.model)


def by_peft_layers(model) -> dict[str, torch.Tensor]:
    from peft.tuners.lora import LoraLayer

    layers = {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {
        path: layer.get_delta_weight(next(iter(layer.lora_A))).detach().flatten(1).double()
        for path, layer in layers.items()
    }


def by_weights(pipe, path) -> dict[str, torch.Tensor]:
    """Edited weights, put into the model by their names."""
    state, found = denoiser(pipe).state_dict(), {}
    names = {name: name for name in state}
    if hasattr(pipe, "unet"):
        names |= {original(pipe, name): name for name in state if "attentions" in name}
    for key, tensor in load_file(path).items():
        name = names[key.removeprefix("model.").removeprefix("diffusion_model.")]
        if name.endswith(".weight") and not torch.equal(tensor, state[name].to(tensor.dtype)):
            delta = tensor.double() - state[name].to(tensor.dtype).double()
            found[name.removesuffix(".weight")] = delta.flatten(1)
    return found


def by_hand(pipe, path) -> dict[str, torch.Tensor]:
    """LoRA layouts that diffusers' loader does not take as they are: their twin that it does."""
    twin = path.with_name("twin.safetensors")
    tensors = {}
    for key, tensor in load_file(path).items():
        where, _, leaf = key.removeprefix("diffusion_model.").partition(".lora_")
        where, leaf = (where, f"lora_{leaf}") if leaf else (where.removesuffix(".alpha"), "alpha")
        leaf = leaf.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        tensors[f"lora_unet_{where.replace('.', '_')}.{leaf}"] = tensor
    save_file(tensors, twin)
    return by_diffusers(pipe, twin)


def expected(layout: Layout, pipe, path) -> dict[str, torch.Tensor]:
    if layout.reference == "diffusers":
        return by_diffusers(pipe, path)
    if layout.reference == "peft":
        return by_peft(pipe, path)
    return by_weights(pipe, path) if layout.says.startswith("edited") else by_hand(pipe, path)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_layout_is_right_or_refused(layout, tmp_path):
    path = layout.build(build(layout.family), tmp_path / "file")
    pipe = build(layout.family)
    if layout.refused:
        with pytest.raises(SemipermError, match=layout.refused) as refusal:
            import_membranes(pipe, path)
        assert len(str(refusal.value).splitlines()) == 1 and path.name.split(".")[0] in str(refusal.value)
    if layout.refused and not layout.options:
        return
    stack = import_membranes(pipe, path, **layout.options)
    found, right = ours(pipe, stack), expected(layout, build(layout.family), path)
    assert found.keys() == right.keys()
    tolerance = 1e-3 if "half" in layout.name else TO_ROUNDING
    for where, delta in right.items():
        assert float((found[where] - delta).norm() / delta.norm()) < tolerance, where
    if layout.says != "semiperm membranes":
        assert read_adapter(path).layout == layout.says


def test_the_page_is_this_table():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/file_layouts.py"
    assert len(LAYOUTS) >= 30
