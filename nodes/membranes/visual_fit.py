"""Image-side membranes fitted in ComfyUI: the model's own sampling draws the pictures of the fit."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.lora
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ...methods.errors import MembraneError
from ...methods.membranes.base_model import base_model_hash
from ...methods.membranes.config import MembraneConfig
from ...methods.membranes.types import Membrane, Membranes
from ...methods.membranes.visual_drawing import LOOKED_AT, Drawing
from ...methods.membranes.visual_fit import VisualConfig
from ...methods.membranes.visual_words import BETAS, fit_looks, wanted
from ..base_weights import base_weights
from ..extra_rows import Rows
from ..progress import Progress
from ..root_patch import add_around, add_root
from .patch import apply_membranes_to, text_first

logger = logging.getLogger(__name__)

__all__ = ["Sampling", "solve_looks"]

# diffusers' names only, as membrane files have them
_LAYERS = re.compile(
    r"^lora_(unet_(down|mid|up)_block.*_attn[12]_to_out_0|transformer_transformer_blocks_\d+_attn_to_out_0"
    r"|transformer_single_transformer_blocks_\d+_proj_out)$"
)
_OF_THE_PICTURE = "_attn1_to_out_0"  # self-attention, which reads no text
_PIXELS = 8  # of a picture in one latent cell, as ComfyUI's Empty Latent Image has it
_SAMPLER, _SCHEDULER = "euler", "simple"  # which every family of models knows
_NEGATIVE = 1  # in ComfyUI's cond_or_uncond


@dataclass(frozen=True)
class Sampling:
    """How the pictures of a fit are drawn: their size in pixels, and the guidance scale."""

    width: int = 512
    height: int = 512
    cfg: float = 7.0


def solve_looks(
    model,
    clip,
    concepts: Sequence[str],
    surrogate: str = "",
    preserve: Sequence[str] = (),
    config: VisualConfig | None = None,
    sampling: Sampling | None = None,
) -> Membranes:
    """Fit one image-side membrane per concept for this MODEL and CLIP; nothing is applied.

    The model samples as it is, LoRAs and other patches included.

    Args:
        concepts: names; "robot|android" names a synonym too. preserve: captions whose pictures do not show them, in
            place of a general list; () takes that.

    Raises:
        MembraneError: no concept, an unsupported model, or a concept that no layer tells from others.
    """
    concepts = [concept.strip() for concept in concepts if concept.strip(" |")]
    if not concepts:
        raise MembraneError("the concept is empty; write what to erase, one concept a line, e.g. robot|android")
    config, kept = config or VisualConfig(), [caption.strip() for caption in preserve if caption.strip()]
    asked = wanted(concepts, surrogate.strip(), kept or None, None, None, config)
    drawing = _Drawing(model, clip, config, sampling or Sampling(), len(asked.phrases))
    made, weights = fit_looks(drawing, asked, config), base_weights(model)
    hashes = [base_model_hash({key: weights[drawing.paths[key]] for key in m.keys}) for m in made]
    return Membranes(replace(m, base_model=known) for m, known in zip(made, hashes, strict=True))


class _Drawing(Drawing):
    """A model's sampling for one fit."""

    def __init__(self, model, clip, config: VisualConfig, sampling: Sampling, concepts: int):
        self.model, self.clip, self.sampling = model, clip, sampling
        known = comfy.lora.model_lora_keys_unet(model.model, {})
        self.paths = {key: path for key, path in known.items() if _LAYERS.match(key) and isinstance(path, str)}
        super().__init__(config, [key for key in self.paths if _OF_THE_PICTURE not in key], list(self.paths))
        if not self.layers:
            raise MembraneError(
                f"a {type(model.model).__name__} model has no layer whose image tokens are known; expected SD1.x, SD2,"
                " SDXL, SD3 or Flux"
            )
        drawn_again = 2 if config.beta is not None else 3 + len(BETAS)  # at most
        count = concepts * (config.samples + drawn_again * config.validation) + config.samples + config.background
        self.bar = comfy.utils.ProgressBar(count + config.calibration + config.spare)

    def _conditioning(self, prompt: str) -> list:
        states, pooled = self.clip.encode_from_tokens(self.clip.tokenize(prompt), return_pooled=True)
        return [[states, {"pooled_output": pooled}]]

    def _empty(self) -> Tensor:
        sampling = self.sampling
        empty = torch.zeros(1, 4, sampling.height // _PIXELS, sampling.width // _PIXELS)
        return comfy.sample.fix_empty_latent_channels(self.model, empty)

    def draw(
        self, prompts: Sequence[str], seed: int, taker: Any = None, keys: Sequence[str] = (), more: int = 0
    ) -> Tensor:
        return self._drawn(self._watched(taker, keys), prompts, seed, taker, more)

    def redrawn(self, prompts: Sequence[str], seed: int, membrane: Membrane) -> Tensor:
        model = apply_membranes_to(self.model, Membranes(membrane), MembraneConfig(check_base=False))
        return self._drawn(model, prompts, seed, None, 0)

    def _drawn(self, model, prompts: Sequence[str], seed: int, taker: Any, more: int) -> Tensor:
        """(P, C, h, w): what sampling returns, one picture at a time."""
        found, empty, negative = [], self._empty(), self._conditioning("")
        for number, prompt in enumerate(prompts):
            start = self.config.seed + seed + number
            noise = comfy.sample.prepare_noise(empty, start)
            found.append(
                comfy.sample.sample(
                    model, noise, self.config.steps + more, self.sampling.cfg, _SAMPLER, _SCHEDULER,
                    self._conditioning(prompt), negative, empty, disable_pbar=True, seed=start,
                )
            )  # fmt: skip
            if taker is not None:
                taker.next()
            self.bar.update(1)
        return torch.cat(found)

    def _watched(self, taker, keys: Sequence[str]):
        """A clone of the model, of which a taker sees what these layers answer for positive rows; without, itself."""
        if taker is None:
            return self.model
        watch, patched = _Watch(self.model, taker), self.model.clone()
        for key in keys:
            path = self.paths[key].removesuffix(".weight")
            add_around(patched, f"{path}.forward", watch.eye(key))
        add_root(patched, watch.around)
        return patched

    def show(self, pictures: Tensor, captions: Sequence[str], taker: Any, keys: Sequence[str]) -> None:
        model, euler = self._watched(taker, keys), comfy.samplers.sampler_object("euler")
        sampling = model.get_model_object("model_sampling")
        for number, (latent, caption) in enumerate(zip(pictures, captions, strict=True)):
            text, start = self._conditioning(caption), self.config.seed + number
            noise = comfy.sample.prepare_noise(latent[None], start)
            for share in LOOKED_AT:
                # one step of Euler's method down to no noise asks once; a scale of 1 asks for one side
                sigmas = torch.tensor([float(sampling.percent_to_sigma(share)), 0.0])
                comfy.sample.sample_custom(
                    model, noise, 1.0, euler, sigmas, text, text, latent[None], disable_pbar=True, seed=start
                )
            taker.next()


class _Watch:
    """What a watched model's calls are about."""

    def __init__(self, model, taker):
        self.taker, self.progress = taker, Progress(model.get_model_object("model_sampling"))
        self.rows: list[int] = []
        self.share, self.text = 0.0, 0

    def around(self, original: Callable) -> Callable:
        """The diffusion model's forward."""

        def forward(*args, **kwargs):
            context, options = kwargs.get("context", args[2] if len(args) > 2 else None), kwargs["transformer_options"]
            rows = Rows(len(context), options.get("cond_or_uncond") or [0], len(context))
            self.rows = [i for i in range(len(context)) if rows.chunks[rows.chunk_of(i)] != _NEGATIVE]
            self.share, self.text = round(min(max(self.progress(options)[0], 0.0), 1.0), 6), context.shape[1]
            return original(*args, **kwargs)

        return forward

    def eye(self, key: str) -> Callable:
        """A patch of one layer's forward."""
        text_comes_first = text_first(key)

        def around(original: Callable) -> Callable:
            def forward(x, *args, **kwargs):
                y = original(x, *args, **kwargs)
                if self.rows:
                    self.taker.take(key, y[self.rows].detach(), self.share, self.text if text_comes_first else 0)
                return y

            return forward

        return around
