"""The node that gives the embedded model, so that every example workflow runs with no download."""

from comfy_api.latest import io

from ..sockets import aliases


class SemipermLoadCanvas(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SemipermLoadCanvas",
            display_name="Load Canvas (embedded model)",
            category="semiperm/loaders",
            description=(
                "The very small model that comes with semiperm: Stable Diffusion 1.5's architecture, 7 million "
                "parameters, pictures of 128x128. It draws simple objects in a few styles within seconds on a CPU. "
                "Made for trying things out; put a checkpoint loader in its place for real pictures."
            ),
            inputs=[],
            outputs=[
                io.Model.Output(
                    display_name="MODEL", tooltip="The denoiser, for a KSampler; cfg 4 and 25 steps suit it."
                ),
                io.Clip.Output(
                    display_name="CLIP", tooltip="The text encoder, for CLIP Text Encode; 32 tokens a prompt."
                ),
                io.Vae.Output(
                    display_name="VAE", tooltip="The autoencoder, for VAE Decode; a latent of 128x128 is 16x16."
                ),
            ],
            **aliases("demo model", "toy model", "embedded model", "test checkpoint"),
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from .model import load_canvas

        return io.NodeOutput(*load_canvas())


NODES = [SemipermLoadCanvas]
