"""In ComfyUI's Python (benchmarks/run_in_comfyui.py): a picture detector from example pictures, on a small SD3.

The autoencoder is a stand-in: a picture's brightness is what its latents are. Prints JSON.
"""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import torch
from semiperm.methods.errors import GuidanceError
from semiperm.methods.guidance.category import Category
from semiperm.nodes.guidance.detectors import detectors_for
from semiperm.nodes.guidance.picture_fit import _STEPS, Examples, _Drawing

models = SimpleNamespace(**runpy.run_path(Path(__file__).with_name("comfy_models.py")))
model, channels = models.small_model("sd3")
clip = models.Words("sd3")


class Brightness:
    def encode(self, pictures):
        small = torch.nn.functional.avg_pool2d(pictures.movedim(-1, 1).mean(1, keepdim=True), 8)
        return (6 * small).expand(-1, channels, -1, -1).contiguous()


calm = [f"a {thing} on {ground}" for thing in ("fox", "boat", "chair", "lake") for ground in ("sky", "sand", "fog")]
category = Category("glare", ("a glaring light",), false_alarms=0.4)
examples = Examples(torch.ones(3, 64, 64, 3) * torch.tensor([0.9, 1.0, 0.8])[:, None, None, None], Brightness(), 2.0)
calls = []
model.add_wrapper_with_key(
    "apply_model", "count", lambda executor, x, *a, **k: (calls.append(len(x)), executor(x, *a, **k))[1]
)
pair = detectors_for(model, clip, category, None, calm, "", examples).pairs[0]
found = {"calls": sum(calls), "text": pair.text is not None, "alarms": pair.false_alarms}
drawing = _Drawing(model, clip, examples, 1)
for name, steps in {"examples": drawing.noised(), "harmless": drawing.harmless(calm[:6], 100)}.items():
    highest = torch.stack([pair.picture.score(latents, share) for share, latents in steps]).amax(dim=0)
    found[name] = float((highest > pair.picture.threshold).float().mean())
    found[f"{name}, steps"] = [len(steps), len(steps[0][1])]
found["step"] = _STEPS
try:
    detectors_for(model, clip, category, None, calm, "", Examples(None, Brightness()))
except GuidanceError as error:
    found["without pictures"] = str(error)
print(json.dumps(found))
