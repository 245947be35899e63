"""The text and prediction seams, around a denoiser: what a call is given, and what comes of its answer.

One call for prompts and negative prompts: [u, t] becomes [u, t, s], and the pipeline gets [u, t - gamma], to which it
applies its own guidance. Two calls (Flux's true guidance, Wan), prompt first: the first becomes [t, u, s] and gives
t - gamma; the second is answered with the u of the first, if its inputs are those that were foreseen.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...methods.errors import GuidanceError
from ...methods.modules import same_bits, stamp
from ..family import Family
from ..hooks import others_at
from ..rows import ExtraRows, with_rows
from ..scheduler import alphas_of, image_tokens, noise_levels, share_of, sigma_of
from .layers import joint_of, needs_rows
from .run import Extra, GuidanceCall, GuidanceRun

__all__ = ["Root"]

logger = logging.getLogger(__name__)

_POOLED = ("text_embeds", "pooled_projections")  # what UNets and transformers call the pooled text
_LAYOUTS = 3  # text batches remembered: guidance by separate calls alternates between two; one is spare
_LEAST_NOISE = 1e-3  # a prediction that leads to a stated picture divides by the noise that is left


class Root:
    """Safe guidance around one denoiser.

    Args:
        handle: a `SafeGuidanceHandle`.
    """

    def __init__(self, handle):
        self.handle, self.config = handle, handle.config
        self.family: Family = handle.family
        self.guiding = handle.config.having("prediction")
        self.branching = any(one.BRANCHES for one in self.guiding)
        self.paired = any(one.GUIDED for one in self.guiding)

    # ---- before ----------------------------------------------------------------------------------------------------

    def begin(self, run: GuidanceRun, inputs: dict, sample_name: str) -> GuidanceCall:
        """Look at a call, and say which rows it gets."""
        hidden = inputs.get("encoder_hidden_states")
        if not isinstance(hidden, Tensor):
            raise GuidanceError(
                f"the denoiser was called with encoder_hidden_states of type {type(hidden).__name__}; safe guidance"
                " expected one tensor (B, N, d): text beside other conditions is not supported"
            )
        sample, timestep = inputs[sample_name], torch.as_tensor(inputs["timestep"])
        negative = self._negative(run, hidden)
        call = self._call(sample, timestep, hidden, negative)
        self._check_pairs(run, call)
        if call.positive:
            run.calls += 1
        if call.active:
            self._add_rows(run, call, hidden)
        if call.positive:
            extra = sum(len(one.sources) for one in call.extras if one.kind != "uncond")
            run.record.step(call.share, call.sigma, call.active, extra)
        call.answer = self._known(run, call, hidden, inputs)
        return call

    def _call(self, sample: Tensor, timestep: Tensor, hidden: Tensor, negative: tuple[bool, ...]) -> GuidanceCall:
        scheduler = self.handle.scheduler
        tokens = image_tokens(self.family, self.handle.denoiser, sample)
        steps = self.handle.run.timesteps(scheduler)
        share = float(share_of(scheduler, self.family, timestep, tokens, steps))
        return GuidanceCall(
            active=bool(self.config.window.contains(share)),
            share=share,
            sigma=sigma_of(scheduler, self.family, timestep),
            level=float(timestep.reshape(-1)[0]),
            update=bool(getattr(scheduler, "state_in_first_order", True)),
            positive=tuple(i for i, one in enumerate(negative) if not one),
            negative=tuple(i for i, one in enumerate(negative) if one),
            sample=sample,
            timestep=timestep,
            batch=len(hidden),
            text=hidden.shape[1],
        )

    def _negative(self, run: GuidanceRun, hidden: Tensor) -> tuple[bool, ...]:
        """Which rows are guided away from, remembered for the tensor."""
        for known, then, rows in run.layouts:
            if known is hidden and same_bits(hidden, then):
                return rows
        found = self.handle.negative_rows(hidden)
        if any(one is None for one in found):
            raise GuidanceError(
                "the denoiser was called with text that this run never encoded, so that prompts and negative prompts"
                " cannot be told apart (other embeddings, or another method that replaced them): apply safe guidance"
                " last, or say which is which with pipelines.rows.row_layout"
            )
        rows = tuple(bool(one) for one in found)
        run.layouts = [*run.layouts[1 - _LAYOUTS :], (hidden, stamp(hidden), rows)]
        return rows

    def _check_pairs(self, run: GuidanceRun, call: GuidanceCall) -> None:
        """Guidance must be there where an algorithm works on it, and whole; and each image have been judged."""
        if run.fired is not None and call.positive and len(call.positive) != len(run.fired):
            raise GuidanceError(
                f"the denoiser was called with {len(call.positive)} rows for prompts, and detectors judged"
                f" {len(run.fired)} prompts: several are mixed into one picture, or another method added rows; take"
                " safe guidance without detectors there"
            )
        if not self.paired:
            return
        names = " and ".join(one.NAME for one in self.guiding if one.GUIDED)
        if self.family.one_call:
            if not call.negative:
                raise GuidanceError(
                    f"{names} needs classifier-free guidance, and it is off: give the pipeline a guidance_scale above"
                    " 1, or take safree, adavd or nag"
                )
            if len(call.positive) != len(call.negative):
                raise GuidanceError(
                    f"{names}: the denoiser was called with {len(call.positive)} rows for prompts and"
                    f" {len(call.negative)} for negative prompts; they were split, or another method added rows:"
                    " expected as many of both in one call"
                )
        elif call.positive and run.negative is None:
            raise GuidanceError(
                f"{names} needs guidance, and this run has no negative prompt: give one and a true_cfg_scale (Flux) or"
                " guidance_scale (Wan) above 1, or take safree, adavd or nag"
            )
        elif call.positive and not run.answered:
            raise GuidanceError(
                f"{names} needs guidance, but the pipeline never asked for the negative prompt's prediction: its scale"
                " must be above 1"
            )

    # ---- rows beside the batch --------------------------------------------------------------------------------------

    def _add_rows(self, run: GuidanceRun, call: GuidanceCall, hidden: Tensor) -> None:
        if not call.positive:
            return
        texts = self.handle.texts
        if self.branching:
            self._choose_branches(run, call)
            if not self.family.one_call:
                call.extras.append(Extra("uncond", call.positive, *run.negative))
            if call.pairs:
                sources = [call.positive[image] for _, image in call.pairs]
                picks = [k for k, _ in call.pairs]
                call.extras.append(self._extra("branch", sources, texts.branches, texts.pooled_branches, picks))
        if joint_of(self.family, self.config) and any(self.handle.guides(row, call) for row in call.positive):
            together = texts.together, texts.pooled_together
            call.extras.append(self._extra("outputs", call.positive, *together, [0] * len(call.positive)))
        if self.config.having("values") and needs_rows(self.family) and not run.values:
            # as many rows as images for each phrase, of which the first is read: others count rows by images
            sources = call.positive * len(texts.phrases)
            everything = [i for i in range(len(texts.phrases)) for _ in call.positive]
            call.extras.append(self._extra("values", sources, texts.phrases, texts.pooled_phrases, everything))

    @staticmethod
    def _extra(kind: str, sources, hidden: Tensor, pooled: Tensor | None, picks: list[int]) -> Extra:
        return Extra(kind, tuple(sources), hidden[picks], None if pooled is None else pooled[picks])

    def _choose_branches(self, run: GuidanceRun, call: GuidanceCall) -> None:
        """The categories that are worth a branch in this step, and on which images."""
        wanted = run.branches.wanted(len(call.positive))
        if run.fired is not None:
            wanted = wanted & run.fired.mT
        call.wanted = wanted
        call.branches = tuple(wanted.any(dim=1).nonzero()[:, 0].tolist())
        if others_at(self.handle.denoiser, self.handle.NAME):  # they count rows by images
            wanted = wanted.any(dim=1, keepdim=True).expand_as(wanted)
        call.pairs = tuple((k, image) for k, image in wanted.nonzero().tolist())

    def change_inputs(self, run: GuidanceRun, call: GuidanceCall, inputs: dict) -> dict | None:
        """The call's inputs with edited text and added rows; None where they stay."""
        edits = self._edits(run, call)
        if not edits and not call.extras:
            return None
        hidden = inputs["encoder_hidden_states"]
        sources = [source for extra in call.extras for source in extra.sources]
        key = (id(hidden), tuple(edits), call.pairs, tuple(extra.kind for extra in call.extras), tuple(sources))

        def text(name: str, value: Tensor, edited: Tensor | None, added: Sequence[Tensor | None]) -> Tensor:
            key_of = (name, *key)
            if key_of not in run.made:
                if edits and edited is not None:
                    value = value.clone()
                    value[[row for row, _ in edits]] = edited[[image for _, image in edits]].to(value)
                rows = [self._as_long(part, value) for part in added if part is not None]
                if len(rows) < len(added):
                    raise GuidanceError(f"the denoiser reads {name}, of which the categories have none; apply again")
                run.made[key_of] = torch.cat([value, *rows]) if rows else value
            return run.made[key_of]

        def own(name: str, value: Tensor) -> Tensor | None:
            if value is call.sample and any(extra.kind == "values" for extra in call.extras):
                return torch.cat([value, *(self._noise(call, extra) for extra in call.extras)])
            if value is hidden:
                return text(name, value, run.prompts.edited, [extra.hidden for extra in call.extras])
            if name in _POOLED:
                return text(name, value, run.prompts.edited_pooled, [extra.pooled for extra in call.extras])
            return None if sources else value

        call.rows = ExtraRows(call.batch, sources, own)
        return {name: with_rows(name, value, call.rows) for name, value in inputs.items()}

    @staticmethod
    def _noise(call: GuidanceCall, extra: Extra) -> Tensor:
        """The images of added rows: their sources', or the same noise for all, where values are read once for all."""
        if extra.kind != "values":
            return call.sample[list(extra.sources)]
        noise = torch.randn(call.sample.shape[1:], generator=torch.Generator().manual_seed(0))
        return noise.to(call.sample).expand(len(extra.sources), *noise.shape)

    def _edits(self, run: GuidanceRun, call: GuidanceCall) -> list[tuple[int, int]]:
        """(row, image) of the prompts that are given as edited in this call.

        A run of few steps may have none as early as they reach; its first step is then theirs.
        """
        if not call.active or not self.config.having("text"):
            return []
        until = run.prompts.until
        began = next((step["share"] for step in run.record.steps if step["active"]), 0.0)
        found = [(row, i) for i, row in enumerate(call.positive) if self.handle.guides(row, call)]
        return [(row, image) for row, image in found if until[image] > 0 and call.share <= max(until[image], began)]

    @staticmethod
    def _as_long(text: Tensor, given: Tensor) -> Tensor:
        """A category's text beside prompts of several chunks: said as often, which attention cannot tell from once."""
        text = text.to(given)
        if text.ndim < 3 or text.shape[1:] == given.shape[1:]:
            return text
        times, rest = divmod(given.shape[1], text.shape[1])
        if rest or text.shape[2] != given.shape[2]:
            raise GuidanceError(
                f"prompts are {tuple(given.shape[1:])} to the denoiser, the categories {tuple(text.shape[1:])};"
                " expected the same width, and whole chunks of text: encode prompts with the pipeline's own encoders"
            )
        return text.repeat(1, times, 1)

    def _known(self, run: GuidanceRun, call: GuidanceCall, hidden: Tensor, inputs: dict) -> Any:
        """An answer that needs no call of the denoiser: the negative prompt's, or the plain grey of a refused run."""
        if run.refused is not None and bool(run.refused.all()):
            return self._towards_grey(call)
        if run.stash is None or not call.negative or self.family.one_call:
            return None
        sample, negative, answer = run.stash
        run.stash, run.answered = None, True
        same = torch.equal(sample, call.sample) and self._same_text(negative, hidden)
        pooled, given = run.negative[1], next((inputs[name] for name in _POOLED if name in inputs), None)
        if not same or (pooled is not None and given is not None and not torch.equal(pooled.to(given), given)):
            raise GuidanceError(
                "the pipeline's second call of a step had other inputs than the negative prompt that it encoded; safe"
                " guidance foresaw it for that: another method changes one of the two calls, remove it"
            )
        return answer

    @staticmethod
    def _same_text(negative: Tensor, hidden: Tensor) -> bool:
        return negative.shape == hidden.shape and torch.equal(negative.to(hidden), hidden)

    # ---- after -------------------------------------------------------------------------------------------------------

    def finish(self, run: GuidanceRun, call: GuidanceCall, prediction: Tensor) -> Tensor:
        """The denoiser's answer, guided, without the added rows."""
        own = prediction[: call.batch]
        if not call.positive:
            return self._refuse(run, call, own)
        rows, negative = list(call.positive), list(call.negative)
        if call.active and self.guiding:
            uncond = prediction[call.rows_of("uncond")] if not self.family.one_call else own[negative]
            text = own[rows]
            guided = self._guided(run, call, uncond, text, self._safety(call, prediction, uncond))
            own = own.clone()
            own[rows] = guided
            if not self.family.one_call:
                run.stash, run.answered = (call.sample, run.negative[0], uncond), False
        self._look(run, call, own[rows])
        broken = ~own.isfinite().all()
        run.broken = broken if run.broken is None else run.broken | broken
        return self._refuse(run, call, own)

    @staticmethod
    def _safety(call: GuidanceCall, prediction: Tensor, uncond: Tensor) -> Tensor:
        """(K, B, ...), as `Algorithm.guide` takes it."""
        if not call.pairs:
            return uncond[None][:0]
        rows = prediction[call.rows_of("branch")]
        if len(call.pairs) == len(call.branches) * len(call.positive):
            return rows.unflatten(0, (len(call.branches), -1))
        safety = uncond[None].repeat(len(call.branches), *[1] * uncond.ndim)
        safety[[call.branches.index(k) for k, _ in call.pairs], [image for _, image in call.pairs]] = rows
        return safety

    def _guided(self, run: GuidanceRun, call: GuidanceCall, uncond: Tensor, text: Tensor, safety: Tensor) -> Tensor:
        evaluated = None
        if call.branches and not bool(call.wanted[list(call.branches)].all()):
            evaluated = call.wanted[list(call.branches)].to(text.device)
        for one in self.guiding:
            active = torch.full((len(text),), self._after(call.share, one.window()), device=text.device)
            if run.fired is not None:
                active &= run.fired.any(dim=1).to(text.device)
            outcome = one.guide(
                uncond, text, safety, run.momentum, unit=self._unit(call), active=active, level=call.level,
                update=call.update, strength=self.config.strength, evaluated=evaluated,
            )  # fmt: skip
            text = outcome.prediction
            scale = outcome.scale * active
            run.record.add("scale", scale)
            if call.branches:
                picked = torch.tensor(call.branches, device=text.device)[outcome.category]
                run.record.add("category", picked.where(outcome.scale > 0, -1))
                if outcome.alignment is not None:
                    run.record.add("alignment", outcome.alignment.amax(dim=0))
                    loud = torch.zeros_like(call.wanted)
                    loud[list(call.branches)] = outcome.loud.cpu()
                    run.branches.heard(call.wanted, loud)
        return text

    @staticmethod
    def _after(share: float, warmup: float) -> bool:
        return share >= warmup - 1e-4  # methods.schedule.EDGE: a step on the edge is behind it

    def _unit(self, call: GuidanceCall) -> float:
        """How much noise one unit of the prediction is."""
        kind = "velocity" if self.family.flow else self.handle.scheduler.config.get("prediction_type", "epsilon")
        if kind == "epsilon":
            return 1.0
        image, noise = self._levels(call)
        units = {"velocity": image, "v_prediction": image, "sample": -image / max(noise, _LEAST_NOISE)}
        if kind not in units:
            raise GuidanceError(f"prediction_type={kind!r}; safe guidance knows epsilon, v_prediction, sample and flow")
        return units[kind]

    def _levels(self, call: GuidanceCall) -> tuple[float, float]:
        alphas = None if self.family.flow else alphas_of(self.handle.pipe).cpu()
        image, noise = noise_levels(self.family, call.timestep.cpu(), alphas)
        return float(image), float(noise)

    # ---- the picture that it will be ---------------------------------------------------------------------------------

    def predicted(self, call: GuidanceCall, prediction: Tensor) -> Tensor:
        """The picture's latents as the denoiser predicts them, (B, C, H, W), from the rows for prompts."""
        image, noise = self._levels(call)
        sample = call.sample[list(call.positive)]
        kind = "velocity" if self.family.flow else self.handle.scheduler.config.get("prediction_type", "epsilon")
        if kind == "velocity":
            found = sample - noise * prediction
        elif kind == "v_prediction":
            found = image * sample - noise * prediction
        else:
            found = prediction if kind == "sample" else (sample - noise * prediction) / max(image, _LEAST_NOISE)
        return self.handle.unpacked(found)

    def _look(self, run: GuidanceRun, call: GuidanceCall, prediction: Tensor) -> None:
        """Let the picture detectors see what the picture will be; they decide the steps to come."""
        if not self.config.seeing or not call.active:
            return
        ended = run.record.look(self.config, self.predicted(call, prediction), call.share, run.fired)
        if ended is not None:
            run.refused = ended if run.refused is None else run.refused | ended

    def _refuse(self, run: GuidanceRun, call: GuidanceCall, own: Tensor) -> Tensor:
        """Refused images are led to latents of 0 (the decoder's plain grey), whatever the sampler is."""
        if run.refused is None:
            return own
        own, grey = own.clone(), self._towards_grey(call)
        for rows in (call.positive, call.negative):
            for image, row in enumerate(rows):
                if run.refused[image]:
                    own[row] = grey[row]
        return own

    def _towards_grey(self, call: GuidanceCall) -> Tensor:
        image, noise = self._levels(call)
        noise = max(noise, _LEAST_NOISE)
        kind = "velocity" if self.family.flow else self.handle.scheduler.config.get("prediction_type", "epsilon")
        factor = {"velocity": 1 / noise, "v_prediction": image / noise, "sample": 0.0}.get(kind, 1 / noise)
        return call.sample * factor
