"""Safe guidance on a ComfyUI model: a clone of its ModelPatcher; no weight is touched.

Prediction seam: the categories become conditionings of the guider and are denoised in its one batch (a wrapper around
`calc_cond_batch`), so that plain samplers and other packs' guiders are guided, too; the predicted picture for the
prompt is changed before guidance, and whatever other packs do to guidance follows. Attention seam: see layers.py.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable

import comfy.model_sampling
import comfy.patcher_extension
import comfy.sampler_helpers
import torch
from torch import Tensor

from ...methods.errors import GuidanceError
from ...methods.guidance.algorithm import Momentum
from ...methods.guidance.branches import Branches
from ...methods.guidance.config import SafeGuidanceConfig
from ...methods.guidance.record import GuidanceRecord
from ..extra_rows import call_with_rows, rows_of
from ..progress import Progress
from ..root_patch import add_root
from .detectors import Detectors
from .joint import JointLayers, is_joint
from .layers import Layers

logger = logging.getLogger(__name__)

ATTACHMENT = "semiperm_guidance"
_MP = comfy.patcher_extension.WrappersMP
_SAFETY = "negative_semiperm_safety_{}"  # of the guider's conditionings: "negative" to those who ask what guides
_numbers = itertools.count()


def guide_model(model, config: SafeGuidanceConfig, clip, detectors=None, *, branches=None, together=None, states=None):
    """Return a clone of the model that is guided away from the config's categories; the given model stays as it is.

    Args:
        model: ComfyUI's ModelPatcher. config: strength 0 returns the model itself. clip: reads the categories.
        detectors: `Detectors` of `config.detectors`, which say what the text detectors found; None: nobody asked them.
        branches, together, states: what `texts` made of them already; None makes it here.

    Raises:
        GuidanceError: an algorithm of the text seam, which a model has none for; or an architecture that is not known.
    """
    if config.having("text"):
        names = ", ".join(one.NAME for one in config.having("text"))
        raise GuidanceError(f"{names} edits prompts, which a MODEL has none of; use Prompt Filter in its place")
    if config.strength == 0:
        return model
    from .texts import branches_of, joint_texts, phrase_states, together_of

    inner = bool(config.having("values") or config.having("outputs"))
    joint = joint_texts(model, clip, config) if inner and is_joint(model.get_model_object("diffusion_model")) else None
    if config.having("prediction") and branches is None:
        branches = branches_of(clip, config)
    if config.having("outputs") and together is None and joint is None:
        together = together_of(clip, config)
    if config.having("values") and states is None and joint is None:
        most = max(one.rank for one in config.having("values"))
        states = phrase_states(model, clip, config, most)
    patched = model.clone()
    patch = GuidancePatch(config, branches or [], detectors)
    if inner:
        patch.layers = Layers(patch, together, states) if joint is None else JointLayers(patch, joint)
        patch.layers.install(patched)
        add_root(patched, patch.around, adds_rows=joint is not None)
    key = f"semiperm_guidance_{next(_numbers)}"
    patched.add_wrapper_with_key(_MP.OUTER_SAMPLE, key, patch.sample)
    patched.add_wrapper_with_key(_MP.PREDICT_NOISE, key, patch.predict)
    patched.add_wrapper_with_key(_MP.CALC_COND_BATCH, key, patch.calculate)
    earlier = patched.get_attachment(ATTACHMENT)
    patched.set_attachments(ATTACHMENT, [*(earlier or []), patch])
    return patched


def reports_of(model) -> list[dict]:
    """What each safe guidance on a model did in its last sampling run, in the order of the nodes.

    Raises:
        GuidanceError: none is on this model, or it has not sampled since.
    """
    patches = model.get_attachment(ATTACHMENT)
    if not patches:
        raise GuidanceError(
            "this model carries no safe guidance (or its strength is 0); connect the model that comes out of Safe"
            " Guidance"
        )
    return [patch.report() for patch in patches]


def report_of(model) -> dict:
    """What the last applied node did: see `GuidanceRecord.report`.

    Raises:
        GuidanceError: as `reports_of`.
    """
    return reports_of(model)[-1]


class GuidancePatch:
    """Safe guidance at work on one model."""

    def __init__(self, config: SafeGuidanceConfig, branches: list, detectors: Detectors | None = None):
        self.config, self.branches, self.detectors = config, branches, detectors
        self.guiding = config.having("prediction")
        self.layers: Layers | JointLayers | None = None
        self.record, self.images, self.over = GuidanceRecord(), 0, False
        self._begin()

    def _begin(self) -> None:
        self.record, self.momentum, self.images = GuidanceRecord(), Momentum(), 0
        self.guider = None
        self.step: tuple[float, float, bool] | None = None  # share, sigma, active of the call at hand
        self.guided = False  # whether the call at hand was
        self.worth = Branches.of(self.config)
        self.fired: Tensor | None = None  # (B, K) bool on the CPU, categories that were detected; None: no detectors
        self.refused = torch.zeros(0, dtype=torch.bool)  # (B,), pictures that end as plain grey
        self.positive: list[int] = []
        self.over = False
        self.calls = 0

    # ---- a run ------------------------------------------------------------------------------------------------------

    def sample(self, executor, *args, **kwargs):
        """Around a whole sampling run: nothing is carried from one to the next."""
        guider, noise = executor.class_obj, args[0] if args else kwargs["noise"]
        self._begin()
        self.guider, self.images = guider, noise.shape[0]
        self.sampling = guider.model_patcher.get_model_object("model_sampling")
        self.progress = Progress(self.sampling)
        self.refused = torch.zeros(self.images, dtype=torch.bool)
        self._judge_prompt(guider)
        if self.layers is not None:
            self.layers.begin_run()
        for index, branch in enumerate(self.branches):  # ComfyUI then prepares them as it does the others
            guider.conds[_SAFETY.format(index)] = comfy.sampler_helpers.convert_cond(branch)
        try:
            result = executor(*args, **kwargs)
        finally:
            self.guider = None
        self.over = True
        if not self.calls:
            raise GuidanceError(
                "the model sampled, but safe guidance never ran: another node replaced the guider's predict_noise or"
                " the model's forward; put Safe Guidance after that node"
            )
        if missed := self.config.window.missed(self.record.steps):
            logger.warning("Safe Guidance: %s", missed)
        return result

    def _judge_prompt(self, guider) -> None:
        """What the text detectors said of the prompt that is sampled."""
        if not self.config.detectors:
            return
        self.fired = torch.zeros(self.images, len(self.config.categories), dtype=torch.bool)
        if self.detectors is None or self.detectors.prompt is None:
            return
        conditionings = [cond["cross_attn"] for cond in guider.conds.get("positive", ()) if "cross_attn" in cond]
        self.detectors.check(conditionings)
        names = [category.name for category in self.config.categories]
        scores = [score for score in self.detectors.scores if score is not None]
        self.record.text_scores = torch.full((self.images,), max(scores)) if scores else None
        for pair, score in zip(self.detectors.pairs, self.detectors.scores, strict=True):
            self.fired[:, names.index(pair.category)] |= score is not None and score > 0

    def _look(self, latents: Tensor) -> None:
        """Let the picture detectors see the picture that the model predicts for the prompt."""
        if self.fired is None or not self.config.seeing or not self.step[2]:
            return
        ended = self.record.look(self.config, latents, self.step[0], self.fired)
        if ended is not None:
            self.refused = self.refused | ended

    def report(self) -> dict:
        if not self.over:
            raise GuidanceError("no report yet: this model has not sampled; connect the sampler's latent to the report")
        return self.record.report(self.config, self.images)

    # ---- a step ------------------------------------------------------------------------------------------------------

    def predict(self, executor, x, timestep, *args, **kwargs):
        """Around a guider's predict_noise: what had to be guided was, or nothing is returned."""
        sigma = float(timestep.max())
        share = self.progress.share(sigma)
        active = bool(self.config.window.contains(share))
        self.step, self.guided = (share, sigma, active), False
        self.record.step(share, sigma, active, 0)
        self.calls += 1
        before = 0 if self.layers is None else self.layers.acted
        wanted = self.fired is None or bool(self.fired.any())  # whether layers have anything to do
        try:
            result = executor(x, timestep, *args, **kwargs)
        finally:
            self.step = None
        if active and (self.guiding or self.config.detectors) and not self.guided:
            raise GuidanceError(
                "the sampler took a step that safe guidance never saw: another node calculates prompts by itself"
                " (sampler_calc_cond_batch_function, or a guider of its own); use Safe Guider, or remove that node"
            )
        if active and self.layers is not None and self.layers.acted == before and wanted:
            raise GuidanceError(
                "none of the attention layers that safe guidance acts at ran in this step: another node replaced them;"
                " put Safe Guidance after that node"
            )
        if not bool(result.isfinite().all()):
            raise GuidanceError("a guided prediction is NaN or infinite; use another dtype, or a smaller strength")
        if bool(self.refused.any()):
            result = result.clone()
            result[self.refused.to(result.device)] = 0  # the decoder's plain grey
        return result

    def calculate(self, executor, model, conds, x, timestep, *args, **kwargs):
        """Around calc_cond_batch: the categories are denoised in the same batch, and the prompt's prediction is"
        " changed."""
        if self.step is None or self.guided or self.guider is None or not (self.guiding or self.config.detectors):
            return executor(model, conds, x, timestep, *args, **kwargs)
        positive = self.guider.conds.get("positive")
        where = next((i for i, cond in enumerate(conds) if cond is not None and cond is positive), None)
        if where is None:
            return executor(model, conds, x, timestep, *args, **kwargs)
        if not self.guiding:
            self.guided = True
            found = executor(model, conds, x, timestep, *args, **kwargs)
            self._look(found[where])
            return found
        negative = self.guider.conds.get("negative")
        other = next((i for i, cond in enumerate(conds) if cond is not None and cond is negative), None)
        if other is None:
            raise GuidanceError(
                f"{', '.join(one.NAME for one in self.guiding)} needs guidance, and it is off: set cfg above 1, and"
                " give a negative prompt; or use NAG, which works at cfg 1"
            )
        self.guided = True
        if not self.step[2]:
            return executor(model, conds, x, timestep, *args, **kwargs)
        wanted = self.worth.wanted(self.images)
        if self.fired is not None:
            wanted &= self.fired.mT
        branches = wanted.any(dim=1).nonzero()[:, 0].tolist()
        safety = [self._prepared(k) for k in branches]
        found = executor(model, [*conds, *safety], x, timestep, *args, **kwargs)
        if len(found) != len(conds) + len(safety):
            raise GuidanceError(
                f"{len(conds) + len(safety)} conditionings were to be denoised, and {len(found)} were: another node"
                " leaves some out; remove it"
            )
        out = list(found[: len(conds)])
        self.record.evaluations += len(out[where]) * len(safety)
        out[where] = self._guided(out[other], out[where], found[len(conds) :], wanted, self._update(args, kwargs))
        self._look(out[where])
        return out

    def _prepared(self, category: int):
        cond = self.guider.conds.get(_SAFETY.format(category))
        if not cond:
            raise GuidanceError(
                "the categories' conditionings are gone from the guider: another node replaced them; put Safe Guidance"
                " after that node"
            )
        return cond

    def _update(self, args: tuple, kwargs: dict) -> bool:
        """Whether a step begins with this noise level; second-order samplers ask for others, too."""
        options = kwargs.get("model_options") or next((a for a in args if isinstance(a, dict)), {})
        sigmas = options.get("transformer_options", {}).get("sample_sigmas")
        if sigmas is None:
            return True
        return bool(((sigmas.float().cpu() - self.step[1]).abs() <= 1e-4 * max(self.step[1], 1e-4)).any())

    def _guided(self, uncond: Tensor, text: Tensor, safety: list[Tensor], wanted: Tensor, update: bool) -> Tensor:
        """Predicted pictures in units of noise differ by -1 / sigma, of flow models by -(1 - sigma) / sigma.

        Args:
            safety: of each category that is wanted on any image; wanted: (K, B) bool.
        """
        share, sigma, _ = self.step
        flow = isinstance(self.sampling, comfy.model_sampling.CONST)
        unit = -(1 - sigma if flow else 1.0) / max(sigma, 1e-6)
        stacked = torch.stack(safety) if safety else text[None][:0]
        branches = wanted.any(dim=1).nonzero()[:, 0]
        evaluated = None if bool(wanted[branches].all()) else wanted[branches].to(text.device)
        for one in self.guiding:
            active = torch.full((len(text),), share >= one.window() - 1e-4, device=text.device)
            if self.fired is not None:
                active &= self.fired.any(dim=1).to(text.device)
            outcome = one.guide(
                uncond, text, stacked, self.momentum, unit=unit, active=active, level=sigma, update=update,
                strength=self.config.strength, evaluated=evaluated,
            )  # fmt: skip
            text = outcome.prediction
            self.record.add("scale", outcome.scale * active)
            if safety:
                picked = branches.to(text.device)[outcome.category]
                self.record.add("category", picked.where(outcome.scale > 0, -1))
                if outcome.alignment is not None:
                    self.record.add("alignment", outcome.alignment.amax(dim=0))
                    loud = torch.zeros_like(wanted)
                    loud[branches] = outcome.loud.cpu()
                    self.worth.heard(wanted, loud)
        return text

    # ---- the attention seam's view of a call -------------------------------------------------------------------------

    def around(self, original: Callable) -> Callable:
        """The diffusion model's forward; layers are told which rows are for prompts."""

        def forward(x, *args, **kwargs):
            options = kwargs.get("transformer_options") or {}
            rows = rows_of(x, options)
            if options.get("sigmas") is None or self.step is None:
                self.positive = []
            else:
                self.positive = [r for r in range(rows.sampled) if rows.chunks[rows.chunk_of(r)] == 0]
            if self.step is None or not self.step[2]:
                self.positive = []
            if self.fired is not None:
                fires = self.fired.any(dim=1).tolist()
                self.positive = [row for row in self.positive if fires[row % self.images]]
            shares = self.layers.shares
            shares.clear()
            extra = self.layers.extra(x, args, kwargs)
            output = original(x, *args, **kwargs) if extra is None else call_with_rows(original, x, args, kwargs, extra)
            if extra is not None:
                self.record.evaluations += len(extra.sources)
            if shares and self.positive:
                total = torch.stack([share.float() for share in shares]).mean(dim=0)
                if len(total) == len(self.positive):
                    scales = torch.zeros(self.images, device=total.device)
                    scales[[row % self.images for row in self.positive]] = total
                    self.record.add("scale", scales)
            self.positive = []
            return output

        return forward
