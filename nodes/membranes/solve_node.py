"""The nodes that make membranes from words: Solve Membranes, and Erase Concept, which also applies them."""

from comfy_api.latest import io

from ...methods.membranes.closed_form import METHODS, ClosedFormConfig
from ..sockets import MembranesIO, aliases
from .inputs import CATEGORY, concept_inputs, strength_input

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
                io.String.Input(
                    "preserve",
                    optional=True,
                    multiline=True,
                    default="",
                    placeholder="captions to keep, one per line",
                    tooltip="Captions that must not change, one per line, in place of a general list: give at least 50."
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
            outputs=[
                MembranesIO.Output(
                    "made",
                    display_name="membranes",
                    tooltip="One membrane for each line, for Apply Membranes, Save Membrane or Load Membrane's stack.",
                )
            ],
            **aliases("unlearn", "unlearning", "erase concept advanced", "UCE", "RECE", "closed form", "null space"),
        )

    @classmethod
    def execute(cls, model, clip, concept, surrogate, preserve="", **options):
        from .concept_text import erase_in

        config = ClosedFormConfig(**options)
        return io.NodeOutput(erase_in(model, clip, concept.splitlines(), surrogate, preserve.splitlines(), config))
