"""A layer's true weight, however it is stored; or a refusal that names the reason."""

import accelerate
import pytest
import torch
from contracts.membranes import strong
from peft import LoraConfig
from semiperm.methods.errors import ModelError
from semiperm.methods.membranes.base_model import base_model_distance
from semiperm.methods.membranes.config import MembraneConfig
from semiperm.pipelines.membranes.apply import apply_membranes, remove_membranes
from semiperm.pipelines.membranes.erase import erase_concepts
from semiperm.pipelines.text import module_keys
from semiperm.pipelines.weights import weight_of
from tiny_models import LENGTH, build, call
from torch import nn

ERASE = {
    "surrogate": "cat",
    "templates": ("a photo of a {}", "a painting of a {} in the garden"),
    "preserve": ("a photo of a cat", "a dog by the river"),
    "max_sequence_length": LENGTH,
}
CPU = torch.device("cpu")


class Eightbit(nn.Linear):
    """A linear of integers and a scale for each output, as 8-bit formats are."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def linear(bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias).requires_grad_(False)
    if bias:
        layer.bias.mul_(50)  # far larger than the weights: what rounds it must not reach them
    return layer


def eightbit(layer):
    return Eightbit(layer), (Eightbit(layer).weight * Eightbit(layer).scale)


def layerwise(layer):
    from diffusers.hooks import apply_layerwise_casting

    expected = layer.weight.to(torch.float8_e4m3fn).float()
    apply_layerwise_casting(layer, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=())
    assert layer.weight.dtype == torch.float8_e4m3fn
    return layer, expected


def offloaded(layer):
    expected = layer.weight.clone()
    accelerate.cpu_offload(layer, CPU)
    assert layer.weight.is_meta
    return layer, expected


def torchao(layer):
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(layer)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model[0], model[0].weight.dequantize()


def gguf(layer):
    pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter, dequantize_gguf_tensor
    from gguf import GGMLQuantizationType, quantize

    wide = nn.Linear(64, 40, bias=layer.bias is not None).requires_grad_(False)  # blocks of 32
    packed = torch.from_numpy(quantize(wide.weight.numpy(), GGMLQuantizationType.Q8_0))
    made = GGUFLinear(64, 40, bias=wide.bias is not None, compute_dtype=torch.float32)
    made.weight = GGUFParameter(packed, quant_type=GGMLQuantizationType.Q8_0)
    made.bias = wide.bias
    return made, dequantize_gguf_tensor(made.weight).float()


def nf4(layer):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    wide = nn.Linear(64, 64, bias=layer.bias is not None).requires_grad_(False)
    made = bitsandbytes.nn.Linear4bit(64, 64, bias=wide.bias is not None, compute_dtype=torch.float32, quant_type="nf4")
    made.load_state_dict(wide.state_dict())
    made = made.to(CPU)
    if made.weight.quant_state is None:
        made.weight = made.weight._quantize(CPU)
    return made, bitsandbytes.functional.dequantize_4bit(made.weight.data, made.weight.quant_state).float()


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("made", [eightbit, layerwise, offloaded, torchao, gguf, nf4])
def test_the_weight_is_what_the_layer_multiplies_by(made, bias):
    layer, expected = made(linear(bias))
    found = weight_of(layer, "to_k", torch.float32, CPU)
    torch.testing.assert_close(found, expected.float(), atol=2e-6, rtol=1e-4)


def test_plain_weights_are_their_own_tensors():
    layer = linear(True)
    assert weight_of(layer, "to_k", torch.float32, CPU).data_ptr() == layer.weight.data_ptr()
    conv = nn.Conv2d(4, 6, 1)
    assert weight_of(conv, "proj", torch.float32, CPU).shape == (6, 4, 1, 1)


class Bent(Eightbit):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: linear(False).to("meta"), "meta device"),
        (lambda: Bent(linear(False)), "not linear"),
        (lambda: Broken(linear(False)), "needs a GPU"),
    ],
)
def test_what_cannot_be_seen_is_refused_with_its_reason(made, says):
    with pytest.raises(ModelError, match=says):
        weight_of(made(), "to_k", torch.float32, CPU)


class Broken(Eightbit):
    def forward(self, x):
        raise RuntimeError("this format needs a GPU")


# ---- on pipelines ----------------------------------------------------------------------------------------------------


def eight_bits(pipe):
    for name, module in list(pipe.unet.named_modules()):
        for child, layer in list(module.named_children()):
            if "attn2" in name and type(layer) is nn.Linear:
                setattr(module, child, Eightbit(layer))


def cast(pipe):
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def sequential(pipe):
    accelerate.cpu_offload(pipe.unet, CPU)


@pytest.mark.parametrize("store", [eight_bits, cast, sequential], ids=lambda f: f.__name__)
def test_erasing_on_stored_weights_does_what_it_does_on_plain_ones(store):
    plain, pipe = build("sd15"), build("sd15")
    expected = erase_concepts(plain, "robot", **ERASE)
    store(pipe)
    found = erase_concepts(pipe, "robot", **ERASE)
    assert base_model_distance(expected[0].base_model, found[0].base_model) <= 4
    for key, pair in expected[0].modules.items():
        other = found[0].modules[key]
        # float8 keeps 4 bits
        assert (other.up @ other.down - pair.up @ pair.down).norm() < 0.1 * (pair.up @ pair.down).norm(), key
    images = []
    for each, membranes in ((plain, expected), (pipe, found), (pipe, expected)):
        with apply_membranes(each, membranes, MembraneConfig(gate="always")):
            images.append(call(each, ["a robot"], negative_prompt=[""]))
    bare = [call(each, ["a robot"], negative_prompt=[""]) for each in (plain, pipe)]
    moved = [(image - other).norm() for image, other in zip(images[:2], bare, strict=True)]
    assert 0.7 < moved[1] / moved[0] < 1.4 and (images[1] - images[2]).norm() < 0.3 * moved[0]


# ---- LoRAs that come, go and are fused -------------------------------------------------------------------------------


def with_lora(pipe, seed=1):
    torch.manual_seed(seed)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v", "to_q"], init_lora_weights=False), "style")


def run(pipe):
    return call(pipe, ["a photo of a robot"], negative_prompt=["a cat"])


def close(a, b):
    torch.testing.assert_close(a, b, atol=3e-5, rtol=1e-3)


@pytest.mark.parametrize("mode", ["auto", "fused", "folded", "cached"])
def test_loras_after_apply_are_seen(mode):
    pipe, other = build("sd15"), build("sd15")
    config = MembraneConfig(gate="always", mode=mode, negative_rows=True)
    stack = strong(pipe)
    with_lora(other)
    apply_membranes(other, stack, config)
    expected = run(other)
    handle = apply_membranes(pipe, stack, config)
    first = run(pipe)
    with_lora(pipe)
    close(run(pipe), expected)
    assert not handle.report()["idle_modules"]
    pipe.unet.fuse_lora()
    close(run(pipe), expected)
    pipe.unet.unfuse_lora()
    close(run(pipe), expected)
    pipe.unet.set_adapters(["style"], [0.5])
    other.unet.set_adapters(["style"], [0.5])
    half = run(other)
    close(run(pipe), half)
    assert not torch.allclose(half, expected, atol=1e-3)
    pipe.unet.fuse_lora()
    close(run(pipe), half)
    pipe.unet.unload_lora()  # what was fused stays
    close(run(pipe), half)
    remove_membranes(pipe)
    other.unet.unload_lora()
    close(run(other), first)
    assert not handle.report()["idle_modules"]


def test_a_lora_changes_neither_keys_nor_fingerprint():
    pipe = build("sd15")
    keys = set(module_keys(pipe.unet, "unet"))
    before = erase_concepts(pipe, "robot", **ERASE)
    with_lora(pipe)
    assert set(module_keys(pipe.unet, "unet")) == keys
    assert erase_concepts(pipe, "robot", **ERASE)[0].base_model == before[0].base_model
    apply_membranes(pipe, before).remove()
