"""The handle that `apply_membranes` returns: the plan of the current call, and the record of what fired."""

from __future__ import annotations

import functools
import inspect
import logging

import torch
from torch import Tensor

from ..methods.errors import MembraneError
from ..methods.gate_bank import GateBank
from ..methods.membrane_runtime import Plan, Site, stamp
from ..methods.membrane_types import Membranes
from .hooks import MEMBRANES, install, uninstall
from .membrane_hooks import RootHook, SiteHook
from .text import denoiser_of, token_ids

logger = logging.getLogger(__name__)

_PLANS = 3  # text batches remembered: guidance by separate calls (Flux) alternates between two
ATTRIBUTE = "_semiperm_membranes"  # on the denoiser, which pipelines may share


class MembraneHandle:
    """Membranes at work on one pipeline; a context manager that removes them on exit."""

    weights_fixed = False  # LoRA weights may be fused in place at any time

    def __init__(self, pipe, membranes: Membranes, config, sites: dict, bank: GateBank):
        self.pipe, self.membranes, self.config = pipe, membranes, config
        self.denoiser, self.attribute = denoiser_of(pipe)
        self.strength, self.bank = float(config.strength), bank
        self.windowed = (config.start, config.end) != (0.0, 1.0)
        self.sites = [(module, Site(self, key, module, packed)) for key, (module, packed) in sites.items()]
        self.plan: Plan | None = None
        self.gamma: Tensor | None = None
        self.outside = False
        self.folds: dict = {}
        self.fold_key: tuple | None = None
        self.ran = False
        self._plans: list[Plan] = []
        self._used: list[Plan] = []  # since the last encode_prompt
        self._encodes = 0
        self._fresh = False
        self._silent: tuple[str, ...] = ()
        self._encode_prompt = None

    @staticmethod
    def on(pipe) -> MembraneHandle | None:
        """The handle of the membranes at work on a pipeline, or None."""
        return getattr(denoiser_of(pipe)[0], ATTRIBUTE, None)

    def __enter__(self) -> MembraneHandle:
        return self

    def __exit__(self, *_) -> None:
        self.remove()

    def install(self) -> None:
        """Put the hooks in place; `remove` takes them out again."""
        setattr(self.denoiser, ATTRIBUTE, self)
        for module, site in self.sites:
            install(module, SiteHook(site), MEMBRANES)
        install(self.denoiser, RootHook(self, self.denoiser), MEMBRANES)
        original = self.pipe.encode_prompt
        signature = inspect.signature(original)

        @functools.wraps(original)
        def encode_prompt(*args, **kwargs):
            encoded = original(*args, **kwargs)
            self._on_encode(encoded, signature.bind(*args, **kwargs).arguments)
            return encoded

        self._encode_prompt = encode_prompt
        self.pipe.encode_prompt = encode_prompt
        parameter = next(self.denoiser.parameters())
        self._place(parameter.device, parameter.dtype)

    def remove(self) -> None:
        """Take every hook out: the pipeline computes the bits it computed before. Removing twice is harmless."""
        if getattr(self.denoiser, ATTRIBUTE, None) is not self:
            return
        for module in (self.denoiser, *(module for module, _ in self.sites)):
            uninstall(module, MEMBRANES)
        delattr(self.denoiser, ATTRIBUTE)
        if self.pipe.__dict__.get("encode_prompt") is self._encode_prompt:
            del self.pipe.encode_prompt
        self._plans, self.plan, self.gamma, self.folds = [], None, None, {}
        if self._encodes and not self.ran:
            logger.warning("%s", self._never_ran())

    def report(self) -> dict:
        """What fired in the last call: one entry per row the denoiser saw, negative rows included.

        Returns:
            {"concepts", "gates", "strength", "window", "modules", "mode", "silent", "rows": [{"prompt", "negative",
            "source", "gamma": {concept: value}}]}. `source` is "embeds" for embeddings passed in by the user, whose
            prompt is unknown: gates that need token ids then used the feature cosine alone.

        Raises:
            MembraneError: the pipeline has not run since, or ran without the membranes.
        """
        if not self.ran:
            raise MembraneError(
                self._never_ran()
                if self._encodes
                else "no report yet: the pipeline has not been called since apply_membranes"
            )
        rows = []
        for plan in self._used:
            for hidden, gamma in zip(plan.hidden, plan.gamma.tolist(), strict=True):
                entry = self.bank.recorded_row(hidden)
                rows.append(
                    {
                        "prompt": entry.prompt if entry else None,
                        "negative": entry.negative if entry else None,
                        "source": "prompt" if entry else "embeds",
                        "gamma": self.bank.named(gamma),
                    }
                )
        return {
            "concepts": list(self.membranes.concepts),
            "gates": list(self.bank.kinds),
            "strength": self.strength,
            "window": [self.config.start, self.config.end],
            "modules": len(self.sites),
            "mode": self._modes(),
            "silent": list(self._silent),
            "rows": rows,
        }

    def _modes(self) -> list[str]:
        if not self._used:
            return ["compiled"]
        modes = {
            name
            for plan in self._used
            for name, there in (("cached", plan.outputs), ("fused", not plan.neutral and self._fuses(plan)))
            if there
        }
        return sorted(modes | ({"folded"} if self.folds else set()) or {"neutral"})

    def _fuses(self, plan: Plan) -> bool:
        return any(site not in plan.outputs for site in plan.fused)

    # --- called by the hooks ---

    def within(self, fraction: float) -> bool:
        """Is this point of the schedule inside [start, end)? The end itself counts where it is 1."""
        return self.config.start <= fraction and (fraction < self.config.end or self.config.end == 1.0)

    def traced_gamma(self, hidden: Tensor, fraction: Tensor | None) -> Tensor:
        """Gamma as a graph computes it: tensors only."""
        gamma = self.bank(hidden) * self.strength
        if fraction is not None:
            inside = (fraction >= self.config.start) & ((fraction < self.config.end) | (self.config.end == 1.0))
            gamma = gamma * inside.to(gamma)
        return gamma.to(hidden.dtype)

    def select(self, hidden: Tensor, pooled: Tensor | None) -> None:
        """Make the plan of this text batch the current one."""
        plan = next((p for p in self._plans if p.fits(hidden, pooled)), None)
        if plan is None:
            plan = self._make(hidden, pooled)
            self._plans = [plan, *self._plans][:_PLANS]
            self._fresh = True
            for _, site in self.sites:
                site.ran = False
        if plan is not self.plan and plan.uniform and not plan.neutral:
            self._claim_fold(plan)
        if plan not in self._used:
            self._used.append(plan)
        self.plan = plan
        gamma = plan.gamma.to(hidden.dtype)
        self.gamma = torch.zeros_like(gamma) if self.outside else gamma  # for blocks that are compiled one by one

    def _claim_fold(self, plan: Plan) -> None:
        """One set of folded weights at a time. A plan that comes back after losing them stays fused: folding at every
        step would cost more than it saves (guidance by separate calls)."""
        key = tuple(plan.gamma[0].tolist())
        if key == self.fold_key:
            plan.fold_lost = False
        elif plan.fold_key is not None:
            plan.fold_lost = True
        else:
            self.folds, self.fold_key = {}, key
        plan.fold_key = key

    def _make(self, hidden: Tensor, pooled: Tensor | None) -> Plan:
        grad = torch.is_grad_enabled()
        with torch.set_grad_enabled(grad and hidden.requires_grad):
            gamma = self.bank(hidden) * self.strength if self.strength else hidden.new_zeros(hidden.shape[0], 1)
        if not torch.isfinite(gamma).all():
            raise MembraneError(
                "a gate is NaN or Inf: the text embeddings are not finite; check the prompt's embeddings"
            )
        uniform = bool((gamma == gamma[:1]).all())
        if self.config.mode == "folded" and not uniform:
            raise MembraneError(
                f"mode='folded' needs the same gates in all rows of the batch, but they differ: {gamma.tolist()};"
                " expected gate='always' or mode='auto'"
            )
        stamps = tuple(None if t is None else stamp(t) for t in (hidden, pooled))
        neutral = not grad and not bool(gamma.any()) or self.strength == 0
        return Plan(hidden, pooled, stamps, gamma, self.config.mode, neutral, uniform, grad)

    def check_sites(self) -> None:
        """After the first call of a plan: did the wrapped projections run at all?"""
        if not self._fresh:
            return
        self._fresh = False
        self._silent = tuple(site.key for _, site in self.sites if not site.ran)
        if len(self._silent) == len(self.sites):
            raise MembraneError(
                f"none of the {len(self.sites)} wrapped projections ran (first: {self._silent[0]}); were the attention"
                " layers fused (fuse_qkv_projections) or replaced? Undo that, then apply_membranes again"
            )
        if self._silent:
            logger.warning(
                "%d of %d wrapped projections did not run, e.g. %s", len(self._silent), len(self.sites), self._silent[0]
            )

    def _on_encode(self, encoded, arguments: dict) -> None:
        if denoiser_of(self.pipe)[0] is not self.denoiser:
            raise MembraneError(
                f"pipe.{self.attribute} was replaced after apply_membranes, so no membrane would act; call"
                " apply_membranes again"
            )
        if self.ran or not self._encodes:
            self._used, self.ran, self._encodes = [], False, 0
        self._encodes += 1
        tensors = [t for t in encoded if isinstance(t, Tensor) and t.ndim == 3] if isinstance(encoded, tuple) else []
        if not tensors:
            return
        self._place(tensors[0].device, tensors[0].dtype)
        prompts = _strings(arguments.get("prompt"))
        if prompts and arguments.get("prompt_embeds") is None:
            self.bank.record(tensors[0], prompts, False, self._ids)
        negatives = _strings(arguments.get("negative_prompt")) or [""]
        if len(tensors) > 1 and arguments.get("negative_prompt_embeds") is None:
            self.bank.record(tensors[1], negatives * (len(prompts) if len(negatives) == 1 else 1), True, self._ids)

    def _ids(self, prompts):
        return token_ids(self.pipe, prompts)

    def _place(self, device: torch.device, dtype: torch.dtype) -> None:
        self.bank.place(device)
        for _, site in self.sites:
            site.place(device, dtype)

    def _never_ran(self) -> str:
        return (
            f"encode_prompt was called {self._encodes} time(s), but the membranes on pipe.{self.attribute} never ran:"
            " the images, if any, are not protected"
        )


def _strings(prompt) -> list[str]:
    if prompt is None:
        return []
    return [prompt] if isinstance(prompt, str) else [p for p in prompt if isinstance(p, str)]
