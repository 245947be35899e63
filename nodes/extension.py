"""What ComfyUI asks for: the list of our nodes."""

from comfy_api.latest import ComfyExtension, io

from . import canvas, image_attacks, membranes, negative_token_merging, provenance, watermark


class SemipermExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        modules = canvas, membranes, negative_token_merging, watermark, image_attacks, provenance
        return [node for module in modules for node in module.NODES]
