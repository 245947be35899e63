"""Saving with provenance in ComfyUI: the workflow, a record of origin that names the mark found, what safe guidance
did, and a C2PA manifest.

Order matters: ComfyUI writes the picture and its workflow, then come the records, and the manifest, which covers every
byte, comes last.
"""

import json
import os
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ...methods.errors import GuidanceError, WatermarkError
from ...methods.files import write_file
from ...methods.guidance.record import CHUNK, SEAL, record_of_picture
from ...methods.provenance.picture_file import parse
from ...methods.provenance.record import describe, embed
from ..private import private_folder
from ..sockets import DetectionIO, aliases, digest

NO_CERTIFICATE = "none"
_UNNAMED = "unnamed model"


def certificate_names() -> list[str]:
    """The NAME of every pair NAME.pem, NAME.key in user/__semiperm/certificates, behind "none"."""
    folder = private_folder("certificates")
    return [NO_CERTIFICATE, *sorted(path.stem for path in folder.glob("*.pem") if path.with_suffix(".key").exists())]


def credentials_of(name: str):
    """What signs C2PA manifests under a listed name; None for "none".

    Raises:
        WatermarkError: a name that is not listed, or what `load_credentials` refuses.
    """
    if name == NO_CERTIFICATE:
        return None
    if name not in certificate_names():
        raise WatermarkError(
            f"there is no certificate {name!r}; expected one of {certificate_names()}: put {name}.pem (the chain) and"
            f" {name}.key into {private_folder('certificates')} and refresh (key R)"
        )
    from ...methods.provenance.c2pa import load_credentials

    path = private_folder("certificates") / f"{name}.pem"
    return load_credentials(path, path.with_suffix(".key"))


def records_of(images, detection, model_name: str) -> list:
    """The record of each picture. A mark is named only where it was found, its unique id only where it is authentic.

    Raises:
        WatermarkError: a detection of other pictures.
    """
    if detection is None:
        return [describe(model_name.strip() or _UNNAMED) for _ in images]
    if detection.digest != digest(images):
        raise WatermarkError(
            "the detection is of other pictures than those to save; give Detect Watermark and Save With Provenance the"
            " same images"
        )
    records = []
    for result in detection.results:
        authentic = result.verdict == "valid"
        named = result if result.verdict in ("valid", "unverified") else None
        records.append(describe(model_name.strip() or _UNNAMED, named, result.payload if authentic else None))
    return records


def seal_key() -> bytes | None:
    """The secret that seals guidance records: user/__semiperm/guidance.key; None where there is no such file."""
    path = private_folder("guidance.key")
    return path.read_bytes().strip() if path.is_file() else None


def guidance_of(images, guidance: str | None, model_name: str) -> list[str | None]:
    """For each picture the text chunk that says what safe guidance did, in `semiperm generate`'s form.

    Args:
        guidance: `record` of Guidance Report, of the run that drew these pictures; None: no chunk.

    Raises:
        GuidanceError: no such record, or one of other pictures.
    """
    if guidance is None:
        return [None] * len(images)
    try:
        reports = json.loads(guidance)
        counts = {len(report["rows"]) for report in reports}
    except (ValueError, TypeError, KeyError):
        raise GuidanceError(
            "guidance is not a guidance record; expected JSON as Guidance Report's output `record` has it"
        ) from None
    if counts != {len(images)}:
        raise GuidanceError(
            f"the guidance record is of {', '.join(map(str, sorted(counts))) or 'no'} pictures, and {len(images)} are"
            " to be saved: connect the Guidance Report of the sampler that drew them"
        )
    name, key = model_name.strip() or _UNNAMED, seal_key()
    found = [record_of_picture(reports, image, key) for image in range(len(images))]
    return [json.dumps({"model": name, "guard": one[0] if len(one) == 1 else one}) for one in found]


def save(images, filename_prefix: str, records: list, guards: list, credentials, cls):
    """Save pictures as ComfyUI does, then write records and manifest into them; (what was saved, text)."""
    saved = ui.ImageSaveHelper.save_images(images, filename_prefix, io.FolderType.output, cls)
    lines = []
    for one, record, guard in zip(saved, records, guards, strict=True):
        path = Path(folder_paths.get_output_directory(), one["subfolder"], one["filename"])
        data = path.read_bytes()
        if guard is not None:
            data = parse(data).with_text(CHUNK, guard).to_bytes()
        data = embed(data, record)
        if credentials is not None:
            from ...methods.provenance.c2pa import sign

            data = sign(data, credentials)
        write_file(path, data)
        mark = "no mark named" if record.key_id is None else f"mark of key {record.key_id}"
        mark += f", unique id {record.unique_id}" if record.unique_id else ""
        if guard is not None:
            mark += f", guidance record {'sealed' if SEAL in guard else 'not sealed'}"
        name = os.path.join(one["subfolder"], one["filename"])
        lines.append(f"{name}: {mark}, {'no C2PA manifest' if credentials is None else 'C2PA manifest signed'}")
    return saved, "\n".join(lines)


class SemipermSaveWithProvenance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SemipermSaveWithProvenance",
            display_name="Save With Provenance",
            category="semiperm/watermark",
            description="Saves PNG files with the workflow, as Save Image does, and with a machine-readable record of"
            " their origin that names the mark that was found in them. With a certificate also signs a C2PA manifest.",
            inputs=[
                io.Image.Input("images", tooltip="The pictures to save."),
                io.String.Input(
                    "filename_prefix",
                    default="semiperm/signed",
                    tooltip="Start of the file name inside ComfyUI's output folder; a number is added.",
                ),
                io.String.Input(
                    "model_name",
                    default="",
                    placeholder="name of the model",
                    tooltip="The model's name, for the record. It is written into the file for everybody to read.",
                ),
                io.Combo.Input(
                    "certificate",
                    options=certificate_names(),
                    default=NO_CERTIFICATE,
                    tooltip="Signs a C2PA manifest with this pair NAME.pem, NAME.key of user/__semiperm/certificates."
                    " Needs the package c2pa-python. none: no manifest.",
                ),
                DetectionIO.Input(
                    "detection",
                    optional=True,
                    tooltip="From Detect Watermark, for the same pictures. The record then names the mark that was"
                    " found; without it, no mark is named.",
                ),
                io.String.Input(
                    "guidance",
                    optional=True,
                    force_input=True,
                    tooltip="`record` of Guidance Report, of the sampler that drew these pictures: what safe guidance"
                    " did is then written into each file, sealed with user/__semiperm/guidance.key where there is one.",
                ),
            ],
            outputs=[
                io.Image.Output("saved_images", display_name="IMAGE", tooltip="The pictures that came in, unchanged."),
                io.String.Output(
                    "text", display_name="text", tooltip="Each file, the mark that it names, and whether it is signed."
                ),
            ],
            is_output_node=True,
            **aliases("C2PA", "content credentials", "save image metadata", "provenance"),
        )

    @classmethod
    def validate_inputs(cls, certificate):
        known = certificate is None or certificate in certificate_names()
        return known or f"there is no certificate {certificate!r}; expected one of {certificate_names()}"

    @classmethod
    def execute(cls, images, filename_prefix, model_name, certificate, detection=None, guidance=None):
        credentials, records = credentials_of(certificate), records_of(images, detection, model_name)
        guards = guidance_of(images, guidance, model_name)
        saved, text = save(images, filename_prefix, records, guards, credentials, cls)
        shown = ui.SavedImages(saved).as_dict() | ui.PreviewText(text).as_dict()
        return io.NodeOutput(images, text, ui=shown)


NODES = [SemipermSaveWithProvenance]
