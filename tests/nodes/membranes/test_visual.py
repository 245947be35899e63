"""Image-side membranes on a ComfyUI model, in ComfyUI's own Python: the same latents as the diffusers face."""

import dataclasses

import pytest
import torch
from comfy_server import in_comfyui
from contracts.membranes import look
from safetensors.torch import save_file

pytestmark = pytest.mark.comfy
PROMPT = "a dotted picture of a robot on a sand background"
STEPS = 6


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What check_visual.py measured, given diffusers' latents of the same noise."""
    from semiperm import apply_membranes, save_membranes
    from semiperm.canvas import load_pipeline
    from semiperm.pipelines.membranes.visual import reads_text

    pipe, folder = load_pipeline(), tmp_path_factory.mktemp("comfy")
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))

    def latents():
        call = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "latent"}
        return pipe([PROMPT], latents=noise, **call).images / pipe.vae.config.scaling_factor

    plain = latents()
    both = [look(pipe, 0, low=1.0, beta=0.3), look(pipe, 1, concept="ghost", low=1e6)]
    for i, membrane in enumerate(both):
        sites = {key: site for key, site in membrane.visual.sites.items() if reads_text(key)}
        both[i] = dataclasses.replace(membrane, visual=dataclasses.replace(membrane.visual, sites=sites))
    apply_membranes(pipe, both[0])
    edited = latents()
    kept = torch.cat(
        [pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps], pipe.scheduler.final_alpha_cumprod[None]]
    )
    sigmas = ((1 - kept) / kept).sqrt()
    save_file({"noise": noise, "sigmas": sigmas, "plain": plain, "edited": edited}, folder / "given.safetensors")
    path = save_membranes(both, folder / "looks.safetensors")
    return in_comfyui("check_visual.py", folder / "given.safetensors", path)


def test_latents_equal_those_of_the_diffusers_face(found):
    assert found["plain"] < 1e-4 < 0.1 < found["effect"]
    assert found["edited"] < 1e-3


def test_a_shut_gate_leaves_every_bit(found):
    assert found["shut"] == 0.0 and found["never fired"] == ["ghost"] and found["without"] == 0.0


def test_the_report_says_where(found):
    report = found["report"]
    assert report["gates"] == ["image"]
    opened = [(row["kind"], row["gamma"]["robot"] > 0, row["opened"]["robot"] > 0) for row in report["rows"]]
    assert sorted(opened) == [("negative", False, False), ("positive", True, True)]
    shape, widest = found["maps"]["robot"]
    assert shape == [1, 16, 16] and 0 < widest <= 1
    assert found["plots"][1][1] > found["plots"][0][1], "the maps stand below the gates"


def test_both_sides_stack_in_one_node_or_two(found):
    assert found["one node against two"] < 1e-4


def test_solved_by_the_models_own_sampling(found):
    solved = found["solved"]
    assert solved["method"] == "visual/words" and solved["keys"] and solved["base_model"]
    assert all("attn2_to_out_0" in key for key in solved["keys"])
    assert solved["checked"] == 1 and solved["calibrated"] == 1 and len(solved["shares"]) == 2
    assert found["solved gates"] == ["image"] and "write what to erase" in found["empty"]
