"""What a queued graph would do to the mark, read from the graph alone, without ComfyUI."""

import copy
import importlib

import comfy_stub
import pytest
from semiperm.methods.errors import WatermarkError

KSAMPLER = ({"model": "MODEL", "latent_image": "LATENT", "sampler_name": "COMBO", "denoise": "FLOAT"}, ["LATENT"])
CUSTOM = ({"noise": "NOISE", "guider": "GUIDER", "sampler": "SAMPLER", "latent_image": "LATENT"}, ["LATENT", "LATENT"])
TYPES = {
    "Loader": ({}, ["MODEL", "CLIP", "VAE"]),
    "SemipermWatermarkModel": ({"model": "MODEL"}, ["MODEL"]),
    "SemipermWatermarkNoise": ({"sampler": "SAMPLER"}, ["NOISE"]),
    "LoraLoader": ({"model": "MODEL"}, ["MODEL"]),
    "KSampler": KSAMPLER,
    "KSamplerAdvanced": KSAMPLER,
    "SamplerCustomAdvanced": CUSTOM,
    "KSamplerSelect": ({}, ["SAMPLER"]),
    "RandomNoise": ({}, ["NOISE"]),
    "DisableNoise": ({}, ["NOISE"]),
    "CFGGuider": ({"model": "MODEL"}, ["GUIDER"]),
    "Latent": ({}, ["LATENT"]),
    "Upscale": ({"samples": "LATENT"}, ["LATENT"]),
    "Decode": ({"samples": "LATENT", "vae": "VAE"}, ["IMAGE"]),
    "Encode": ({"pixels": "IMAGE", "vae": "VAE"}, ["LATENT"]),
    "SemipermMembraneReport": ({"model": "MODEL", "samples": "LATENT"}, ["LATENT", "STRING", "IMAGE"]),
    "Detailer": ({"model": "MODEL", "image": "IMAGE", "sampler_name": "COMBO"}, ["IMAGE"]),
}
HIRES = {
    "load": ("Loader", {}),
    "sign": ("SemipermWatermarkModel", {"model": ["load", 0]}),
    "lora": ("LoraLoader", {"model": ["sign", 0]}),
    "empty": ("Latent", {}),
    "first": ("KSampler", {"model": ["lora", 0], "latent_image": ["empty", 0], "sampler_name": "euler"}),
    "up": ("Upscale", {"samples": ["first", 0]}),
    "second": ("KSampler", {"model": ["load", 0], "latent_image": ["up", 0], "sampler_name": "euler", "denoise": 0.5}),
}
CUSTOMS = {
    "load": ("Loader", {}),
    "euler": ("KSamplerSelect", {"sampler_name": "euler"}),
    "noise": ("SemipermWatermarkNoise", {"noise_seed": 1, "sampler": ["euler", 0]}),
    "guider": ("CFGGuider", {"model": ["load", 0]}),
    "empty": ("Latent", {}),
    "first": ("SamplerCustomAdvanced", {
        "noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["euler", 0], "latent_image": ["empty", 0],
    }),
}  # fmt: skip


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    with comfy_stub.stand_in(tmp_path_factory.mktemp("models")):
        yield importlib.import_module("semiperm.nodes.watermark.graph")


def told(graph, nodes: dict, **changes) -> list[str]:
    """The losses in these nodes, of which some are changed: {node: class or inputs}."""
    nodes = copy.deepcopy(nodes)
    for key, change in changes.items():
        kind, inputs = nodes.get(key, (None, {}))
        nodes[key] = (change, inputs) if isinstance(change, str) else (kind, inputs | change)
    prompt = {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}
    return graph.losses(prompt, lambda kind: TYPES.get(kind, ({}, [])))


def test_a_second_pass_that_does_not_sign_is_told(graph):
    (found,) = told(graph, HIRES)
    assert found.startswith("KSampler (node second) adds noise to a signed picture")
    through_pixels = HIRES | {
        "pixels": ("Decode", {"samples": ["first", 0], "vae": ["load", 2]}),
        "up": ("Encode", {"pixels": ["pixels", 0], "vae": ["load", 2]}),
    }
    assert len(told(graph, through_pixels)) == 1
    detailed = HIRES | {"second": ("Detailer", {"model": ["load", 0], "image": ["pixels", 0], "sampler_name": "euler"})}
    assert len(told(graph, detailed | {"pixels": through_pixels["pixels"]})) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"second": {"model": ["sign", 0]}},
        {"second": {"model": ["lora", 0]}},
        {"second": {"denoise": 0}},
        {"second": {"add_noise": "disable"}},
        {"second": {"latent_image": ["empty", 0]}},
        {"second": "SemipermMembraneReport"},
        {"sign": {"later_passes": "allow"}},
        {"first": {"model": ["load", 0]}},
    ],
    ids=str,
)
def test_what_keeps_the_mark_or_never_had_one_is_not(graph, changes):
    assert told(graph, HIRES, **changes) == []


def test_signed_noise_counts_as_signing(graph):
    second = ("SamplerCustomAdvanced", CUSTOMS["first"][1] | {"latent_image": ["first", 0]})
    two = CUSTOMS | {"second": second, "plain": ("RandomNoise", {}), "none": ("DisableNoise", {})}
    assert told(graph, CUSTOMS) == [] and told(graph, two) == []
    assert told(graph, two, second={"noise": ["none", 0]}) == []
    (found,) = told(graph, two, second={"noise": ["plain", 0]})
    assert "SamplerCustomAdvanced (node second)" in found and "NOISE of Watermark Noise" in found


def test_the_sampler_that_draws_is_the_one_that_was_checked(graph):
    other = CUSTOMS | {"other": ("KSamplerSelect", {"sampler_name": "euler"})}
    assert told(graph, other, first={"sampler": ["other", 0]}) == []  # the same choice twice
    (found,) = told(graph, other, first={"sampler": ["other", 0]}, other={"sampler_name": "euler_ancestral"})
    assert "another sampler than the one that is wired into Watermark Noise" in found


def test_a_graph_that_loses_the_mark_is_refused(graph, monkeypatch):
    prompt = {key: {"class_type": kind, "inputs": dict(inputs)} for key, (kind, inputs) in HIRES.items()}
    monkeypatch.setattr(graph, "node_types", lambda kind: TYPES[kind])
    monkeypatch.setattr(graph, "queued_prompt", lambda: prompt)
    hidden = type("Hidden", (), {"prompt": prompt, "unique_id": "sign"})
    with pytest.raises(WatermarkError, match="node second"):
        graph.check_graph(hidden)
    assert "node second" in graph.fingerprint()
    hidden.unique_id = "elsewhere"  # inside of what another node expands to: nothing is known of it
    graph.check_graph(hidden)
    prompt["second"]["inputs"]["model"] = ["sign", 0]
    assert graph.fingerprint() == ""
