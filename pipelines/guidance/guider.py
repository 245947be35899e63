"""Safe guidance as a guider of Modular Diffusers: one branch for each category beside the two of guidance.

guider = SafeGuidance(["violence", "sexual"], preset="strong", guidance_scale=7.0)
pipe.update_components(guider=guider)
guider.prepare(pipe)                       # encodes the categories with the pipeline's own text block
picture = pipe(prompt="a fox", output="images")[0]
guider.report()

Blocks hand a guider pairs (prompt, negative prompt) and call the denoiser for each batch that comes back, so that more
branches need no other blocks. The type hint of an entry in `modular_model_index.json` may name this module and class:
import it before `ModularPipeline.from_pretrained`; or let a folder load it by `trust_remote_code` (docs/python.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import ClassifierFreeGuidance
from torch import Tensor

from ...methods.errors import GuidanceError
from ...methods.guidance.algorithm import Momentum
from ...methods.guidance.category import Category, load_category
from ...methods.guidance.config import SafeGuidanceConfig
from ...methods.guidance.record import GuidanceRecord
from ...methods.guidance.sld import SLD
from ...methods.schedule import Window

__all__ = ["SafeGuidance"]

_TEXT_BLOCK = "text_encoder"  # what every modular pipeline calls its block that encodes prompts
_SAFETY = "pred_safety_{}"


class SafeGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance with safe latent diffusion, for every modular pipeline that takes a guider.

    Args:
        categories: names of bundled categories, .toml files, or {"name", "phrases"} of your own.
        preset: of `SLD`; None takes the strongest that a category asks for.
        strength: a factor on the change; 0 is plain guidance.
        guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled: as
            `ClassifierFreeGuidance`'s; guidance must be on.

    Raises:
        GuidanceError: unknown categories or preset, or values outside their range.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]  # and one for each category: see __init__

    @register_to_config
    def __init__(
        self,
        categories: Sequence[str | Mapping[str, Any]] = ("violence", "sexual"),
        preset: str | None = None,
        strength: float = 1.0,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        super().__init__(guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled)
        found = [Category(**dict(one)) if isinstance(one, Mapping) else load_category(one) for one in categories]
        algorithm: str | SLD = "sld" if preset is None else SLD(preset)
        self.safety = SafeGuidanceConfig(found, algorithm, strength=strength)
        self.algorithm = cast("SLD", self.safety.acting[0])
        self._input_predictions = ["pred_cond", "pred_uncond", *map(_SAFETY.format, range(len(found)))]
        self._texts: list[dict[str, Tensor]] = []
        self._flow = False
        self._levels: Any = None
        self._begin()

    def _begin(self) -> None:
        self.momentum, self.record, self._last_step = Momentum(), GuidanceRecord(), -1
        self._images = 0

    # ---- what it needs of the pipeline -----------------------------------------------------------------------------

    def prepare(self, pipe: Any, **inputs: Any) -> None:
        """Encode the categories with the pipeline's own text block.

        Args:
            pipe: a modular pipeline with its components loaded. inputs: what else the block gets, such as
                max_sequence_length: the same as in your calls.

        Raises:
            GuidanceError: the pipeline has no text block.
        """
        blocks = getattr(getattr(pipe, "blocks", None), "sub_blocks", {})
        if _TEXT_BLOCK not in blocks:
            raise GuidanceError(
                f"{type(pipe).__name__} has no block {_TEXT_BLOCK!r} but {', '.join(blocks) or 'none'}; expected a"
                " modular pipeline that encodes prompts"
            )
        self._texts = [self._encode(pipe, category.text, inputs) for category in self.safety.chosen]
        self._scheduler = pipe.scheduler

    @staticmethod
    def _encode(pipe: Any, text: str, inputs: dict) -> dict[str, Tensor]:
        from diffusers.modular_pipelines.modular_pipeline import PipelineState

        block, state = pipe.blocks.sub_blocks[_TEXT_BLOCK], PipelineState()
        for name in block.input_names:
            given = {"prompt": text, **inputs}.get(name)
            default = next((p.default for p in block.inputs if p.name == name), None)
            state.set(name, given if given is not None else default)
        with torch.no_grad():
            _, state = block(pipe, state)
        return {name: value for name, value in state.values.items() if isinstance(value, Tensor)}

    # ---- the guider's side -----------------------------------------------------------------------------------------

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        if step == 0:
            self._begin()
        elif step != self._last_step + 1:
            raise GuidanceError(
                f"step {step} followed step {self._last_step}: safe guidance missed some, or two runs share one guider;"
                " give each pipeline its own"
            )
        self._last_step = step
        super().set_state(step, num_inference_steps, timestep)

    @property
    def num_conditions(self) -> int:
        """Branches of this step; encoders ask before the first one."""
        if self._is_cfg_enabled():
            return 2 + (len(self.safety.chosen) if self.safety.strength else 0)
        return 1

    def prepare_inputs(self, data: dict[str, Any]) -> list:
        self._check(any(isinstance(value, tuple) for value in data.values()))
        pairs = [self._prepare_batch(data, i, name) for i, name in enumerate(self._input_predictions[:2])]
        return [*pairs, *self._branches(data, pairs)]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list:
        self._check(any(isinstance(value, tuple) for value in input_fields.values()))
        pairs = [
            self._prepare_batch_from_block_state(input_fields, data, i, name)
            for i, name in enumerate(self._input_predictions[:2])
        ]
        known = {
            field: tuple(getattr(data, name) for name in names) if isinstance(names, tuple) else getattr(data, names)
            for field, names in input_fields.items()
        }
        return [*pairs, *self._branches(known, pairs)]

    def _check(self, paired: bool) -> None:
        if not self._is_cfg_enabled() or not paired:
            raise GuidanceError(
                "safe guidance needs classifier-free guidance in every step, and it is off: give a guidance_scale other"
                " than 1, start 0 and stop 1, and a pipeline that is not distilled"
            )
        if not self._texts and self.safety.strength:
            raise GuidanceError("safe guidance has no embeddings of its categories; call guider.prepare(pipe) first")

    def _branches(self, data: Mapping[str, Any], pairs: list) -> list:
        """Copies of the prompt's batch with each category's text."""
        if not self.safety.strength:
            return []
        found = []
        pairs_of_text = {field: value for field, value in data.items() if isinstance(value, tuple) and _text(*value)}
        for index, text in enumerate(self._texts):
            values = {field: data[field][0] if isinstance(data[field], tuple) else data[field] for field in data}
            values |= {field: _in_place_of(pair[0], pair[1], field, text) for field, pair in pairs_of_text.items()}
            values[self._identifier_key] = _SAFETY.format(index)
            found.append(type(pairs[0])(**values))
        return found

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None, **safety: Tensor) -> Any:
        if not self.safety.strength or pred_uncond is None:  # which `prepare_inputs` refuses
            return super().forward(pred_cond, pred_uncond)
        share = self._step / max(self._num_inference_steps, 1)
        branches = torch.stack([safety[_SAFETY.format(i)] for i in range(len(self.safety.chosen))])
        level, rows = float(torch.as_tensor(self._timestep).reshape(-1)[0]), len(pred_cond)
        active = Window(self.algorithm.window(), 1.0).contains(share) if self.algorithm.window() < 1 else False
        outcome = self.algorithm.guide(
            pred_uncond, pred_cond, branches, self.momentum, unit=self._unit(level), level=level, update=True,
            active=torch.full((rows,), bool(active), device=pred_cond.device), strength=self.safety.strength,
        )  # fmt: skip
        if not bool(outcome.prediction.isfinite().all()):
            raise GuidanceError("a guided prediction was NaN or infinite; use another dtype, or a smaller strength")
        self._images = rows
        self.record.step(share, level, bool(active), rows * len(branches))
        self.record.add("scale", outcome.scale * bool(active))
        self.record.add("category", outcome.category)
        return super().forward(outcome.prediction, pred_uncond)

    def _unit(self, level: float) -> float:
        config, alphas = self._scheduler.config, getattr(self._scheduler, "alphas_cumprod", None)
        if alphas is None:
            return 1.0 - level / config.num_train_timesteps
        kind = config.get("prediction_type", "epsilon")
        alpha = float(alphas[min(int(level), len(alphas) - 1)])
        units = {"epsilon": 1.0, "v_prediction": alpha**0.5, "sample": -((alpha / max(1 - alpha, 1e-6)) ** 0.5)}
        if kind not in units:
            raise GuidanceError(f"prediction_type={kind!r}; safe guidance knows epsilon, v_prediction, sample and flow")
        return units[kind]

    def report(self) -> dict:
        """What was done in the last run: see `GuidanceRecord.report`.

        Raises:
            GuidanceError: it has not run.
        """
        if not self.record.steps:
            raise GuidanceError("no report yet: the pipeline has not been called with this guider")
        return self.record.report(self.safety, self._images)


def _text(one: Any, other: Any) -> bool:
    """Whether a pair is text: not the same tensor for both, and other numbers, or such that may be equal by chance."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)) or one is other:
        return False
    return not one.is_floating_point() or _differ(one, other)  # masks and positions of texts of the same length


def _differ(one: Tensor, other: Tensor) -> bool:
    return one.shape != other.shape or not torch.equal(one, other)


def _in_place_of(given: Tensor, other: Tensor, field: str, text: Mapping[str, Tensor]) -> Tensor:
    """A category's tensor for a field that prompt and negative prompt have one of each, with as many rows.

    Texts of a category are as long as they are: each branch is a call of its own.

    Raises:
        GuidanceError: the text block made none of its kind.
    """
    kind = given.is_floating_point()
    alike = [
        t for n, t in text.items() if t.ndim == given.ndim and t.is_floating_point() == kind and "negative" not in n
    ]
    alike = [t for t in alike if given.ndim < 3 or t.shape[-1] == given.shape[-1]]
    found = text.get(field)
    if found is None:
        exact = [t for t in alike if t.shape[1:] == given.shape[1:]]
        found = next(iter(exact or alike), None)
    if found is None and not _differ(given, other):  # positions, the same for every text
        return given
    if found is None:
        raise GuidanceError(
            f"the guider was given {field!r} {tuple(given.shape)}, of which the text block made none for the"
            f" categories: it made {', '.join(f'{n} {tuple(t.shape)}' for n, t in text.items())}; this pipeline is not"
            " supported"
        )
    return found[:1].expand(len(given), *found.shape[1:]).to(given)
