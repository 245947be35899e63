"""In ComfyUI's Python (see benchmarks/run_in_comfyui.py): which steps lie inside a window, by its own sampling classes.

ARGUMENTS: a JSON file of cases {"kind": "discrete" | "flow" | "flux", "shift", "sigmas", "windows": [[start, end]]}.
Prints, for each case, the share of each step, and for each window which steps are active.
"""

import json
from pathlib import Path

import torch
from comfy.model_sampling import ModelSamplingDiscrete, ModelSamplingDiscreteFlow, ModelSamplingFlux
from semiperm.methods.schedule import Window
from semiperm.nodes.progress import Progress

found = []
for case in json.loads(Path(ARGUMENTS[0]).read_text(encoding="utf-8")):  # noqa: F821
    sampling = {"discrete": ModelSamplingDiscrete, "flow": ModelSamplingDiscreteFlow, "flux": ModelSamplingFlux}[
        case["kind"]
    ]()
    if case["kind"] != "discrete":
        sampling.set_parameters(shift=case["shift"])
    progress = Progress(sampling)
    steps = [progress({"sigmas": torch.tensor([sigma])}) for sigma in case["sigmas"]]
    active = [[bool(Window(*window).contains(share)) for share, _ in steps] for window in case["windows"]]
    core = []  # by the thresholds that ComfyUI itself would compute, ours being open at the end
    for start, end in case["windows"]:
        first, last = (float(sampling.percent_to_sigma(p)) for p in (start, end))
        late, early = first * (1 + 1e-4), last * (1 + 1e-4)  # what stands on an edge belongs to the later side
        core.append([sigma <= late and (sigma > early or last == 0) for sigma in case["sigmas"]])
    found.append({"shares": [share for share, _ in steps], "active": active, "core": core})
print(json.dumps(found))
