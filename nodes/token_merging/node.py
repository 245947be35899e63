"""Negative token merging in ComfyUI: push away from an image, or push the images of a batch apart.

The modules that need `comfy` itself are imported when a node runs, so that the definitions can be read without it.
"""

from comfy_api.latest import io, ui

from ...methods.pictures import FITS
from ...methods.token_merging.config import NegativeTokenMergingConfig as Default
from ..sockets import aliases

CATEGORY = "semiperm/negative token merging"

_PATCHED = "A clone of the model that pushes; at strength 0 the model itself. For a sampler or a LoRA loader."


def _strength() -> io.Input:
    return io.Float.Input(
        "strength",
        default=Default.strength,
        min=-4.0,
        max=8.0,
        step=0.05,
        tooltip="How far tokens are pushed from their matches. 0 is exactly the untouched model, the paper has 0.9,"
        " strong prompts want 2 to 3; below 0 pulls towards the image.",
    )


def _end() -> io.Input:
    return io.Float.Input(
        "end",
        default=Default.end,
        min=0.0,
        max=1.0,
        step=0.001,
        tooltip="Where in sampling it stops: 0 is the first step, 1 the last. What a picture shows is decided early;"
        " each step inside costs one more image for every reference.",
    )


def _reference() -> list[io.Input]:
    """The inputs that say what to push away from."""
    return [
        io.Image.Input(
            "image",
            optional=True,
            tooltip="What to push away from; a batch is several references, transparent parts of a picture with alpha"
            " do not count. Without it the images of the latent's batch push each other apart.",
        ),
        io.Mask.Input(
            "mask",
            optional=True,
            tooltip="Where in the image to look: white is what to avoid. One for all images, or one for each.",
        ),
        io.Vae.Input("vae", optional=True, tooltip="The model's VAE, which encodes the image. Needed with an image."),
        io.Conditioning.Input(
            "reference",
            optional=True,
            tooltip="Words for what the image shows, from CLIP Text Encode. Makes it stand out, so that the background"
            " and the style are kept better. Without it, each prompt's own words.",
        ),
    ]


class SemipermNegativeTokenMerging(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SemipermNegativeTokenMerging",
            display_name="Negative Token Merging",
            category=CATEGORY,
            description="Guidance away from an image instead of words: what is like the reference image is pushed away"
            " from it while the picture forms. Without an image, the images of a batch push each other apart and"
            " become more different. No training, no file; the checkpoint is not touched.",
            inputs=[
                io.Model.Input("model", tooltip="The model: SD1.5, SD2, SDXL, SD3, Flux or Wan."),
                _strength(),
                _end(),
                *_reference(),
            ],
            outputs=[io.Model.Output("merged_model", display_name="MODEL", tooltip=_PATCHED)],
            **aliases("negtome", "NegToMe", "negative image", "avoid image", "diversity", "copyright"),
        )

    @classmethod
    def execute(cls, model, **options):
        from .patch import apply_token_merging_to, from_inputs

        return io.NodeOutput(apply_token_merging_to(model, *from_inputs(**options)))


class SemipermNegativeTokenMergingAdvanced(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SemipermNegativeTokenMergingAdvanced",
            display_name="Negative Token Merging (advanced)",
            category=CATEGORY,
            description="Negative Token Merging with everything that can be set: threshold, window, which layers and"
            " rows, how the reference is noised and matched, and the released code's way of doing it.",
            inputs=[
                io.Model.Input("model", tooltip="The model: SD1.5, SD2, SDXL, SD3, Flux or Wan."),
                _strength(),
                io.Float.Input(
                    "threshold",
                    default=Default.threshold,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How alike (cosine) a token and its match must be for the token to be pushed. -1 pushes"
                    " every token, 1 none.",
                ),
                io.Float.Input(
                    "start",
                    default=Default.start,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Where in sampling it begins: 0 is the first step. Must lie before end.",
                ),
                _end(),
                io.Combo.Input(
                    "rows",
                    options=["conditional", "all"],
                    default=Default.rows,
                    tooltip="conditional: only the positive prompt's half, so that cfg amplifies the push. all: the"
                    " negative prompt's half as well, as released; cfg then cancels most of it.",
                ),
                io.String.Input(
                    "blocks",
                    default="",
                    tooltip="Only attention layers in blocks whose name starts so, separated by commas: output_blocks,"
                    " middle_block (UNets), joint_blocks (SD3), double_blocks (Flux), blocks (Wan). all: every layer."
                    " Empty: the paper's choice, output_blocks of UNets and every layer of other models.",
                ),
                io.Boolean.Input(
                    "cross_attention",
                    default=Default.cross_attention,
                    tooltip="Push the outputs of cross-attention, too, as released for SDXL. Only UNets have them.",
                ),
                io.Int.Input(
                    "max_downscale",
                    default=Default.max_downscale,
                    min=1,
                    max=64,
                    tooltip="Layers coarser than the latent by more than this are left alone. 1: only layers at full"
                    " resolution.",
                ),
                io.Boolean.Input(
                    "noise_reference",
                    default=Default.noise_reference,
                    tooltip="Bring the reference to the noise of each step, so that like is compared with like. Off:"
                    " feed it clean, as released.",
                ),
                io.Int.Input(
                    "reference_seed",
                    default=Default.seed,
                    min=0,
                    max=2**32 - 1,
                    tooltip="Seed of the reference's noise, which is the same in every step.",
                ),
                io.Combo.Input(
                    "matching",
                    options=["reference", "output"],
                    default=Default.matching,
                    tooltip="reference: each token finds the reference's best match, as the paper says. output: the"
                    " other way round, as the released code does.",
                ),
                io.Combo.Input(
                    "diversity",
                    options=["symmetric", "first"],
                    default=Default.diversity,
                    tooltip="Without an image: symmetric pushes each image from all others, first pushes the others"
                    " from the batch's first image.",
                ),
                io.Combo.Input(
                    "compat",
                    options=["none", "official"],
                    default="none",
                    tooltip="official sets rows, matching, diversity, cross_attention and noise_reference as the"
                    " released code, to reproduce its images.",
                ),
                io.Combo.Input(
                    "fit",
                    options=list(FITS),
                    default=Default.fit,
                    tooltip="How an image of another shape is brought to the latent's: crop keeps the middle, pad keeps"
                    " all of it with borders that do not count, stretch gives up its proportions.",
                ),
                io.String.Input(
                    "strengths",
                    default="",
                    tooltip="One strength for each image of the batch, separated by commas, instead of strength: 2, 0"
                    " pushes away from the first and keeps what is like the second. Empty: strength for all.",
                ),
                *_reference(),
            ],
            outputs=[io.Model.Output("merged_model", display_name="MODEL", tooltip=_PATCHED)],
            **aliases("negtome", "NegToMe", "negative image", "avoid image", "diversity"),
        )

    @classmethod
    def execute(cls, model, **options):
        from .patch import apply_token_merging_to, from_inputs

        return io.NodeOutput(apply_token_merging_to(model, *from_inputs(**options)))


def report_text(report: dict) -> str:
    """The report of `patch.report_of` as text: what it was set to, when it acted, and on how much."""
    steps, (start, end) = report["steps"], report["window"]
    active = sum(bool(step["active"]) for step in steps)
    sigmas = f", sigma {steps[0]['sigma']:.3g} to {steps[-1]['sigma']:.3g}" if steps else ""
    each = report["strength"] if isinstance(report["strength"], list) else [report["strength"]]
    number, strengths = report["references"], ", ".join(f"{value:g}" for value in each)
    source = f"{number} reference image{'' if number == 1 else 's'}" if number else "the images of the batch"
    lines = [
        f"away from {source}: strength {strengths}, threshold {report['threshold']:g}",
        f"window {start:g} to {end:g}: active in {active} of {len(steps)} steps{sigmas}",
        f"{report['extra_rows']} extra rows denoised",
        "",
        "image  row       tokens pushed",
    ]
    lines += [f"{row['image']:<5}  {row['kind']:<8}  {100 * row['pushed']:.1f} %" for row in report["rows"]]
    if not active:
        lines.append("no step lay inside the window, so nothing was pushed: widen start and end")
    elif not any(row["pushed"] for row in report["rows"]):
        lines.append("no token was like the reference: lower threshold")
    return "\n".join(lines)


class SemipermTokenMergingReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SemipermTokenMergingReport",
            display_name="Token Merging Report",
            category=CATEGORY,
            description="Shows what Negative Token Merging did in the run that drew a latent: the share of tokens that"
            " were pushed in each image, the steps, and the extra rows that were denoised.",
            inputs=[
                io.Model.Input("model", tooltip="The model that the sampler used: from Negative Token Merging."),
                io.Latent.Input("samples", tooltip="The sampler's own latent; the report is of the run that drew it."),
            ],
            outputs=[
                io.Latent.Output("latent", display_name="LATENT", tooltip="The latent that came in, unchanged."),
                io.String.Output("text", display_name="text", tooltip="The report as a table in plain text."),
            ],
            is_output_node=True,
            **aliases("negtome report", "pushed tokens"),
        )

    @classmethod
    def execute(cls, model, samples):
        from .patch import report_of

        text = report_text(report_of(model, samples["samples"]))
        return io.NodeOutput(samples, text, ui=ui.PreviewText(text))


NODES = [SemipermNegativeTokenMerging, SemipermNegativeTokenMergingAdvanced, SemipermTokenMergingReport]
