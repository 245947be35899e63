"""Runs in ComfyUI's own Python: `run_in_comfyui.py COMFYUI REPOSITORY CHECK.py [ARGUMENT ...]`.

Loads the repository as the package `semiperm` and executes CHECK with `ARGUMENTS`, under inference mode as nodes are.
"""

import importlib.util
import runpy
import sys

comfyui, repository, check, *arguments = sys.argv[1:]
sys.argv = ["check", "--cpu"]
sys.path.insert(0, comfyui)
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
_spec = importlib.util.spec_from_file_location(
    "semiperm", f"{repository}/__init__.py", submodule_search_locations=[repository]
)
sys.modules["semiperm"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["semiperm"])

import torch  # noqa: E402

with torch.inference_mode():
    runpy.run_path(check, init_globals={"ARGUMENTS": arguments}, run_name="__main__")
