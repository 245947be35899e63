"""The mark in ComfyUI: keyrings, attacks and maps without it; signing, inversion and detection in its own Python."""

import importlib
import importlib.util
import os
import stat
import sys
from types import SimpleNamespace

import comfy_stub
import numpy as np
import pytest
import torch
from comfy_server import in_comfyui
from safetensors.torch import save_file
from semiperm.methods.errors import WatermarkError
from semiperm.methods.watermark.config import DetectionResult
from semiperm.methods.watermark.keyring import Keyring, load_keyring, save_keyring
from semiperm.methods.watermark.keys import WatermarkKey

comfy = pytest.mark.comfy


@pytest.fixture
def home(tmp_path):
    """A stand-in for ComfyUI whose user folder lies in tmp_path."""
    with comfy_stub.stand_in(tmp_path):
        yield tmp_path / "user" / "__semiperm" / "keyrings"


@pytest.fixture
def keyrings(home):
    return importlib.import_module("semiperm.nodes.watermark.keyring")


@pytest.fixture
def nodes(home):
    return importlib.import_module("semiperm.nodes.watermark.node")


# ---- keyrings -------------------------------------------------------------------------------------------------------


def test_a_keyring_is_made_once_and_only_when_told(keyrings, home):
    with pytest.raises(WatermarkError, match="no keyring 'my_keys.json'.*make_missing"):
        keyrings.open_keys("my_keys.json")
    made = keyrings.open_keys("my_keys.json", make_missing=True)
    assert made.key.name == "my_keys" and keyrings.open_keys("my_keys.json").key == made.key
    again = keyrings.open_keys("my_keys.json", make_missing=True)
    assert again.key == made.key and len(again.ring) == 1
    with pytest.raises(WatermarkError, match=r"no key '2027'; expected one of \['my_keys'\]"):
        keyrings.open_keys("my_keys.json", "2027")
    newer = keyrings.open_keys("my_keys.json", " 2027 ", make_missing=True)
    assert newer.key.name == "2027" and [key.name for key in newer.ring] == ["my_keys", "2027"]
    assert keyrings.open_keys("my_keys.json").key.name == "2027", "the newest one"
    assert keyrings.open_keys("my_keys.json", "my_keys").key == made.key
    if os.name == "posix":
        assert stat.S_IMODE((home / "my_keys.json").stat().st_mode) == 0o600
        assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_a_damaged_or_open_keyring_is_refused_and_left_alone(keyrings, home):
    keyrings.open_keys("my_keys.json", make_missing=True)
    path = home / "my_keys.json"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    for make_missing in (False, True):
        with pytest.raises(WatermarkError, match="truncated, corrupted"):
            keyrings.open_keys("my_keys.json", "new", make_missing)
    assert path.read_bytes() == whole[: len(whole) // 2]
    path.write_bytes(whole)
    path.chmod(0o644)
    if os.name == "posix":
        with pytest.raises(WatermarkError, match="chmod 600"):
            keyrings.open_keys("my_keys.json")


@pytest.mark.parametrize("name", ["../keys.json", "/etc/keys.json", "a/b.json", "a\\b.json", "keys", ".json", "", 3])
def test_other_names_are_refused(nodes, keyrings, name):
    with pytest.raises(WatermarkError, match="plain file name"):
        keyrings.open_keys(name)
    assert "plain file name" in nodes.SemipermKeyring.validate_inputs(name)


def test_the_list_shows_new_files(nodes, home):
    def options():
        return nodes.SemipermKeyring.define_schema().inputs[0].options["options"]

    assert options() == ["my_keys.json"]
    home.mkdir(parents=True)
    for name in ("studio.json", ".hidden.json", "notes.txt"):
        (home / name).touch()
    assert options() == ["my_keys.json", "studio.json"]


def test_the_fingerprint_follows_the_file_and_says_nothing_of_it(nodes, keyrings, home):
    node = nodes.SemipermKeyring
    assert node.fingerprint_inputs("my_keys.json") == node.fingerprint_inputs(None) == ""
    keyrings.open_keys("my_keys.json", make_missing=True)
    before = node.fingerprint_inputs("my_keys.json", "", True)
    assert before == node.fingerprint_inputs("my_keys.json", "", True)
    keyrings.open_keys("my_keys.json", "b", make_missing=True)
    assert node.fingerprint_inputs("my_keys.json", "", True) != before
    assert before.replace(" ", "").isdigit()


def test_secrets_do_not_show(nodes, keyrings, home):
    output = nodes.SemipermKeyring.execute("my_keys.json", "", True)
    (keys,) = output.args
    shown = repr(keys) + str(keys) + repr(output.ui.as_dict())
    assert "my_keys" in shown and "signs and detects" in shown
    for key in keys.ring:
        for secret in (key.stream_key, key.mac_key, key.content_key):
            assert repr(secret) not in shown and secret.hex() not in shown
    only = keyrings.keys_text("d.json", keyrings.Keys(keys.ring.detector(), keys.key.detector()))
    assert "only detects" in only


# ---- nodes ----------------------------------------------------------------------------------------------------------


def test_the_time_is_stamped_only_when_told(nodes, monkeypatch):
    calls = []
    surgery = SimpleNamespace(
        SignedNoise=lambda *args: calls.append(args),
        sign_model=lambda *args: calls.append(args),
        check_sampler=lambda sampler: calls.append(sampler),
    )
    monkeypatch.setitem(sys.modules, "semiperm.nodes.watermark.noise", surgery)
    monkeypatch.setattr(nodes.time, "time", lambda: 1234.5)
    monkeypatch.setattr(nodes, "fingerprint_of_graph", lambda: "")
    keys = SimpleNamespace(key="K")
    for node in (nodes.SemipermWatermarkNoise, nodes.SemipermWatermarkModel):
        node.hidden = SimpleNamespace(prompt={}, unique_id="1")
    nodes.SemipermWatermarkNoise.execute(keys, 7, False, "S")
    nodes.SemipermWatermarkNoise.execute(keys, 7, True, "S")
    nodes.SemipermWatermarkModel.execute("M", keys, True)
    assert calls == ["S", (7, "K", 0), "S", (7, "K", 1234), ("M", "K", 1234, None)]
    for node in (nodes.SemipermWatermarkNoise, nodes.SemipermWatermarkModel):
        assert node.fingerprint_inputs(stamp_time=False) == "" and node.fingerprint_inputs(stamp_time=True) == 1234.5


def result(evidence=None, **changes) -> DetectionResult:
    values = {
        "verdict": "valid", "p_value": 1e-9, "log10_p": -9.0, "payload": SimpleNamespace(unique_id=255),
        "bit_confidence": 0.9, "key_id": 2, "key_name": "studio", "model_evaluations": 1,
    }  # fmt: skip
    return DetectionResult(**values | changes, evidence=evidence)


def test_the_map_is_green_where_the_mark_agrees_and_red_where_not(home):
    heat = importlib.import_module("semiperm.nodes.watermark.heatmap")
    evidence = np.random.default_rng(0).uniform(0.1, 1, (4, 16, 16)).astype(np.float32)
    evidence[:, :, 8:] *= -1
    share = heat.sign_agreement(evidence)
    assert share.shape == (16, 16) and share[:, :5].min() > 0.99 and share[:, 11:].max() < -0.99
    images = torch.full((2, 128, 128, 3), 0.5)
    maps = heat.heat_maps(images, [result(evidence), result(None, verdict="absent")], "first\nsecond")
    assert maps.shape[0] == 2 and maps.shape[2:] == (128, 3) and maps.shape[1] > 128
    left, right, plain = maps[0, 64, 16], maps[0, 64, 112], maps[1, 64, 64]
    assert left[1] > left[0] + 0.2 and right[0] > right[1] + 0.2 and plain.std() < 1e-6
    undone = heat.heat_map(torch.rand(3, 128, 128), result(evidence, transform="flipped"))
    again = heat.heat_map(torch.rand(3, 128, 128), result(evidence, transform="flipped"))
    assert undone.equal(again), "the picture as given does not lie under a map of the picture before the edit"
    assert heat.heat_map(torch.rand(3, 64, 200), result(evidence[:, :4, :])).shape[1] == 200


def test_the_table(home):
    heat = importlib.import_module("semiperm.nodes.watermark.heatmap")
    lost = result(verdict="absent", p_value=0.5, log10_p=-0.3, payload=None, key_id=None, key_name=None)
    far = result(p_value=0.0, log10_p=-400.0, transform="flipped")
    lines = [line.split() for line in heat.detection_text([result(), lost, far], "one\ntwo").splitlines()]
    assert lines[1] == ["one", "valid", "1e-09", "studio", "(2)", "ff", "1"]
    assert lines[2] == ["two", "absent", "0.5", "1"]
    assert lines[3] == ["2", "valid", "1e-400", "studio", "(2)", "ff", "1", "flipped"]


# ---- in ComfyUI's Python --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A keyring with two keys, and where the picture goes that ComfyUI signs."""
    folder = tmp_path_factory.mktemp("comfy")
    secrets = ((bytes([i] * 32), bytes([9 - i] * 32), bytes([20 + i] * 32)) for i in range(2))
    keys = (
        WatermarkKey(name, i, "2026-01-01", *three) for i, (name, three) in enumerate(zip("ab", secrets, strict=True))
    )
    save_keyring(Keyring(keys), folder / "keys.json")  # the same keys, so the same pictures every time
    return SimpleNamespace(
        keys=folder / "keys.json", signed=folder / "signed.png", tensors=folder / "given.safetensors"
    )


@pytest.fixture(scope="module")
def pipe():
    from semiperm.canvas import load_pipeline

    return load_pipeline()


@pytest.fixture(scope="module")
def found(given, pipe):
    """What check_watermark.py measured, given what diffusers makes of the same pictures."""
    from semiperm.pipelines.watermark.inversion import encode_images, invert

    pixels = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    latents = encode_images(pipe, list(pixels))
    tensors = {"pixels": pixels, "latents": latents, "noise1": invert(pipe, latents, 1)}
    tensors["noise5"] = invert(pipe, latents, 5)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, given.tensors)
    return in_comfyui("check_watermark.py", given.tensors, given.keys, given.signed)


@comfy
@pytest.mark.parametrize(
    "what",
    [
        "magnitudes",
        "batch of one",
        "node",
        "batch_index",
        "zero stays",
        "model is noise",
        "queued again",
        "unsigned again",
        "last one counts",
        "invert 0",
        "through a signing model",
    ],
)
def test_not_a_bit_differs(found, what):
    assert found[what] == 0.0


@comfy
def test_signs_are_the_keys_and_unrelated_between_pictures(found):
    for what in ("signs kept", "images alike", "other key"):
        assert 0.42 < found[what] < 0.58, what  # 1,024 to 3,072 coins; 5 deviations
    assert found["effect"] > 1 and found["half"] == ["torch.float16", 0.0] and found["video"] == [1, 4, 5, 8, 8]


@comfy
def test_samplers_are_refused_exactly_where_they_add_noise(found):
    samplers = found["samplers"]
    assert len(samplers) > 30 and samplers["ddim"] == [True, True] and samplers["euler_ancestral"] == [False, False]
    assert {name: allowed for name, (allowed, _) in samplers.items()} == {
        name: alone for name, (_, alone) in samplers.items()
    }
    assert found["options"] == [True, True, False, False]


@comfy
def test_inversion_equals_that_of_the_diffusers_face(found):
    assert found["multiple"] == 8 and found["encode"] < 1e-4
    assert found["invert 1"] < 1e-2 and found["invert 5"] < 1e-2  # sigmas are looked up, times are not rounded


@comfy
def test_marks_are_found_and_nothing_else(found):
    assert found["verdicts"] == ["valid", "valid", "absent", "absent"]
    assert max(found["log10_p"][:2]) < -12 and min(found["log10_p"][2:]) > -5
    assert found["keys"] == ["a", "a", None, None] and max(found["evaluations"]) == 44  # three of them for the reader
    first, second = found["unique ids"][:2]
    assert first != second and found["unique ids"][2:] == [None, None]
    assert found["another key"] == ["absent"] * 4 and found["a detector's"] == ["unverified"]
    assert found["conditioning"] == found["four channels"] == found["resized"] == ["valid"]
    assert found["text"].splitlines()[1].startswith("one ") and found["maps"][0][0] == 4
    assert 0 <= found["maps"][1] and found["maps"][2] <= 1 and found["maps"][3] > 0.05


@comfy
def test_content_is_bound_where_a_vae_is_connected(found):
    assert found["bound"] == ["valid", "valid"] and max(found["bound, content p"]) < 1e-2
    assert found["bound, other content"] == ["content differs"] * 2
    assert found["bound, draws"] >= 2 and found["bound, queued again"] == 0.0
    assert found["bound, prompt once more"] == 0.0, "the conditioning is as before"


@comfy
def test_the_models_own_size_is_known(found):
    assert found["native"] == 128


@comfy
def test_search_undoes_a_flip(found):
    assert found["flipped"] == ["absent"] and found["flipped, search"][0] == "valid"
    assert found["flipped, search"][1] != "as given"


@comfy
def test_the_mark_in_added_noise(found):
    assert found["denoise 1.0"] == found["denoise 0.6"] == found["denoise 0.3"] == [True] * 4


@comfy
def test_the_mark_in_the_masked_part(found):
    assert sum(found["inpainted"]) >= 3 and found["mask of another size"] == found["inpainted"]
    assert found["beside the mask"] == [False] * 4


@comfy
def test_errors_say_what_to_do(found):
    words = {
        "ancestral": "such as euler, ddim",
        "detector's key": "can only detect",
        "small": "use a larger picture",
        "flat": "expected (B, C, H, W)",
        "no text": "neither clip nor conditioning",
        "one side": "expected both sides",
        "two masks": "one for all pictures",
        "no keys": "keyring is empty",
    }
    assert set(found["errors"]) == set(words)
    for name, text in words.items():
        assert text in found["errors"][name], name


@comfy
def test_a_picture_signed_in_comfyui_is_read_by_the_diffusers_face(found, given, pipe):
    from PIL import Image
    from semiperm.pipelines.watermark.detect import detect_watermark

    (seen,) = detect_watermark(pipe, Image.open(given.signed), load_keyring(given.keys))
    assert (seen.verdict, seen.key_name, seen.payload.unique_id) == ("valid", "a", found["unique ids"][0])


@comfy
def test_the_same_ladder_and_p_values_as_the_command_line(given, pipe):
    """Load Canvas attaches the reader that `semiperm detect` finds beside the weights, and both climb alike."""
    from semiperm.canvas.models import aid_files
    from semiperm.cli.detect import aids_of
    from semiperm.pipelines.watermark.detect import detect_watermark
    from semiperm.pipelines.watermark.sign import sign_noise

    ring = load_keyring(given.keys)
    latents = sign_noise(pipe, ring.get("a"), generator=torch.Generator().manual_seed(7))
    picture = pipe("a robot in sketch style on sky", latents=latents, guidance_scale=4, num_inference_steps=12).images[
        0
    ]
    file = given.signed.with_name("picture.png")
    picture.save(file)
    found = in_comfyui("check_reader.py", file, given.keys)
    aids = aids_of(pipe, "canvas", aid_files("canvas"), None)
    assert aids["reader"].model == found["reader"]
    for name, image in {"as saved": picture, "grey": picture.convert("L").convert("RGB")}.items():
        for seen, settings in zip(found[name], (aids, {}), strict=True):
            (ours,) = detect_watermark(pipe, image, ring, **settings)
            assert (seen[0], seen[2]) == (ours.verdict, ours.model_evaluations), name
            assert seen[1] == pytest.approx(ours.log10_p, rel=0.05, abs=0.3), name  # inversions differ by 1e-2 at most
    aided, bare = found["grey"]
    assert aided[2] != bare[2], "the reader is a rung of its own"


@comfy
@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "wan"])
def test_other_families(family, given):
    """Small models of ComfyUI's own classes: the noise is signed, and inversion asks the model what it should."""
    found = in_comfyui("check_watermark_families.py", family, given.keys)
    assert found["signs"] == 1.0
    if family == "wan":
        assert "semiperm.detect" in found["refused"]
        return
    assert "connect the VAE of the model" in found["vae"]
    assert found["calls"] == 1 and found["seen"] < 1e-5 and found["result"] < 1e-4
    expected = {"sdxl": 50, "sd3": 50, "flux": 0.05}[family]
    assert found["timestep"] == pytest.approx([expected] * 2, rel=0.01)
    assert found["five"] == [5, True, True]
