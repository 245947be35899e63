"""What ComfyUI asks for: the list of our nodes."""

from comfy_api.latest import ComfyExtension, io

from . import canvas, membranes, negative_token_merging


class SemipermExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*canvas.NODES, *membranes.NODES, *negative_token_merging.NODES]
