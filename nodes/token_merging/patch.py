"""Negative token merging on a ComfyUI model: a clone of its ModelPatcher; no weight is touched.

Reference rows are added around the diffusion model's forward, only in steps inside the window, and taken off its
output. Tokens are pushed where the attention layers' outputs can be patched: see layers.py.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable

import comfy.patcher_extension
import torch
import torch.nn.functional as F
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from einops import rearrange, repeat
from torch import Tensor

from ...methods.errors import TokenMergingError
from ...methods.token_merging.config import NegativeTokenMergingConfig
from ...methods.token_merging.merging import knobs
from ...methods.token_merging.record import MergeRecord
from ..extra_rows import ExtraRows, call_with_rows, rows_of
from ..progress import Progress
from ..root_patch import add_root
from ..run_reports import RunReports
from .layers import KNOWN, Layers
from .rows import Layout, ReferenceImages, groups_of, reference_text, row_kinds

logger = logging.getLogger(__name__)

ATTACHMENT = "semiperm_token_merging"
_LAYOUTS = 16  # text batches remembered: split and area conditionings take turns, rarely more than a few
_WRAPPER = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
_numbers = itertools.count()


def from_inputs(
    image: Tensor | None = None,
    mask: Tensor | None = None,
    vae=None,
    reference=None,
    blocks: str = "",
    reference_seed: int = 0,
    compat: str = "none",
    strengths: str = "",
    **options,
) -> tuple[NegativeTokenMergingConfig, object, object]:
    """A node's inputs as `apply_token_merging_to` takes them: (config, vae, reference).

    Args:
        image: (R, H, W, 3 or 4), what to push away from, where it is not transparent; None lets the images of a batch
            push each other.
        mask: (R or 1, H, W), where in the image. vae: encodes the image.
        reference: CONDITIONING with words for what the image shows.
        blocks: prefixes of ComfyUI's names of blocks, separated by commas; "all"; "" is the paper's choice.
        strengths: numbers separated by commas, one for each image, in the place of `strength`; "" is that one for all.
        options: what else `NegativeTokenMergingConfig` takes.

    Raises:
        SemipermError: wrong options, an image without a VAE, or words without an image.
    """
    if image is not None and vae is None:
        raise TokenMergingError("an image without a vae, which encodes it; connect the VAE of the model, too")
    if image is None and reference is not None:
        raise TokenMergingError("a reference conditioning without an image; it says in words what the image shows")
    prefixes = tuple(part.strip() for part in blocks.split(",") if part.strip())
    if numbers := [part.strip() for part in strengths.split(",") if part.strip()]:
        try:
            options["strength"] = [float(number) for number in numbers]
        except ValueError as error:
            raise TokenMergingError(f"strengths={strengths!r}; expected numbers separated by commas: 0.9, 2") from error
    config = NegativeTokenMergingConfig(
        reference=None if image is None else rearrange(image[..., :4], "r h w c -> r c h w").clamp(0.0, 1.0),
        mask=mask,
        blocks=("",) if "all" in prefixes else prefixes or None,
        seed=reference_seed,
        compat=None if compat == "none" else compat,
        **options,
    )
    return config, vae, reference


def apply_token_merging_to(model, config: NegativeTokenMergingConfig, vae=None, reference=None):
    """Return a clone of the model on which tokens are pushed; the given model stays as it is.

    Args:
        model: ComfyUI's ModelPatcher of an SD1.x, SD2, SDXL, SD3, Flux or Wan model.
        config: what to push away from, how far, and when; strength 0 returns the model itself. Its `blocks` are
            ComfyUI's names; None is the paper's choice: those of a UNet's output, all of a transformer.
        vae: encodes the config's reference images.
        reference: CONDITIONING with words for what they show.

    Raises:
        TokenMergingError: a model of another architecture, or a reference that is no single prompt.
    """
    unet = model.get_model_object("diffusion_model")
    if not isinstance(unet, KNOWN):
        raise TokenMergingError(
            f"a {type(model.model).__name__} model ({type(unet).__name__}); negative token merging knows SD1.x, SD2,"
            " SDXL, SD3, Flux and Wan"
        )
    text = reference_text(reference)
    if config.strength == 0:
        return model
    images = ReferenceImages(config, vae) if config.reference else None
    patch = TokenMergingPatch(config, images, text, unet)
    patched = model.clone()
    patch.layers.install(patched)
    add_root(patched, patch.around, adds_rows=True)
    patched.add_wrapper_with_key(_WRAPPER, f"semiperm_token_merging_{next(_numbers)}", patch.sample)
    patched.set_attachments(ATTACHMENT, patch)
    return patched


def report_of(model, samples: Tensor | None = None) -> dict:
    """What was pushed in a sampling run of a model from `apply_token_merging_to` (of the last applied node).

    Args:
        samples: what the run returned; None: the last run, whatever it drew.

    Returns:
        See `MergeRecord.report`.

    Raises:
        TokenMergingError: no token merging on this model, it has not sampled, or none of its last runs returned these
            latents.
    """
    patch = model.get_attachment(ATTACHMENT)
    if patch is None:
        raise TokenMergingError(
            "this model carries no negative token merging (or its strength is 0); connect the model that comes out of"
            " Negative Token Merging"
        )
    return patch.report() if samples is None else patch.reports.of(samples)


class TokenMergingPatch:
    """Negative token merging at work on one model: the state its layers share, and the record of what was pushed."""

    def __init__(self, config: NegativeTokenMergingConfig, images: ReferenceImages | None, text, unet):
        self.config, self.images, self.text = config, images, text
        self.record, self.called = MergeRecord(), False
        self.layers = Layers(self, unet)
        self.repeats_text = isinstance(unet, UNetModel)  # cross-attention alone reads it: to repeat it changes nothing
        self.reports = RunReports(TokenMergingError)
        self._forget()

    def _forget(self) -> None:
        self.layout: Layout | None = None
        self._layouts: list[tuple[tuple, Tensor | None, Layout | None]] = []
        self._pushed = False
        self.layers.begin_run()
        if self.images is not None:
            self.images.free()

    def sample(self, executor, *args, **kwargs):
        """Around a whole sampling run: nothing is carried from one to the next, and one that we missed is an error."""
        guider, noise = executor.class_obj, args[0] if args else kwargs["noise"]
        self._forget()
        self.record.clear()
        self.called = False
        self.sampling = guider.model_patcher.get_model_object("model_sampling")
        self.progress = Progress(self.sampling)
        self.names = {cond.get("uuid"): name for name, conds in guider.conds.items() for cond in conds or ()}
        if self.images is not None:
            self.images.encode(noise.shape, guider.model_patcher.model)
        try:
            result = executor(*args, **kwargs)
        finally:
            self._forget()
        if not self.called:
            raise TokenMergingError(
                "the model sampled, but negative token merging on it never ran: another node replaced"
                " diffusion_model.forward; put Negative Token Merging after that node"
            )
        if missed := self.config.window.missed(self.record.steps):  # a second pass may lie outside on purpose
            logger.warning("Negative Token Merging: %s", missed)
        elif nothing := self.record.nothing(self.config):
            logger.warning("Negative Token Merging: %s", nothing)
        self.reports.keep(result, self.report())
        return result

    def report(self) -> dict:
        """Of the last run; see `report_of`."""
        if not self.called:
            raise TokenMergingError(
                "no report yet: this model has not sampled; connect the sampler's latent to the report"
            )
        return self.record.report(self.config, len(self.layers.reached))

    def around(self, original: Callable) -> Callable:
        """The diffusion model's forward, inside the window with the reference rows, which its answer does not have."""

        def forward(x, *args, **kwargs):
            options = kwargs.get("transformer_options") or {}
            context = kwargs.get("context", args[1] if len(args) > 1 else None)
            layout = self._begin(x, context, options)
            if layout is None:
                return original(x, *args, **kwargs)
            before = self.record.outcomes
            self.layout = layout
            try:
                output = self._run(original, x, args, kwargs, context, options)
            finally:
                self.layout = None
            if not self._pushed and self.record.outcomes == before:
                raise TokenMergingError(
                    f"no attention layer was pushed: blocks={self.layers.blocks} with"
                    f" max_downscale={self.config.max_downscale} leaves none, or another node replaced the attention:"
                    " put Negative Token Merging after it"
                )
            self._pushed = True
            return output

        return forward

    def _begin(self, x: Tensor, context: Tensor | None, options: dict) -> Layout | None:
        self.called = True
        self.layers.begin_call()
        share, sigma = self.progress(options)
        active = self.config.window.contains(share)
        layout = self._layout(x, context, options) if active else None
        self.record.step(share, sigma, active, len(layout.groups.sources) if layout else 0)
        return layout

    def _layout(self, x: Tensor, context: Tensor | None, options: dict) -> Layout | None:
        rows = rows_of(x, options)
        names = [self.names.get(uuid) for uuid in options.get("uuids") or ()]
        images = row_kinds(rows, [*names, *[None] * len(rows.chunks)])
        alike = self.config.mode == "diversity" or self.text is not None or context is None
        compared = None if alike or self.config.compat == "official" else context
        told = tuple(options.get("uuids") or ())  # which conditionings these are; else their text has to be compared
        key = (tuple(images), len(rows.chunks), told, x.shape, x.device, None if context is None else context.shape)
        for known, text, layout in self._layouts:
            if known == key and (text is None or torch.equal(text, compared)):
                return layout
        groups, layout = groups_of(self.config, images, rows, compared, x.device), None
        if groups is not None:
            tokens = 0 if context is None else context.shape[1]
            tuned = knobs(self.config, groups.count, x.device)
            layout = Layout(images, groups, tuple(x.shape[-2:]), self.layers.grid(x.shape), tokens, *tuned)
        text = None if compared is None or told else compared.clone()
        self._layouts = [(key, text, layout), *self._layouts][:_LAYOUTS]
        return layout

    def _run(self, original: Callable, x: Tensor, args, kwargs: dict, context: Tensor | None, options: dict) -> Tensor:
        extra = ExtraRows(self.layout.groups.sources)
        if extra.sources:
            if self.text is not None and context is not None:
                extra.context, extra.pooled = self._text(context), self.text[1]
            images = self.images.rows(self.sampling, options["sigmas"].max(), x)
            images = repeat(images, "r ... -> (owner r) ...", owner=len(extra.sources) // len(images))
            further = [x[s : s + 1, images.shape[1] :] for s in extra.sources]  # an inpainting model's mask and picture
            extra.x = torch.cat([images, torch.cat(further)], dim=1)
        return call_with_rows(original, x, args, kwargs, extra)

    def _text(self, context: Tensor) -> Tensor:
        states, tokens = self.text[0].to(context), context.shape[1]
        length = states.shape[1]
        if length > tokens:
            raise TokenMergingError(
                f"the reference conditioning has {length} tokens, the prompt {tokens}; use fewer words there"
            )
        if self.repeats_text and tokens % length == 0:
            return repeat(states, "1 n c -> 1 (times n) c", times=tokens // length)
        return F.pad(states, (0, 0, 0, tokens - length))
