"""The attention seam on ComfyUI's transformers, where text and image attend to each other: SD3 and Flux.

The harm's text is a row beside the batch that takes the image tokens of its prompt's row; the categories' values are
read off rows that are carried in the first step, and kept. As pipelines/guidance/layers.py does it on diffusers'
layers; here projections are fused, so that each is reached around the one linear layer that holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from torch import Tensor

from ...methods.errors import GuidanceError
from ..extra_rows import ExtraRows
from ..root_patch import add_around
from .texts import JointTexts

__all__ = ["JointLayers", "is_joint"]

_ROOT = "diffusion_model"


@dataclass(frozen=True)
class _Site:
    """One attention layer.

    Args:
        read: path of the linear layer that gives q, k and v of the image; write: of the one that is given attention's
            output; text: of the one that gives q, k and v of the text.
        heads, width: of the attention. single: text and image are one sequence, text first.
    """

    read: str
    write: str
    text: str
    heads: int
    width: int
    single: bool = False


def is_joint(model) -> bool:
    """Whether a ComfyUI diffusion model is of these."""
    return isinstance(model, (MMDiT, Flux))


def _sites(model) -> list[_Site]:
    if isinstance(model, MMDiT):
        found = []
        for i, block in enumerate(model.joint_blocks):
            attention, path = block.x_block.attn, f"joint_blocks.{i}"
            image, text = f"{path}.x_block.attn", f"{path}.context_block.attn.qkv"
            width = attention.qkv.out_features // 3
            found.append(_Site(f"{image}.qkv", f"{image}.proj", text, attention.num_heads, width))
        return found
    width, heads = model.hidden_size, model.num_heads
    double = [f"double_blocks.{i}" for i in range(len(model.double_blocks))]
    single = [f"single_blocks.{i}" for i in range(len(model.single_blocks))]
    return [
        *(_Site(f"{p}.img_attn.qkv", f"{p}.img_attn.proj", f"{p}.txt_attn.qkv", heads, width) for p in double),
        *(_Site(f"{p}.linear1", f"{p}.linear2", f"{p}.linear1", heads, width, single=True) for p in single),
    ]


class JointLayers:
    """The attention layers of one model, for one `GuidancePatch`; the counterpart of `layers.Layers`."""

    def __init__(self, patch, texts: JointTexts):
        self.patch, self.config, self.texts = patch, patch.config, texts
        self.begin_run()

    def begin_run(self) -> None:
        self.kept: dict[str, Tensor] = {}  # the categories' values (R, C), by layer
        self.shares: list[Tensor] = []
        self.acted = 0
        self._harm: list[int] = []  # the rows of the call at hand that carry the harm's text, one for each prompt's
        self._phrases: list[int] = []  # and those that carry phrases whose values are read
        self._length = 0  # of the text

    def install(self, patched) -> None:
        """Put a patch on each layer of this ModelPatcher."""
        self.offset = int(getattr(patched.get_model_object(_ROOT), "register_length", 0))  # tokens before the text
        for site in _sites(patched.get_model_object(_ROOT)):
            if self.config.having("values"):
                self._around(patched, site.text, lambda original, s=site: self._values(original, s))
            if self.config.having("outputs"):
                self._around(patched, site.read, lambda original, s=site: self._share(original, s))
                self._around(patched, site.write, lambda original, s=site: self._combine(original, s))

    @staticmethod
    def _around(patched, path: str, make: Callable) -> None:
        add_around(patched, f"{_ROOT}.{path}.forward", make, outermost=True)

    # ---- rows beside the batch --------------------------------------------------------------------------------------

    def extra(self, x: Tensor, args: Sequence, kwargs: dict) -> ExtraRows | None:
        """The rows that a call gets besides, and whose they are.

        Raises:
            GuidanceError: the prompt's text is of a length that the categories' cannot be brought to.
        """
        positive, context = self.patch.positive, kwargs.get("context", args[1] if len(args) > 1 else None)
        self._harm, self._phrases = [], []
        if not positive or not isinstance(context, Tensor):
            return None
        self._length = context.shape[1]
        sources, images, texts, pooled = [], [], [], []
        if self.config.having("outputs"):
            self._harm = [len(x) + i for i in range(len(positive))]
            sources, images = list(positive), [x[positive]]
            texts = [self._as_long(self.texts.together, context).expand(len(positive), -1, -1)]
            pooled = [self.texts.together_pooled] * len(positive)
        if self.config.having("values") and not self.kept:
            count = len(self.texts.phrases)
            self._phrases = [len(x) + len(sources) + i for i in range(count)]
            noise = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(0)).to(x)
            images.append(noise.expand(count, *noise.shape))  # the same for all: values are read once for all images
            texts.append(self._as_long(self.texts.phrases, context))
            pooled += [None if self.texts.pooled is None else self.texts.pooled[i : i + 1] for i in range(count)]
            sources += [positive[0]] * count
        if not sources:
            return None
        vectors = None if any(one is None for one in pooled) else torch.cat(pooled)
        return ExtraRows(sources, torch.cat(images), torch.cat(texts), vectors)

    @staticmethod
    def _as_long(text: Tensor, context: Tensor) -> Tensor:
        """A category's text beside a longer prompt: said as often as it takes, as ComfyUI does with prompts."""
        times, rest = divmod(context.shape[1], text.shape[1])
        if rest or not times or text.shape[2] != context.shape[2]:
            raise GuidanceError(
                f"prompts are {tuple(context.shape[1:])} to the model, the categories {tuple(text.shape[1:])}; expected"
                " the same width, and a whole number of times the length: connect the CLIP of the model, and shorten"
                " the prompt"
            )
        return text.to(context).repeat(1, times, 1)

    # ---- layers -----------------------------------------------------------------------------------------------------

    def _values(self, original: Callable, site: _Site) -> Callable:
        values = slice(2 * site.width, 3 * site.width)

        def forward(x, *args, **kwargs):
            output, rows = original(x, *args, **kwargs), self.patch.positive
            if not rows:
                return output
            stretch = slice(self.offset, self.offset + self._length)
            if self._phrases:
                found = [
                    output[row, self.offset + p, values]
                    for row, ps in zip(self._phrases, self.texts.positions, strict=True)
                    for p in ps
                ]
                self.kept[site.text] = torch.stack(found).detach()
            part, share = output[rows, stretch, values], torch.zeros(len(rows), device=output.device)
            for algorithm in self.config.having("values"):
                harm = self.kept[site.text]
                edited, taken = algorithm.edit_values(part, harm, site.heads, self.config.strength)
                if self.texts.begins:
                    edited[:, 0] = part[:, 0]  # the begin-of-text token is no word
                part, share = edited, share + taken
            output = output.clone()
            output[rows, stretch, values] = part
            self._acted(share)
            return output

        return forward

    def _image(self, site: _Site) -> slice:
        return slice(self._length if site.single else 0, None)

    def _share(self, original: Callable, site: _Site) -> Callable:
        def forward(x, *args, **kwargs):
            if self._harm and self.patch.positive:
                x, image = x.clone(), self._image(site)
                x[self._harm, image] = x[self.patch.positive, image]
            return original(x, *args, **kwargs)

        return forward

    def _combine(self, original: Callable, site: _Site) -> Callable:
        def forward(x, *args, **kwargs):
            rows = self.patch.positive
            if not self._harm or not rows:
                return original(x, *args, **kwargs)
            image, width = self._image(site), slice(0, site.width)
            combined, share = self.config.combine(*(x[some, image, width] for some in (rows, self._harm)))
            self._acted(share)
            x = x.clone()
            x[rows, image, width] = combined
            x[self._harm, image, width] = combined  # the same image from here on
            return original(x, *args, **kwargs)

        return forward

    def _acted(self, share: Tensor) -> None:
        self.shares.append(share.detach())
        self.acted += 1
