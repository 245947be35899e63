"""Membranes in ComfyUI: load, apply, save, report; solve_node.py has those that make them. The work is done elsewhere.

The modules that need `comfy` itself are imported when a node runs, so that the definitions can be read without it.
"""

from comfy_api.latest import io, ui

from ...methods.errors import SemipermError
from ...methods.membranes.config import MembraneConfig
from ...methods.membranes.file import save_membranes
from ...methods.membranes.types import Membranes
from ..sockets import MembranesIO, aliases
from .files import membrane_names, membrane_path, new_membrane_file, read_membranes
from .inputs import CATEGORY, strength_input
from .report_plot import report_plot, report_text
from .solve_node import SemipermEraseConcept, SemipermSolveImageMembranes, SemipermSolveMembranes

# A saved name may be wired into a text input and, in the same graph, into Load Membrane's list.
FileNameIO = io.Custom("STRING,COMBO")

_GATES = (
    "When a membrane opens, judged for each prompt of the batch by itself. auto: when the prompt has the concept's"
    " words or its detector fires; always on where the detector cannot tell (its words alone where the model does not"
    " know them), paper where there is none. probe: the detector alone. paper: similarity of the prompt to the"
    " concept's words."
)


def _control(gates: list[str], about_gates: str) -> list[io.Input]:
    """How membranes act."""
    return [
        strength_input(),
        io.Combo.Input("gate", options=gates, default="auto", tooltip=about_gates),
        io.Float.Input(
            "start",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.001,
            tooltip="Where in sampling the membranes begin to act: 0 is the first step, 0.5 the middle of the noise"
            " schedule.",
        ),
        io.Float.Input(
            "end",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.001,
            tooltip="Where in sampling they stop acting: 1 is the last step. Must lie behind start.",
        ),
    ]


class SemipermLoadMembrane(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SemipermLoadMembrane",
            display_name="Load Membrane",
            category=CATEGORY,
            description="Reads membranes from a .safetensors file in models/semiperm or models/loras: files of Save"
            " Membrane, published SPM files and kohya LoRAs. Chain several of these nodes to stack files.",
            inputs=[
                io.Combo.Input(
                    "membrane_name",
                    options=membrane_names(),
                    display_name="file",
                    tooltip="A .safetensors file below models/semiperm or models/loras. Press R after adding one.",
                ),
                MembranesIO.Input(
                    "membranes",
                    optional=True,
                    tooltip="Membranes to put before the ones of this file, from another Load Membrane or from Erase"
                    " Concept. The order does not change the picture.",
                ),
                io.String.Input(
                    "concept",
                    optional=True,
                    default="",
                    tooltip="What the file erases, such as robot, if it does not say so itself: most LoRAs do not, and"
                    " without a name their gate never closes. The file's name is not taken for it.",
                ),
                io.Combo.Input(
                    "text_encoder",
                    options=["refuse", "drop"],
                    default="refuse",
                    optional=True,
                    tooltip="What to do with a LoRA that also adapts the text encoder, where no membrane acts: refuse"
                    " the file, or drop that part of it.",
                ),
            ],
            outputs=[
                MembranesIO.Output(
                    "stack",
                    display_name="membranes",
                    tooltip="All membranes of the file, behind those that came in. For Apply Membranes.",
                )
            ],
            **aliases("SPM", "load spm", "concept eraser file", "unlearning lora", "load erasure"),
        )

    @classmethod
    def validate_inputs(cls, membrane_name):
        try:
            return membrane_name is None or bool(membrane_path(membrane_name))  # None: wired, known only when it runs
        except SemipermError as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, membrane_name, membranes=None, concept="", text_encoder="refuse"):
        if membrane_name is None:
            return ""
        stat = membrane_path(membrane_name).stat()
        return f"{stat.st_mtime_ns} {stat.st_size}"  # an overwritten file is read again

    @classmethod
    def execute(cls, membrane_name, membranes=None, concept="", text_encoder="refuse"):
        return io.NodeOutput(Membranes(membranes or ()) + read_membranes(membrane_name, concept, text_encoder))


class SemipermApplyMembranes(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SemipermApplyMembranes",
            display_name="Apply Membranes",
            category=CATEGORY,
            description="Puts a stack of membranes into a clone of the model, each with its own gate. Works together"
            " with LoRAs, ControlNets and further Apply Membranes, in any order.",
            inputs=[
                io.Model.Input("model", tooltip="The model, of the kind that the membranes were made for."),
                MembranesIO.Input("membranes", tooltip="From Load Membrane, Solve Membranes or Erase Concept."),
                *_control(
                    ["auto", "probe", "paper", "official", "always"],
                    f"{_GATES} official: as SPM's released code computes it, to reproduce its images. always: never"
                    " closes. paper and official need clip.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder of your prompts. Needed by the gates paper and official, and by auto for"
                    " membranes without a detector, such as SPM files.",
                ),
                io.Boolean.Input(
                    "negative_rows",
                    default=False,
                    optional=True,
                    tooltip="Whether gates may open for the negative prompt, too. Off, because a membrane there takes"
                    " the concept out of what the picture is steered away from: a negative prompt that names it would"
                    " no longer work. On is as SPM's released code does it.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "patched_model",
                    display_name="MODEL",
                    tooltip="A clone of the model with the membranes in it; at strength 0 the model itself.",
                )
            ],
            **aliases("SPM", "unlearn", "erasure strength", "apply concept eraser", "SLD"),
        )

    @classmethod
    def execute(cls, model, membranes, clip=None, **control):
        from .patch import apply_membranes_to

        return io.NodeOutput(apply_membranes_to(model, membranes, MembraneConfig(**control), clip))


class SemipermSaveMembrane(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SemipermSaveMembrane",
            display_name="Save Membrane",
            category=CATEGORY,
            description="Writes membranes to one numbered .safetensors file in models/semiperm, where Load Membrane"
            " finds it. Nothing is ever overwritten.",
            inputs=[
                MembranesIO.Input("membranes", tooltip="What to save, from Erase Concept or Load Membrane."),
                io.String.Input(
                    "filename_prefix",
                    default="semiperm/erased",
                    tooltip="Start of the file name inside models/semiperm; a number is added. Subfolders are allowed:"
                    " semiperm/people/erased",
                ),
            ],
            outputs=[
                FileNameIO.Output(
                    "saved_name",
                    display_name="name",
                    tooltip="The name under which Load Membrane lists the file, such as"
                    " semiperm/erased_00001.safetensors. May be wired into its file input.",
                )
            ],
            is_output_node=True,
            **aliases("SPM", "export concept eraser", "save erasure"),
        )

    @classmethod
    def execute(cls, membranes, filename_prefix):
        path, name = new_membrane_file(filename_prefix)
        save_membranes(membranes, path)
        return io.NodeOutput(name, ui=ui.PreviewText(name))


class SemipermMembraneReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SemipermMembraneReport",
            display_name="Membrane Report",
            category=CATEGORY,
            description="Shows what fired in the run that drew a latent: how far each membrane opened for each prompt,"
            " and in which steps.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that the sampler used: from Apply Membranes or Erase Concept."
                ),
                io.Latent.Input("samples", tooltip="The sampler's own latent; the report is of the run that drew it."),
            ],
            outputs=[
                io.Latent.Output("latent", display_name="LATENT", tooltip="The latent that came in, unchanged."),
                io.String.Output("text", display_name="text", tooltip="The report as a table in plain text."),
                io.Image.Output(
                    "plot", display_name="plot", tooltip="The report as a picture: gates, and steps below."
                ),
            ],
            is_output_node=True,
            **aliases("erasure report", "which concept fired", "gates", "debug erasure"),
        )

    @classmethod
    def execute(cls, model, samples):
        from .patch import opening_maps_of, report_of

        report = report_of(model, samples["samples"])
        maps = opening_maps_of(model, samples["samples"])
        text, plot = report_text(report), report_plot(report, maps)
        shown = ui.PreviewText(text).as_dict() | ui.PreviewImage(plot, cls=cls).as_dict()
        return io.NodeOutput(samples, text, plot, ui=shown)


NODES = [
    SemipermLoadMembrane,
    SemipermEraseConcept,
    SemipermSolveMembranes,
    SemipermSolveImageMembranes,
    SemipermApplyMembranes,
    SemipermSaveMembrane,
    SemipermMembraneReport,
]
