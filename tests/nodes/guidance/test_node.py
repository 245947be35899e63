"""Safe guidance in ComfyUI: the nodes without it, the surgery in ComfyUI's own Python."""

import importlib
import sys
from types import SimpleNamespace

import comfy_stub
import pytest
import torch
from comfy_server import in_comfyui
from safetensors.torch import save_file
from semiperm.methods.errors import GuidanceError
from semiperm.methods.guidance.config import SafeGuidanceConfig
from semiperm.methods.guidance.detectors import DetectorPair, PictureDetector, TextDetector
from semiperm.methods.guidance.record import GuidanceRecord

comfy = pytest.mark.comfy
STEPS = 6
NEAR = 5e-3  # relative; rows in another batch are rounded otherwise, and S = 5000 multiplies that
PROMPT = "a dotted picture of a robot on a sand background"


# ---- without ComfyUI -------------------------------------------------------------------------------------------------


@pytest.fixture
def nodes(tmp_path):
    with comfy_stub.stand_in(tmp_path):
        yield importlib.import_module("semiperm.nodes.guidance.node")


def made_up() -> dict:
    record = GuidanceRecord()
    for i in range(4):
        record.step(i / 4, 1 - i / 4, i < 3, extra_rows=2)
        if i < 3:
            record.add("scale", torch.tensor([0.5, 0.0]))
            record.add("category", torch.tensor([0, 0]))
    return record.report(SafeGuidanceConfig("violence", "sld", end=0.7), 2)


def test_the_nodes_pass_everything_on(nodes, monkeypatch):
    calls, given = [], []

    def guide_model(model, config, clip, detectors=None):
        calls.append((config, clip))
        given.append(detectors)
        return f"guided {model}"

    surgery = SimpleNamespace(guide_model=guide_model, reports_of=lambda model: [made_up()])
    monkeypatch.setitem(sys.modules, "semiperm.nodes.guidance.patch", surgery)
    window = {"start": 0.1, "end": 0.5}
    seeing = PictureDetector(torch.tensor([0.0, 1.0]), torch.zeros(1, 100), torch.zeros(1), 0.0)
    pair = DetectorPair("violence", TextDetector(torch.zeros(4), torch.zeros(()), 1.0), seeing, 0.1)
    found = SimpleNamespace(pairs=(pair,), when_unsafe="refuse")
    assert nodes.SemipermSafeGuidance.execute("M", "C", "violence", 0.5, detectors=found).args == ("guided M",)
    nodes.SemipermSafeGuidanceAdvanced.execute("M", "C", "all", 1.0, "max", **window, patience=3)
    nodes.SemipermValueDecomposer.execute("M", "C", "own words", 1.0, 4, **window, words="a, b")
    nodes.SemipermNAG.execute("M", "C", "hate", 1.0, "sd15", 3.0, **window)
    one, two, three, four = (config for config, _ in calls)
    assert one.algorithms[0].preset == "strong" and one.strength == 0.5
    assert one.when_unsafe == "refuse" and two.when_unsafe == "guide"
    assert one.detectors == (pair,) and given == [found, None, None, None] and two.detectors == ()
    assert len(two.categories) == 7 and two.algorithms[0].patience == 3 and (two.start, two.end) == (0.1, 0.5)
    assert three.phrases == ("a", "b") and three.algorithms[0].rank == 4
    assert four.algorithms[0].tau == 3.0 and four.algorithms[0].NAME == "nag"
    latent = {"samples": torch.zeros(1, 4, 2, 2)}
    output = nodes.SemipermGuidanceReport.execute("M", latent)
    assert output.args[0] is latent and output.ui.as_dict()["text"] == (output.args[1],)


def test_own_words_must_be_there(nodes):
    with pytest.raises(GuidanceError, match="expected"):
        nodes.categories_of("own words", " \n ")


def test_report_text(nodes):
    lines = nodes.report_text([made_up()]).splitlines()
    assert lines[0] == "sld away from violence: strength 1"
    assert lines[1] == "window 0 to 0.7: active in 3 of 4 steps, 8 extra rows denoised"
    assert lines[5].split() == ["0", "75.0", "%", "0.3750", "violence"] and lines[6].split()[-1] == "-"


# ---- with it ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What check_guidance.py measured, given diffusers' latents of the same noise."""
    from semiperm.canvas import load_pipeline
    from semiperm.methods.guidance.category import Category
    from semiperm.methods.guidance.nag import NAG
    from semiperm.methods.guidance.safree import SAFREE
    from semiperm.methods.guidance.sld import SLD
    from semiperm.pipelines.guidance.apply import apply_safe_guidance

    pipe = load_pipeline()
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    given = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "latent"}
    harm = Category("machines", ("a robot", "a machine"))

    def latents():
        return pipe([PROMPT] * 2, latents=noise, **given).images / pipe.vae.config.scaling_factor

    tensors = {"noise": noise, "plain": latents()}
    for name, algorithm in {
        "sld": SLD("max"),
        "adavd": "adavd",
        "nag": NAG("sd15"),
        "safree": SAFREE(adaptive=False),
    }.items():
        with apply_safe_guidance(pipe, SafeGuidanceConfig(harm, algorithm)):
            tensors[name] = latents()
    kept = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps]
    kept = torch.cat([kept, pipe.scheduler.final_alpha_cumprod[None]])
    tensors["sigmas"] = ((1 - kept) / kept).sqrt()
    path = tmp_path_factory.mktemp("comfy") / "given.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return in_comfyui("check_guidance.py", path)


@comfy
@pytest.mark.parametrize("name", ["plain", "sld", "adavd", "nag", "safree"])
def test_latents_equal_those_of_the_diffusers_face(found, name):
    assert found[name] < NEAR
    if name != "plain":
        assert found[f"{name}, effect"] > 20 * found[name]


@comfy
def test_nothing_is_carried_over_and_nothing_is_left(found):
    assert found["untouched after"] == found["strength 0"] == 0
    assert found["sld, again"] == found["adavd, again"] == found["nag, again"] == 0


@comfy
def test_one_batch_or_split_and_the_guider(found):
    assert found["one batch, rows"] == [6] and found["split, rows"] == [2]
    assert found["split"] < NEAR
    assert found["guider"] == 0 and found["hooks"] == ["post", "pre"]
    assert found["nag at cfg 1"] > 1e-3


@comfy
def test_second_order_samplers_update_the_momentum_once_a_step(found):
    for name in ("heun", "dpm_2"):
        levels, steps = found[f"{name}, levels"]
        assert levels in (steps, steps + 1), name  # Heun's corrector also looks at the level at which sampling ends


@comfy
def test_beside_the_other_methods_in_any_order(found):
    for pair in ("guidance and membranes", "guidance and merging", "attention and membranes"):
        assert found[pair] < NEAR, pair


@comfy
def test_detectors_decide_whether_it_acts(found):
    assert found["detected"] > 20 * NEAR and found["detected, as without"] < NEAR, (
        "guided as if there were no detectors"
    )
    assert found["detected, text score"] > 0 and found["detected, evaluations"] == STEPS * 2
    assert found["not detected"] == 0 and found["not detected, evaluations"] == 0, "the untouched model's bits"
    assert found["seen"] > 1e-3 and found["seen, evaluations"] == (STEPS - 1) * 2, "from the step after"
    assert found["seen by adavd"] > 1e-3 and found["never seen"] == found["never seen by adavd"] == 0


@comfy
def test_a_picture_that_cannot_be_saved_is_refused(found):
    assert found["refused"] and found["grey"] < 0.05 and found["beside it"] < 1e-4
    assert "of this run still looks like machines" in found["raised"]
    assert "fit from pictures" in found["refuse without a picture detector"]


@comfy
def test_dynamic_mode_leaves_silent_categories_out(found):
    assert found["dynamic, evaluations"] == 2 * 2, "steps 0 and 5 of 6"
    assert found["dynamic"] == 0 and -1 < found["dynamic, alignment"] < 1


@comfy
def test_faults_raise(found):
    assert len(found["faults"]) == 16
    assert not [name for name, words in found["faults"].items() if not words or len(words) < 40]


@comfy
def test_reports_have_the_same_keys_in_both_faces(found):
    expected = made_up()
    report = found["sld, report"]
    assert set(report) == set(expected) and set(report["rows"][0]) == set(expected["rows"][0])
    assert report["evaluations"] == STEPS * 2 and report["rows"][0]["category"] == "machines"


# ---- joint attention -------------------------------------------------------------------------------------------------


def _like_a_negative_prompt(found):
    for name in ("adavd", "nag"):
        assert found[f"{name}, effect"] > 1e-3 and found[f"{name}, again"] == 0 and found[f"{name}, scale"] > 0
    assert found["untouched after"] == found["strength 0"] == 0
    assert found["nag at cfg 1"] > 1e-3
    assert found["nag, away from the prompt itself"] < 1e-4


@comfy
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_joint_attention(family):
    found = in_comfyui("check_guidance_families.py", family)
    _like_a_negative_prompt(found)
    assert found["nag, evaluations"] == 3 * 2 and found["adavd, evaluations"] == 2, "two phrases, in the first step"
    assert found["nag and membranes"] < NEAR < found["membranes beside nag"]


@comfy
def test_joint_attention_equals_that_of_the_diffusers_face(tmp_path):
    from semiperm.canvas import load_pipeline
    from semiperm.methods.guidance.category import Category
    from semiperm.methods.guidance.nag import NAG
    from semiperm.pipelines.guidance.apply import apply_safe_guidance

    pipe = load_pipeline("canvas-flow")
    noise = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(3))
    harm, vae = Category("machines", ("a robot", "a machine")), pipe.vae.config

    def latents():
        given = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent"}
        return pipe([PROMPT] * 2, latents=noise, **given).images / vae.scaling_factor + vae.shift_factor

    tensors = {"noise": noise, "plain": latents()}
    for name, algorithm in {"adavd": "adavd", "nag": NAG("sd3")}.items():
        with apply_safe_guidance(pipe, SafeGuidanceConfig(harm, algorithm)):
            tensors[name] = latents()
    tensors["sigmas"] = pipe.scheduler.sigmas
    path = tmp_path / "given.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    found = in_comfyui("check_guidance_families.py", "canvas-flow", path)
    _like_a_negative_prompt(found)
    for name in ("plain", "adavd", "nag"):
        assert found[name] < NEAR, name
        assert name == "plain" or found[f"{name}, effect"] > 20 * found[name]


# ---- detectors from example pictures ---------------------------------------------------------------------------------


@comfy
def test_a_picture_detector_from_example_pictures():
    found = in_comfyui("check_guidance_pictures.py")
    assert found["text"] and found["alarms"] == 0.4
    assert found["calls"] == found["step"] * (3 + 12 * 2), "examples at cfg 1, harmless runs with both prompts"
    assert found["examples, steps"] == [found["step"], 3] and found["harmless, steps"] == [found["step"], 6]
    assert found["examples"] == 1.0 and found["harmless"] <= 0.5
    assert "connect example pictures" in found["without pictures"]
