"""The handle that `apply_membranes` returns: the plan of the current call, and the record of what fired."""

from __future__ import annotations

import functools
import inspect
import logging

import torch
from torch import Tensor, nn

from ...methods.errors import MembraneError
from ...methods.membranes.config import MembraneConfig
from ...methods.membranes.gate_bank import GateBank
from ...methods.membranes.record import membrane_report
from ...methods.membranes.sites import Folds, Plan, Site, modes_of
from ...methods.membranes.types import Membranes
from ...methods.modules import stamp
from ..family import denoiser_of, family_of
from ..handle import Handle
from ..hooks import parameters_of
from ..scheduler import image_tokens, share_of, sigma_of
from ..text import token_ids
from .hooks import RootHook, SiteHook

logger = logging.getLogger(__name__)

_PLANS = 3  # text batches remembered: guidance by separate calls (Flux) alternates between two


class MembraneHandle(Handle):
    """Membranes at work on one pipeline."""

    NAME = "_semiperm_membranes"
    weights_fixed = False  # LoRA weights may be fused in place at any time

    def __init__(self, pipe, membranes: Membranes, config: MembraneConfig, sites: dict, bank: GateBank):
        super().__init__(pipe)
        self.family = family_of(pipe)
        self.membranes, self.config = membranes, config
        self.strength, self.bank = float(config.strength), bank
        self.sites = [Site(self, key, module, pair) for key, (module, pair) in sites.items()]
        modules: list[nn.Module] = [module for module, _ in sites.values()]
        self.hooks = [(module, SiteHook(site)) for module, site in zip(modules, self.sites, strict=True)]
        self.hooks.append((self.denoiser, RootHook(self, self.denoiser)))
        self.sample_name = parameters_of(self.denoiser)[0]
        self.plan: Plan | None = None
        self.gamma: Tensor | None = None  # for compiled graphs
        self.outside = False
        self.folds = Folds()
        self.ran = False
        self._plans: list[Plan] = []
        self._used: list[Plan] = []  # since the last encode_prompt
        self._times: list[tuple[Tensor, int, bool]] = []  # (timestep, image tokens, inside the window) of each call
        self._encodes = 0
        self._fresh = False
        self._idle: tuple[str, ...] = ()
        self._encode_prompt = None

    def install(self) -> None:
        super().install()
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
        if self.on(self.pipe) is not self:
            return
        super().remove()
        if self.pipe.__dict__.get("encode_prompt") is self._encode_prompt:
            del self.pipe.encode_prompt
        self._plans, self.plan, self.gamma, self.folds = [], None, None, Folds()
        if self._encodes and not self.ran:
            logger.warning("%s", self._never_ran())

    def report(self) -> dict:
        """What fired in the last call, one entry per row the denoiser saw: see `membrane_report`.

        Raises:
            MembraneError: the pipeline has not run since, or ran without the membranes.
        """
        if not self.ran:
            raise MembraneError(
                self._never_ran()
                if self._encodes
                else "no report yet: the pipeline has not been called since apply_membranes"
            )
        rows = [row for plan in self._used for row in self._rows(plan)]
        kept = {
            "modules": len(self.sites),
            "idle_modules": self._idle,
            "modes": modes_of(self._used, self.folds) or ["compiled"],
        }
        return membrane_report(self.bank, self.config, rows, self._steps(), **kept)

    def _rows(self, plan: Plan) -> list[dict]:
        """One entry a row; of unknown embeddings the first half is taken for negative where guidance is one call."""
        count = len(plan.hidden)
        guided = self.family.one_call and getattr(self.pipe, "do_classifier_free_guidance", False) and count % 2 == 0
        found = []
        for number, (hidden, gates) in enumerate(zip(plan.hidden, plan.gates.tolist(), strict=True)):
            entry = self.bank.recorded_row(hidden)
            negative = entry.negative if entry else guided and number < count // 2
            found.append(
                {
                    "kind": "negative" if negative else "positive",
                    "prompt": entry.prompt if entry else None,
                    "source": "prompt" if entry else "embeds",
                    "gamma": self.bank.named(gates),
                }
            )
        return found

    def _steps(self) -> list[dict]:
        """Several calls at one noise level are one step."""
        steps: dict[float, dict] = {}
        for timestep, tokens, active in self._times:
            share = share_of(self.pipe, self.family, timestep, tokens)
            sigma = sigma_of(self.pipe, self.family, timestep)
            steps[share] = {"share": share, "sigma": sigma, "active": active}
        return list(steps.values())

    # --- called by the hooks ---

    def begin(self, inputs: dict) -> None:
        """Look at the text and the step of a call of the denoiser."""
        hidden = inputs.get("encoder_hidden_states")
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden  # (text, image prompt) of IP-Adapter
        if hidden is None:
            raise MembraneError(
                "the denoiser was called without encoder_hidden_states: a membrane cannot see the prompt"
            )
        timestep, sample = torch.as_tensor(inputs["timestep"]), inputs[self.sample_name]
        tokens = image_tokens(self.family, self.denoiser, sample)
        self.ran = True
        window, compiling = self.config.window, torch.compiler.is_compiling()
        inside = window.whole or window.contains(share_of(self.pipe, self.family, timestep, tokens))
        if compiling:
            if self.strength != 0:
                gamma = self.bank(hidden) * self.strength
                self.gamma = (gamma if window.whole else gamma * inside.to(gamma)).to(hidden.dtype)
            return
        self.outside = not inside
        self._times.append((timestep, tokens, bool(inside)))
        self.select(hidden, inputs.get("pooled_projections"))

    def select(self, hidden: Tensor, pooled: Tensor | None) -> None:
        """Make the plan of this text batch the current one."""
        plan = next((p for p in self._plans if p.fits(hidden, pooled)), None)
        if plan is None:
            plan = self._make(hidden, pooled)
            self._plans = [plan, *self._plans][:_PLANS]
            self._fresh = True
            for site in self.sites:
                site.ran = False
        if plan is not self.plan and plan.uniform and not plan.neutral:
            self.folds.claim(plan)
        if plan not in self._used:
            self._used.append(plan)
        self.plan = plan
        gamma = plan.gamma.to(hidden.dtype)
        self.gamma = torch.zeros_like(gamma) if self.outside else gamma  # for blocks that are compiled one by one

    def _make(self, hidden: Tensor, pooled: Tensor | None) -> Plan:
        grad = torch.is_grad_enabled()
        with torch.set_grad_enabled(grad and hidden.requires_grad):
            gates = self.bank(hidden)
            gamma = gates * self.strength
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
        return Plan(hidden, pooled, stamps, gates, gamma, self.config.mode, neutral, uniform, grad)

    def check_sites(self) -> None:
        """After the first call of a plan: did the wrapped projections run at all?"""
        if not self._fresh:
            return
        self._fresh = False
        self._idle = tuple(site.key for site in self.sites if not site.ran)
        if len(self._idle) == len(self.sites):
            raise MembraneError(
                f"none of the {len(self.sites)} wrapped projections ran (first: {self._idle[0]}); were the attention"
                " layers fused (fuse_qkv_projections) or replaced? Undo that, then apply_membranes again"
            )
        if self._idle:
            logger.warning(
                "%d of %d wrapped projections did not run, e.g. %s", len(self._idle), len(self.sites), self._idle[0]
            )

    def _on_encode(self, encoded, arguments: dict) -> None:
        if denoiser_of(self.pipe)[0] is not self.denoiser:
            raise MembraneError(
                f"pipe.{self.attribute} was replaced after apply_membranes, so no membrane would act; call"
                " apply_membranes again"
            )
        if self.ran or not self._encodes:
            self._used, self._times, self.ran, self._encodes = [], [], False, 0
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
        for site in self.sites:
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
