"""The attack suite in ComfyUI: what happens to pictures on their way, to see what a mark survives."""

import torch
from comfy_api.latest import io
from einops import rearrange

from ...methods.attacks.pictures import ATTACKS, SUITE, attack
from ...methods.errors import WatermarkError
from ..sockets import aliases


def attacked(images: torch.Tensor, attacks: str, seed: int) -> tuple[torch.Tensor, str]:
    """(B, H, W, 3) pictures -> (B * attacks, H, W, 3), attack by attack, and the name of each on a line of its own.

    Args:
        attacks: one a line; empty lines and what follows # are left out.
        seed: of places, noise and jitter, for each attack anew: the lines do not depend on each other.

    Raises:
        WatermarkError: no attack, an unknown one, a strength out of range, or pictures of several sizes.
    """
    texts = [text for line in attacks.splitlines() if (text := line.partition("#")[0].strip())]
    if not texts:
        raise WatermarkError(f"no attack was given; write one a line, such as jpeg:25; there are {', '.join(ATTACKS)}")
    pixels = rearrange(images[..., :3], "b h w c -> b c h w").float().clamp(0, 1)
    found = [attack(pixels, text, torch.Generator().manual_seed(seed)) for text in texts]
    sizes = {text: tuple(one.shape[-2:]) for text, one in zip(texts, found, strict=True)}
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{text}: {width}x{height}" for text, (height, width) in sizes.items())
        raise WatermarkError(f"the attacks give pictures of several sizes ({said}); run those alone that change it")
    several = len(pixels) > 1
    names = [f"{text} ({i})" if several else text for text in texts for i in range(len(pixels))]
    return rearrange(torch.cat(found), "b c h w -> b h w c").contiguous(), "\n".join(names)


class SemipermAttackSuite(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SemipermAttackSuite",
            display_name="Attack Suite",
            category="semiperm/watermark",
            description="Changes pictures as they are changed on their way: JPEG, crops, resizing, blur, noise, light,"
            " turns. Shows what a mark, of this pack or of another one, survives.",
            inputs=[
                io.Image.Input("images", tooltip="Pictures to attack; each one is attacked in every way."),
                io.String.Input(
                    "attacks",
                    multiline=True,
                    default="\n".join(SUITE),
                    placeholder="one attack a line, such as jpeg:25",
                    tooltip="One attack a line, with its strength behind a colon; several joined by + follow each"
                    f" other. There are: {', '.join(ATTACKS)}.",
                ),
                io.Int.Input(
                    "attack_seed",  # the page adds a control to inputs that are called seed
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    tooltip="Of noise, jitter and random places; each line begins with it anew.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "attacked",
                    display_name="IMAGE",
                    tooltip="One batch: all pictures under the first attack, then all under the second, and so on.",
                ),
                io.String.Output(
                    "names",
                    display_name="names",
                    tooltip="What was done to each picture, one a line: for the labels of Detect Watermark.",
                ),
            ],
            **aliases("jpeg attack", "robustness", "crop rotate blur", "image degradation"),
        )

    @classmethod
    def execute(cls, images, attacks, attack_seed):
        return io.NodeOutput(*attacked(images, attacks, attack_seed))


NODES = [SemipermAttackSuite]
