"""The real ComfyUI, started once for all tests, and what a test asks of it.

It runs in its own process with its own Python, from a temporary base directory whose custom_nodes holds nothing but a
link to this repository: neither the user's models nor other packs take part.
"""

import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image
from semiperm.benchmarks.launch import environment, run_in_comfyui

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def comfyui_path() -> Path:
    """The ComfyUI checkout: COMFYUI_PATH, else ~/comfy/ComfyUI."""
    return Path(os.environ.get("COMFYUI_PATH") or "~/comfy/ComfyUI").expanduser()


def comfyui_python() -> Path:
    """The Python that runs it: COMFYUI_PYTHON, else that of a `venv` beside the checkout, else this one."""
    if os.environ.get("COMFYUI_PYTHON"):
        return Path(os.environ["COMFYUI_PYTHON"]).expanduser()
    beside = comfyui_path().parent / "venv" / "bin" / "python"
    return beside if beside.exists() else Path(sys.executable)


def why_no_comfyui() -> str | None:
    """Why tests that need ComfyUI cannot run here, or None."""
    path, python = comfyui_path(), comfyui_python()
    if not (path / "main.py").exists():
        return f"no ComfyUI in {path}; set COMFYUI_PATH to a checkout"
    if not python.exists():
        return f"no Python at {python}; set COMFYUI_PYTHON to one with ComfyUI's requirements"
    if python == Path(sys.executable) and importlib.util.find_spec("aiohttp") is None:
        return "this Python lacks ComfyUI's requirements; set COMFYUI_PYTHON to one that has them"
    return None


def in_comfyui(check: str, *arguments, timeout: float = 1200) -> dict:
    """Run a check of this folder with ComfyUI's Python; return the JSON it prints last.

    The timeout is for one that hangs, not for a busy machine.
    """
    return run_in_comfyui(comfyui_path(), comfyui_python(), HERE / check, *arguments, timeout=timeout)


def link_pack(base: Path) -> Path:
    """Put this repository into `base`/custom_nodes as a user's clone would lie there; return its path."""
    pack = base / "custom_nodes" / "semiperm"
    pack.parent.mkdir(parents=True, exist_ok=True)
    pack.symlink_to(ROOT, target_is_directory=True)
    return pack


class ComfyServer:
    """A running ComfyUI on 127.0.0.1. `base` is its base directory: base / "models" / "semiperm" and so on."""

    def __init__(self, base: Path, *arguments: str, patience: float = 600):
        self.base = base
        link_pack(base)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_file = base / "comfyui.log"
        command = [str(comfyui_python()), "main.py", "--cpu", "--disable-auto-launch", "--disable-api-nodes"]
        command += ["--port", str(self.port), "--base-directory", str(base)]
        command += ["--database-url", f"sqlite:///{base / 'comfyui.db'}"]  # else it would lie in the checkout
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *arguments], cwd=comfyui_path(), env=environment(), stdout=log, stderr=subprocess.STDOUT
            )
        try:
            self._wait(patience)
        except BaseException:
            self.stop()
            raise

    def _wait(self, patience: float) -> None:
        end = time.monotonic() + patience
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended with {self.process.returncode}:\n{self.log()[-4000:]}")
            try:
                self.object_info()
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.3)
        raise TimeoutError(f"ComfyUI does not answer on {self.url} after {patience} s:\n{self.log()[-4000:]}")

    def stop(self) -> None:
        """End the process; harmless when it has ended."""
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def alive(self) -> bool:
        return self.process.poll() is None

    def log(self) -> str:
        """Everything the server has written so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + urllib.parse.quote(path, safe="/?&=%"), timeout=60) as answer:
            return answer.read()

    def post(self, path: str, body: bytes, content_type: str = "application/json") -> bytes:
        request = urllib.request.Request(self.url + path, data=body, headers={"Content-Type": content_type})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def object_info(self) -> dict:
        """{node id: definition} of every node that the server knows."""
        return json.loads(self.get("/object_info"))

    def queue(self, prompt: dict, timeout: float = 120) -> dict:
        """Run an API graph and wait for it.

        Returns: the history entry: `outputs` {node: ...}, `status` with its `status_str` "success", "error" or (never
            run) "invalid", and `errors`, the texts that the nodes' error dialogs show; empty when all went well.
        """
        try:
            answer = json.loads(self.post("/prompt", json.dumps({"prompt": prompt, "client_id": "tests"}).encode()))
        except urllib.error.HTTPError as refusal:
            return _refused(json.loads(refusal.read()))
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            entry = json.loads(self.get(f"/history/{answer['prompt_id']}")).get(answer["prompt_id"])
            if entry:
                messages = entry["status"]["messages"] if entry.get("status") else []
                failed = [data for kind, data in messages if kind == "execution_error"]
                return entry | {"errors": [f"{d['node_type']}: {d['exception_message']}" for d in failed]}
            if not self.alive():
                raise RuntimeError(f"ComfyUI ended while it ran the graph:\n{self.log()[-4000:]}")
            time.sleep(0.1)
        self.post("/interrupt", b"{}")
        raise TimeoutError(f"the graph still ran after {timeout} s:\n{self.log()[-2000:]}")

    def cached(self, entry: dict) -> set[str]:
        """The nodes that this run did not execute, for their results were still there."""
        told = [data["nodes"] for kind, data in entry["status"]["messages"] if kind == "execution_cached"]
        return set().union(*told)

    def image_files(self, entry: dict) -> list[bytes]:
        """The bytes of every picture that a run saved or previewed, in the order of the nodes' ids."""
        found = [
            {key: image[key] for key in ("filename", "subfolder", "type")}
            for node in sorted(entry["outputs"], key=lambda node: (len(node), node))
            for image in entry["outputs"][node].get("images", [])
        ]
        return [self.get("/view?" + urllib.parse.urlencode(image)) for image in found]

    def images(self, entry: dict) -> list[np.ndarray]:
        """The same as uint8 arrays (H, W, 3)."""
        return [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in self.image_files(entry)]


def _refused(answer: dict) -> dict:
    """The history entry of a graph that never ran."""
    errors = [str(answer["error"].get("message", answer["error"]) if isinstance(answer["error"], dict) else answer)]
    for node in answer.get("node_errors", {}).values():
        errors += [f"{node['class_type']}: {e['message']}: {e['details']}" for e in node["errors"]]
    return {"outputs": {}, "status": {"status_str": "invalid", "completed": False, "messages": []}, "errors": errors}
