"""The nodes that make membranes from words: Solve Membranes (text side), Solve Image-Side Membranes, and Erase Concept,
which also applies the first."""

from comfy_api.latest import io

from ...methods.membranes.closed_form import METHODS, ClosedFormConfig
from ...methods.membranes.visual_fit import VisualConfig
from ..sockets import MembranesIO, aliases
from .inputs import CATEGORY, concept_inputs, lines_input, membranes_output, strength_input

LINK = {"rawLink": True}  # the node is given where its input comes from, not what it is
PRESETS = {"selective": {"gate": "auto"}, "strict": {"gate": "always"}}


class SemipermEraseConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SemipermEraseConcept",
            display_name="Erase Concept",
            category=CATEGORY,
            description="Makes the model blind to concepts named in words. Solved in closed form, in seconds, without"
            " training or a file; another strength or preset is not solved again. The checkpoint's weights are not"
            " touched: without this node the old picture is back.",
            inputs=[
                # The links themselves: Solve Membranes and Apply Membranes, which this node stands for, follow them.
                io.Model.Input(
                    "model", tooltip="The model to erase from: SD1.5, SD2, SDXL, SD3 or Flux.", extra_dict=LINK
                ),
                io.Clip.Input("clip", tooltip="The text encoder that also encodes your prompts.", extra_dict=LINK),
                *concept_inputs(),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=next(iter(PRESETS)),
                    tooltip="selective: acts where a prompt asks for the concept; other prompts keep every bit. strict:"
                    " always acts, also on descriptions in other words; other prompts change a little.",
                ),
                strength_input(),
            ],
            outputs=[
                io.Model.Output(
                    "erased_model",
                    display_name="MODEL",
                    tooltip="A clone of the model with the membranes in it. For a sampler, a LoRA loader or another"
                    " Erase Concept.",
                ),
                MembranesIO.Output(
                    "made",
                    display_name="membranes",
                    tooltip="The membranes that were made, for Save Membrane or for another model of the same kind.",
                ),
            ],
            enable_expand=True,
            **aliases("unlearn", "unlearning", "remove concept", "forget", "UCE", "SPM", "censor", "block"),
        )

    @classmethod
    def execute(cls, model, clip, concept, surrogate, preset, strength):
        from comfy_execution.graph_utils import GraphBuilder

        graph = GraphBuilder()  # its nodes are cached one by one: what did not change is not computed again
        made = graph.node("SemipermSolveMembranes", model=model, clip=clip, concept=concept, surrogate=surrogate)
        control = {"strength": strength, **PRESETS[preset], "start": 0.0, "end": 1.0}
        erased = graph.node("SemipermApplyMembranes", model=model, clip=clip, membranes=made.out(0), **control)
        return io.NodeOutput(erased.out(0), made.out(0), expand=graph.finalize())


class SemipermSolveMembranes(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        default = ClosedFormConfig
        return io.Schema(
            node_id="SemipermSolveMembranes",
            display_name="Solve Membranes",
            category=CATEGORY,
            description="Computes membranes for concepts named in words, in closed form, with everything that can be"
            " set. Nothing is applied: connect Apply Membranes, whose strength, gate and window then change without"
            " solving again.",
            inputs=[
                io.Model.Input("model", tooltip="The model to erase from; its LoRAs are not looked at."),
                io.Clip.Input("clip", tooltip="The text encoder that also encodes your prompts."),
                *concept_inputs(),
                lines_input(
                    "preserve",
                    "captions to keep",
                    "Captions that must not change, one per line, in place of a general list: give at least 50."
                    " Those that name an erased concept are left out.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=default.method,
                    optional=True,
                    tooltip="uce: ridge regression. null_space: also exactly zero on what the preserved captions have"
                    " in common. rece: also finds and edits what still gives the concept afterwards.",
                ),
                io.Int.Input(
                    "rank",
                    default=default.rank,
                    min=1,
                    max=64,
                    optional=True,
                    tooltip="Directions of text space that each membrane moves; more move the concept more exactly.",
                ),
                io.Float.Input(
                    "push",
                    default=default.push,
                    min=0.0,
                    max=8.0,
                    step=0.05,
                    optional=True,
                    tooltip="How far beyond the surrogate, in lengths of the way there. 0 aims at the surrogate, and"
                    " mostly falls short of it.",
                ),
                io.Float.Input(
                    "preserve_scale",
                    default=default.preserve_scale,
                    min=0.0,
                    max=1000.0,
                    step=0.5,
                    optional=True,
                    tooltip="Weight of the preserved captions against the concept's own; more keeps other prompts more"
                    " exactly and erases less.",
                ),
            ],
            outputs=[membranes_output()],
            **aliases("unlearn", "unlearning", "erase concept advanced", "UCE", "RECE", "closed form", "null space"),
        )

    @classmethod
    def execute(cls, model, clip, concept, surrogate, preserve="", **options):
        from .concept_text import erase_in

        config = ClosedFormConfig(**options)
        return io.NodeOutput(erase_in(model, clip, concept.splitlines(), surrogate, preserve.splitlines(), config))


class SemipermSolveImageMembranes(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        default = VisualConfig
        size = {"default": 512, "min": 16, "max": 16384, "step": 8}
        return io.Schema(
            node_id="SemipermSolveImageMembranes",
            display_name="Solve Image-Side Membranes",
            category=CATEGORY,
            description="Computes membranes that read the picture instead of the prompt, so that a concept does not"
            " pass in other words either. The model draws some hundred small pictures for it, in few steps. Nothing is"
            " applied: connect Apply Membranes, alone or together with those of Solve Membranes.",
            inputs=[
                io.Model.Input("model", tooltip="The model to erase from; it draws with what is patched into it."),
                io.Clip.Input("clip", tooltip="The text encoder that also encodes your prompts."),
                *concept_inputs(),
                io.Int.Input(
                    "width", tooltip="Width of the pictures that are drawn, in pixels: the model's own.", **size
                ),
                io.Int.Input("height", tooltip="Height of the pictures that are drawn, in pixels.", **size),
                io.Float.Input(
                    "cfg",
                    default=7.0,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    tooltip="Guidance scale of these pictures: the one that you will draw with.",
                ),
                io.Int.Input(
                    "steps",
                    default=default.steps,
                    min=2,
                    max=50,
                    optional=True,
                    tooltip="Steps of these pictures. What is found is interpolated between them for any sampler.",
                ),
                io.Float.Input(
                    "false_open",
                    default=default.false_open,
                    min=0.001,
                    max=0.5,
                    step=0.001,
                    optional=True,
                    tooltip="Share of other pictures in which a gate may open somewhere. Smaller draws more pictures"
                    " for the thresholds: 99 at 0.01.",
                ),
                io.Int.Input(
                    "rank",
                    default=default.rank,
                    min=1,
                    max=2,
                    optional=True,
                    tooltip="Directions of one concept at each layer; 2 also takes what a part of the picture shows.",
                ),
                lines_input(
                    "preserve",
                    "captions of other pictures",
                    "Captions whose pictures do not show the concept, one per line, in place of a general list."
                    " They set the thresholds.",
                ),
                lines_input(
                    "others",
                    "words for other things",
                    "What stands in the concept's place in pictures without it, one per line, in place of a"
                    " general list: other animals for an animal, other styles for a style.",
                ),
            ],
            outputs=[membranes_output()],
            **aliases("unlearn by picture", "visual eraser", "CASteer", "robust erase", "steering", "image gate"),
        )

    @classmethod
    def execute(cls, model, clip, concept, surrogate, width, height, cfg, preserve="", others="", **options):
        from .visual_fit import Sampling, solve_looks

        words = tuple(word.strip() for word in others.splitlines() if word.strip())
        config, sampling = VisualConfig(others=words, **options), Sampling(width, height, cfg)
        made = solve_looks(model, clip, concept.splitlines(), surrogate, preserve.splitlines(), config, sampling)
        return io.NodeOutput(made)
