"""The keyed mark in ComfyUI: a keyring, two ways to sign, and the detector. The work is done elsewhere.

The modules that need `comfy` itself are imported when a node runs, so that the definitions can be read without it.
"""

import time

from comfy_api.latest import io, ui

from ..sockets import DetectionIO, KeyringIO, aliases
from .graph import LATER_PASSES, check_graph
from .graph import fingerprint as fingerprint_of_graph
from .keyring import DEFAULT, fingerprint, keyring_names, keyring_path, keys_text, open_keys

CATEGORY = "semiperm/watermark"

_KEYRING = "From Keyring. Its chosen key signs; the secrets stay in memory and never enter a workflow or a picture."


def _stamp() -> io.Input:
    return io.Boolean.Input(
        "stamp_time",
        default=False,
        tooltip="Write the time of queueing into the payload, where the picture is large enough for it (4,096 latent"
        " values or more). The same seed then gives another noise every time.",
    )


def _later_passes() -> io.Input:
    return io.Combo.Input(
        "later_passes",
        options=list(LATER_PASSES),
        default=LATER_PASSES[0],
        optional=True,
        tooltip="What to do about a second sampler (hires fix, inpainting, a detailer) that adds noise to the signed"
        " picture and does not sign it, so that the mark is drawn over: refuse to run, or allow it.",
    )


def _now(stamp_time: bool) -> int:
    return int(time.time()) if stamp_time else 0


class SemipermKeyring(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SemipermKeyring",
            display_name="Keyring",
            category=CATEGORY,
            description="Opens a keyring of user/__semiperm/keyrings and chooses the key that signs. Workflows and"
            " pictures only ever hold the names of file and key, never a secret. Can make a first keyring.",
            inputs=[
                io.Combo.Input(
                    "keyring_name",
                    options=keyring_names(),
                    default=DEFAULT,
                    tooltip="A keyring file in user/__semiperm/keyrings, a folder that ComfyUI's server does not hand"
                    " out. Press R after adding one.",
                ),
                io.String.Input(
                    "key_name",
                    default="",
                    placeholder="newest key",
                    tooltip="Which key signs. Empty: the newest one. All keys of the file are used to detect.",
                ),
                io.Boolean.Input(
                    "make_missing",
                    default=False,
                    tooltip="Make the file, and the key of this name, where they are not there yet. Nothing is ever"
                    " replaced. Keep a copy: nobody can read the marks of a lost key.",
                ),
            ],
            outputs=[
                KeyringIO.Output(
                    "keyring",
                    display_name="KEYRING",
                    tooltip="All keys of the file and the one that signs, for Watermark Noise, Watermark Model and"
                    " Detect Watermark.",
                )
            ],
            is_output_node=True,  # what it shows is then shown again by every run
            **aliases("watermark key", "secret key", "signing key"),
        )

    @classmethod
    def validate_inputs(cls, keyring_name):
        try:
            return keyring_name is None or bool(keyring_path(keyring_name))  # None: wired, known only when it runs
        except ValueError as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, keyring_name, key_name="", make_missing=False):
        return fingerprint(keyring_name) if keyring_name else ""

    @classmethod
    def execute(cls, keyring_name, key_name, make_missing):
        keys = open_keys(keyring_name, key_name, make_missing)
        return io.NodeOutput(keys, ui=ui.PreviewText(keys_text(keyring_name, keys)))


class SemipermWatermarkNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SemipermWatermarkNoise",
            display_name="Watermark Noise",
            category=CATEGORY,
            description="Random noise that carries a keyed mark, for SamplerCustomAdvanced. Each picture's noise is"
            " still exactly normal: nothing is lost in quality. The same seed and key give the same noise.",
            inputs=[
                KeyringIO.Input("keyring", tooltip=_KEYRING),
                io.Int.Input(
                    "noise_seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="The random seed. Take another one for every picture: pictures with equal marked noise"
                    " give the mark away.",
                ),
                _stamp(),
                io.Sampler.Input(
                    "sampler",
                    tooltip="The sampler that you use, the same that goes into SamplerCustomAdvanced: one that would"
                    " lose the mark is refused.",
                ),
                _later_passes(),
            ],
            outputs=[
                io.Noise.Output("noise", display_name="NOISE", tooltip="Signed noise, in place of RandomNoise's.")
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            **aliases("invisible watermark", "signed noise", "gaussian shading", "RandomNoise watermark", "provenance"),
        )

    @classmethod
    def fingerprint_inputs(cls, stamp_time=False, **inputs):
        return time.time() if stamp_time else fingerprint_of_graph()

    @classmethod
    def execute(cls, keyring, noise_seed, stamp_time, sampler, later_passes="refuse"):
        from .noise import SignedNoise, check_sampler

        check_graph(cls.hidden)
        check_sampler(sampler)
        return io.NodeOutput(SignedNoise(noise_seed, keyring.key, _now(stamp_time)))


class SemipermWatermarkModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SemipermWatermarkModel",
            display_name="Watermark Model",
            category=CATEGORY,
            description="Signs the noise of every sampling run of this model, also in a plain KSampler: magnitudes"
            " stay as the seed gave them, signs carry the mark. Samplers that add noise of their own are refused.",
            inputs=[
                io.Model.Input("model", tooltip="The model. Wire what comes out into every sampler of the graph."),
                KeyringIO.Input("keyring", tooltip=_KEYRING),
                _stamp(),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="The model's VAE. Connect it to bind the content: the mark then says what the picture"
                    " shows, and cannot be moved to another one unnoticed. Each picture is drawn two to five times.",
                ),
                _later_passes(),
            ],
            outputs=[
                io.Model.Output(
                    "signing_model",
                    display_name="MODEL",
                    tooltip="A clone of the model that signs, for KSampler or any other sampler node. With several of"
                    " these nodes the last one counts.",
                )
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            **aliases("invisible watermark", "sign images", "gaussian shading", "tree ring", "provenance"),
        )

    @classmethod
    def fingerprint_inputs(cls, stamp_time=False, **inputs):
        return time.time() if stamp_time else fingerprint_of_graph()

    @classmethod
    def execute(cls, model, keyring, stamp_time, vae=None, later_passes="refuse"):
        from .noise import sign_model

        check_graph(cls.hidden)
        return io.NodeOutput(sign_model(model, keyring.key, _now(stamp_time), vae))


class SemipermDetectWatermark(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SemipermDetectWatermark",
            display_name="Detect Watermark",
            category=CATEGORY,
            description="Looks for the marks of a keyring in pictures, and says with an exact p-value how sure it is."
            " A clean picture takes one to ten evaluations of the model, one without a mark 41.",
            inputs=[
                io.Model.Input("model", tooltip="The model that drew the pictures, or the nearest that you have."),
                io.Vae.Input("vae", tooltip="The model's VAE, which encodes the pictures."),
                io.Image.Input(
                    "images",
                    tooltip="Pictures to look at. Resized ones are found, too, where they were drawn at the model's own"
                    " size.",
                ),
                KeyringIO.Input("keyring", tooltip="From Keyring; all of its keys are tried."),
                io.Boolean.Input(
                    "search",
                    default=False,
                    tooltip="Where nothing is found, also try to undo flips, turns, shifts and crops. Takes much"
                    " longer; the p-value accounts for every try.",
                ),
                io.Int.Input(
                    "width",
                    default=0,
                    min=0,
                    max=16384,
                    step=8,
                    tooltip="Width that was drawn, in pixels, where the picture was resized or cropped since. 0: its"
                    " own and the model's are tried.",
                ),
                io.Int.Input("height", default=0, min=0, max=16384, step=8, tooltip="Height that was drawn; as width."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The model's text encoder; it encodes the empty prompt. Not needed with conditioning.",
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="In place of clip: the empty prompt's conditioning, or the picture's own if it is known.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the noise was signed, white, after inpainting; elsewhere nothing is counted.",
                ),
                io.String.Input(
                    "labels",
                    optional=True,
                    force_input=True,
                    tooltip="A name for each picture, one a line, for the table: the names of Attack Suite.",
                ),
            ],
            outputs=[
                io.String.Output("text", display_name="text", tooltip="A table of what was found, one line a picture."),
                io.String.Output(
                    "verdict",
                    display_name="verdict",
                    is_output_list=True,
                    tooltip="For each picture: valid, content differs, unverified or absent.",
                ),
                io.Float.Output(
                    "p_value",
                    display_name="p_value",
                    is_output_list=True,
                    tooltip="For each picture the chance that one without a mark looks so marked; below 1e-6 a mark"
                    " counts as found.",
                ),
                io.Image.Output(
                    "heat_map",
                    display_name="heat map",
                    tooltip="Where the mark was found: green agrees with it, red does not, grey is no better than"
                    " chance.",
                ),
                DetectionIO.Output(
                    "detection", display_name="DETECTION", tooltip="What was found, for Save With Provenance."
                ),
            ],
            is_output_node=True,
            **aliases("find watermark", "verify watermark", "is it AI", "read watermark", "provenance"),
        )

    @classmethod
    def execute(cls, model, vae, images, keyring, search, width, height, labels="", mask=None, **text):
        from ...methods.watermark.config import DetectionConfig
        from .heatmap import detection_text, heat_maps
        from .inversion import ComfyInverter, detect_pictures, signed_size

        config = DetectionConfig(search=search, size=signed_size(width, height))
        detection = detect_pictures(images, keyring.ring, ComfyInverter(model, vae, **text), config, mask)
        text, maps = detection_text(detection.results, labels), heat_maps(images, detection.results, labels)
        verdicts, p_values = zip(*((r.verdict, r.p_value) for r in detection.results), strict=True)
        shown = ui.PreviewText(text).as_dict() | ui.PreviewImage(maps, cls=cls).as_dict()
        return io.NodeOutput(text, list(verdicts), list(p_values), maps, detection, ui=shown)


NODES = [SemipermKeyring, SemipermWatermarkNoise, SemipermWatermarkModel, SemipermDetectWatermark]
