"""In ComfyUI's Python (see benchmarks/run_in_comfyui.py): the loaded canvas on the inputs of a diffusers run.

Argument: a safetensors file with the inputs `sample`, `timestep`, `picture`, what diffusers made of them (the names in
`found` below) and the metadata {"prompts": JSON list}. Prints the largest absolute difference of every part.
"""

import json

import comfy.model_management
import torch
from safetensors import safe_open
from semiperm.nodes.canvas.model import load_canvas

(file,) = ARGUMENTS  # noqa: F821
with safe_open(file, "pt") as f:
    prompts = json.loads(f.metadata()["prompts"])
    given = {name: f.get_tensor(name) for name in f.keys()}

model, clip, vae = load_canvas()
comfy.model_management.load_models_gpu([model])
tokens = [clip.tokenize(prompt) for prompt in prompts]
scale = model.model.latent_format
found = {
    "noise_pred": model.model.diffusion_model(given["sample"], given["timestep"], context=given["hidden"]),
    "ids": torch.tensor([[token for token, _ in t["l"][0]] for t in tokens]),
    "hidden": torch.cat([clip.encode_from_tokens(t) for t in tokens]),
    "decoded": vae.decode(scale.process_out(given["encoded"])).movedim(-1, 1),
    "encoded": scale.process_in(vae.encode(given["picture"].movedim(1, -1))),
    "sigmas": model.get_model_object("model_sampling").sigmas,
}
double = vae.first_stage_model.double()
found["encoded_64"] = scale.process_in(double.encode(given["picture"].double() * 2 - 1))
found["decoded_64"] = vae.process_output(double.decode(scale.process_out(given["encoded_64"])))
report = {name: (tensor.double() - given[name].double()).abs().max().item() for name, tensor in found.items()}
pooled = clip.encode_from_tokens(tokens[0], return_pooled=True)[1]
marks = [patcher.get_attachment("semiperm_canvas") is True for patcher in (model.clone(), clip.clone().patcher)]
dtypes = [str(model.model.get_dtype()), str(vae.vae_dtype)]
print(json.dumps(report | {"marked": all(marks), "dtypes": dtypes, "pooled": bool(pooled.isfinite().all())}))
