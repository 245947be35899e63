"""Negative token merging inside a denoiser, as diffusers hooks: one on the root, one per attention layer.

The root hook looks at the noise level, appends the reference rows to every input and cuts them off the output; the
layers' hooks push the tokens of the image rows. No hook waits for the GPU but for the timestep, once a call.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from ..methods.errors import TokenMergingError
from ..methods.membrane_runtime import same_bits, stamp
from ..methods.negative_token_merging import (
    MergeRows,
    NegativeTokenMergingConfig,
    diversity_rows,
    merge_tokens,
    reference_rows,
)
from ..methods.token_merging_record import MergeRecord
from .token_merging_reference import Reference

_POOLED = ("text_embeds", "pooled_projections")
_UNBATCHED = ("img_ids", "txt_ids")


@dataclass(eq=False)
class MergePlan:
    """What one text batch asks for: who is pushed from whom, and the text with the reference rows appended."""

    hidden: Tensor
    stamped: object
    batch: int
    chunks: tuple[bool, ...]
    rows: MergeRows | None  # None: nothing to push in this call
    sources: tuple[int, ...] = ()  # the row that each group of reference rows takes its other inputs from
    labels: tuple = ()
    joined: dict = field(default_factory=dict)  # name -> (tensor, stamp, with the reference rows)

    @property
    def extra(self) -> int:
        """Reference rows."""
        return self.rows.pairs.shape[1] if self.rows is not None and self.sources else 0


class MergeState:
    """What the hooks of one pipeline share."""

    def __init__(self, pipe, family: str, config: NegativeTokenMergingConfig, layers: Sequence[str]):
        self.pipe, self.family, self.config, self.layers = pipe, family, config, layers
        self.reference = Reference(pipe, family, config)
        self.record = MergeRecord()
        self.plan: MergePlan | None = None  # of the current call, None where nothing is pushed
        self.gate: Tensor | None = None  # of a compiled graph
        self.grid = self.token_grid = (0, 0)  # of the latent, and of the finest layer's tokens
        self.image_tokens = 0
        self.pushed = 0
        self.context: str | None = None  # "cond" or "uncond", where the pipeline tells
        self._plans: list[MergePlan] = []
        self._timesteps = self._time = self._first = None

    # ---- the root -------------------------------------------------------------------------------------------------

    def begin(self, inputs: dict, sample_name: str) -> dict:
        """Look at a call of the denoiser and return its inputs, with the reference rows where there are some."""
        self.plan, self.gate, self.pushed = None, None, 0
        if self.config.merging_alpha == 0:
            return inputs
        sample, timestep = inputs[sample_name], torch.as_tensor(inputs["timestep"])
        hidden = inputs.get("encoder_hidden_states")
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        if not isinstance(hidden, Tensor):
            raise TokenMergingError("the denoiser was called without encoder_hidden_states; give it a prompt")
        self._measure(sample, inputs)
        if torch.compiler.is_compiling():
            image, noise = self.reference.level(timestep)
            plan = self._make(hidden, sample.shape[0], self._chunks(sample.shape[0], None, hidden))
            self.gate = self._inside_tensor(timestep, image, noise)
        else:
            plan = self._plan(hidden, sample, timestep)
        if plan is None or plan.rows is None:
            return inputs
        self.plan = plan
        if not plan.extra:
            return inputs
        joined = {name: self._join(name, value, plan) for name, value in inputs.items()}
        joined[sample_name] = self._with_reference(sample, timestep, plan)
        return joined

    def end(self, output):
        """Cut the reference rows off; refuse a step that should have pushed and did not."""
        plan, self.plan = self.plan, None
        if plan is None:
            return output
        if not self.pushed:
            raise TokenMergingError(
                f"none of the {len(self.layers)} hooked attention layers (first: {self.layers[0]}) was at a resolution"
                f" within max_downscale={self.config.max_downscale}, or they were replaced; nothing was pushed: raise"
                " max_downscale, or apply again after replacing layers"
            )
        if not plan.extra:
            return output
        if isinstance(output, tuple):
            return (output[0][: plan.batch], *output[1:])
        return type(output)(sample=output.sample[: plan.batch])

    def _measure(self, sample: Tensor, inputs: dict) -> None:
        """The grid of latents, and how many image tokens a transformer makes of it."""
        if self.family == "flux":
            ids = inputs["img_ids"]
            if torch.compiler.is_compiling():
                sizes = [size for size in self.reference.sizes if size[0] * size[1] == 4 * sample.shape[1]]
                self.grid = sizes[-1] if sizes else (0, 0)
            elif getattr(self, "_ids", None) is not ids:
                self._ids = ids
                ids = ids.reshape(-1, 3)
                self.grid = tuple(2 * (int(ids[:, axis].max()) + 1) for axis in (1, 2))
            self.image_tokens, self.token_grid = sample.shape[1], (self.grid[0] // 2, self.grid[1] // 2)
            return
        self.grid = self.token_grid = tuple(sample.shape[-2:])
        if self.family in ("sd3", "wan"):
            patch = self.pipe.transformer.config.patch_size
            frames, rows, columns = patch if isinstance(patch, (tuple, list)) else (1, patch, patch)
            count = sample.shape[2] // frames if sample.ndim == 5 else 1
            self.token_grid = self.grid[0] // rows, self.grid[1] // columns
            self.image_tokens = count * self.token_grid[0] * self.token_grid[1]

    def _plan(self, hidden: Tensor, sample: Tensor, timestep: Tensor) -> MergePlan | None:
        timesteps = getattr(self.pipe.scheduler, "timesteps", None)
        if timesteps is not self._timesteps:  # a new run has a new schedule
            self._timesteps, self._time = timesteps, None
            self.record.clear()
        image, noise = (float(value) for value in self.reference.level(timestep))
        sigma = noise / max(image, 1e-8) if self.family in ("sd", "sdxl") else noise
        percent = self._percent(float(timestep.reshape(-1)[0]))
        active = self.config.inside(percent, sigma)
        chunks = self._chunks(sample.shape[0], percent, hidden)
        plan = next((p for p in self._plans if p.hidden is hidden and p.chunks == chunks), None) if active else None
        if active and (plan is None or plan.batch != sample.shape[0] or not same_bits(hidden, plan.stamped)):
            plan = self._make(hidden, sample.shape[0], chunks)
            self._plans = [plan, *self._plans][:2]  # guidance by separate calls alternates between two
        self.record.step(percent, sigma, active, plan.extra if plan is not None else 0)
        return plan

    def _percent(self, timestep):
        return 1.0 - timestep / (1.0 if self.family == "flux" else 1000.0)

    def _inside_tensor(self, timestep: Tensor, image: Tensor, noise: Tensor) -> Tensor:
        sigma = noise / image.clamp_min(1e-8) if self.family in ("sd", "sdxl") else noise
        return self.config.inside(self._percent(timestep.reshape(-1)[0].float()), sigma)

    def _chunks(self, batch: int, percent: float | None, hidden: Tensor) -> tuple[bool, ...]:
        """For each equal part of the batch, whether it is conditional."""
        if self.family in ("sd", "sdxl", "sd3"):
            guided = bool(getattr(self.pipe, "do_classifier_free_guidance", False)) and batch % 2 == 0
            return (False, True) if guided else (True,)
        # Flux and Wan guide by two calls at one timestep: they tell which, or the conditional one comes first
        if self.context is not None or percent is None:
            return (self.context != "uncond",)
        if percent != self._time:
            self._time, self._first = percent, hidden
        return (self._first is hidden,)

    def _make(self, hidden: Tensor, batch: int, chunks: tuple[bool, ...]) -> MergePlan:
        per = batch // len(chunks)
        pushed = [self.config.rows == "all" or chunk for chunk in chunks for _ in range(per)]
        kinds = ["positive" if chunk else "negative" for chunk in chunks for _ in range(per)]
        labels = tuple((kind, b % per) for b, kind in enumerate(kinds))
        mark = None if torch.compiler.is_compiling() else stamp(hidden)
        if not any(pushed):
            return MergePlan(hidden, mark, batch, chunks, None)
        own = [b // per if pushed[b] else -1 for b in range(batch)]
        device = hidden.device
        if self.config.mode == "diversity":
            rows = diversity_rows(own, self.config.diversity, device)
            return MergePlan(hidden, mark, batch, chunks, rows, labels=labels)
        if self.config.compat == "official":
            groups = own
        elif self.config.reference_prompt is not None or torch.compiler.is_compiling():
            groups = [0 if on else -1 for on in pushed]
        else:
            groups = _same_text(hidden, pushed)
        order = sorted(set(groups) - {-1})
        groups = [order.index(g) if g >= 0 else -1 for g in groups]
        sources = tuple(groups.index(g) for g in range(len(order)))
        rows = reference_rows(groups, len(self.reference.images), device)
        extra = rows.pairs.shape[1]  # the reference rows are in the batch too, and are not pushed
        rows = MergeRows(F.pad(rows.gate, (0, extra)), F.pad(rows.pairs, (0, 0, 0, extra)))
        return MergePlan(hidden, mark, batch, chunks, rows, sources, labels)

    def _join(self, name: str, value, plan: MergePlan):
        """Append the reference rows to whatever has one row an image."""
        if isinstance(value, dict):
            return {key: self._join(key, item, plan) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._join(name, item, plan) for item in value)
        if not isinstance(value, Tensor) or name in _UNBATCHED or value.ndim == 0 or value.shape[0] != plan.batch:
            return value
        if value is not plan.hidden and name not in _POOLED:
            return torch.cat([value, self._extra(value, plan)])
        if torch.compiler.is_compiling():
            return torch.cat([value, self._text(value, plan)])
        tensor, mark, joined = plan.joined.get(name, (None, None, None))
        if tensor is not value or not same_bits(value, mark):  # kept, so that others recognise the text by identity
            joined = torch.cat([value, self._text(value, plan)])
            plan.joined[name] = value, stamp(value), joined
        return joined

    def _text(self, value: Tensor, plan: MergePlan) -> Tensor:
        if self.config.reference_prompt is None:
            return self._extra(value, plan)
        text, pooled = self.reference.text(plan.hidden.shape[1])
        text = text if value is plan.hidden else pooled
        return text.to(value).expand(plan.extra, *value.shape[1:])

    def _extra(self, value: Tensor, plan: MergePlan) -> Tensor:
        index = torch.tensor(plan.sources, device=value.device)
        return value[index].repeat_interleave(len(self.reference.images), dim=0)

    def _with_reference(self, sample: Tensor, timestep: Tensor, plan: MergePlan) -> Tensor:
        latents = self.reference.rows(*self.grid, timestep.to(sample.device))
        latents = latents.repeat(len(plan.sources), *[1] * (latents.ndim - 1)).to(sample.dtype)
        if self.family == "flux":
            latents = self.pipe._pack_latents(latents, *latents.shape)
        elif sample.ndim == 5:
            latents = latents[:, :, None].expand(-1, -1, sample.shape[2], -1, -1)  # a still picture, frame by frame
        extra = self._extra(sample, plan).clone()
        axis = 2 if self.family == "flux" else 1  # of the channels
        if extra.shape[axis] < latents.shape[axis]:
            raise TokenMergingError(
                f"the VAE makes latents {tuple(latents.shape[1:])}, the model takes {tuple(sample.shape[1:])}; load the"
                " VAE that belongs to the model"
            )
        extra.narrow(axis, 0, latents.shape[axis]).copy_(latents)  # inpainting models have further channels
        return torch.cat([sample, extra])

    # ---- the layers -----------------------------------------------------------------------------------------------

    def push(self, output):
        """One attention layer's output, with the image rows pushed."""
        if self.plan is None:
            return output
        if isinstance(output, tuple):  # (image, text, ...)
            return (self._push(output[0]), *output[1:])
        text = output.shape[1] - self.image_tokens if self.family == "flux" else 0
        if text > 0:  # a single block: text and image in one sequence
            return torch.cat([output[:, :text], self._push(output[:, text:])], dim=1)
        return self._push(output)

    def _push(self, x: Tensor) -> Tensor:
        plan, config = self.plan, self.config
        expected = plan.batch + plan.extra
        if x.shape[0] != expected:
            raise TokenMergingError(
                f"an attention layer got a batch of {x.shape[0]}, the denoiser {expected}; expected the same: models"
                " that move frames into the batch are not supported"
            )
        tokens, area = x.shape[1], self.grid[0] * self.grid[1]
        if self.family in ("sd", "sdxl") and tokens * config.max_downscale**2 < area:
            return x
        self.pushed += 1
        rows = plan.rows if self.gate is None else MergeRows(plan.rows.gate * self.gate, plan.rows.pairs)
        reference, mask = x, None
        if plan.extra:
            reference = x[plan.batch :]
            mask = self.reference.mask(tokens, *self.token_grid, x.device)
            mask = mask if mask is None else mask.repeat(len(plan.sources), 1)
        merged, pushed = merge_tokens(x, reference, rows, config, mask)
        if not torch.compiler.is_compiling():
            self.record.add(plan.labels, pushed)
        return merged


def _same_text(hidden: Tensor, pushed: Sequence[bool]) -> list[int]:
    """The first pushed row with the same text, for each row; -1 for rows that are not pushed."""
    groups: list[int] = []
    for b, on in enumerate(pushed):
        first = next((g for g in set(groups) - {-1} if torch.equal(hidden[g], hidden[b])), b) if on else -1
        groups.append(first)
    return groups


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


class RowsHook(ModelHook):
    """On the denoiser."""

    def __init__(self, state: MergeState, module: nn.Module):
        super().__init__()
        self.state = state
        self.names = list(inspect.signature(type(module).forward).parameters)[1:]

    def pre_forward(self, module: nn.Module, *args, **kwargs):
        inputs = dict(zip(self.names, args, strict=False)) | kwargs
        return (), self.state.begin(inputs, self.names[0])

    def post_forward(self, module: nn.Module, output):
        return self.state.end(output)
