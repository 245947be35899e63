"""Guidance Detector: whether safe guidance acts at all, decided by the prompt and by the picture that forms."""

import dataclasses

from comfy_api.latest import io

from ..membranes.files import membrane_names, membrane_path
from ..sockets import GuidanceDetectorsIO, aliases
from .node import CATEGORY, categories_of, category_input, clip_input, words_input

FIT, PICTURES = "fit from words", "fit from pictures"


def detector_files() -> list[str]:
    """What `source` may be: fit, or a file below models/semiperm."""
    return [FIT, PICTURES, *(name for name in membrane_names() if name.startswith("semiperm/"))]


class SemipermGuidanceDetector(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SemipermGuidanceDetector",
            display_name="Guidance Detector",
            category=CATEGORY,
            description="Decides whether Safe Guidance acts: by the prompt's words, and by the picture that forms, each"
            " with a stated rate of false alarms. What is harmless then costs nothing and stays as it is.",
            **aliases("nsfw detector", "safety checker", "prompt classifier"),
            inputs=[
                io.Model.Input("model", tooltip="The model that is sampled; it is not changed."),
                clip_input(),
                category_input(whole=False),
                io.Combo.Input(
                    "source",
                    options=detector_files(),
                    default=FIT,
                    tooltip="fit from words: a text detector of this CLIP, from the category's phrases and harmless"
                    " prompts. fit from pictures: a picture detector besides, from `pictures`; the model draws each"
                    " harmless prompt for it. Or a file of `semiperm guard fit` in models/semiperm, which also sees the"
                    " picture.",
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="The prompt that is sampled, for the text detector; another one is refused when sampling."
                    " Empty: the picture detector alone decides.",
                ),
                io.Float.Input(
                    "false_alarms",
                    default=0.02,
                    min=0.001,
                    max=0.4,
                    step=0.001,
                    tooltip="Share of harmless prompts on which a detector that is fitted here may fire. Files have"
                    " their own.",
                ),
                io.String.Input(
                    "benign",
                    default="",
                    multiline=True,
                    tooltip="Harmless prompts to fit from, one a line, at least 2 / false_alarms of them. Empty: 144"
                    " general ones.",
                ),
                words_input(),
                io.Image.Input(
                    "pictures",
                    optional=True,
                    tooltip="Example pictures of the category, of the size that you draw at: a handful. Read by fit"
                    " from pictures.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="The model's VAE, which reads the example pictures."),
                io.Float.Input(
                    "cfg",
                    default=7.0,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    optional=True,
                    tooltip="Guidance scale of the harmless pictures: the one that you will draw with. Read by fit from"
                    " pictures.",
                ),
                io.Combo.Input(
                    "when_unsafe",
                    options=["guide", "refuse", "raise"],
                    default="guide",
                    optional=True,
                    tooltip="What follows where the picture detector still fires in the second half of sampling. guide:"
                    " go on. refuse: that picture ends as plain grey. raise: the run stops with an error.",
                ),
            ],
            outputs=[
                GuidanceDetectorsIO.Output(
                    "detectors", display_name="DETECTORS", tooltip="For Safe Guidance of the same category."
                ),
                io.String.Output("text", display_name="text", tooltip="What the text detector said of the prompt."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        category,
        source,
        prompt,
        false_alarms,
        benign="",
        words="",
        pictures=None,
        vae=None,
        cfg=7.0,
        when_unsafe="guide",
    ):
        from .detectors import detectors_for
        from .picture_fit import Examples

        one = dataclasses.replace(categories_of(category, words)[0], false_alarms=false_alarms)
        lines = [line.strip() for line in benign.splitlines() if line.strip()] or None
        path = None if source in (FIT, PICTURES) else membrane_path(source)
        examples = Examples(pictures, vae, cfg) if source == PICTURES else None
        found = detectors_for(model, clip, one, path, lines, prompt, examples, when_unsafe)
        return io.NodeOutput(found, found.said)


NODES = [SemipermGuidanceDetector]
