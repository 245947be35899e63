"""The embedded model in the real ComfyUI: the pack loads, the model is the diffusers door's, and it draws."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from comfy_server import in_comfyui, link_pack
from semiperm.canvas import load_pipeline
from semiperm.canvas.models import MODELS, aid_files
from semiperm.methods.watermark.aids import aids_of_model
from semiperm.pipelines.watermark.fingerprint import fingerprint
from untrained_worlds import SECOND, has_weights

pytestmark = pytest.mark.comfy

PROMPT = "a dotted picture of a robot on a sand background"
SHIPPED = [name for name in MODELS if has_weights(name)]
ATOL = 1e-4  # fp32: other kernels, another order of sums
ATOL_64 = 1e-9  # fp64, for the autoencoder: in fp32 its large levels leave 1e-4, and the memory layout alone moves 4e-4


def graph(
    positive: str,
    negative: str = "",
    seed: int = 0,
    batch: int = 1,
    sampler: str = "ddim",
    model: str | None = None,
    steps: int = 25,
) -> dict:
    """The API graph of the shortest text-to-image workflow; without `model` as before there was a choice."""
    own = MODELS[model or "canvas"]
    scheduler = own.scheduler if sampler == own.sampler else "normal"
    return {
        "1": {"class_type": "SemipermLoadCanvas", "inputs": {} if model is None else {"model": model}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": positive}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": negative}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": batch}},
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0],
                "positive": ["2", 0],
                "negative": ["3", 0],
                "latent_image": ["4", 0],
                "seed": seed,
                "steps": steps,
                "cfg": own.guidance_scale,
                "sampler_name": sampler,
                "scheduler": scheduler,
                "denoise": 1.0,
            },
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "canvas"}},
    }


def test_comfyui_loads_the_pack_without_a_word(tmp_path):
    report = in_comfyui("check_loading.py", link_pack(tmp_path))
    assert report["loaded"] and report["complaints"] == []
    assert report["nodes"]["SemipermLoadCanvas"] == "Load Canvas (embedded model)"
    assert all(name.startswith("Semiperm") and title for name, title in report["nodes"].items())
    assert report["foreign"] == []


def test_the_server_starts_with_the_pack_and_lists_the_node(comfy):
    about_us = [line for line in comfy.log().splitlines() if "semiperm" in line and "seconds" in line]
    assert len(about_us) == 1 and "FAILED" not in about_us[0], about_us
    node = comfy.object_info()["SemipermLoadCanvas"]
    assert node["category"] == "semiperm/loaders" and node["python_module"] == "custom_nodes.semiperm"
    assert node["output"] == ["MODEL", "CLIP", "VAE"] and node["output_name"] == ["MODEL", "CLIP", "VAE"]
    assert node["description"] and all(node["output_tooltips"])
    (choices, options) = node["input"]["optional"]["model"]
    assert not node["input"].get("required") and list(MODELS) in (choices, options.get("options"))
    assert options["default"] == "canvas"


def _through(vae, picture):
    """Return the latents (1, C, 16, 16) of a picture (1, 3, 128, 128) in 0..1, and the picture they decode to."""
    scaling, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    latents = (vae.encode(picture * 2 - 1).latent_dist.mode() - shift) * scaling
    return latents, (vae.decode(latents / scaling + shift).sample / 2 + 0.5).clamp(0, 1)


@pytest.fixture(scope="module", params=MODELS)
def from_diffusers(request, tmp_path_factory, untrained_worlds):
    """The model's name, the folder of its weights, and a file of inputs and of what diffusers makes of them."""
    from safetensors.torch import save_file
    from semiperm.canvas import load_pipeline

    name, folder = request.param, untrained_worlds if request.param in SECOND else ""
    pipe = load_pipeline(name, weights=folder)
    prompts = [PROMPT, "", "Ünïcode 🤖!", "a robot, " * 9]
    picture = _picture()
    with torch.no_grad():
        ids = pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        noise = torch.randn(4, pipe.vae.config.latent_channels, 16, 16, generator=torch.Generator().manual_seed(0))
        tensors = {"sample": noise, "picture": picture, "ids": ids, "timestep": torch.tensor([1, 321, 640, 999])}
        if name in ("canvas", "canvas-scenes"):
            hidden = pipe.text_encoder(ids).last_hidden_state
            noise_pred = pipe.unet(noise, tensors["timestep"], hidden).sample
            cumprod = pipe.scheduler.alphas_cumprod.double()
            tensors["sigmas"] = ((1 - cumprod) / cumprod).sqrt().float()
        else:
            tensors["sigmas"] = pipe.scheduler.sigmas.flip(0)
            hidden, _, pooled, _ = pipe.encode_prompt(
                prompts, prompts, prompts, device="cpu", do_classifier_free_guidance=False
            )
            noise_pred = pipe.transformer(noise, hidden, pooled, tensors["timestep"]).sample
            tensors |= {"pooled": pooled, "ids_g": ids.clone()}
        if name == "canvas-turbo":
            pipe(PROMPT, output_type="latent")
            tensors["steps"] = pipe.scheduler.sigmas
        tensors |= {"hidden": hidden, "noise_pred": noise_pred}
        tensors["encoded"], tensors["decoded"] = _through(pipe.vae, picture)
        tensors["encoded_64"], tensors["decoded_64"] = _through(pipe.vae.double(), picture.double())
    file = tmp_path_factory.mktemp("diffusers") / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, {"prompts": json.dumps(prompts)})
    return name, folder, file


def _picture():
    """A picture of the canvas (1, 3, 128, 128) in 0..1."""
    from semiperm.canvas import Scene
    from semiperm.canvas.render import render

    return torch.from_numpy(np.array(render(Scene(object="robot", style="dotted")))).permute(2, 0, 1)[None] / 255


def aids_here(name, folder):
    """What helps to read this model's marks, as the diffusers door finds it."""
    pipe = load_pipeline(name, weights=Path(folder) if folder else None)
    return aids_of_model(aid_files(name, Path(folder) if folder else None), lambda: fingerprint(pipe))


def test_every_part_gives_what_diffusers_gives(from_diffusers):
    name, folder, file = from_diffusers
    report = in_comfyui("check_canvas.py", file, name, folder)
    flow = name in ("canvas-flow", "canvas-turbo")
    assert report["ids"] == 0 and report.get("ids_g", 0) == 0
    compared = ["noise_pred", "hidden", "decoded", "encoded", "sigmas"] + ["pooled"] * flow
    differences = {part: report[part] for part in compared + ["steps"] * (name == "canvas-turbo")}
    assert all(value < ATOL for value in differences.values()), differences
    assert report["encoded_64"] < ATOL_64 and report["decoded_64"] < ATOL_64, report
    tokens = 32 if name == "canvas" else 77
    assert report["facts"] == {
        "fit": [[2, 77, 4096], [2, 256]] if flow else [[2, tokens, 128], False],
        "projections": [1, 1, 1] if flow else [14, 0, 1],
        "marked": True,
        "dtypes": ["torch.float32"] * 2,
        "pooled_finite": True,
        "native": 128,
        "aids": {kind: aid.model for kind, aid in aids_here(name, folder).items()},
        "channels": 16 if flow else 4,
        "kind": "SD3" if flow else "BaseModel",
    }


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_a_graph_draws_what_is_asked(comfy, sampler):
    from semiperm.canvas import Judge

    entry = comfy.queue(graph(PROMPT, seed=7, batch=4, sampler=sampler))
    assert entry["errors"] == [] and entry["status"]["status_str"] == "success"
    pictures = comfy.images(entry)
    assert [p.shape for p in pictures] == [(128, 128, 3)] * 4
    seen = Judge.load()(pictures)
    assert seen.object == ["robot"] * 4 and seen.style == ["dotted"] * 4
    assert seen.background == ["sand"] * 4


def test_the_same_graph_gives_the_same_bytes(comfy):
    runs = [comfy.queue(graph(PROMPT, seed=seed)) for seed in (3, 4, 3)]  # what only the first needs is forgotten
    assert all("5" not in comfy.cached(run) for run in runs)
    first, other, again = (comfy.images(run)[0].tobytes() for run in runs)
    assert first == again != other


@pytest.mark.parametrize("name", SHIPPED)
def test_every_model_gives_the_same_bytes_when_queued_again(comfy, name):
    own, pictures = MODELS[name], []
    for seed in (3, 4, 3):
        entry = comfy.queue(graph(PROMPT, "a ring", seed=seed, sampler=own.sampler, model=name, steps=4))
        assert entry["errors"] == [] and entry["status"]["status_str"] == "success"
        assert "5" not in comfy.cached(entry)  # forgotten with the run between
        pictures.append(comfy.images(entry)[0].tobytes())
    assert pictures[0] == pictures[2] != pictures[1]


@pytest.mark.slow  # the transformer reads 4096 columns of text, and a fit solves in as many
@pytest.mark.parametrize("name", [name for name in SHIPPED if name in SECOND])
def test_erasing_in_every_model_is_the_same_when_queued_again(comfy, name):
    own, pictures = MODELS[name], []
    for strength in (0.0, 1.0, 0.0, 1.0):
        prompt = graph(PROMPT, "a ring", seed=3, sampler=own.sampler, model=name, steps=4)
        inputs = {"model": ["1", 0], "clip": ["1", 1], "concept": "robot", "surrogate": "", "preset": "selective"}
        prompt["erase"] = {"class_type": "SemipermEraseConcept", "inputs": inputs | {"strength": strength}}
        prompt["5"]["inputs"]["model"] = ["erase", 0]
        entry = comfy.queue(prompt)
        assert entry["errors"] == [] and entry["status"]["status_str"] == "success"
        pictures.append(comfy.images(entry)[0].tobytes())
    assert pictures[0] == pictures[2] != pictures[1] == pictures[3]


def test_a_model_by_its_name(comfy):
    """`canvas` by its name is what it was without one; a model whose weights are not there says what makes them."""
    plain, named = (comfy.images(comfy.queue(graph(PROMPT, seed=5, steps=2, model=m)))[0] for m in (None, "canvas"))
    assert plain.tobytes() == named.tobytes()
    for name in sorted(set(MODELS) - set(SHIPPED)):
        (error,) = comfy.queue(graph(PROMPT, model=name))["errors"]
        assert "is missing" in error and "semiperm canvas worlds export" in error
    entry = comfy.queue(graph(PROMPT) | {"1": {"class_type": "SemipermLoadCanvas", "inputs": {"model": "canvas-slow"}}})
    assert "'canvas-slow'; choose from canvas, canvas-scenes" in str(entry["errors"])


def test_errors_come_back_and_the_server_goes_on(comfy):
    wrong = graph(PROMPT)
    wrong["5"]["inputs"]["sampler_name"] = "no_such_sampler"
    entry = comfy.queue(wrong)
    assert entry["status"]["status_str"] == "invalid"
    assert any("KSampler" in error and "no_such_sampler" in error for error in entry["errors"])
    assert comfy.alive()
