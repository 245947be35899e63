"""Membranes as plain LoRA, and other people's adapters as membranes."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from semiperm.methods.errors import MembraneError, SemipermError
from semiperm.methods.membranes.config import MembraneConfig
from semiperm.methods.membranes.file import load_membranes, save_membranes
from semiperm.methods.membranes.types import LowRank, Membrane
from semiperm.methods.membranes.weight_edit import membrane_from_weights
from semiperm.pipelines.family import denoiser_of
from semiperm.pipelines.membranes.adapters import export_lora, import_membranes
from semiperm.pipelines.membranes.apply import apply_membranes, remove_membranes
from semiperm.pipelines.text import module_keys, text_projections
from tiny_models import FAMILIES, build, call

ALWAYS = MembraneConfig(gate="always", negative_rows=True)  # as a LoRA acts: on every row
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
    stack = import_membranes(pipe, tmp_path / "robot.safetensors")
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
        (
            {"unet.no.lora_A.weight": torch.ones(1, 2), "unet.no.lora_B.weight": torch.ones(2, 1)},
            "matches no module of this",
        ),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("concepts", [1, 3])
def test_uce_comes_in_at_its_true_rank(concepts, dtype):
    """UCE as its code computes it: in float32, by an inverse of bad condition, then saved in the file's precision."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(320, 768, generator=generator) / 768**0.5
    directions = torch.randn(2 * concepts + 20, 768, generator=generator)
    directions *= 27 / directions.norm(dim=1, keepdim=True)  # the length of CLIP's embeddings
    erased, targets, kept = directions.split([concepts, concepts, 20])
    wanted, gram = 0.5 * base, 0.5 * torch.eye(768)
    for c, v in [*zip(erased, targets, strict=True), *zip(kept, kept, strict=True)]:
        wanted, gram = wanted + torch.outer(base @ v, c), gram + torch.outer(c, c)
    after = (wanted @ torch.inverse(gram)).to(dtype)
    before = base.to(dtype).float()
    (pair,) = membrane_from_weights({"lora_unet_x": before}, {"lora_unet_x": after}, "robot").modules.values()
    assert pair.rank == concepts
    delta = after.double() - before.double()
    left_out = (pair.scale * pair.up.double() @ pair.down.double() - delta).norm()
    # rounding of W in the file's precision, or the noise of the solver
    assert left_out < max(torch.finfo(dtype).eps * base.norm(), 0.003 * delta.norm())


def test_a_float32_edit_on_a_half_precision_pipeline_keeps_its_rank(tmp_path):
    pipe, half = build("sd15"), build("sd15", dtype=torch.float16)
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    state = pipe.unet.state_dict()
    edit = torch.outer(torch.linspace(-1, 1, 32), torch.linspace(1, 2, 32)) * 0.1
    tensors = {f"{key}.weight": state[f"{key}.weight"] + edit}
    tensors |= {f"{key[:-1]}q.weight": state[f"{key[:-1]}q.weight"].clone()}  # untouched: float16 rounds it
    save_file(tensors, tmp_path / "uce.safetensors")
    (membrane,) = import_membranes(half, tmp_path / "uce.safetensors", "robot")
    (pair,) = membrane.modules.values()
    assert pair.rank == 1
    torch.testing.assert_close(pair.up @ pair.down, edit, rtol=0, atol=1e-3)


def test_fine_tuned_weights_keep_their_whole_rank():
    base = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) / 8
    for seed in range(20):  # the smallest singular value of a square matrix is often far below its neighbour
        moved = base + torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)) * 0.01
        (pair,) = membrane_from_weights({"x": base}, {"x": moved}, "robot").modules.values()
        torch.testing.assert_close(pair.up @ pair.down, moved - base, rtol=0, atol=1e-6)


def nameless(pipe, folder):
    first, _ = membranes(pipe)
    tensors = {}
    for key, pair in first.modules.items():
        tensors |= {f"{key}.lora_down.weight": pair.down, f"{key}.lora_up.weight": pair.up}
    save_file(tensors, folder / "my_export_v2-000010.safetensors")
    return folder / "my_export_v2-000010.safetensors"


@pytest.mark.parametrize("gate", ["auto", "paper", "official"])
def test_a_files_name_is_no_concept(gate, tmp_path, caplog):
    pipe = build("sd15")
    stack = import_membranes(pipe, nameless(pipe, tmp_path))
    assert not stack[0].named and stack[0].phrases == ()
    with apply_membranes(pipe, stack, ALWAYS):
        right = images(pipe)
    with apply_membranes(pipe, stack, MembraneConfig(gate=gate, negative_rows=True)) as handle:
        assert "always on" in caplog.text and "concept=" in caplog.text
        assert torch.equal(images(pipe), right)
        assert all(row["gamma"] == {"my_export_v2-000010": 1.0} for row in handle.report()["rows"])
    again = load_membranes(save_membranes(stack, tmp_path / "again.safetensors"))
    assert not again[0].named and again[0].phrases == ()


def test_a_named_file_is_gated(tmp_path, caplog):
    pipe = build("sd15")
    stack = import_membranes(pipe, nameless(pipe, tmp_path), "cat")
    assert stack[0].named and stack[0].phrases == ("cat",)
    with apply_membranes(pipe, stack) as handle:
        call(pipe, ["the dog runs"])
        opened = [row["gamma"]["cat"] for row in handle.report()["rows"]]
    assert min(opened) < 1 and "always on" not in caplog.text
    assert load_membranes(nameless(pipe, tmp_path), "cat").concepts == ("cat",)


def test_fused_projections_of_a_whole_flux(tmp_path):
    """linear1 of a single block holds q, k, v and the MLP; diffusers' converter knows it at the real width alone."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    with torch.device("meta"):
        transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    parts = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipe = FluxPipeline(**dict.fromkeys(parts), transformer=transformer)
    down, up = torch.randn(2, 3072), torch.randn(3 * 3072 + 12288, 2)
    name = "lora_unet_single_blocks_0_linear1"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(4.0)}
    final = {"lora_unet_final_layer_linear.lora_down.weight": torch.ones(2, 3072)}
    final |= {"lora_unet_final_layer_linear.lora_up.weight": torch.ones(64, 2)}
    final |= {"lora_unet_final_layer_linear.alpha": torch.tensor(4.0)}  # which the converter drops
    save_file(tensors | final, tmp_path / "flux.safetensors")
    (membrane,) = import_membranes(pipe, tmp_path / "flux.safetensors", "robot")
    ends = ("attn_to_q", "attn_to_k", "attn_to_v", "proj_mlp")
    where = [f"lora_transformer_single_transformer_blocks_0_{end}" for end in ends]
    delta = torch.cat(
        [membrane.modules[key].scale * membrane.modules[key].up @ membrane.modules[key].down for key in where]
    )
    torch.testing.assert_close(delta, 2 * up @ down)
    last = membrane.modules["lora_transformer_proj_out"]
    torch.testing.assert_close(last.scale * last.up @ last.down, torch.full((64, 3072), 4.0))


def test_two_spellings_of_one_module_must_agree(tmp_path):
    pipe = build("sdxl")
    tensors = {}
    for where in ("lora_unet_input_blocks_3_1_proj_in", "lora_unet_down_blocks_1_attentions_0_proj_in"):
        tensors |= {f"{where}.lora_down.weight": torch.ones(1, 32), f"{where}.lora_up.weight": torch.ones(32, 1)}
    save_file(tensors, tmp_path / "both.safetensors")
    assert len(import_membranes(pipe, tmp_path / "both.safetensors")[0].modules) == 1
    save_file(tensors | {f"{where}.lora_up.weight": torch.zeros(32, 1)}, tmp_path / "both.safetensors")
    with pytest.raises(MembraneError, match="twice"):
        import_membranes(pipe, tmp_path / "both.safetensors")


def test_peft_without_its_configuration_says_so(tmp_path, caplog):
    key = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    pair = {f"{key}.lora_A.weight": torch.ones(2, 32), f"{key}.lora_B.weight": torch.ones(32, 2)}
    save_file(pair, tmp_path / "alone.safetensors")
    (membrane,) = import_membranes(build("sd15"), tmp_path / "alone.safetensors", "robot")
    assert next(iter(membrane.modules.values())).scale == 1 and "no adapter_config.json" in caplog.text


def test_what_no_membrane_carries_is_never_dropped_silently(tmp_path):
    pipe = build("sd15")
    pair = {"lora_A.weight": torch.ones(1, 32), "lora_B.weight": torch.ones(64, 1)}
    te = {f"text_encoder.text_model.encoder.layers.0.mlp.fc1.{k}": t for k, t in pair.items()}
    save_file(te, tmp_path / "te.safetensors")
    with pytest.raises(MembraneError, match="text_encoder='drop' .--text-encoder drop"):
        import_membranes(pipe, tmp_path / "te.safetensors")
    with pytest.raises(MembraneError, match="text encoder alone"):
        import_membranes(pipe, tmp_path / "te.safetensors", text_encoder="drop")
    with pytest.raises(MembraneError, match="'refuse' or 'drop'"):
        import_membranes(pipe, tmp_path / "te.safetensors", text_encoder="yes")
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    pair = {f"{key}.lora_A.weight": torch.ones(1, 32), f"{key}.lora_B.weight": torch.ones(32, 1)}
    save_file(pair | {f"{key}.lora_B.bias": torch.ones(32)}, tmp_path / "bias.safetensors")
    with pytest.raises(MembraneError, match="bias='drop'"):
        import_membranes(pipe, tmp_path / "bias.safetensors")
    assert len(import_membranes(pipe, tmp_path / "bias.safetensors", bias="drop")[0].modules) == 1


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
