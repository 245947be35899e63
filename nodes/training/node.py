"""The node that trains membranes. The work is done in train.py, which is imported when it runs: it needs `comfy`."""

from comfy_api.latest import io

from ...methods.training.config import LAYERS, OBJECTIVES, TrainingConfig
from ..membranes.inputs import CATEGORY, concept_inputs, lines_input, membranes_output
from ..sockets import aliases


class SemipermTrainMembranes(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        default = TrainingConfig
        size = {"default": 512, "min": 16, "max": 16384, "step": 8}
        return io.Schema(
            node_id="SemipermTrainMembranes",
            display_name="Train Membranes",
            category=CATEGORY,
            description="Trains membranes for concepts named in words, by SPM's latent anchoring, from the closed form"
            " on: minutes to hours, for a concept that Solve Membranes leaves too much of. Shows pictures while it"
            " trains. Cancelled, it goes on where it was when it is queued again. Nothing is applied.",
            inputs=[
                io.Model.Input("model", tooltip="The model to erase from; it is trained with what is patched into it."),
                io.Clip.Input("clip", tooltip="The text encoder that also encodes your prompts."),
                io.Vae.Input("vae", tooltip="The decoder of the previews."),
                *concept_inputs(),
                io.Int.Input(
                    "width", tooltip="Width of the pictures that are trained on, in pixels: the model's own.", **size
                ),
                io.Int.Input("height", tooltip="Height of the pictures that are trained on, in pixels.", **size),
                io.Int.Input(
                    "steps",
                    default=default.steps,
                    min=1,
                    max=100000,
                    tooltip="Steps of the optimiser, at most: a concept that no longer gets better stops before.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=default.learning_rate,
                    min=0.00001,
                    max=1.0,
                    step=0.00001,
                    tooltip="How large the optimiser's steps are, at most. Less where the loss jumps.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**53 - 1,
                    control_after_generate=True,  # the page adds its field to every "seed" anyway
                    tooltip="Of everything that is drawn. Fixed, the same training is not done again.",
                ),
                io.Combo.Input(
                    "layers",
                    options=list(LAYERS),
                    default=default.layers,
                    optional=True,
                    tooltip="text: what reads the prompt alone, the cheapest at work. cross: all of cross-attention."
                    " all: SPM's choice, attention and feed-forward.",
                ),
                io.Int.Input(
                    "rank",
                    default=default.rank,
                    min=1,
                    max=64,
                    optional=True,
                    tooltip="Rank at layers that do not begin from the closed form.",
                ),
                io.Combo.Input(
                    "objective",
                    options=list(OBJECTIVES),
                    default=default.objective,
                    optional=True,
                    tooltip="anchoring: SPM's, one point of a picture's way at each step. trajectory: the whole way of"
                    " a picture at each step, as EraseFlow does; much slower.",
                ),
                io.Float.Input(
                    "push",
                    default=default.push,
                    min=0.0,
                    max=8.0,
                    step=0.05,
                    optional=True,
                    tooltip="How far beyond the surrogate, in lengths of the way there; 1 is SPM's, 0 the surrogate.",
                ),
                io.Float.Input(
                    "anchor_weight",
                    default=default.anchor_weight,
                    min=0.0,
                    max=1000.0,
                    step=0.5,
                    optional=True,
                    tooltip="Weight of what must not change against what must; more keeps other prompts more exactly.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=default.batch_size,
                    min=1,
                    max=64,
                    optional=True,
                    tooltip="Pictures of each concept that are drawn and trained on side by side; more takes memory.",
                ),
                io.Int.Input(
                    "sampling_steps",
                    default=default.sampling_steps,
                    min=2,
                    max=100,
                    optional=True,
                    tooltip="Steps of the sampler whose pictures are trained on.",
                ),
                io.Int.Input(
                    "adversary_steps",
                    default=default.adversary_steps,
                    min=0,
                    max=50,
                    optional=True,
                    tooltip="Steps of a search for texts that bring the concept back, which are then erased, too. Each"
                    " costs as much as a step without. 0: no search. Not with the objective trajectory.",
                ),
                lines_input(
                    "preserve",
                    "captions to keep",
                    "Captions that must not change, one per line, in place of a general list.",
                ),
                io.Int.Input(
                    "validate_every",
                    default=default.validate_every,
                    min=0,
                    max=10000,
                    optional=True,
                    tooltip="Steps between two looks at wordings that are not trained on, by which the best is kept and"
                    " training stops early. 0: never; the last is kept.",
                ),
                io.Int.Input(
                    "preview_every",
                    default=5,
                    min=0,
                    max=10000,
                    optional=True,
                    tooltip="Steps between two previews: left by the model alone, right through the membrane. 0: none.",
                ),
                io.Boolean.Input(
                    "resume",
                    default=True,
                    optional=True,
                    tooltip="Keep a checkpoint in user/__semiperm/training, and go on from it when the same training is"
                    " queued again, also after a restart.",
                ),
            ],
            outputs=[
                membranes_output(),
                io.Image.Output(
                    "course",
                    display_name="course",
                    tooltip="The losses of the training, and what validation said of each concept, as a picture.",
                ),
            ],
            **aliases("SPM", "train eraser", "unlearn training", "latent anchoring", "EraseFlow", "fine-tune erasure"),
        )

    @classmethod
    def execute(cls, model, clip, vae, concept, surrogate, preserve="", preview_every=5, resume=True, **settings):
        from .train import train_in

        config, lines = TrainingConfig(**settings), concept.splitlines()
        made = train_in(model, clip, vae, lines, surrogate, preserve.splitlines(), config, preview_every, resume)
        return io.NodeOutput(made.membranes, made.course)


NODES = [SemipermTrainMembranes]
