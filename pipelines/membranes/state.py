"""The handle that `apply_membranes` returns: the plan of the current call, and the record of what fired."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...methods.errors import MembraneError
from ...methods.membranes.config import MembraneConfig
from ...methods.membranes.gate_bank import GateBank
from ...methods.membranes.record import membrane_report
from ...methods.membranes.sites import Folds, Plan, Site, modes_of
from ...methods.membranes.types import Membranes
from ...methods.modules import stamp
from ...methods.text_space import Wording
from ..family import family_of
from ..handle import Handle
from ..hooks import parameters_of
from ..scheduler import image_tokens, share_of, sigma_of
from ..text import wordings
from .hooks import RootHook, SiteHook

logger = logging.getLogger(__name__)

_PLANS = 3  # text batches remembered: guidance by separate calls (Flux) alternates between two; one is spare


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of the denoiser."""

    timestep: Tensor
    image_tokens: int
    active: bool  # whether it lies inside the window


class _Run:
    """What happened in one call of the pipeline: from its first `encode_prompt` to that of the next call."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Forget: a new run begins. In place, so that compiled graphs keep looking at this object."""
        self.encodes = 0  # calls of encode_prompt: a run may need several before it denoises
        self.began = False  # whether the denoiser has been called
        self.plans: list[Plan] = []  # in the order of their first use
        self.calls: list[_Call] = []  # none where the whole denoiser is compiled


class MembraneHandle(Handle):
    """Membranes at work on one pipeline."""

    NAME = "_semiperm_membranes"
    ERROR = MembraneError
    weights_fixed = False  # LoRA weights may be fused in place at any time

    def __init__(self, pipe, membranes: Membranes, config: MembraneConfig, sites: dict, bank: GateBank):
        super().__init__(pipe, config)
        self.family = family_of(pipe)
        self.membranes = membranes
        self.strength, self.bank = float(config.strength), bank
        self.sites = [Site(self, key, module, pair) for key, (module, pair) in sites.items()]
        modules: list[nn.Module] = [module for module, _ in sites.values()]
        self.hooks = [(module, SiteHook(site)) for module, site in zip(modules, self.sites, strict=True)]
        self.hooks.append((self.denoiser, RootHook(self, self.denoiser)))
        self.sample_name = parameters_of(self.denoiser)[0]
        self.plan: Plan | None = None
        self.gamma: Tensor | None = None  # for compiled graphs
        self.outside = False  # of the window, in the current call
        self.folds = Folds()
        self._run = _Run()
        self._plans: list[Plan] = []  # remembered, the newest first; they outlive runs
        self._watching = False  # whether sites have to tell in this call that they ran, as in the first one of a plan
        self._idle: tuple[str, ...] = ()  # sites that did not

    def install(self) -> None:
        super().install()
        parameter = next(self.denoiser.parameters())
        self._place(parameter.device, parameter.dtype)

    def remove(self) -> None:
        if self.on(self.pipe) is not self:
            return
        super().remove()
        self._plans, self.plan, self.gamma, self.folds = [], None, None, Folds()
        if self._run.encodes and not self._run.began and not self.compiled:
            logger.warning("%s", self.never_ran())

    def report(self) -> dict:
        """What fired in the last call, one entry per row the denoiser saw: see `membrane_report`.

        Raises:
            MembraneError: the pipeline has not run since (or only compiled, which keeps no record), or ran without the
                membranes.
        """
        if not self._run.calls:
            raise MembraneError(
                self.never_ran()
                if self._run.encodes and not self.compiled
                else "no report yet: the pipeline has not been called since apply_membranes (a compiled denoiser keeps"
                " no record)"
            )
        rows = [row for plan in self._run.plans for row in self._rows(plan)]
        kept = {
            "modules": len(self.sites),
            "idle_modules": self._idle,
            "modes": modes_of(self._run.plans, self.folds),
        }
        return membrane_report(self.bank, self.config, rows, self.steps(), **kept)

    def _rows(self, plan: Plan) -> list[dict]:
        """One entry a row."""
        found = []
        for number, (hidden, gates) in enumerate(zip(plan.hidden, plan.gates.tolist(), strict=True)):
            known = plan.negative[number] if plan.negative is not None else None
            entry = self.bank.recorded.find(hidden, known)
            negative = known if known is not None else entry is not None and entry.negative
            found.append(
                {
                    "kind": "negative" if negative else "positive",
                    "prompt": entry.prompt if entry else None,
                    "source": "prompt" if entry and entry.prompt is not None else "embeds",
                    "gamma": self.bank.named(gates),
                }
            )
        return found

    def steps(self) -> list[dict]:
        """Several calls at one noise level are one step."""
        steps: dict[float, dict] = {}
        for call in self._run.calls:
            share = share_of(self.pipe, self.family, call.timestep, call.image_tokens)
            sigma = sigma_of(self.pipe, self.family, call.timestep)
            steps[share] = {"share": share, "sigma": sigma, "active": call.active}
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
        pooled = inputs.get("pooled_projections")
        timestep, sample = torch.as_tensor(inputs["timestep"]), inputs[self.sample_name]
        tokens = image_tokens(self.family, self.denoiser, sample)
        self._run.began = True
        window, compiling = self.config.window, torch.compiler.is_compiling()
        inside = window.whole or window.contains(share_of(self.pipe, self.family, timestep, tokens))
        if compiling:
            if self.strength != 0:
                gamma = self.bank(hidden, pooled, self._negative(hidden, pooled)) * self.strength
                self.gamma = (gamma if window.whole else gamma * inside.to(gamma)).to(hidden.dtype)
            return
        self.outside = not inside
        self._run.calls.append(_Call(timestep, tokens, bool(inside)))
        self.select(hidden, pooled)

    def select(self, hidden: Tensor, pooled: Tensor | None) -> None:
        """Make the plan of this text batch the current one."""
        plan = self._plan_of(hidden, pooled, self._negative(hidden, pooled))
        if plan is not self.plan and plan.uniform and not plan.neutral:
            self.folds.claim(plan)
        if plan not in self._run.plans:
            self._run.plans.append(plan)
        self.plan = plan
        gamma = plan.gamma.to(hidden.dtype)
        self.gamma = torch.zeros_like(gamma) if self.outside else gamma  # for blocks that are compiled one by one

    def _negative(self, hidden: Tensor, pooled: Tensor | None) -> tuple[bool, ...] | None:
        """Which rows of this text are negative; None where their embeddings are on record as one or the other.

        Where guidance is two calls, the conditional one comes first, and the words of both were encoded alike.
        """
        if self.family.one_call:
            return None
        guided = self._run.encodes > 1 or getattr(self.pipe, "do_classifier_free_guidance", False)
        first = torch.compiler.is_compiling() or not self._run.plans or self._run.plans[0].fits(hidden, pooled)
        return (bool(guided and not first),) * len(hidden)

    def _plan_of(self, hidden: Tensor, pooled: Tensor | None, negative: tuple[bool, ...] | None) -> Plan:
        """The remembered plan of this text batch, or a new one, in whose first call the sites are watched."""
        for plan in self._plans:
            if plan.fits(hidden, pooled) and plan.negative == negative:
                return plan
        plan = self._new_plan(hidden, pooled, negative)
        self._plans = [plan, *self._plans][:_PLANS]
        self._watching = True
        for site in self.sites:
            site.ran = False
        return plan

    def _new_plan(self, hidden: Tensor, pooled: Tensor | None, negative: tuple[bool, ...] | None) -> Plan:
        grad = torch.is_grad_enabled()
        with torch.set_grad_enabled(grad and hidden.requires_grad):
            gates = self.bank(hidden, pooled, negative)
            gamma = gates * self.strength
        if not torch.isfinite(gamma).all():
            raise MembraneError(
                "a gate is NaN or Inf: the text embeddings are not finite; check the prompt's embeddings"
            )
        uniform = bool((gamma == gamma[:1]).all())
        if self.config.mode == "folded" and not uniform:
            raise MembraneError(
                f"mode='folded' needs the same gates in all rows of the batch, but they differ: {gamma.tolist()};"
                " expected gate='always' with negative_rows=True, or mode='auto'"
            )
        return Plan(
            hidden=hidden,
            pooled=pooled,
            stamps=tuple(None if t is None else stamp(t) for t in (hidden, pooled)),
            gates=gates,
            gamma=gamma,
            mode=self.config.mode,
            neutral=self.strength == 0 or (not grad and not bool(gamma.any())),
            uniform=uniform,
            grad=grad,
            negative=negative,
        )

    def check_sites(self) -> None:
        """After the first call of a plan: did the wrapped projections run at all?"""
        if not self._watching:
            return
        self._watching = False
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

    def begin_run(self, encoded, arguments: dict) -> None:
        if self._run.began:  # the run that it belonged to is over
            self._run.clear()
        self._run.encodes += 1
        if self._run.encodes == 1:
            self.bank.recorded.begin()
        tensors = [t for t in encoded if isinstance(t, Tensor) and t.ndim == 3] if isinstance(encoded, tuple) else []
        if not tensors:
            return
        self._place(tensors[0].device, tensors[0].dtype)
        self._record(tensors[0], arguments, "", False)
        if len(tensors) > 1:
            self._record(tensors[1], arguments, "negative_", True)

    def _record(self, hidden: Tensor, arguments: dict, which: str, negative: bool) -> None:
        """Remember which rows were encoded just now, and their words where they came from words."""
        texts = [_strings(arguments.get(f"{which}prompt{n}")) for n in ("", "_2", "_3")]
        if arguments.get(f"{which}prompt_embeds") is None and (texts[0] or which):
            count = max(1, len(_strings(arguments.get("prompt")))) if which else len(texts[0])
            texts[0] = texts[0] or [""]
            texts = [many * count if len(many) == 1 else many for many in texts]
            if all(len(many) in (0, len(texts[0])) for many in texts):
                self.bank.recorded.add(hidden, wordings(self.pipe, *texts), negative)
                return
        self.bank.recorded.add(hidden, [Wording(None, (), ())] * len(hidden), negative)

    def _place(self, device: torch.device, dtype: torch.dtype) -> None:
        self.bank.place(device)
        for site in self.sites:
            site.place(device, dtype)

    def never_ran(self) -> str:
        return (
            f"encode_prompt was called {self._run.encodes} time(s), but the membranes on pipe.{self.attribute} never"
            " ran: the images, if any, are not protected"
        )


def _strings(prompt) -> list[str]:
    if prompt is None:
        return []
    return [prompt] if isinstance(prompt, str) else [p for p in prompt if isinstance(p, str)]
