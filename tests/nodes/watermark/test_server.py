"""The watermark's workflows on the real ComfyUI: what they promise, that no secret leaks, and that errors are clear."""

import base64
import copy
import io
import itertools
import json
import time
import urllib.error
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from semiperm.methods.provenance.examine import examine
from semiperm.methods.provenance.record import extract
from semiperm.methods.watermark.keyring import Keyring, load_keyring, save_keyring
from semiperm.methods.watermark.keys import WatermarkKey

pytestmark = pytest.mark.comfy

API = Path(__file__).resolve().parents[3] / "workflows" / "api"
_numbers = itertools.count()


def graph(name: str) -> dict:
    """A workflow with file prefixes never used before."""
    prompt = json.loads((API / f"{name}.json").read_text(encoding="utf-8"))
    number = next(_numbers)
    for node in prompt.values():
        if "filename_prefix" in node["inputs"]:
            node["inputs"]["filename_prefix"] += f"-{number}"
    return prompt


def key_of(prompt: dict, class_type: str) -> str:
    (key,) = [key for key, node in prompt.items() if node["class_type"] == class_type]
    return key


def inputs(prompt: dict, class_type: str) -> dict:
    return prompt[key_of(prompt, class_type)]["inputs"]


def run(comfy, prompt: dict) -> dict:
    entry = comfy.queue(prompt)
    assert entry["errors"] == [] and entry["status"]["status_str"] == "success"
    return entry["outputs"]


def table(outputs: dict, prompt: dict) -> list[list[str]]:
    """The lines of Detect Watermark's table: name, verdict, p and so on; spaces in names are gone."""
    text = outputs[key_of(prompt, "SemipermDetectWatermark")]["text"][0]
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()[1:]]


def keyrings(comfy) -> Path:
    return comfy.base / "user" / "__semiperm" / "keyrings"


@pytest.fixture(scope="module", autouse=True)
def fixed(comfy):
    """The keyring of the workflows with a key that is the same every time, and so are the pictures."""
    keyrings(comfy).mkdir(parents=True, exist_ok=True)
    path = keyrings(comfy) / "my_keys.json"
    path.unlink(missing_ok=True)
    save_keyring(Keyring([WatermarkKey("my_keys", 5, "2026-01-01", bytes(range(32)), bytes(range(32, 64)))]), path)


def saved(comfy, outputs: dict, prompt: dict, class_type: str) -> list[Path]:
    return [
        comfy.base / "output" / one["subfolder"] / one["filename"]
        for one in outputs[key_of(prompt, class_type)]["images"]
    ]


def test_sign(comfy):
    from semiperm.canvas.judge import Judge

    prompt = graph("Sign")
    outputs = run(comfy, prompt)
    ((name, verdict, p, *_),) = table(outputs, prompt)
    assert (name, verdict) == ("0", "valid") and float(p) < 1e-12
    (file,) = saved(comfy, outputs, prompt, "SemipermSaveWithProvenance")
    data = file.read_bytes()
    record = extract(data)
    key = load_keyring(keyrings(comfy) / "my_keys.json").get("my_keys")
    assert record.key_id == key.key_id == 5 and record.unique_id and record.model == "semiperm canvas"
    assert examine(data).problems == ()
    found = {"verdict": "valid", "key_id": record.key_id, "unique_id": record.unique_id}
    assert examine(data, found=found).problems == ()
    with Image.open(io.BytesIO(data)) as image:
        assert json.loads(image.text["prompt"]).keys() == prompt.keys(), "the workflow is in the file, too"
    (comparison,) = saved(comfy, outputs, prompt, "SaveImage")
    picture = np.asarray(Image.open(comparison).convert("RGB"))
    top = (picture.shape[0] - 128) // 2  # the map has a caption; ImageStitch centers what is lower
    panels = [picture[top : top + 128, x : x + 128] for x in (0, 136)]
    seen = Judge.load()(panels)
    assert seen.object == ["mascot"] * 2 or len(set(seen.object)) == 1
    assert seen.style == ["striped"] * 2


def test_detect(comfy):
    prompt = graph("Detect")
    (signed, plain) = table(run(comfy, prompt), prompt)
    assert signed[:2] == ["signed", "valid"] and plain[:2] == ["not signed", "absent"]
    assert float(signed[2]) < 1e-12 and float(plain[2]) > 1e-5


def test_the_reader_of_load_canvas_looks_too_also_when_queued_again(comfy):
    prompt = graph("Detect")
    first = table(run(comfy, prompt), prompt)
    comfy.post("/free", b'{"unload_models": true, "free_memory": true}')  # forget all, so that all is computed anew
    time.sleep(1)
    entry = comfy.queue(prompt)
    assert entry["errors"] == [] and key_of(prompt, "SemipermDetectWatermark") not in comfy.cached(entry)
    assert table(entry["outputs"], prompt) == first
    assert first[1][:2] == ["not signed", "absent"]
    assert int(first[1][3]) in (44, 88), "41 of each climb without a reader; a second one where plain areas are filled"


def test_attack_and_detect(comfy):
    prompt = graph("Attack and detect")
    rows = {row[0]: row for row in table(run(comfy, prompt), prompt)}
    lines = inputs(prompt, "SemipermAttackSuite")["attacks"].splitlines()
    assert list(rows) == lines
    for name in ("none", "jpeg:25", "blur:1", "resize:0.5+jpeg:50"):
        assert rows[name][1] in ("valid", "unverified"), rows[name]
    assert rows["rotate:90"][1] == "absent", "a turn needs the search"


def test_verdicts_and_p_values_are_lists_and_both_signing_nodes_agree(comfy):
    prompt = graph("Detect")
    detector, noise = key_of(prompt, "SemipermDetectWatermark"), key_of(prompt, "SemipermWatermarkNoise")
    prompt["verdicts"] = {"class_type": "PreviewAny", "inputs": {"source": [detector, 1]}}
    prompt["p_values"] = {"class_type": "PreviewAny", "inputs": {"source": [detector, 2]}}
    outputs = run(comfy, prompt)
    assert outputs["verdicts"]["text"] == ["valid", "absent"]
    small, large = map(float, outputs["p_values"]["text"])
    assert small < 1e-12 < 1e-5 < large
    other = graph("Sign")
    seed = prompt[noise]["inputs"]["noise_seed"]
    assert {n["inputs"]["seed"] for n in other.values() if n["class_type"] == "KSampler"} == {seed}
    assert table(outputs, prompt)[0][1:] == table(run(comfy, other), other)[0][1:], "p-value, key and unique id"


def test_a_keyring_is_made_where_there_is_none(comfy):
    prompt = graph("Sign")
    inputs(prompt, "SemipermKeyring").update(keyring_name="made here.json", key_name="studio")
    text = run(comfy, prompt)[key_of(prompt, "SemipermKeyring")]["text"][0]
    assert text.startswith("made here.json: 1 key\n-> studio  id 0")
    path = keyrings(comfy) / "made here.json"
    assert [key.name for key in load_keyring(path)] == ["studio"] and path.stat().st_mode & 0o777 == 0o600
    assert "made here.json" in json.dumps(comfy.object_info()["SemipermKeyring"]["input"])


def secrets_of(comfy) -> list[bytes]:
    found = []
    for path in keyrings(comfy).glob("*.json"):
        for key in load_keyring(path):
            for secret in (key.stream_key, key.mac_key, key.content_key):
                found += [secret, base64.b64encode(secret), secret.hex().encode(), repr(secret)[2:-1].encode()]
                found.append(base64.urlsafe_b64encode(secret))
    return found


def test_no_secret_leaves_the_keyring(comfy):
    prompt = graph("Sign")
    # what other nodes make of the sockets, and what ComfyUI says of inputs where a node fails
    prompt["any keyring"] = {"class_type": "PreviewAny", "inputs": {"source": [key_of(prompt, "SemipermKeyring"), 0]}}
    prompt["any model"] = {
        "class_type": "PreviewAny",
        "inputs": {"source": [key_of(prompt, "SemipermWatermarkModel"), 0]},
    }
    run(comfy, prompt)
    failing = graph("Sign")
    inputs(failing, "SemipermDetectWatermark")["width"] = 128
    assert "expected both sides" in comfy.queue(failing)["errors"][0]
    secrets = secrets_of(comfy)
    assert secrets
    said = {"history": comfy.get("/history"), "log": comfy.log().encode(), "nodes": comfy.get("/object_info")}
    said |= {str(p): p.read_bytes() for d in ("output", "temp") for p in (comfy.base / d).rglob("*") if p.is_file()}
    assert any(name.endswith(".png") for name in said) and b"my_keys" in said["history"]
    for name, data in said.items():
        for secret in secrets:
            assert secret not in data, name
    database = [path for path in comfy.base.glob("comfyui.db*") if path.is_file()]
    assert not any(secret in path.read_bytes() for path in database for secret in secrets)


def test_the_server_does_not_hand_out_keyrings(comfy):
    run(comfy, graph("Sign"))
    file = keyrings(comfy) / "my_keys.json"
    assert file.exists()
    below = ["__semiperm/keyrings/my_keys.json", "../__semiperm/keyrings/my_keys.json"]
    asked = [f"/userdata/{urllib.parse.quote(name, safe='')}" for name in below]
    asked += [f"/api/userdata/{urllib.parse.quote(urllib.parse.quote(name, safe=''), safe='')}" for name in below]
    folders = ["__semiperm", "../__semiperm/keyrings"]
    asked += [f"/userdata?dir={urllib.parse.quote(folder, safe='')}&recurse=true" for folder in folders]
    asked += [f"/v2/userdata?path={urllib.parse.quote(folder, safe='')}" for folder in folders]
    for kind in ("input", "output", "temp"):
        for up in ("../user/__semiperm/keyrings", "user/__semiperm/keyrings"):
            asked.append("/view?" + urllib.parse.urlencode({"filename": file.name, "subfolder": up, "type": kind}))
    asked.append("/view?" + urllib.parse.urlencode({"filename": str(file)}))
    for path in asked:
        try:
            answer = comfy.get(path)
        except urllib.error.HTTPError:
            continue
        assert b"stream_key" not in answer and b"my_keys.json" not in answer, path
    # the check can fail: what lies in user/default is handed out
    (comfy.base / "user" / "default").mkdir(parents=True, exist_ok=True)
    (comfy.base / "user" / "default" / "open.json").write_text("seen", encoding="utf-8")
    assert comfy.get("/userdata/open.json") == b"seen"


def _missing(prompt, comfy):
    inputs(prompt, "SemipermKeyring").update(keyring_name="nobody.json", make_missing=False)


def _outside(prompt, comfy):
    inputs(prompt, "SemipermKeyring")["keyring_name"] = "../keys.json"


def _damaged(prompt, comfy):
    inputs(prompt, "SemipermKeyring")["keyring_name"] = "damaged.json"
    keyrings(comfy).mkdir(parents=True, exist_ok=True)
    path = keyrings(comfy) / "damaged.json"
    path.write_text('{"format": "semiperm-watermark-keyring", "version": 1, "keys": [{', encoding="utf-8")
    path.chmod(0o600)


def _ancestral(prompt, comfy):
    for node in prompt.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["sampler_name"] = "euler_ancestral"


def _small(prompt, comfy):
    inputs(prompt, "EmptyLatentImage").update(width=64, height=64)


def _other_pictures(prompt, comfy):
    saver = inputs(prompt, "SemipermSaveWithProvenance")
    saver["images"] = inputs(prompt, "SaveImage")["images"]


@pytest.mark.parametrize(
    "change, node, words",
    [
        (_missing, "SemipermKeyring", ["nobody.json", "make_missing"]),
        (_outside, "SemipermKeyring", ["plain file name"]),
        (_damaged, "SemipermKeyring", ["damaged.json", "truncated, corrupted"]),
        (_ancestral, "KSampler", ["euler_ancestral", "such as euler, ddim"]),
        (_small, "KSampler", ["256 elements", "larger picture"]),
        (_other_pictures, "SemipermSaveWithProvenance", ["of other pictures", "same images"]),
    ],
)
def test_bad_input_says_so_and_the_server_goes_on(comfy, change, node, words):
    good = graph("Sign")
    prompt = copy.deepcopy(good)
    change(prompt, comfy)
    entry = comfy.queue(prompt)
    assert entry["status"]["status_str"] in ("error", "invalid")
    (message,) = [text for text in entry["errors"] if text.startswith(node)]
    assert all(word in message for word in words), message
    assert comfy.alive()
    assert table(run(comfy, good), good)[0][1] == "valid"


def test_a_detection_runs_again_when_the_keyring_changes(comfy):
    prompt = graph("Sign")
    run(comfy, prompt)
    detector = key_of(prompt, "SemipermDetectWatermark")
    entry = comfy.queue(prompt)
    assert detector in comfy.cached(entry)
    path = keyrings(comfy) / "my_keys.json"
    path.touch()
    entry = comfy.queue(prompt)
    assert entry["errors"] == [] and detector not in comfy.cached(entry)


# ---- later passes ---------------------------------------------------------------------------------------------------


def key_titled(prompt: dict, title: str) -> str:
    (key,) = [key for key, node in prompt.items() if node["_meta"]["title"].startswith(title)]
    return key


@pytest.mark.parametrize("name", ["Sign with hires fix", "Sign an inpainting"])
def test_the_last_pass_signs_and_is_found(comfy, name):
    prompt = graph(name)
    (row,) = table(run(comfy, prompt), prompt)
    assert row[1] == "valid" and float(row[2]) < 1e-6


def test_a_second_pass_that_does_not_sign_is_refused_also_after_a_good_run(comfy):
    """The graph changes behind Watermark Model, whose own inputs stay: it is asked again all the same."""
    prompt = graph("Sign with hires fix")
    signing, second = key_of(prompt, "SemipermWatermarkModel"), key_titled(prompt, "Second pass")
    for node in prompt.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 2
    run(comfy, prompt)
    prompt[second]["inputs"]["model"] = [key_of(prompt, "SemipermLoadCanvas"), 0]
    (error,) = comfy.queue(prompt)["errors"]
    assert error.startswith("SemipermWatermarkModel: Second pass") and "later_passes" in error
    prompt[signing]["inputs"]["later_passes"] = "allow"
    run(comfy, prompt)


def test_noise_for_a_sampler_that_nobody_checked_is_refused(comfy):
    prompt = graph("Detect")
    inputs(prompt, "SemipermWatermarkNoise").pop("sampler")
    ran = set(comfy.queue(prompt)["outputs"])  # the Keyring alone: ComfyUI leaves out what lacks an input
    assert not ran & {key_of(prompt, "SaveImage"), key_of(prompt, "SemipermDetectWatermark")}
    prompt = graph("Detect")
    prompt["other"] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler_ancestral"}}
    for node in prompt.values():
        if node["class_type"] == "SamplerCustomAdvanced":
            node["inputs"]["sampler"] = ["other", 0]
    (error,) = comfy.queue(prompt)["errors"]
    assert "another sampler than the one that is wired into Watermark Noise" in error
    inputs(prompt, "SemipermWatermarkNoise")["sampler"] = ["other", 0]
    entry = comfy.queue(prompt)
    assert "euler_ancestral with these settings is not known to keep the mark" in entry["errors"][0]
    kinds = [data["exception_type"] for kind, data in entry["status"]["messages"] if kind == "execution_error"]
    assert kinds == ["semiperm.ModelError"]
