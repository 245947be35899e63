"""Negative token merging inside a denoiser: around it, and around each attention layer.

Around the denoiser, the noise level is looked at and the reference rows are added (`pipelines.rows`); around the layers
the tokens of the image rows are pushed. Nothing waits for the GPU but for the timestep, once a call, and for a new
text, once a run: what a layer needs lies in the plan (tests/pipelines/token_merging/test_waits.py counts).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from einops import repeat
from torch import Tensor, nn

from ...methods.errors import TokenMergingError
from ...methods.modules import same_bits, stamp
from ...methods.token_merging.config import NegativeTokenMergingConfig
from ...methods.token_merging.merging import MergeRows, grid_of, knobs, merge_tokens
from ...methods.token_merging.record import MergeRecord
from ..rows import ExtraRows, chunks_of, said
from ..scheduler import image_tokens, on_host, share_of, sigma_of
from ..text import split_encoded
from .plan import MergePlan, make_plan
from .reference import Reference

# What UNets and transformers call the pooled text, of which reference rows have their own.
_POOLED = ("text_embeds", "pooled_projections")
_PLANS = 2  # text batches remembered: guidance by separate calls alternates between two


@dataclass(eq=False)
class MergeRun:
    """What is kept of one run of a pipeline."""

    record: MergeRecord = field(default_factory=MergeRecord)
    plans: list[MergePlan] = field(default_factory=list)
    ids: Tensor | None = None  # the positions that `grid` was read from
    grid: tuple[int, int] = (0, 0)
    picture: int = 0  # tokens


@dataclass(eq=False)
class MergeCall:
    """One call of the denoiser.

    Args:
        plan: None where nothing is pushed.
        gate: in a compiled graph, whether the step is inside the window, ().
        grid: of the latent. token_grid: of the finest layer's tokens. image_tokens: of a transformer.
        sequence: of those, and of an editing model's context, which follows them.
        pushed: how many layers pushed.
    """

    plan: MergePlan | None = None
    gate: Tensor | None = None
    grid: tuple[int, int] = (0, 0)
    token_grid: tuple[int, int] = (0, 0)
    image_tokens: int = 0
    sequence: int = 0
    pushed: int = 0
    rows: ExtraRows | None = None


class Merging:
    """Negative token merging on one denoiser, as its handle and its layers see it."""

    def __init__(self, handle, pipe, layers: list[str]):
        self.handle, self.family, self.config, self.layers = handle, handle.family, handle.config, layers
        self.reference = Reference(handle, pipe)
        # whose `_pack_latents` is static: the plain class, not the one that listens
        self.packer = next(cls for cls in type(pipe).__mro__ if cls.__module__.partition(".")[0] != "semiperm")
        self.tune(self.config)

    def tune(self, config: NegativeTokenMergingConfig) -> None:
        """Another strength or threshold. Tensors, filled anew: a compiled graph reads them at each call."""
        self.config, self.off = config, config.strength == 0
        strength, threshold = knobs(config, len(config.strengths))
        if not hasattr(self, "strength"):
            self.strength, self.threshold = strength, threshold
        self.strength.copy_(strength)
        self.threshold.copy_(threshold)
        if self.handle.run is not None:
            self.handle.run.record.plans.clear()

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

    def begin(self, inputs: dict, sample_name: str) -> MergeCall:
        """Look at a call of the denoiser, and say which rows it gets."""
        call = MergeCall()
        sample, timestep = inputs[sample_name], torch.as_tensor(inputs["timestep"])
        if self.off:
            if not torch.compiler.is_compiling():
                run = self.handle.called()
                self._measure(call, sample, inputs, run.record)
                share, sigma, _ = self._level(run, timestep, call.image_tokens)
                run.record.record.step(share, sigma, False)
            return call
        hidden = inputs.get("encoder_hidden_states")
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        if not isinstance(hidden, Tensor):
            raise TokenMergingError("the denoiser was called without encoder_hidden_states; give it a prompt")
        if torch.compiler.is_compiling():
            self._measure(call, sample, inputs, None)
            share = share_of(self.handle.scheduler, self.family, timestep, call.image_tokens)
            plan = make_plan(hidden, self._traced_chunks(sample.shape[0]), *self._made_of(hidden.device))
            call.gate = self.config.window.contains(share)
        else:
            run = self.handle.called()
            self._measure(call, sample, inputs, run.record)
            plan = self._plan(run, hidden, timestep, call.image_tokens)
        if plan is None or plan.rows is None:
            return call
        call.plan = plan
        if not plan.extra:
            return call

        def own(name: str, value: Tensor) -> Tensor | None:
            if value is sample:
                return torch.cat([sample, self._latents(call, sample, timestep)])
            return self._text(value, plan) if value is plan.hidden or name in _POOLED else None

        call.rows = ExtraRows(plan.batch, plan.sources, own)
        return call

    def check(self, call: MergeCall) -> None:
        """Refuse a step that should have pushed and did not."""
        if call.plan is not None and not call.pushed:
            raise TokenMergingError(
                f"none of the {len(self.layers)} hooked attention layers (first: {self.layers[0]}) was at a resolution"
                f" within max_downscale={self.config.max_downscale}, or they were replaced; nothing was pushed: raise"
                " max_downscale, or apply again after replacing layers"
            )

    def _made_of(self, device: torch.device) -> tuple[NegativeTokenMergingConfig, Tensor]:
        if not torch.compiler.is_compiling():  # which is told in time: `ready`
            self.strength, self.threshold = self.strength.to(device), self.threshold.to(device)
        return self.config, self.strength

    def _measure(self, call: MergeCall, sample: Tensor, inputs: dict, run: MergeRun | None) -> None:
        """The grid of latents, and how many image tokens a transformer makes of it."""
        if not self.family.packed:
            call.grid = tuple(sample.shape[-2:])
        elif run is None:
            sizes = [size for size in self.reference.sizes if size[0] * size[1] <= 4 * sample.shape[1]]
            call.grid = sizes[-1] if sizes else (0, 0)
            picture = call.grid[0] * call.grid[1] // 4 or sample.shape[1]
        else:
            if run.ids is not inputs["img_ids"]:
                run.ids = inputs["img_ids"]
                ids = run.ids.reshape(-1, 3).cpu()  # (kind, row, column) of each token of 2 x 2 cells
                ids = ids[ids[:, 0] == ids[0, 0]]  # an editing model's context is of another kind, and follows
                run.picture, run.grid = len(ids), tuple(2 * (side + 1) for side in ids[:, 1:].amax(0).long().tolist())
            call.grid, picture = run.grid, run.picture
        call.token_grid = call.grid
        if not self.family.uneven:
            denoiser = self.handle.denoiser
            _, rows, columns = self.family.patch(denoiser)
            call.token_grid = call.grid[0] // rows, call.grid[1] // columns
            call.sequence = image_tokens(self.family, denoiser, sample)
            call.image_tokens = picture if self.family.packed else call.sequence

    def _plan(self, run, hidden: Tensor, timestep: Tensor, tokens: int) -> MergePlan | None:
        kept, plan = run.record, None
        share, sigma, active = self._level(run, timestep, tokens)
        if active:
            plan = next(
                (p for p in kept.plans if p.hidden is hidden and p.said == said() and same_bits(hidden, p.stamped)),
                None,
            )
            if plan is None:
                plan = make_plan(hidden, self._chunks(run, hidden), *self._made_of(hidden.device))
                plan.said, kept.plans = said(), [plan, *kept.plans][:_PLANS]
                run.seen += 1
        kept.record.step(share, sigma, active, plan.extra if plan is not None else 0)
        return plan

    def _level(self, run, timestep: Tensor, tokens: int) -> tuple[float, float, bool]:
        """(share of the schedule, sigma, inside the window) of a call."""
        scheduler, timestep = self.handle.scheduler, on_host(timestep)
        share = share_of(scheduler, self.family, timestep, tokens, run.timesteps(scheduler))
        return share, sigma_of(scheduler, self.family, timestep), bool(self.config.window.contains(share))

    def _chunks(self, run, hidden: Tensor) -> tuple[bool, ...]:
        """For each equal part of the batch, whether it is conditional."""
        if self.config.rows == "all" and self.config.mode == "reference":
            negative = tuple(bool(row) for row in self.handle.negative_rows(hidden))
        else:
            negative = self.handle.negative_rows(hidden)
        if None in negative:
            raise TokenMergingError(
                f"a call of the denoiser has {len(negative)} rows, of which {negative.count(None)} carry text that no"
                " pipeline was seen to encode: which of them are conditional is unknown, and the others must not be"
                " pushed. Give the pipeline prompts, apply negative token merging to the pipeline that you call, say"
                " what the rows are (semiperm.row_layout('negative', 'positive')), or push them all: rows='all'"
            )
        return chunks_of(negative, run.images)

    def _traced_chunks(self, batch: int) -> tuple[bool, ...]:
        """A graph looks neither at text nor at context variables: the layout of the family's own pipelines."""
        if self.family.one_call:
            return (False, True) if self.handle.guided and batch % 2 == 0 else (True,)
        context = vars(self.handle.denoiser).get("cache_context")
        return (context is None or context.name != "uncond",)

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

    def _latents(self, call: MergeCall, sample: Tensor, timestep: Tensor) -> Tensor:
        plan = call.plan
        latents = self.reference.rows(*call.grid, timestep.to(sample.device)).to(sample.dtype)
        latents = repeat(latents, "r c h w -> (group r) c h w", group=plan.extra // len(latents))
        if self.family.video:  # a still picture, frame by frame
            latents = repeat(latents, "r c h w -> r c f h w", f=sample.shape[2])
        latents = self.family.pack(self.packer, latents)
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
        call = self.handle.call
        if call is None:
            raise TokenMergingError(
                "an attention layer was called before its denoiser, which adds the reference rows and looks at the"
                " step; call the denoiser, or apply again if its hook was taken off"
            )
        if call.plan is None:
            return output
        if isinstance(output, tuple):  # (image, text, ...)
            return (self._picture_of(output[0], 0, call), *output[1:])
        # a single block has text and image in one sequence
        return self._picture_of(output, output.shape[1] - call.sequence if self.family.packed else 0, call)

    def _picture_of(self, x: Tensor, start: int, call: MergeCall) -> Tensor:
        """Push the picture's tokens: behind the text, and before an editing model's context."""
        if not self.family.packed or x.shape[1] == call.image_tokens:
            return self._push(x, call)
        stop = start + call.image_tokens
        return torch.cat([x[:, :start], self._push(x[:, start:stop], call), x[:, stop:]], dim=1)

    def _push(self, x: Tensor, call: MergeCall) -> Tensor:
        plan, config = call.plan, self.config
        expected = plan.batch + plan.extra
        if x.shape[0] != expected:
            raise TokenMergingError(
                f"an attention layer got a batch of {x.shape[0]}, the denoiser {expected}; expected the same: models"
                " that move frames into the batch are not supported"
            )
        tokens, area = x.shape[1], call.grid[0] * call.grid[1]
        if self.family.uneven and tokens * config.max_downscale**2 < area:
            return x
        call.pushed += 1
        rows = plan.rows
        if call.gate is not None:
            rows = MergeRows(rows.gate * call.gate, rows.pairs, rows.seen)
        reference, mask, frames = x, None, 1
        if plan.extra:
            reference = x[plan.batch :]
            mask = self.reference.mask(tokens, *call.token_grid, x.device)
            mask = mask if mask is None else repeat(mask, "r n -> (group r) n", group=plan.extra // len(mask))
            frames = grid_of(tokens, *call.token_grid)[0] if self.family.video else 1
        merged, pushed = merge_tokens(
            x, reference, rows, config, mask, strength=plan.strength, threshold=self.threshold, frames=frames
        )
        if not torch.compiler.is_compiling():
            self.handle.here.record.record.add(plan.labels, pushed)
        return merged


class Layer:
    """Around an attention layer: its output is pushed."""

    outermost = True

    def __init__(self, merging: Merging):
        self.merging = merging

    def __call__(self, original: Callable, module: nn.Module, *args, **kwargs):
        return self.merging.push(original(*args, **kwargs))


class BeforeOutput(Layer):
    """Around an output projection: its input is pushed."""

    def __call__(self, original: Callable, module: nn.Module, x: Tensor, *args, **kwargs):
        return original(self.merging.push(x), *args, **kwargs)
