"""What ComfyUI asks for: the list of our nodes."""

from comfy_api.latest import ComfyExtension, io

from . import installation
from .attacks import node as image_attacks
from .canvas import node as canvas
from .guidance import detector_node as guidance_detector
from .guidance import node as guidance
from .membranes import node as membranes
from .membranes import wordings
from .provenance import node as provenance
from .token_merging import node as negative_token_merging
from .training import node as training
from .watermark import node as watermark


class SemipermExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        wordings.listen()
        installation.check()
        modules = (
            canvas,
            membranes,
            training,
            guidance,
            guidance_detector,
            negative_token_merging,
            watermark,
            image_attacks,
            provenance,
        )
        return [node for module in modules for node in module.NODES]
