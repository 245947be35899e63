"""Safe guidance as a guider of Modular Diffusers, in small pipelines of the installed diffusers."""

import importlib.util
import json

import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks, WanBlocks
from diffusers.modular_pipelines.flux2 import Flux2KleinBaseAutoBlocks
from diffusers.modular_pipelines.qwenimage import QwenImageAutoBlocks
from diffusers.modular_pipelines.stable_diffusion_3 import StableDiffusion3AutoBlocks
from semiperm.methods.errors import GuidanceError
from semiperm.methods.guidance.category import Category
from semiperm.methods.guidance.config import SafeGuidanceConfig
from semiperm.methods.guidance.sld import SLD
from semiperm.pipelines.guidance.apply import apply_safe_guidance
from semiperm.pipelines.guidance.guider import SafeGuidance
from tiny_models import LENGTH, build, build_wan, call, flux2_parts, qwenimage_parts

OWN = {"name": "machines", "phrases": ["a robot", "an android"]}
SIZE = {"height": 16, "width": 16}
PACKED = {"height": 32, "width": 32, "max_sequence_length": LENGTH}
FAMILIES = {
    "sdxl": (StableDiffusionXLAutoBlocks, lambda: build("sdxl"), SIZE),
    "sd3": (StableDiffusion3AutoBlocks, lambda: build("sd3"), SIZE | {"max_sequence_length": LENGTH}),
    "flux2": (Flux2KleinBaseAutoBlocks, flux2_parts, PACKED),
    "qwenimage": (QwenImageAutoBlocks, qwenimage_parts, PACKED | {"max_sequence_length": 400}),
    "wan": (WanBlocks, build_wan, {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": LENGTH}),
}
needs = pytest.mark.skipif(importlib.util.find_spec("ftfy") is None, reason="diffusers' modular Wan needs ftfy")


def made(family, guider):
    blocks, base, kwargs = FAMILIES[family]
    blocks, given = blocks(), base()
    if isinstance(given, dict):  # parts without an autoencoder: latents are what is looked at
        blocks.sub_blocks.pop("decode")
    parts = given if isinstance(given, dict) else given.components
    pipe = blocks.init_pipeline()
    pipe.update_components(**{k: v for k, v in parts.items() if v is not None and k in pipe._component_specs})
    pipe.update_components(guider=guider)
    pipe.set_progress_bar_config(disable=True)
    return pipe, kwargs


def draw(pipe, kwargs, **more):
    generator = torch.Generator().manual_seed(0)
    given = {"prompt": "a photo of a robot", "negative_prompt": "", "num_inference_steps": 3, "output_type": "latent"}
    given = {name: value for name, value in given.items() if name in pipe.blocks.input_names}
    return pipe(**given, generator=generator, **kwargs, **more).values["latents"]


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux2", "qwenimage", pytest.param("wan", marks=needs)])
def test_it_guides_and_says_so(family):
    guider = SafeGuidance([OWN], preset="max", guidance_scale=3.0)
    pipe, kwargs = made(family, guider)
    guider.prepare(pipe, **{k: v for k, v in kwargs.items() if k == "max_sequence_length"})
    found, again = draw(pipe, kwargs), draw(pipe, kwargs)
    assert torch.equal(found, again), "nothing is carried over"
    report = guider.report()
    assert report["evaluations"] == 3 and report["rows"][0]["fired"] > 0.5
    neutral = SafeGuidance([OWN], preset="max", strength=0.0, guidance_scale=3.0)
    pipe.update_components(guider=neutral)
    plain = draw(pipe, kwargs)
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=3.0))
    assert torch.equal(draw(pipe, kwargs), plain) and not torch.equal(found, plain)


def test_it_is_the_classic_pipelines():
    guider = SafeGuidance([OWN], preset="max", guidance_scale=3.0)
    pipe, kwargs = made("sd3", guider)
    guider.prepare(pipe, max_sequence_length=LENGTH)
    classic = build("sd3")
    with apply_safe_guidance(classic, SafeGuidanceConfig(Category(**OWN), SLD("max"))):
        expected = call(classic, ["a photo of a robot"], negative_prompt=[""], steps=3)
    found = draw(pipe, kwargs)
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_faults_of_a_guider():
    guider = SafeGuidance([OWN], guidance_scale=3.0)
    pipe, kwargs = made("sd3", guider)
    with pytest.raises(GuidanceError, match="prepare"):
        draw(pipe, kwargs)
    guider.prepare(pipe, max_sequence_length=LENGTH)
    with pytest.raises(GuidanceError, match="no report yet"):
        guider.report()
    guider.disable()
    with pytest.raises(GuidanceError, match="it is off"):
        draw(pipe, kwargs)
    guider.enable()
    guider._texts = [{"prompt_embeds": guider._texts[0]["prompt_embeds"]}]
    with pytest.raises(GuidanceError, match="text_embeds"):
        draw(pipe, kwargs)
    with pytest.raises(GuidanceError, match="followed step"):
        guider.set_state(0, 4, torch.tensor(9))
        guider.set_state(2, 4, torch.tensor(7))
    with pytest.raises(GuidanceError, match="no block"):
        guider.prepare(object())


def test_its_config_is_a_file(tmp_path):
    SafeGuidance([OWN, "violence"], preset="strong", strength=0.5, guidance_scale=4.0).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "guider_config.json").read_text())
    assert said["_class_name"] == "SafeGuidance" and said["categories"][0]["name"] == "machines"
    again = SafeGuidance.from_pretrained(tmp_path)
    assert again.safety.strength == 0.5 and [c.name for c in again.safety.categories] == ["machines", "violence"]
    assert again.algorithm == SLD("strong") and again.guidance_scale == 4.0


def test_a_category_keeps_its_length_and_its_own_mask():
    """QwenImage's texts are as long as they are; a longer category must not be cut to the prompt's length."""
    guider = SafeGuidance([OWN], preset="max", guidance_scale=3.0)
    pipe, kwargs = made("qwenimage", guider)
    guider.prepare(pipe, max_sequence_length=kwargs["max_sequence_length"])
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: seen.append(
            (given["encoder_hidden_states"].shape[1], given["encoder_hidden_states_mask"].shape[1])
        ),
        with_kwargs=True,
    )
    try:
        draw(pipe, kwargs)
    finally:
        hook.remove()
    (prompt, of_prompt), (none, of_none), (harm, of_harm) = seen[:3]
    assert harm - none == len("a robot, an android") and prompt - none == len("a photo of a robot")
    assert (prompt, none, harm) == (of_prompt, of_none, of_harm)


def test_the_type_hint_of_an_index_loads_it(tmp_path):
    """modular_model_index.json may name this module and class; whoever imported it gets it, with its settings."""
    from diffusers import ModularPipeline

    SafeGuidance([OWN], preset="strong", strength=0.5, guidance_scale=4.0).save_pretrained(tmp_path / "guider")
    said = {
        "type_hint": ["semiperm.pipelines.guidance.guider", "SafeGuidance"],
        "pretrained_model_name_or_path": str(tmp_path),
        "subfolder": "guider",
    }
    index = {
        "_class_name": "StableDiffusion3ModularPipeline",
        "_blocks_class_name": "StableDiffusion3AutoBlocks",
        "_diffusers_version": "0.42.1",
        "guider": ["semiperm.pipelines.guidance.guider", "SafeGuidance", said],
    }
    (tmp_path / "modular_model_index.json").write_text(json.dumps(index))
    pipe = ModularPipeline.from_pretrained(str(tmp_path))
    pipe.load_components(names=["guider"])
    assert type(pipe.guider) is SafeGuidance and pipe.guider.safety.strength == 0.5
    assert pipe.guider.safety.chosen[0].phrases == ("a robot", "an android")


CODE = {"_class_name": "SafeGuidance", "auto_map": {"AutoModel": "guider.SafeGuidance"}}


def test_code_in_a_folder_is_loaded_with_trust_remote_code(tmp_path):
    """A guider's folder with a file of its own, which takes it from the installed package (docs/python.md)."""
    from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec

    SafeGuidance([OWN], preset="strong", guidance_scale=4.0).save_pretrained(tmp_path)
    (tmp_path / "guider.py").write_text("from semiperm.pipelines.guidance.guider import SafeGuidance\n")
    (tmp_path / "config.json").write_text(json.dumps(CODE))
    spec = ComponentSpec(name="guider", type_hint=None, pretrained_model_name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match="Unable to load guider"):
        spec.load()
    found = spec.load(trust_remote_code=True)
    assert isinstance(found, SafeGuidance) and found.guidance_scale == 4.0
