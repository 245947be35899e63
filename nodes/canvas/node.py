"""The node that gives the embedded models, so that every example workflow runs with no download."""

from comfy_api.latest import io

from ...canvas.models import MODELS
from ..sockets import aliases


class SemipermLoadCanvas(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SemipermLoadCanvas",
            display_name="Load Canvas (embedded model)",
            category="semiperm/loaders",
            description=(
                "The very small models that come with semiperm, built like Stable Diffusion 1.5 and 3, pictures of "
                "128x128. They draw simple objects in a few styles within seconds on a CPU. Made for trying things "
                "out; put a checkpoint loader in its place for real pictures."
            ),
            inputs=[
                io.Combo.Input(
                    "model",
                    options=list(MODELS),
                    default="canvas",
                    optional=True,  # workflows made before there was a choice
                    tooltip=" ".join(f"{name}: {model.about}." for name, model in MODELS.items()),
                )
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL",
                    tooltip=(
                        "The denoiser, for a KSampler. "
                        + " ".join(
                            f"{name}: {model.steps} steps, cfg {model.guidance_scale:g}, {model.sampler},"
                            f" {model.scheduler}."
                            for name, model in MODELS.items()
                        )
                    ),
                ),
                io.Clip.Output(
                    display_name="CLIP",
                    tooltip="The text encoder, for CLIP Text Encode; canvas reads 32 tokens a prompt, the others 77.",
                ),
                io.Vae.Output(
                    display_name="VAE", tooltip="The autoencoder, for VAE Decode; a latent of 128x128 is 16x16."
                ),
            ],
            **aliases(
                "demo model", "toy model", "embedded model", "test checkpoint", "sd3 demo", "flow model", "turbo model"
            ),
        )

    @classmethod
    def execute(cls, model: str = "canvas") -> io.NodeOutput:
        from .model import load_canvas

        return io.NodeOutput(*load_canvas(model))


NODES = [SemipermLoadCanvas]
