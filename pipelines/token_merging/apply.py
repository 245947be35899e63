"""Negative token merging on diffusers pipelines of the SD1.x, SD2, SDXL, SD3, Flux and Wan families.

handle = apply_negative_token_merging(pipe, NegativeTokenMergingConfig(reference=image, reference_prompt="a quibble"))
picture = pipe("an eared mascot in striped style on sky").images[0]
handle.report()
remove_negative_token_merging(pipe)
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from torch import nn

from ...methods.errors import TokenMergingError
from ...methods.token_merging.config import NegativeTokenMergingConfig
from ..family import Family, Pipeline
from ..handle import Handle, RootHook
from ..hooks import parameters_of
from ..latents import pixels_per_latent
from ..rows import with_rows, without_rows
from .hooks import BeforeOutput, Layer, MergeCall, MergeRun, Merging

logger = logging.getLogger(__name__)

__all__ = ["TokenMergingHandle", "apply_negative_token_merging", "remove_negative_token_merging"]


def apply_negative_token_merging(
    pipe: Pipeline, config: NegativeTokenMergingConfig | None = None
) -> TokenMergingHandle:
    """Push attention outputs away from reference images, or the images of a batch away from one another.

    In place of what was applied before; nothing changes if anything is wrong. Inside the window, one more row a
    reference image is denoised beside the batch (for each distinct prompt in it, unless `reference_prompt` is given);
    outside, none. That row never comes back as an image. Under torch.compile the row is carried at every step and
    takes the first image's prompt, since a compiled graph looks neither at the timestep's value nor at prompts.

    Args:
        pipe: SD1.x, SD2, SDXL, SD3, Flux or Wan pipeline, compiled or not.
        config: see `NegativeTokenMergingConfig`; None is diversity mode.

    Returns:
        A handle: `.report()` tells what was pushed in the last call, `.remove()` undoes; also a context manager.

    Raises:
        ModelError: an unsupported pipeline.
        TokenMergingError: no attention layer that `blocks` lets in.

    Source: NegToMe (arXiv 2412.01339), section 3; see methods/token_merging/merging.py for where we differ.

    >>> with apply_negative_token_merging(pipe, NegativeTokenMergingConfig(reference=picture)) as handle:
    ...     image = pipe("a star", num_inference_steps=2).images[0]
    >>> handle.report()["mode"]
    'reference'
    """
    handle = TokenMergingHandle(pipe, config or NegativeTokenMergingConfig())
    handle.replace(pipe)
    return handle


def remove_negative_token_merging(pipe: Pipeline) -> None:
    """Undo `apply_negative_token_merging`: the untouched model's bits again. Where nothing was applied: nothing."""
    TokenMergingHandle.clear(pipe)


class TokenMergingHandle(Handle):
    """Negative token merging at work on one pipeline."""

    NAME = "_semiperm_negative_token_merging"
    ERROR = TokenMergingError
    methods = frozenset(["token merging"])

    def __init__(self, pipe, config: NegativeTokenMergingConfig):
        super().__init__(pipe, config)
        layers = _layers(self.denoiser, self.family, config)
        self.merging = Merging(self, pipe, [path for path, _, _ in layers])
        self.hooks = [(module, (BeforeOutput if before else Layer)(self.merging)) for _, module, before in layers]
        self.hooks.append((self.denoiser, RootHook(self, outermost=True)))
        self.sample_name = parameters_of(type(self.denoiser))[0]

    def new_record(self) -> MergeRun:
        return MergeRun()

    def set(self, *, strength: float | Sequence[float] | None = None, threshold: float | None = None) -> None:
        """Go on with another strength or threshold; a compiled model is not compiled again.

        Args:
            strength, threshold: as in `NegativeTokenMergingConfig`; None leaves it.

        Raises:
            TokenMergingError: values out of range, or a compiled model to or from strength 0, which runs no extra row.
        """
        given = {"strength": strength, "threshold": threshold}
        config = dataclasses.replace(self.config, **{name: v for name, v in given.items() if v is not None})
        if self.compiled and (config.strength == 0) != self.merging.off:
            raise TokenMergingError(
                f"strength={config.strength} instead of {self.config.strength} on a compiled model; strength 0 is"
                " another graph: remove, or apply again"
            )
        self.config = config
        self.merging.tune(config)

    def prepare(self, height: int, width: int, max_sequence_length: int | None = None) -> None:
        """Encode the references for pictures of this size now; needed before a compiled model's first call only.

        Args:
            height, width: of the pictures, in pixels.
            max_sequence_length: of T5 (SD3, Flux, Wan), the one you will generate with; None is the pipeline's default.
        """
        if self.config.mode == "reference":
            scale = pixels_per_latent(self.pipe)
            self.merging.reference.prepare(height // scale, width // scale)
            if self.config.reference_prompt is not None:
                self.merging.reference.encode(max_sequence_length)

    def begin(self, inputs: dict) -> MergeCall:
        return self.merging.begin(inputs, self.sample_name)

    def change_inputs(self, call: MergeCall, inputs: dict) -> dict | None:
        if call.rows is None:
            return None
        return {name: with_rows(name, value, call.rows) for name, value in inputs.items()}

    def finish(self, call: MergeCall, output):
        self.merging.check(call)
        return output if call.rows is None else without_rows(output, call.rows)

    def steps(self) -> list[dict]:
        return list(self.run.record.record.steps) if self.run is not None else []

    def begin_run(self, encoded, arguments: dict) -> None:
        self.merging.ready(encoded)

    def ended(self, pipe: Pipeline) -> None:
        run = self.here
        going = run if run is not None and not run.over else None
        super().ended(pipe)
        if going and going.over and not self.compiled and (nothing := going.record.record.nothing(self.config)):
            logger.warning("%s: %s", self.NAME.strip("_"), nothing)

    def report(self) -> dict:
        """What was pushed in the last call of the pipeline: see `MergeRecord.report`.

        Raises:
            TokenMergingError: the pipeline has not run since (or only compiled, which keeps no record).
        """
        run = self.run
        if run is None or not run.record.record.steps:
            raise TokenMergingError(
                "no report yet: the pipeline has not been called since apply_negative_token_merging (a compiled"
                " denoiser keeps no record)"
            )
        return run.record.record.report(self.config, len(self.hooks) - 1)


def _layers(
    denoiser: nn.Module, family: Family, config: NegativeTokenMergingConfig
) -> list[tuple[str, nn.Module, bool]]:
    """(path, module to hook, whether its input is meant) of every attention layer that the config lets in."""
    names = family.self_attention | (family.cross_attention if config.cross_attention else frozenset())
    paths = {path: module for path, module in denoiser.named_modules() if path.rpartition(".")[2] in names}
    blocks = config.blocks or family.token_merging
    found = {path: module for path, module in paths.items() if path.startswith(blocks)}
    if not found:
        raise TokenMergingError(
            f"blocks={blocks} let in 0 of {len(paths)} attention layers of this {type(denoiser).__name__};"
            f" they are called e.g. {next(iter(paths), 'none')!r}"
        )
    layers = []
    for path, module in found.items():
        # the released Flux code matches before the output projection where there is one
        before = config.compat == "official" and family.packed and getattr(module, "to_out", None) is not None
        layers.append((path, module.to_out[0] if before else module, before))
    return layers
