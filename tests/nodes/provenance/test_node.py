"""Saving with provenance, without ComfyUI: what the record says, and that the manifest comes last."""

import importlib
import importlib.util
import io
import json
from pathlib import Path
from types import SimpleNamespace

import comfy_stub
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from semiperm.methods.errors import GuidanceError, WatermarkError
from semiperm.methods.guidance.config import SafeGuidanceConfig
from semiperm.methods.guidance.record import GuidanceRecord, sealed_is_intact
from semiperm.methods.provenance.examine import examine
from semiperm.methods.provenance.picture_file import parse
from semiperm.methods.provenance.record import extract
from semiperm.methods.watermark.config import DetectionResult
from semiperm.methods.watermark.mark import Payload


@pytest.fixture
def provenance(tmp_path):
    with comfy_stub.stand_in(tmp_path):
        yield importlib.import_module("semiperm.nodes.provenance.node")


PAYLOAD = Payload(255)


def result(verdict: str, payload=PAYLOAD, key_id=2) -> DetectionResult:
    return DetectionResult(verdict, 1e-9, -9.0, payload, 0.9, key_id, "studio", 1)


def test_records_name_only_what_was_found(provenance):
    images = torch.rand(3, 8, 8, 3)
    plain = provenance.records_of(images, None, " my model ")
    assert [record.key_id for record in plain] == [None] * 3 and plain[0].model == "my model"
    found = [result("valid"), result("unverified"), result("absent", None, None)]
    detection = SimpleNamespace(results=found, digest=provenance.digest(images))
    valid, claimed, absent = provenance.records_of(images, detection, "")
    assert (valid.key_id, valid.unique_id) == (2, f"{255:016x}") and valid.model == "unnamed model"
    assert (claimed.key_id, claimed.unique_id) == (2, None) and absent.key_id is absent.algorithm is None
    detection.results = [result("content differs")] * 3
    assert provenance.records_of(images, detection, "")[0].key_id is None
    with pytest.raises(WatermarkError, match="of other pictures"):
        provenance.records_of(images + 1e-3, detection, "")


def test_certificates_are_listed_in_pairs(provenance, tmp_path):
    assert provenance.certificate_names() == ["none"] and provenance.credentials_of("none") is None
    folder = tmp_path / "user" / "__semiperm" / "certificates"
    folder.mkdir(parents=True)
    for name in ("studio.pem", "studio.key", "alone.pem"):
        (folder / name).touch()
    assert provenance.certificate_names() == ["none", "studio"]
    for name in ("alone", "../studio"):
        with pytest.raises(WatermarkError, match="no certificate"):
            provenance.credentials_of(name)
        assert "no certificate" in provenance.SemipermSaveWithProvenance.validate_inputs(name)


class Saver:
    """ComfyUI's ImageSaveHelper as far as it is needed: a numbered PNG with the workflow in a text chunk."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save_images(self, images, filename_prefix, folder_type, cls):
        saved = []
        for number, image in enumerate(images):
            info = PngInfo()
            info.add_text("prompt", '{"1": {}}')
            name = f"{filename_prefix}_{number:05}_.png"
            Image.fromarray((image * 255).byte().numpy()).save(self.folder / name, pnginfo=info)
            saved.append({"filename": name, "subfolder": "", "type": folder_type})
        return saved


@pytest.fixture
def output(provenance, tmp_path, monkeypatch):
    folder = tmp_path / "output"
    folder.mkdir()
    monkeypatch.setattr(provenance.ui, "ImageSaveHelper", Saver(folder), raising=False)
    monkeypatch.setattr(provenance.io, "FolderType", SimpleNamespace(output="output"), raising=False)
    return folder


def save(provenance, certificate: str = "none"):
    images = torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    detection = SimpleNamespace(
        results=[result("valid"), result("absent", None, None)], digest=provenance.digest(images)
    )
    return images, provenance.SemipermSaveWithProvenance.execute(images, "x", "canvas", certificate, detection)


def test_the_record_joins_the_workflow(provenance, output):
    images, node_output = save(provenance)
    assert node_output.args[0] is images
    first, second = node_output.args[1].splitlines()
    assert first == f"x_00000_.png: mark of key 2, unique id {255:016x}, no C2PA manifest"
    assert second == "x_00001_.png: no mark named, no C2PA manifest"
    shown = node_output.ui
    assert [one["filename"] for one in shown["images"]] == ["x_00000_.png", "x_00001_.png"] and shown["text"]
    for name, key_id, image in (("x_00000_.png", 2, images[0]), ("x_00001_.png", None, images[1])):
        data = (output / name).read_bytes()
        assert extract(data).key_id == key_id and examine(data).problems == ()
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.text["prompt"] == '{"1": {}}'
            assert picture.tobytes() == (image * 255).byte().numpy().tobytes()
    assert sorted(path.name for path in output.iterdir()) == ["x_00000_.png", "x_00001_.png"], "no leftovers"


def test_the_manifest_comes_last(provenance, output, tmp_path):
    pytest.importorskip("c2pa")
    from certificates import chain

    folder, made = tmp_path / "user" / "__semiperm" / "certificates", chain()
    folder.mkdir(parents=True)
    (folder / "studio.pem").write_bytes(made.certificates)
    (folder / "studio.key").write_bytes(made.private_key)
    _, node_output = save(provenance, "studio")
    assert "C2PA manifest signed" in node_output.args[1]
    report = examine((output / "x_00000_.png").read_bytes(), trust=made.authority)
    assert report.manifest.state == "Trusted" and report.manifest.binding == f"002-{255:016x}" and report.problems == ()
    (folder / "studio.key").write_bytes(chain().private_key)
    before = sorted(output.iterdir())
    with pytest.raises(WatermarkError, match="not that of the first certificate"):
        save(provenance, "studio")
    assert sorted(output.iterdir()) == before, "nothing is saved that looks signed"


# ---- what safe guidance did ------------------------------------------------------------------------------------------


def guided(images: int) -> str:
    """`record` of Guidance Report, of a model with two guidances."""
    reports = []
    for category in ("violence", "sexual"):
        record = GuidanceRecord()
        record.step(0.0, 1.0, True, extra_rows=images)
        record.add("scale", torch.arange(images) / 4)
        record.add("category", torch.zeros(images, dtype=torch.int64))
        reports.append(record.report(SafeGuidanceConfig(category, "sld"), images))
    return json.dumps(reports)


def test_each_picture_keeps_its_own_row_of_the_guidance_record(provenance, output, tmp_path, capsys):
    from semiperm.cli.guard import show_picture

    key = tmp_path / "user" / "__semiperm" / "guidance.key"
    key.parent.mkdir(parents=True)
    images = torch.rand(2, 16, 16, 3)
    _, text = provenance.SemipermSaveWithProvenance.execute(images, "x", "canvas", "none", guidance=guided(2)).args
    assert text.splitlines()[0].endswith("guidance record not sealed, no C2PA manifest")
    key.write_bytes(b"a secret of some length\n")
    _, text = provenance.SemipermSaveWithProvenance.execute(images, "x", "canvas", "none", guidance=guided(2)).args
    assert "guidance record sealed" in text
    for image in range(2):
        path = output / f"x_{image:05}_.png"
        assert examine(path.read_bytes()).problems == () and extract(path.read_bytes()).model == "canvas"
        (said,) = parse(path.read_bytes()).texts("semiperm")
        said = json.loads(said)
        assert [guard["categories"] for guard in said["guard"]] == [["violence"], ["sexual"]]
        assert [row["scale"] for guard in said["guard"] for row in guard["rows"]] == [image / 4] * 2
        assert all(sealed_is_intact(guard, b"a secret of some length") for guard in said["guard"])
    show_picture(path, key.read_bytes().strip(), as_json=False)
    printed = capsys.readouterr().out
    assert "by canvas" in printed and "sld away from sexual" in printed and "seal: intact" in printed


def test_a_changed_guidance_record_is_detected(provenance, output, tmp_path, capsys):
    import typer
    from semiperm.cli.guard import show_picture

    key = tmp_path / "user" / "__semiperm" / "guidance.key"
    key.parent.mkdir(parents=True)
    key.write_bytes(b"a secret of some length")
    provenance.SemipermSaveWithProvenance.execute(torch.rand(1, 16, 16, 3), "x", "", "none", guidance=guided(1))
    path = output / "x_00000_.png"
    file = parse(path.read_bytes())
    (said,) = file.texts("semiperm")
    path.write_bytes(file.with_text("semiperm", said.replace('"strength": 1.0', '"strength": 2.0', 1)).to_bytes())
    with pytest.raises(typer.Exit):
        show_picture(path, key.read_bytes(), as_json=False)
    assert "seal: BROKEN" in capsys.readouterr().out


@pytest.mark.parametrize("record, words", [("a table", "not a guidance record"), ("[]", "of no pictures")])
def test_a_record_of_other_pictures_is_refused(provenance, output, record, words):
    images = torch.rand(2, 16, 16, 3)
    with pytest.raises(GuidanceError, match=words):
        provenance.SemipermSaveWithProvenance.execute(images, "x", "", "none", guidance=record)
    with pytest.raises(GuidanceError, match="of 3 pictures"):
        provenance.SemipermSaveWithProvenance.execute(images, "x", "", "none", guidance=guided(3))
    assert not list(output.iterdir()), "no picture whose record is wrong"
