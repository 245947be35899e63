"""Membranes on a ComfyUI model, in ComfyUI's own Python: the same latents as the diffusers face, and nothing else."""

import pytest
import torch
from comfy_server import in_comfyui
from safetensors.torch import save_file

pytestmark = pytest.mark.comfy
PROMPT = "a dotted picture of a robot on a sand background"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What check_membranes.py measured, given diffusers' latents of the same noise."""
    from semiperm import apply_membranes, erase_concepts
    from semiperm.canvas import load_pipeline

    pipe = load_pipeline()
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    call = {"num_inference_steps": 20, "guidance_scale": 4.0, "output_type": "latent"}

    def latents():
        return pipe([PROMPT] * 2, latents=noise, **call).images / pipe.vae.config.scaling_factor

    plain = latents()
    membranes = erase_concepts(pipe, "robot")
    apply_membranes(pipe, membranes)
    erased = latents()
    kept = torch.cat(
        [pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps], pipe.scheduler.final_alpha_cumprod[None]]
    )
    sigmas = ((1 - kept) / kept).sqrt()
    path = tmp_path_factory.mktemp("comfy") / "given.safetensors"
    save_file({"noise": noise, "sigmas": sigmas, "plain": plain, "erased": erased}, path)
    return in_comfyui("check_membranes.py", path) | {"membranes": membranes}


def test_latents_equal_those_of_the_diffusers_face(found):
    assert found["effect"] > 1
    assert found["plain against diffusers"] < 1e-4
    assert found["erased against diffusers"] < 1e-4 * found["effect"], "what is solved and added is rounded, too"


def test_a_membrane_of_one_face_fits_the_other(found):
    from semiperm.methods.membranes.base_model import base_model_distance

    (membrane,) = found["membranes"]
    assert set(found["keys"]) == set(membrane.modules)
    assert base_model_distance(found["base_model"], membrane.base_model) <= 1


@pytest.mark.parametrize("what", ["queued again", "without the node", "strength 0", "closed gate", "base weights"])
def test_not_a_bit_changes(found, what):
    assert found[what] == 0.0


def test_rows_are_judged_by_themselves(found):
    assert found["batched rows"] < 1e-4
    assert found["areas"] > 1 and set(found["areas, kinds"]) == {"positive", "negative"}
    rows = found["report"]["rows"]
    assert [(row["kind"], row["gamma"]) for row in rows] == [("negative", {"robot": 0.0})] * 2 + [
        ("positive", {"robot": 1.0})
    ] * 2


def test_conditionings_that_run_one_after_the_other(found):
    assert found["split"] < 1e-4 and sorted(found["split, kinds"]) == ["negative"] * 2 + ["positive"] * 2


def test_attention_patches_of_other_packs(found):
    assert found["attention replaced"] < 1e-4
    assert all(effect > 0.1 for effect in found["attention patched"])


def test_nodes_add_up_with_each_other_and_with_lora(found):
    assert found["two nodes against one"] < 1e-4
    assert found["lora effect"] > 0.1 and found["lora and membrane against membrane"] > 0.1
    assert found["lora before against after"] < 1e-4


def test_a_lora_left_in_the_weights_is_not_read(found):
    assert found["left in the weights"] > 1 and found["fingerprint of the live weights"] > 12, "the check can fail"
    assert found["fit beside a lora"] == {"plain branch": [True, 0.0], "lora branch": [True, 0.0]}


def test_a_report_belongs_to_its_latent(found):
    assert found["fired"] == [True, False, True]
    assert "connect the LATENT of the sampler" in found["errors"]["another latent"]


def test_window_and_gates(found):
    active = found["window"]
    assert any(active) and not active[0] and not active[-1]
    assert len(active) == 20 and found["paper"] > 0.1


def test_errors_say_what_to_do(found):
    errors = found["errors"]
    assert set(errors) == {
        "empty",
        "itself",
        "none",
        "window",
        "strength",
        "gate",
        "unsampled",
        "bare",
        "another latent",
    }
    assert "write what to erase" in errors["empty"] and "connect CLIP" in errors["gate"]


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_other_families(family):
    """Small models of ComfyUI's own classes: the membrane acts, on its own row, and is removed without a trace."""
    found = in_comfyui("check_families.py", family)
    assert found["modules"] > 0 and found["effect"] > 1e-2
    assert found["gammas"] == [0.0, 1.0]  # the negative row, the prompt
    assert found["removed"] == 0.0
    assert (found["other rows"] == 0.0) == (found["other gamma"] == 0.0), "a closed gate leaves every bit"
    assert found["against folded weights"] < 1e-4
    assert found["sliced"] == (family != "sdxl") and found["pooled"] == (family != "sdxl")
