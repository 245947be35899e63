"""Safe guidance in ComfyUI: steer away from categories of harm, and show what was done.

The modules that need `comfy` itself are imported when a node runs, so that the definitions can be read without it.
"""

import json

from comfy_api.latest import io, ui

from ...methods.guidance.adavd import AdaVD
from ...methods.guidance.category import bundled_categories, category_from_text, load_category
from ...methods.guidance.config import SafeGuidanceConfig as Default
from ...methods.guidance.nag import NAG
from ...methods.guidance.nag import PRESETS as NAG_PRESETS
from ...methods.guidance.safree import SAFREE
from ...methods.guidance.sld import PRESETS, SLD
from ..sockets import GuidanceDetectorsIO, aliases

CATEGORY = "semiperm/safe guidance"
_ALL, _OWN = "all", "own words"
_GUIDED = (
    "A clone of the model that is guided; at strength 0 the model itself. For a sampler, or another of these nodes."
)


def _model() -> io.Input:
    return io.Model.Input("model", tooltip="The model: any that a KSampler takes.")


def clip_input() -> io.Input:
    return io.Clip.Input("clip", tooltip="The model's text encoder, which reads the categories.")


def category_input(whole: bool = True) -> io.Input:
    """Which category; `whole`: whether it may be all of them."""
    return io.Combo.Input(
        "category",
        options=[*sorted(bundled_categories()), *[_ALL] * whole, _OWN],
        default="sexual",
        tooltip="What to steer away from. all: the seven of I2P, one branch each. own words: what `words` says."
        if whole
        else "What is detected. own words: what `words` says.",
    )


def words_input() -> io.Input:
    return io.String.Input(
        "words",
        default="",
        multiline=True,
        tooltip="Words of your own instead of the category's, by lines or commas, or a category's .toml text. Read"
        " where category is own words.",
    )


def _strength() -> io.Input:
    return io.Float.Input(
        "strength",
        default=Default.strength,
        min=0.0,
        max=4.0,
        step=0.05,
        tooltip="A factor on the change. 0 is exactly the untouched model, 1 the paper's.",
    )


def _share(name: str, tooltip: str) -> io.Input:
    return io.Float.Input(name, default=getattr(Default, name), min=0.0, max=1.0, step=0.001, tooltip=tooltip)


def _window() -> list[io.Input]:
    return [
        _share("start", "Where in sampling it begins: 0 is the first step. Must lie before end."),
        _share("end", "Where in sampling it stops: 0 is the first step, 1 the last."),
    ]


def _detectors() -> io.Input:
    return GuidanceDetectorsIO.Input(
        "detectors",
        optional=True,
        tooltip="From Guidance Detector, of the same category: guides only from when one fires.",
    )


def _judged(detectors) -> dict:
    """Of a config: what the socket carries."""
    return {} if detectors is None else {"detectors": detectors.pairs, "when_unsafe": detectors.when_unsafe}


def categories_of(category: str, words: str):
    """What the two inputs of every node say.

    Raises:
        GuidanceError: own words were chosen, and there are none.
    """
    if category == _OWN:
        return [category_from_text(words)]
    if category == _ALL:
        return [one for name, one in bundled_categories().items() if name != "hazard"]
    return [load_category(category)]


class SemipermSafeGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SemipermSafeGuidance",
            display_name="Safe Guidance",
            category=CATEGORY,
            description="Steers a picture away from a category of harm while it forms, where the prompt comes near it."
            " Costs one more picture a step for each category. Needs cfg above 1.",
            **aliases("SLD", "safety", "nsfw filter", "guard", "content filter"),
            inputs=[_model(), clip_input(), category_input(), _strength(), words_input(), _detectors()],
            outputs=[io.Model.Output("guided_model", display_name="MODEL", tooltip=_GUIDED)],
        )

    @classmethod
    def execute(cls, model, clip, category, strength, words="", detectors=None):
        from .patch import guide_model

        config = Default(categories_of(category, words), "sld", strength, **_judged(detectors))
        return io.NodeOutput(guide_model(model, config, clip, detectors))


class SemipermSafeGuidanceAdvanced(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SemipermSafeGuidanceAdvanced",
            display_name="Safe Guidance (advanced)",
            category=CATEGORY,
            description="Safe Guidance with everything that can be set: preset, window, and leaving silent categories"
            " out.",
            **aliases("SLD", "safe latent diffusion", "safety", "guard"),
            inputs=[
                _model(),
                clip_input(),
                category_input(),
                _strength(),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="strong",
                    tooltip="The paper's settings, from careful to as much as possible.",
                ),
                *_window(),
                io.Int.Input(
                    "patience",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Dynamic mode: a category acts only where the prompt leads towards it, and is left out"
                    " after so many steps in which it does not; it is looked at again every 8. 0: every branch, every"
                    " step.",
                ),
                words_input(),
                _detectors(),
            ],
            outputs=[io.Model.Output("guided_model", display_name="MODEL", tooltip=_GUIDED)],
        )

    @classmethod
    def execute(cls, model, clip, category, strength, preset, start, end, patience, words="", detectors=None):
        from .patch import guide_model

        algorithm = SLD(preset, patience=patience or None)
        config = Default(categories_of(category, words), algorithm, strength, start, end, **_judged(detectors))
        return io.NodeOutput(guide_model(model, config, clip, detectors))


class SemipermSafeGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SemipermSafeGuider",
            display_name="Safe Guider",
            category=CATEGORY,
            description="A guider for SamplerCustomAdvanced on a model of Safe Guidance: it takes no model without one,"
            " and other packs cannot drop the negative prompt from it.",
            **aliases("safe cfg guider", "SLD guider", "guard"),
            inputs=[
                io.Model.Input("model", tooltip="The model that comes out of Safe Guidance."),
                io.Conditioning.Input("positive", tooltip="The prompt that is filtered."),
                io.Conditioning.Input("negative", tooltip="The negative prompt; it may be empty."),
                io.Float.Input("cfg", default=7.0, min=1.0, max=100.0, step=0.1, tooltip="Strength of guidance."),
            ],
            outputs=[io.Guider.Output("guider", display_name="GUIDER", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, model, positive, negative, cfg):
        from .guider import SafeGuider

        guider = SafeGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        return io.NodeOutput(guider)


class SemipermPromptFilter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SemipermPromptFilter",
            display_name="Prompt Filter",
            category=CATEGORY,
            description="Encodes a prompt, and takes what its words have of a category out of them for the first part"
            " of sampling. Costs nothing while sampling; works at any cfg.",
            **aliases("SAFREE", "safe prompt", "clip text encode safe"),
            inputs=[
                io.Model.Input("model", tooltip="The model that the prompt is for; it is not changed."),
                clip_input(),
                io.String.Input("text", multiline=True, tooltip="The prompt that is encoded and filtered."),
                category_input(),
                _strength(),
                io.Boolean.Input(
                    "adaptive",
                    default=SAFREE.adaptive,
                    tooltip="Only as long as the prompt was changed, as the paper. Off: in every step.",
                ),
                words_input(),
            ],
            outputs=[
                io.Conditioning.Output(
                    "conditioning",
                    display_name="CONDITIONING",
                    tooltip="The filtered prompt, for a sampler's positive.",
                ),
                io.String.Output("report", display_name="report", tooltip="Which share of the words was changed."),
            ],
        )

    @classmethod
    def execute(cls, model, clip, text, category, strength, adaptive, words=""):
        from .texts import filtered

        config = Default(categories_of(category, words), SAFREE(adaptive=adaptive), strength)
        conditioning, said = filtered(model, clip, text, config, config.algorithms[0])
        report = f"{100 * said['fired']:.0f} % of the words changed, up to {said['until']:.2f} of sampling"
        return io.NodeOutput(conditioning, report)


class SemipermValueDecomposer(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SemipermValueDecomposer",
            display_name="Value Decomposer",
            category=CATEGORY,
            description="Takes what a prompt's words have of a category out of what they give to attention, in every"
            " step. Costs next to nothing; works at any cfg. SD1.5, SD2, SDXL, SD3 and Flux.",
            **aliases("AdaVD", "concept removal", "erase value"),
            inputs=[
                io.Model.Input("model", tooltip="The model: SD1.5, SD2, SDXL, SD3 or Flux."),
                clip_input(),
                category_input(),
                _strength(),
                io.Int.Input(
                    "rank",
                    default=AdaVD.rank,
                    min=1,
                    max=128,
                    tooltip="How many directions, one a phrase, are taken out of each head at most.",
                ),
                *_window(),
                words_input(),
            ],
            outputs=[io.Model.Output("guided_model", display_name="MODEL", tooltip=_GUIDED)],
        )

    @classmethod
    def execute(cls, model, clip, category, strength, rank, start, end, words=""):
        from .patch import guide_model

        config = Default(categories_of(category, words), AdaVD(rank=rank), strength, start, end)
        return io.NodeOutput(guide_model(model, config, clip))


class SemipermNAG(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SemipermNAG",
            display_name="Normalized Attention Guidance",
            category=CATEGORY,
            description="A negative prompt for models that have none: attention is pushed away from a category. Works"
            " at cfg 1 and in few steps. SD1.5, SD2, SDXL, SD3 and Flux, turbo models included.",
            **aliases("NAG", "negative prompt turbo", "negative without cfg"),
            inputs=[
                io.Model.Input("model", tooltip="The model: SD1.5, SD2, SDXL, SD3 or Flux."),
                clip_input(),
                category_input(),
                _strength(),
                io.Combo.Input(
                    "preset",
                    options=[name for name in NAG_PRESETS if name != "wan"],
                    default="sdxl",
                    tooltip="The paper's settings for this kind of model.",
                ),
                io.Float.Input(
                    "tau", default=NAG.tau, min=1.0, max=100.0, step=0.1, tooltip="Largest growth of a token's norm."
                ),
                *_window(),
                words_input(),
            ],
            outputs=[io.Model.Output("guided_model", display_name="MODEL", tooltip=_GUIDED)],
        )

    @classmethod
    def execute(cls, model, clip, category, strength, preset, tau, start, end, words=""):
        from .patch import guide_model

        config = Default(categories_of(category, words), NAG(preset, tau=tau), strength, start, end)
        return io.NodeOutput(guide_model(model, config, clip))


def report_text(reports: list[dict]) -> str:
    """Reports of `patch.reports_of` as text: what it was set to, when it acted, and on which picture."""
    lines = []
    for report in reports:
        steps, (start, end) = report["steps"], report["window"]
        active = sum(bool(step["active"]) for step in steps)
        lines += [
            f"{', '.join(report['algorithms'])} away from {', '.join(report['categories'])}: strength"
            f" {report['strength']:g}",
            f"window {start:g} to {end:g}: active in {active} of {len(steps)} steps,"
            f" {report['evaluations']} extra rows denoised",
            f"config {report['config']}, categories {report['categories_hash']}",
            "",
            "image  fired    scale    category",
        ]
        lines += [
            f"{row['image']:<5}  {100 * row['fired']:5.1f} %  {row['scale']:.4f}  {row['category'] or '-'}"
            for row in report["rows"]
        ]
        if not any(row["fired"] for row in report["rows"]):
            lines.append("nothing fired on any image")
        lines.append("")
    return "\n".join(lines).rstrip()


class SemipermGuidanceReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SemipermGuidanceReport",
            display_name="Guidance Report",
            category=CATEGORY,
            description="Shows what Safe Guidance did in the last sampling run, image by image; fails where it did not"
            " run.",
            **aliases("safety report", "SLD report", "guard report"),
            inputs=[
                io.Model.Input("model", tooltip="The model that the sampler used: from Safe Guidance."),
                io.Latent.Input("samples", tooltip="The sampler's latent, so that this node runs after it."),
            ],
            outputs=[
                io.Latent.Output("latent", display_name="LATENT", tooltip="The latent that came in, unchanged."),
                io.String.Output("text", display_name="text", tooltip="The report as a table in plain text."),
                io.String.Output("record", display_name="record", tooltip="The whole record as JSON."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, samples):
        from .patch import reports_of

        reports = reports_of(model)
        text = report_text(reports)
        return io.NodeOutput(samples, text, json.dumps(reports), ui=ui.PreviewText(text))


NODES = [
    SemipermSafeGuidance,
    SemipermSafeGuidanceAdvanced,
    SemipermSafeGuider,
    SemipermPromptFilter,
    SemipermValueDecomposer,
    SemipermNAG,
    SemipermGuidanceReport,
]
