"""Run a script with ComfyUI's own Python, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, str]:
    """The environment of a ComfyUI process: without ours on its path, and offline."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "PYTHONWARNINGS")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def run_in_comfyui(comfyui: Path, python: Path, script: Path, *arguments, timeout: float | None = None):
    """Run a script through run_in_comfyui.py and return the JSON it prints last.

    Args:
        comfyui: its folder. python: the Python that has its requirements.

    Raises:
        RuntimeError: the process failed; with the end of what it wrote.
    """
    command = [python, ROOT / "benchmarks" / "run_in_comfyui.py", comfyui, ROOT, script, *arguments]
    done = subprocess.run(
        [str(part) for part in command], env=environment(), capture_output=True, text=True, timeout=timeout
    )
    if done.returncode:
        name = Path(script).name
        raise RuntimeError(f"{name} ended with {done.returncode}:\n{done.stdout[-1000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
