"""Negative token merging in ComfyUI: the nodes without it, the surgery in ComfyUI's own Python."""

import importlib
import importlib.util
import sys
from types import SimpleNamespace

import comfy_stub
import pytest
import torch
from comfy_server import in_comfyui
from safetensors.torch import save_file

comfy = pytest.mark.comfy
NEAR = 1e-2  # of latents up to 30: rows in another batch are rounded otherwise


# ---- without ComfyUI ------------------------------------------------------------------------------------------------


@pytest.fixture
def nodes(tmp_path):
    with comfy_stub.stand_in(tmp_path):
        yield importlib.import_module("semiperm.nodes.token_merging.node")


def made_up(**changes) -> dict:
    rows = [{"kind": "positive", "image": 0, "pushed": 0.25}, {"kind": "negative", "image": 0, "pushed": 0.0}]
    steps = [{"share": i / 10, "sigma": 14.0 - i, "active": i < 4} for i in range(10)]
    found = {"rows": rows, "steps": steps, "extra_rows": 4, "mode": "reference", "references": 1}
    return found | {"strength": 0.9, "threshold": 0.65, "window": [0.0, 0.4]} | changes


def test_the_nodes_pass_everything_on(nodes, monkeypatch):
    calls = []

    def apply_token_merging_to(model, *inputs):
        calls.append((model, dict(inputs)))
        return f"patched {model}"

    surgery = SimpleNamespace(
        apply_token_merging_to=apply_token_merging_to,
        from_inputs=lambda **inputs: inputs.items(),
        report_of=lambda model, samples: made_up(),
    )
    monkeypatch.setitem(sys.modules, "semiperm.nodes.token_merging.patch", surgery)
    assert nodes.SemipermNegativeTokenMerging.execute("M", strength=1.0, end=0.4).args == ("patched M",)
    nodes.SemipermNegativeTokenMergingAdvanced.execute("M", strength=1.0, image="I", vae="V", blocks="output_blocks")
    assert calls == [
        ("M", {"strength": 1.0, "end": 0.4}),
        ("M", {"strength": 1.0, "image": "I", "vae": "V", "blocks": "output_blocks"}),
    ]
    latent = {"samples": torch.zeros(1, 4, 2, 2)}
    output = nodes.SemipermTokenMergingReport.execute("M", latent)
    assert output.args[0] is latent and output.ui.as_dict()["text"] == (output.args[1],)


def test_report_text(nodes):
    lines = nodes.report_text(made_up()).splitlines()
    assert lines[0] == "away from 1 reference image: strength 0.9, threshold 0.65"
    assert lines[1] == "window 0 to 0.4: active in 4 of 10 steps, sigma 14 to 5"
    assert lines[2] == "4 extra rows denoised"
    assert [line.split() for line in lines[5:]] == [["0", "positive", "25.0", "%"], ["0", "negative", "0.0", "%"]]
    assert "the images of the batch" in nodes.report_text(made_up(references=0))
    idle = [{"share": 0.9, "sigma": 1.0, "active": False}]
    assert "nothing was pushed" in nodes.report_text(made_up(steps=idle, rows=[]))
    unlike = [{"kind": "positive", "image": 0, "pushed": 0.0}]
    assert nodes.report_text(made_up(rows=unlike)).endswith("lower threshold")


class Model:
    """A ModelPatcher as far as the root patch needs one."""

    def __init__(self, forward):
        self.forward = forward

    def get_model_object(self, name):
        return self.forward

    def add_object_patch(self, name, forward):
        self.forward = forward


def test_patches_that_add_rows_stand_outside_whoever_came_first(nodes):
    root = importlib.import_module("semiperm.nodes.root_patch")

    def named(name):
        return lambda original: lambda seen: original([*seen, name])

    orders = (["look", "look 2", "add"], ["look", "add", "look 2"], ["add", "look", "look 2"])
    for order in orders:
        model = Model(lambda seen: seen)
        for name in order:
            root.add_root(model, named(name), adds_rows=name == "add")
        assert model.forward([]) == ["add", "look 2", "look"]
    before = model.forward
    root.add_root(model, named("add 2"), adds_rows=True)
    assert model.forward([]) == ["add 2", "add", "look 2", "look"]
    assert before([]) == ["add", "look 2", "look"], "a clone made before keeps its own"


# ---- in ComfyUI's Python --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What check_token_merging.py measured, given diffusers' latents of the same noise and reference."""
    from semiperm.canvas import load_pipeline
    from semiperm.methods.token_merging.config import NegativeTokenMergingConfig
    from semiperm.pipelines.token_merging.apply import apply_negative_token_merging

    pipe = load_pipeline()
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    reference = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(8))
    wide = {"threshold": -1.0, "end": 0.1, "blocks": ("",)}
    config = NegativeTokenMergingConfig(reference=reference, strength=1.0, seed=5, **wide)
    apply_negative_token_merging(pipe, config)
    prompt = ["a one eyed plush in striped style on sky", "a dotted picture of a robot on a sand background"]
    call = {"num_inference_steps": 20, "guidance_scale": 4.0, "output_type": "latent"}
    merged = pipe(prompt, latents=noise, **call).images / pipe.vae.config.scaling_factor
    kept = torch.cat(
        [pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps], pipe.scheduler.final_alpha_cumprod[None]]
    )
    path = tmp_path_factory.mktemp("comfy") / "given.safetensors"
    tensors = {"noise": noise, "reference": reference, "sigmas": ((1 - kept) / kept).sqrt(), "merged": merged}
    save_file(tensors, path)
    return in_comfyui("check_token_merging.py", path)


@comfy
def test_latents_equal_those_of_the_diffusers_face(found):
    assert found["against diffusers"] < NEAR


@comfy
def test_it_acts_inside_the_window_alone(found):
    assert found["effect"] > 1 and found["shape"] == [2, 4, 16, 16]
    assert found["batches"] == [5] * 4 + [4] * 6
    assert found["window"] == [False] * 2 + [True] * 3 + [False] * 5
    assert found["window, batches"] == [4 + active for active in found["window"]]
    percents = found["window, percents"]
    assert percents == sorted(percents) and percents[0] < 0.01 and percents[-1] == 1.0
    assert found["without guidance, batches"] == [3]
    report = found["report"]
    assert report["extra_rows"] == 4 and report["mode"] == "reference"
    assert [(row["kind"], row["image"], row["pushed"]) for row in report["rows"]] == [
        *(("positive", i, 1.0) for i in range(2)),
        *(("negative", i, 0.0) for i in range(2)),
    ]


@comfy
@pytest.mark.parametrize(
    "what",
    [
        "queued again",
        "diversity, queued again",
        "without the node",
        "strength 0",
        "threshold 1",
        "unconditional rows",
        "white mask",
        "base weights",
        "diversity first, image 0",
        "after the errors",
        "the paper's blocks",
    ],
)
def test_not_a_bit_changes(found, what):
    assert found[what] == 0.0


@comfy
def test_strength_0_returns_the_model_itself(found):
    assert found["itself"] and found["conditional rows"] > 0.01 and found["towards"] > 1


@comfy
def test_rows_do_not_depend_on_each_other(found):
    assert found["two batches of 1"] < NEAR
    assert found["two prompts"] < NEAR and found["two prompts, batches"] == 6, "a reference row for each text"
    assert found["reference text, batches"] == 5, "one for all, where its text is given"
    assert found["two references, batches"] == 6


@comfy
def test_conditionings_that_run_one_after_the_other(found):
    # one token's two best matches are 6e-7 apart in cosine, and rounding decides: .016 in the end
    assert found["split"] < 3e-2 and sorted(found["split, batches"]) == [2, 3]
    assert found["gentle split"] < 1e-3 < 0.1 < found["gentle effect"]  # 4e-5, as without the node, and .75
    assert {row["kind"] for row in found["split, report"]["rows"]} == {"positive"}
    assert found["areas"] > 1


@comfy
@pytest.mark.parametrize(
    "name",
    [
        "rows",
        "blocks",
        "cross_attention",
        "max_downscale",
        "noise_reference",
        "seed",
        "matching",
        "official",
        "window",
    ],
)
def test_every_option_tells(found, name):
    assert found[f"option {name}"] > 0.1


@comfy
def test_reference_words_and_masks_tell(found):
    assert min(found[name] for name in ("reference text", "shorter reference text", "mask")) > 0.1
    assert found["official, batches"] == 6, "a reference row for the prompt's half, and one for the negative one's"


@comfy
def test_diversity(found):
    assert found["diversity"] > 1 and found["diversity first"] > 1 and found["diversity, batches"] == [4]
    assert found["diversity, report"]["extra_rows"] == 0 and found["diversity, report"]["mode"] == "diversity"


@comfy
def test_membranes_before_and_after_give_the_same_and_both_act(found):
    assert found["membrane before against after"] == 0.0
    assert found["with and without the membrane"] > 1 and found["with and without merging"] > 1
    gates = found["both, gates"]  # "auto" leaves this encoder's membranes always on
    assert gates.count(1.0) == 4, "the prompts' rows, and the reference rows that have their texts"
    assert found["both, shares"] == [1.0, 1.0, 0.0, 0.0]


@comfy
def test_two_nodes(found):
    assert found["two nodes"] > 1 and found["two nodes, batches"] == [6, 6, 5, 5] + [4] * 6
    assert found["two nodes, rows"] == 4 and found["merging and diversity"] > 1


@comfy
def test_what_other_packs_patched_stays(found):
    assert found["patch before"] > 1 and found["patch after"] > 1 and found["patch before against after"] < NEAR
    assert found["lora"] > 1 and found["lora before against after"] == 0.0


@comfy
def test_errors_say_what_to_do(found):
    words = {
        "vae": "connect the VAE",
        "mask": "a mask without a reference",
        "text": "a reference conditioning without an image",
        "window": "expected 0 <= start < end",
        "two texts": "not combined",
        "long text": "use fewer words",
        "alone": "batch_size",
        "blocks": "no attention layer was pushed",
        "cropped mask": "nothing white",
        "regrouped": "another node regroups the batch",
        "replaced": "put Negative Token Merging after that node",
        "unsampled": "has not sampled",
        "bare": "carries no negative token merging",
    }
    assert set(found["errors"]) == set(words)
    for name, text in words.items():
        assert text in found["errors"][name], name


@comfy
@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "wan"])
def test_other_families(family):
    """Small models of ComfyUI's own classes: it acts in each of their layers, and leaves without a trace."""
    found = in_comfyui("check_token_merging_families.py", family)
    layers = {"sdxl": 4, "sd3": 2, "flux": 2, "wan": 2}[family]
    assert found["active"] == found["extra rows"] == 3 and found["layers"] == 3 * layers
    assert found["rows"] == [["positive", 1.0]] * 2 + [["negative", 0.0]] * 2
    for name in ("effect", "without guidance", "diversity", "mask", "reference text"):
        assert found[name] > 1e-3, name
    assert found["queued again"] == found["removed"] == 0.0
    assert found["batches of 1"] < 3e-2 and found["split"] < 3e-2  # a tie of two tokens may fall the other way
    assert found["row's text"] == 0.0 and found["row's pooled"] == (None if family == "wan" else 0.0)
    assert found["inputs"] == [5], "every input of the denoiser has the reference row"
    assert [count for _, count in found["blocks"]] == {"sdxl": [6, 3], "flux": [3, 3]}.get(family, [3])
    assert all(effect > 1e-3 for effect, _ in found["blocks"]) and "elsewhere" in found["error"]
    if family in ("sd3", "flux"):
        called, *effects = found["override"]
        assert called and min(effects) > 0.01 and "another node replaced the attention" in found["override lost"]
    if family == "flux":
        assert found["newer"] == 0.0 and found["newer, layers"] == 3 * layers
    if family == "sd3":
        assert "knows SD1.x" in found["stranger"]
