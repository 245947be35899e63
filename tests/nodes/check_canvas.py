"""In ComfyUI's Python (see benchmarks/run_in_comfyui.py): an embedded model on the inputs of a diffusers run.

Arguments: a safetensors file with the inputs `sample`, `timestep`, `picture`, what diffusers made of them (the names in
`found` below) and the metadata {"prompts": JSON list}; the model's name, and the folder of its weights or "".
Prints the largest absolute difference of every part.
"""

import json

import comfy.model_management
import comfy.samplers
import torch
from safetensors import safe_open
from semiperm.nodes.canvas.model import load_canvas
from semiperm.nodes.membranes.concept_text import text_space

file, name, folder = ARGUMENTS  # noqa: F821
with safe_open(file, "pt") as f:
    prompts = json.loads(f.metadata()["prompts"])
    given = {name: f.get_tensor(name) for name in f.keys()}

model, clip, vae = load_canvas(name, folder or None)
comfy.model_management.load_models_gpu([model])
tokens = [clip.tokenize(prompt) for prompt in prompts]
scale = model.model.latent_format
sampling = model.get_model_object("model_sampling")
encoded = [clip.encode_from_tokens(t, return_pooled=True) for t in tokens]
read = {"context": given["hidden"]} | ({"y": given["pooled"]} if "pooled" in given else {})
found = {
    "noise_pred": model.model.diffusion_model(given["sample"], given["timestep"], **read),
    "ids": torch.tensor([[token for token, _ in t["l"][0]] for t in tokens]),
    "hidden": torch.cat([hidden for hidden, _ in encoded]),
    "decoded": vae.decode(scale.process_out(given["encoded"])).movedim(-1, 1),
    "encoded": scale.process_in(vae.encode(given["picture"].movedim(1, -1))),
    "sigmas": sampling.sigmas,
}
if "pooled" in given:
    found["pooled"] = torch.cat([pooled for _, pooled in encoded])
    found["ids_g"] = torch.tensor([[token for token, _ in t["g"][0]] for t in tokens])
if "steps" in given:
    found["steps"] = comfy.samplers.calculate_sigmas(sampling, "simple", len(given["steps"]) - 1)
double = vae.first_stage_model.double()
found["encoded_64"] = scale.process_in(double.encode(given["picture"].double() * 2 - 1))
found["decoded_64"] = vae.process_output(double.decode(scale.process_out(given["encoded_64"])))
report = {name: (tensor.double() - given[name].double()).abs().max().item() for name, tensor in found.items()}
marks = [patcher.get_attachment("semiperm_canvas") == name for patcher in (model.clone(), clip.clone().patcher)]
space = text_space(model, clip)
features = space.encode(["", "a robot"])
facts = {
    "fit": [list(features.hidden.shape), features.pooled is not None and list(features.pooled.shape)],
    "projections": [len(space.tokens), len(space.pooled), len(space.segments)],
    "marked": all(marks),
    "dtypes": [str(model.model.get_dtype()), str(vae.vae_dtype)],
    "pooled_finite": bool(encoded[0][1].isfinite().all()),
    "native": model.get_attachment("semiperm_native"),
    "aids": {kind: aid.model for kind, aid in model.clone().get_attachment("semiperm_aids").items()},
    "channels": vae.latent_channels,
    "kind": type(model.model).__name__,
}
print(json.dumps(report | {"facts": facts}))
