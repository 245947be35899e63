"""Negative token merging inside a denoiser, as diffusers hooks: one on the root, one per attention layer.

The root hook looks at the noise level and adds the reference rows (`pipelines.rows`); the layers' hooks push the tokens
of the image rows. No hook waits for the GPU but for the timestep, once a call, and for a new text, once a run: what a
layer needs lies in the plan (tests/pipelines/token_merging/test_waits.py counts).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from diffusers.hooks import ModelHook
from einops import repeat
from torch import Tensor, nn

from ...methods.errors import TokenMergingError
from ...methods.modules import same_bits, stamp
from ...methods.token_merging.config import NegativeTokenMergingConfig
from ...methods.token_merging.merging import MergeRows, grid_of, knobs, merge_tokens
from ...methods.token_merging.record import MergeRecord
from ..family import Family, denoiser_of
from ..rows import ExtraRows
from ..scheduler import image_tokens, share_of, sigma_of
from ..text import split_encoded
from .plan import MergePlan, make_plan
from .reference import Reference

# What UNets and transformers call the pooled text, of which reference rows have their own.
_POOLED = ("text_embeds", "pooled_projections")
_PLANS = 2  # text batches remembered: guidance by separate calls alternates between two


class MergeState:
    """What the hooks of one pipeline share."""

    def __init__(self, pipe, family: Family, config: NegativeTokenMergingConfig, layers: Sequence[str]):
        self.pipe, self.family, self.config, self.layers = pipe, family, config, layers
        self.reference = Reference(pipe, family, config)
        self.record = MergeRecord()
        self.plan: MergePlan | None = None  # of the current call, None where nothing is pushed
        self.gate: Tensor | None = None  # of a compiled graph
        self.grid = self.token_grid = (0, 0)  # of the latent, and of the finest layer's tokens
        self.image_tokens = self.sequence = 0  # of the picture; and with an editing model's context, which follows it
        self.pushed = 0
        self.tune(config)
        self.context: str | None = None  # "cond" or "uncond", where the pipeline tells
        self._plans: list[MergePlan] = []
        self._picture = 0
        self._timesteps = self._ids = self._time = self._first = None

    def begin_run(self) -> None:
        """The pipeline was called: what is recorded is of this run."""
        if self.record.steps:
            self.record.clear()

    def tune(self, config: NegativeTokenMergingConfig) -> None:
        """Another strength or threshold. Tensors, filled anew: a compiled graph reads them at each call."""
        self.config, self.off = config, config.strength == 0
        strength, threshold = knobs(config, len(config.strengths))
        if not hasattr(self, "strength"):
            self.strength, self.threshold = strength, threshold
        self.strength.copy_(strength)
        self.threshold.copy_(threshold)
        self._plans = []

    def ready(self, encoded) -> None:
        """Put what a graph cannot make where it finds it: the reference prompt, at the length of the prompts.

        Args:
            encoded: what the pipeline's encode_prompt returned.
        """
        hidden, _ = split_encoded(encoded)
        self.strength, self.threshold = self.strength.to(hidden.device), self.threshold.to(hidden.device)
        if self.config.reference_prompt is not None and not self.off:
            self.reference.text(hidden.shape[1])

    # ---- the root -------------------------------------------------------------------------------------------------

    def begin(self, inputs: dict, sample_name: str) -> ExtraRows | None:
        """Look at a call of the denoiser, and say which rows it gets."""
        self.plan, self.gate, self.pushed = None, None, 0
        sample, timestep = inputs[sample_name], torch.as_tensor(inputs["timestep"])
        if self.off:
            if not torch.compiler.is_compiling():
                self._measure(sample, inputs)
                self._step(sample, timestep, wanted=False)
            return None
        hidden = inputs.get("encoder_hidden_states")
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        if not isinstance(hidden, Tensor):
            raise TokenMergingError("the denoiser was called without encoder_hidden_states; give it a prompt")
        self._measure(sample, inputs)
        if torch.compiler.is_compiling():
            share = share_of(self.pipe, self.family, timestep, self.image_tokens)
            plan = make_plan(
                hidden, sample.shape[0], self._chunks(sample.shape[0], None, hidden), *self._made_of(hidden.device)
            )
            self.gate = self.config.window.contains(share)
        else:
            plan = self._plan(hidden, sample, timestep)
        if plan is None or plan.rows is None:
            return None
        self.plan = plan
        if not plan.extra:
            return None

        def own(name: str, value: Tensor) -> Tensor | None:
            if value is sample:
                return torch.cat([sample, self._latents(sample, timestep, plan)])
            return self._text(value, plan) if value is plan.hidden or name in _POOLED else None

        return ExtraRows(plan.batch, plan.sources, own)

    def end(self) -> None:
        """Refuse a step that should have pushed and did not."""
        plan, self.plan = self.plan, None
        if plan is not None and not self.pushed:
            raise TokenMergingError(
                f"none of the {len(self.layers)} hooked attention layers (first: {self.layers[0]}) was at a resolution"
                f" within max_downscale={self.config.max_downscale}, or they were replaced; nothing was pushed: raise"
                " max_downscale, or apply again after replacing layers"
            )

    def _made_of(self, device: torch.device) -> tuple[NegativeTokenMergingConfig, Tensor]:
        if not torch.compiler.is_compiling():  # which is told in time: `ready`
            self.strength, self.threshold = self.strength.to(device), self.threshold.to(device)
        return self.config, self.strength

    def _measure(self, sample: Tensor, inputs: dict) -> None:
        """The grid of latents, and how many image tokens a transformer makes of it."""
        if not self.family.packed:
            self.grid = tuple(sample.shape[-2:])
        elif torch.compiler.is_compiling():
            fitting = [size for size in self.reference.sizes if size[0] * size[1] <= 4 * sample.shape[1]]
            self.grid = fitting[-1] if fitting else (0, 0)
            self._picture = self.grid[0] * self.grid[1] // 4 or sample.shape[1]
        elif self._ids is not inputs["img_ids"]:
            self._ids = inputs["img_ids"]
            ids = self._ids.reshape(-1, 3).cpu()  # (kind, row, column) of each token of 2 x 2 cells
            ids = ids[ids[:, 0] == ids[0, 0]]  # an editing model's context is of another kind, and follows
            self._picture = len(ids)
            self.grid = tuple(2 * (int(ids[:, axis].max()) + 1) for axis in (1, 2))
        self.token_grid = self.grid
        if not self.family.uneven:
            denoiser, _ = denoiser_of(self.pipe)
            _, rows, columns = self.family.patch(denoiser)
            self.token_grid = self.grid[0] // rows, self.grid[1] // columns
            self.sequence = image_tokens(self.family, denoiser, sample)
            self.image_tokens = self._picture if self.family.packed else self.sequence

    def _plan(self, hidden: Tensor, sample: Tensor, timestep: Tensor) -> MergePlan | None:
        share, active = self._step(sample, timestep)
        batch, chunks = sample.shape[0], self._chunks(sample.shape[0], share, hidden)
        if not active:
            return None
        plan = next((p for p in self._plans if p.hidden is hidden and p.chunks == chunks), None)
        if plan is None or plan.batch != batch or not same_bits(hidden, plan.stamped):
            plan = make_plan(hidden, batch, chunks, *self._made_of(hidden.device))
            self._plans = [plan, *self._plans][:_PLANS]
        self.record.extra_rows += plan.extra
        return plan

    def _step(self, sample: Tensor, timestep: Tensor, wanted: bool = True) -> tuple[float, bool]:
        """Record a call: its share of the schedule, and whether it lies in the window of something that is wanted."""
        timesteps = getattr(self.pipe.scheduler, "timesteps", None)
        if timesteps is not self._timesteps:  # a new run has a new schedule
            self._timesteps, self._time = timesteps, None
            self.record.clear()
        share = share_of(self.pipe, self.family, timestep, self.image_tokens)
        active = wanted and self.config.window.contains(share)
        self.record.step(share, sigma_of(self.pipe, self.family, timestep), active)
        return share, active

    def _chunks(self, batch: int, share: float | None, hidden: Tensor) -> tuple[bool, ...]:
        """For each equal part of the batch, whether it is conditional."""
        if self.family.one_call:
            guided = bool(getattr(self.pipe, "do_classifier_free_guidance", False)) and batch % 2 == 0
            return (False, True) if guided else (True,)
        # two calls at one timestep: they tell which, or the conditional one comes first
        if self.context is not None or share is None:
            return (self.context != "uncond",)
        if self._time != share:
            self._time, self._first = share, hidden
        return (self._first is hidden,)

    def _text(self, value: Tensor, plan: MergePlan) -> Tensor:
        """A text input with the reference rows: the same tensor for the same text."""
        if torch.compiler.is_compiling():
            return torch.cat([value, self._words(value, plan)])
        tensor, mark, joined = plan.joined.get(id(value), (None, None, None))
        if tensor is not value or not same_bits(value, mark):
            joined = torch.cat([value, self._words(value, plan)])
            plan.joined[id(value)] = value, stamp(value), joined
        return joined

    def _words(self, value: Tensor, plan: MergePlan) -> Tensor:
        if self.config.reference_prompt is None:
            return torch.cat([value[source : source + 1] for source in plan.sources])
        text, pooled = self.reference.text(plan.hidden.shape[1])
        return repeat((text if value is plan.hidden else pooled).to(value), "1 ... -> r ...", r=plan.extra)

    def _latents(self, sample: Tensor, timestep: Tensor, plan: MergePlan) -> Tensor:
        latents = self.reference.rows(*self.grid, timestep.to(sample.device)).to(sample.dtype)
        latents = repeat(latents, "r c h w -> (group r) c h w", group=plan.extra // len(latents))
        if self.family.video:  # a still picture, frame by frame
            latents = repeat(latents, "r c h w -> r c f h w", f=sample.shape[2])
        latents = self.family.pack(self.pipe, latents)
        rows = torch.cat([sample[source : source + 1] for source in plan.sources])
        tokens, channels = latents.shape[1:3] if self.family.packed else (None, latents.shape[1])
        axis = 2 if self.family.packed else 1
        if rows.shape[axis] < channels:
            raise TokenMergingError(
                f"the VAE makes latents {tuple(latents.shape[1:])}, the model takes {tuple(sample.shape[1:])}; load the"
                " VAE that belongs to the model"
            )
        # inpainting models have further channels, editing models further tokens
        own = rows[:, :tokens, :channels] if self.family.packed else rows[:, :channels]
        own.copy_(latents)
        return rows

    # ---- the layers -----------------------------------------------------------------------------------------------

    def push(self, output):
        """One attention layer's output, with the image rows pushed."""
        if self.plan is None:
            return output
        if isinstance(output, tuple):  # (image, text, ...)
            return (self._picture_of(output[0], 0), *output[1:])
        # a single block has text and image in one sequence
        return self._picture_of(output, output.shape[1] - self.sequence if self.family.packed else 0)

    def _picture_of(self, x: Tensor, start: int) -> Tensor:
        """Push the picture's tokens: behind the text, and before an editing model's context."""
        if not self.family.packed or x.shape[1] == self.image_tokens:
            return self._push(x)
        stop = start + self.image_tokens
        return torch.cat([x[:, :start], self._push(x[:, start:stop]), x[:, stop:]], dim=1)

    def _push(self, x: Tensor) -> Tensor:
        plan, config = self.plan, self.config
        expected = plan.batch + plan.extra
        if x.shape[0] != expected:
            raise TokenMergingError(
                f"an attention layer got a batch of {x.shape[0]}, the denoiser {expected}; expected the same: models"
                " that move frames into the batch are not supported"
            )
        tokens, area = x.shape[1], self.grid[0] * self.grid[1]
        if self.family.uneven and tokens * config.max_downscale**2 < area:
            return x
        self.pushed += 1
        rows = plan.rows
        if self.gate is not None:
            rows = MergeRows(rows.gate * self.gate, rows.pairs, rows.seen)
        reference, mask, frames = x, None, 1
        if plan.extra:
            reference = x[plan.batch :]
            mask = self.reference.mask(tokens, *self.token_grid, x.device)
            mask = mask if mask is None else repeat(mask, "r n -> (group r) n", group=plan.extra // len(mask))
            frames = grid_of(tokens, *self.token_grid)[0] if self.family.video else 1
        merged, pushed = merge_tokens(
            x, reference, rows, config, mask, strength=plan.strength, threshold=self.threshold, frames=frames
        )
        if not torch.compiler.is_compiling():
            self.record.add(plan.labels, pushed)
        return merged


def told_context(state: MergeState, original):
    """diffusers' `denoiser.cache_context(name)`, by which pipelines tell the two calls of a guided step apart."""

    @contextlib.contextmanager
    def cache_context(name, *args, **kwargs):
        before, state.context = state.context, name
        try:
            with original(name, *args, **kwargs):
                yield
        finally:
            state.context = before

    return cache_context


class LayerHook(ModelHook):
    """On an attention layer: its output is pushed."""

    def __init__(self, state: MergeState, path: str):
        super().__init__()
        self.state, self.path = state, path

    def post_forward(self, module: nn.Module, output):
        return self.state.push(output)


class BeforeOutputHook(LayerHook):
    """On an output projection: its input is pushed."""

    def pre_forward(self, module: nn.Module, x: Tensor, *args, **kwargs):
        return (self.state.push(x), *args), kwargs

    def post_forward(self, module: nn.Module, output):
        return output
