"""In ComfyUI's Python (see benchmarks/run_in_comfyui.py): what Load Canvas attaches to read its model's marks.

ARGUMENTS: a picture file, a keyring file. Prints JSON: what is found in the picture and in a grey copy of it, with the
reader and without, and which model the reader is of.
"""

import json

import numpy as np
import torch
from PIL import Image
from semiperm.methods.watermark.config import DetectionConfig
from semiperm.methods.watermark.keyring import load_keyring
from semiperm.nodes.canvas.model import load_canvas
from semiperm.nodes.watermark.inversion import ComfyInverter, detect_pictures

picture, ring = Image.open(ARGUMENTS[0]), load_keyring(ARGUMENTS[1])  # noqa: F821
model, clip, vae = load_canvas()
found = {"reader": model.clone().get_attachment("semiperm_aids")["reader"].model}
model.set_attachments("other", 1)  # a node in between clones and patches
aided, bare = (ComfyInverter(model.clone(), vae, clip=clip) for _ in range(2))
bare.aids = {}
for name, image in {"as saved": picture, "grey": picture.convert("L").convert("RGB")}.items():
    pixels = torch.from_numpy(np.asarray(image).copy())[None] / 255
    results = [detect_pictures(pixels, ring, one, DetectionConfig()).results[0] for one in (aided, bare)]
    found[name] = [[result.verdict, result.log10_p, result.model_evaluations] for result in results]
print(json.dumps(found))
