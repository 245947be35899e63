"""Safe guidance on diffusers pipelines of the SD1.x, SD2, SDXL, SD3, Flux and Wan families.

handle = apply_safe_guidance(pipe, SafeGuidanceConfig(["violence", "sexual"], ["safree", "sld"]))
picture = pipe("a fox").images[0]
handle.report()
remove_safe_guidance(pipe)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...methods.errors import GuidanceError
from ...methods.guidance.config import SafeGuidanceConfig
from ...methods.guidance.record import seal
from ..family import Pipeline
from ..handle import Handle, RootHook
from ..hooks import unheard
from ..rows import row_layout
from ..text import encode_text, segments_of
from .layers import attention_hooks
from .root import Root
from .run import GuidanceCall, GuidanceRun
from .texts import CategoryTexts, encode_categories, read_prompts

__all__ = ["SafeGuidanceHandle", "apply_safe_guidance", "remove_safe_guidance"]

_OUTERMOST = 2  # outside of all other methods: its rows must be seen by those, and it by none of theirs


def apply_safe_guidance(pipe: Pipeline, config: SafeGuidanceConfig) -> SafeGuidanceHandle:
    """Steer a pipeline away from categories of harm, in place of what was applied before.

    It fails closed: where something keeps it from acting (guidance off, no text encoder, rows that were split, a
    prediction that is not finite, steps that went by it), the pipeline raises and returns no image.

    Args:
        pipe: SD1.x, SD2, SDXL, SD3, Flux or Wan pipeline. Its blocks may be compiled (`compile_repeated_blocks`), and
            its denoiser by `denoiser.compile()` before this; a wrapped one (`torch.compile(denoiser)`) is refused.
        config: what to steer away from, how, how strongly, and when.

    Returns:
        A handle: `.report()` tells what was done in the last call, `.remove()` undoes; also a context manager.

    Raises:
        ModelError: an unsupported pipeline.
        GuidanceError: no layers of the kind that an algorithm acts at.

    >>> with apply_safe_guidance(pipe, SafeGuidanceConfig("hazard", "sld")) as handle:
    ...     image = pipe("a star", num_inference_steps=2).images[0]
    >>> handle.report()["algorithms"]
    ['sld']
    """
    handle = SafeGuidanceHandle(pipe, config)
    handle.replace(pipe)
    return handle


def remove_safe_guidance(pipe: Pipeline) -> None:
    """Undo `apply_safe_guidance`: the untouched model's bits again. Where nothing was applied: nothing."""
    SafeGuidanceHandle.clear(pipe)


class SafeGuidanceHandle(Handle):
    """Safe guidance at work on one denoiser."""

    NAME = "_semiperm_safe_guidance"
    ERROR = GuidanceError

    def __init__(self, pipe: Pipeline, config: SafeGuidanceConfig):
        super().__init__(pipe, config)
        self.methods = frozenset([*(one.NAME for one in config.acting), *["detector pair"] * bool(config.detectors)])
        self.root: Any = Root(self)
        around = _Around(self)
        self.hooks = [*attention_hooks(self, self.denoiser, self.family), (self.denoiser, around)]
        self.sample_name = around.names[0]
        self.begins = bool(segments_of(pipe, video=True)) and segments_of(pipe, video=True)[0].causal
        self._texts: dict[tuple, CategoryTexts] = {}

    def new_record(self) -> GuidanceRun:
        return GuidanceRun(self.config)

    def prepare(self, max_sequence_length: int | None = None) -> None:
        """Encode the categories now, for pipelines whose text encoders are taken away before they are called.

        Args:
            max_sequence_length: of T5 (SD3, Flux, Wan), the one you will generate with; None is the pipeline's default.
        """
        with unheard():
            hidden = encode_text(self.pipe, [""], max_sequence_length).hidden
        self._encoded(self.pipe, max_sequence_length, hidden.shape[1])

    def _encoded(self, pipe: Pipeline, max_sequence_length: int | None, length: int) -> tuple:
        encoder = getattr(pipe, "text_encoder", None)
        key = (max_sequence_length, None if encoder is None else str(encoder.dtype))
        known = next((k for k in self._texts if k[0] == key[0] and (encoder is None or k == key)), None)
        if known is None:
            self._texts[key] = encode_categories(pipe, self.config, max_sequence_length, length)
        return known or key

    # ---- a run ----

    def begin_run(self, encoded: Any, arguments: dict) -> None:
        if self.config.strength == 0:
            return
        run, pipe = self.now, self.pipe
        if self.compiled and self.denoiser is not getattr(pipe, self.attribute):
            raise GuidanceError(
                f"pipe.{self.attribute} is wrapped by torch.compile, whose graph keeps no state from step to step and"
                " no record: compile its blocks (denoiser.compile_repeated_blocks()), or use denoiser.compile() before"
                " apply_safe_guidance"
            )
        wide = [t for t in encoded if isinstance(t, Tensor) and t.ndim == 3]
        flat = [t for t in encoded if isinstance(t, Tensor) and t.ndim == 2 and len(t) == len(wide[0])][: len(wide)]
        length = arguments.get("max_sequence_length")
        run.texts_key = self._encoded(pipe, length, wide[0].shape[1])
        if self._encodes > 1 and not self.family.one_call and len(wide) == 1:  # the negative prompt's own call
            run.negative = (wide[0], flat[0] if flat else None)
            return
        if len(wide) > 1:
            run.negative = (wide[1], flat[1] if len(flat) > 1 else None)
        words = _words(arguments)
        pooled = flat[0] if flat else None
        run.prompts = read_prompts(pipe, self.config, words, wide[0], pooled, length, self.texts.read)
        if self.config.detectors:
            run.fired = torch.zeros(len(wide[0]), len(self.config.chosen), dtype=torch.bool)
            self._judge(run)

    def _judge(self, run: GuidanceRun) -> None:
        scores = run.prompts.scores
        if scores is None:
            return
        run.record.text_scores = scores.amax(dim=1)
        names = [category.name for category in self.config.chosen]
        judging = [pair for pair in self.config.detectors if pair.text is not None]
        for pair, column in zip(judging, (scores > 0).cpu().T, strict=True):
            run.fired[:, names.index(pair.category)] |= column

    @property
    def now(self) -> GuidanceRun:
        """What is kept of the run at hand."""
        run: Any = self.run
        return run.record

    @property
    def _encodes(self) -> int:
        run: Any = self.run
        return run.encodes

    @property
    def texts(self) -> CategoryTexts:
        return self._texts[self.now.texts_key]

    def guides(self, row: int, call: GuidanceCall) -> bool:
        """Whether the image of a row for a prompt is guided at all in this call."""
        fired = self.now.fired
        return fired is None or bool(fired[call.positive.index(row)].any())

    def acted(self, path: str, rows: list[int], share: Tensor) -> None:
        """A layer changed these rows so far."""
        self.now.layers.add(path)
        self.call.shares.append((rows, share.detach()))

    def unpacked(self, latents: Tensor) -> Tensor:
        """Predicted latents as pictures have them."""
        if not self.family.packed:
            return latents
        side = int(round(latents.shape[1] ** 0.5))  # detectors look at patches: a grid of another shape will do
        rows = next(n for n in range(side, 0, -1) if latents.shape[1] % n == 0)
        grid = latents.unflatten(1, (rows, -1))
        return grid.unflatten(3, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    # ---- a call ----

    def begin(self, inputs: dict) -> GuidanceCall | None:
        if torch.compiler.is_compiling():
            raise GuidanceError("safe guidance cannot be part of a graph: compile the denoiser's blocks instead")
        if self.config.strength == 0:
            return None
        run = self.called()
        if run.record.prompts is None:
            raise GuidanceError(
                "the denoiser was called in a run that encoded no prompt where safe guidance could hear it: call the"
                " pipeline that it was applied to, or apply it to this one"
            )
        if getattr(self.scheduler, "config", None) is None:
            raise GuidanceError("the pipeline has no scheduler, so that the step is unknown; apply to a whole pipeline")
        return self.root.begin(run.record, inputs, self.sample_name)

    def change_inputs(self, call: GuidanceCall | None, inputs: dict) -> dict | None:
        return None if call is None else self.root.change_inputs(self.now, call, inputs)

    def finish(self, call: GuidanceCall | None, output: Any) -> Any:
        if call is None:
            return output
        run = self.now
        self._check_layers(call)
        prediction = output[0] if isinstance(output, tuple) else output.sample
        if not isinstance(output, tuple):
            run.output_type = type(output)
        guided = self.root.finish(run, call, prediction)
        self._record(run, call)
        return (guided, *output[1:]) if isinstance(output, tuple) else type(output)(sample=guided)

    def answered(self, call: GuidanceCall, inputs: dict) -> Any:
        """A known answer in the denoiser's form."""
        if self.now.output_type is None or inputs.get("return_dict") is False:
            return (call.answer,)
        return self.now.output_type(sample=call.answer)

    def _check_layers(self, call: GuidanceCall) -> None:
        """Refuse a step in which an algorithm of the attention seam should have acted and did not."""
        if not call.active or not any(self.guides(row, call) for row in call.positive):
            return
        for seam, count in (("values", call.edited), ("outputs", call.outputs)):
            if self.config.having(seam) and not count:
                raise GuidanceError(
                    f"{self.config.having(seam)[0].NAME}: none of the layers that it acts at ran in this step; they"
                    " were replaced after apply_safe_guidance: apply it again"
                )

    def _record(self, run: GuidanceRun, call: GuidanceCall) -> None:
        if not call.positive or not call.active:
            return
        if call.shares:
            by_rows: dict[tuple, list[Tensor]] = {}
            for rows, share in call.shares:
                by_rows.setdefault(tuple(rows), []).append(share.float())
            total = torch.zeros(len(call.positive), device=call.shares[0][1].device)
            for own, shares in by_rows.items():
                total[[call.positive.index(row) for row in own]] += torch.stack(shares).sum(dim=0)
            run.record.add("scale", total / len(call.shares))
        edits = {image for _, image in self.root._edits(run, call)}
        if self.config.having("text"):
            run.record.add(
                "scale", torch.tensor([run.prompts.fired[i] * (i in edits) for i in range(len(call.positive))])
            )

    # ---- the end ----

    def ended(self, pipe: Pipeline) -> None:
        state: Any = self.here
        was_over = state is None or state.over
        super().ended(pipe)
        if was_over or not state.over or self.config.strength == 0:
            return
        run, expected = state.record, getattr(pipe, "_num_timesteps", None)
        if run.broken is not None and bool(run.broken):
            raise GuidanceError(
                "a guided prediction was NaN or infinite, so that it is unknown what was guided; use another dtype, or"
                " a smaller strength. No image is returned"
            )
        if not run.answered and self.root.paired:
            raise GuidanceError(
                "the last step never asked for the negative prompt's prediction, so that guidance was off: give a scale"
                " above 1. No image is returned"
            )
        if expected and run.calls < expected and not getattr(pipe, "_interrupt", False):
            raise GuidanceError(
                f"the pipeline took {expected} steps, but safe guidance saw {run.calls}: something answers in the place"
                " of the denoiser, or another model took over; remove it. No image is returned"
            )

    def steps(self) -> list[dict]:
        return list(self.now.record.steps) if self.run is not None else []

    def report(self, key: bytes | str | None = None) -> dict:
        """What was done in the last call of the pipeline: see `GuidanceRecord.report`.

        Args:
            key: a secret of at least 16 bytes that seals the report (HMAC-SHA256), so that later changes are detected.

        Raises:
            GuidanceError: the pipeline has not run since (or only compiled, which keeps no record).
        """
        if not self.steps():
            raise GuidanceError(
                "no report yet: the pipeline has not been called since apply_safe_guidance (a compiled denoiser keeps"
                " no record)"
            )
        report = self.now.record.report(self.config, len(self.now.prompts.hidden))
        return report if key is None else seal(report, key)


class _Around(RootHook):
    """Around the denoiser; other methods inside are told what each row is."""

    def __init__(self, handle: SafeGuidanceHandle):
        super().__init__(handle)
        self.owner = handle
        self.outermost: Any = _OUTERMOST

    def _run(self, original: Callable, call: GuidanceCall | None, inputs: dict, args: tuple, kwargs: dict) -> Any:
        if call is None:
            return original(*args, **kwargs)
        if call.answer is not None:
            return self.owner.answered(call, inputs)
        changed = self.handle.change_inputs(call, inputs)
        with row_layout(*call.layout()):
            output = original(*args, **kwargs) if changed is None else original(**changed)
        return self.handle.finish(call, output)


def _words(arguments: dict) -> list[str] | None:
    """The prompts of a run; None where embeddings were given, or where encoders were given different ones."""
    prompt = arguments.get("prompt")
    others = [arguments.get(name) for name in ("prompt_2", "prompt_3")]
    if prompt is None or arguments.get("prompt_embeds") is not None or any(o not in (None, prompt) for o in others):
        return None
    return [prompt] if isinstance(prompt, str) else list(prompt)
