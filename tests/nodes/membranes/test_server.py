"""Membranes on a running ComfyUI, queued more than once: what a run leaves behind must not change the next."""

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load, save_file

pytestmark = pytest.mark.comfy
ROOT = Path(__file__).resolve().parents[3]


def graph(concept: str = "robot", strength: float = 1.0, lora: float | None = None, preset: str = "selective") -> dict:
    """Canvas, perhaps a LoRA, Erase Concept, sampler, Save Latent."""
    model = ["1", 0] if lora is None else ["lora", 0]
    nodes = {
        "1": ("SemipermLoadCanvas", {}),
        "2": ("CLIPTextEncode", {"text": "a dotted picture of a robot on a sand background", "clip": ["1", 1]}),
        "3": ("CLIPTextEncode", {"text": "", "clip": ["1", 1]}),
        "4": ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": 1}),
        "erase": ("SemipermEraseConcept", {
            "model": model, "clip": ["1", 1], "concept": concept, "surrogate": "", "preset": preset,
            "strength": strength,
        }),
        "6": ("KSampler", {
            "model": ["erase", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0], "seed": 7,
            "steps": 4, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
        }),
        "save": ("SaveLatent", {"samples": ["6", 0], "filename_prefix": "tests/queued"}),
    }  # fmt: skip
    if lora is not None:
        inputs = {"model": ["1", 0], "lora_name": "test_lora.safetensors", "strength_model": lora}
        nodes["lora"] = ("LoraLoaderModelOnly", inputs)
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


def latents(comfy, entry: dict) -> np.ndarray:
    assert entry["errors"] == [] and entry["status"]["status_str"] == "success"
    (file,) = entry["outputs"]["save"]["latents"]
    return load((comfy.base / "output" / file["subfolder"] / file["filename"]).read_bytes())["latent_tensor"]


@pytest.fixture(scope="module")
def lora(comfy):
    """A LoRA on every text projection of the canvas, strong enough to make another model of it."""
    rng, tensors = np.random.default_rng(0), {}
    with safe_open(ROOT / "canvas" / "weights" / "unet.safetensors", "numpy") as weights:
        for name in weights.keys():  # noqa: SIM118  no mapping
            if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
                (out, size), key = weights.get_slice(name).get_shape(), name.removesuffix(".weight").replace(".", "_")
                tensors[f"lora_unet_{key}.lora_down.weight"] = rng.normal(size=(8, size)).astype(np.float32)
                tensors[f"lora_unet_{key}.lora_up.weight"] = rng.normal(size=(out, 8)).astype(np.float32)
    folder = comfy.base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "test_lora.safetensors")
    comfy.object_info()  # lists it


def test_queued_twice_with_a_lora_in_between(comfy, lora):
    """The LoRA stays in the weights after a run; what is solved and checked next does not see it."""
    alone = latents(comfy, comfy.queue(graph()))
    with_lora = latents(comfy, comfy.queue(graph(lora=1.0)))
    stronger = latents(comfy, comfy.queue(graph(lora=1.0, strength=0.5)))
    assert np.abs(with_lora - alone).max() > 0.1 and np.abs(with_lora - stronger).max() > 1e-3
    assert (latents(comfy, comfy.queue(graph(lora=1.0, concept="star"))) != with_lora).any()
    assert (latents(comfy, comfy.queue(graph(lora=1.0))) == with_lora).all()
    assert (latents(comfy, comfy.queue(graph())) == alone).all()


def solved(comfy) -> int:
    """How many times captions were encoded for a fit, by the server's own log of Erase Concept's inner nodes."""
    return comfy.log().count("solved 1 membrane")


def test_another_strength_or_preset_is_not_solved_again(comfy):
    comfy.queue(graph(concept="ghost"))
    before = solved(comfy)
    pictures = [latents(comfy, comfy.queue(graph(concept="ghost", strength=s, preset=p))) for s, p in (
        (0.5, "selective"), (0.25, "strict"), (2.0, "strict"))]  # fmt: skip
    assert solved(comfy) == before
    assert not (pictures[1] == pictures[2]).all()
    comfy.queue(graph(concept="star"))
    assert solved(comfy) == before + 1, "the count can change"


def test_each_latent_has_its_own_report(comfy):
    """One erased model, two samplers; the report of a latent is of its own run, whichever ran last."""
    prompt = graph()
    prompt["other"] = {"class_type": "CLIPTextEncode", "inputs": {"text": "a flat star", "clip": ["1", 1]}}
    second = prompt["6"]["inputs"] | {"positive": ["other", 0], "steps": 3}
    prompt["7"] = {"class_type": "KSampler", "inputs": second}
    prompt["waits"] = {"class_type": "LatentBatch", "inputs": {"samples1": ["6", 0], "samples2": ["7", 0]}}
    prompt["save"]["inputs"]["samples"] = ["waits", 0]
    for key, latent in (("r6", "6"), ("r7", "7")):
        inputs = {"model": ["erase", 0], "samples": [latent, 0]}
        prompt[key] = {"class_type": "SemipermMembraneReport", "inputs": inputs}
    entry = comfy.queue(prompt)
    texts = {key: "\n".join(entry["outputs"][key]["text"]) for key in ("r6", "r7")}
    assert "active in 4 of 4 steps" in texts["r6"] and "active in 3 of 3 steps" in texts["r7"]
    prompt["r6"]["inputs"]["samples"] = ["waits", 0]
    (error,) = comfy.queue(prompt)["errors"]
    assert "connect the LATENT of the sampler itself" in error
