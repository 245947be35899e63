"""The handle that `apply_membranes` returns: the plan of the current call, and the record of what fired."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ...methods.errors import MembraneError
from ...methods.membranes.config import MembraneConfig
from ...methods.membranes.gate_bank import GateBank
from ...methods.membranes.image_site import opened_row
from ...methods.membranes.prompt_record import PromptRecord
from ...methods.membranes.record import membrane_report
from ...methods.membranes.sites import Folds, Plan, Site, modes_of
from ...methods.membranes.types import Membranes
from ...methods.modules import stamp
from ...methods.text_space import Wording
from ..handle import Handle, RootHook
from ..hooks import parameters_of
from ..rows import Run, said, same_rows
from ..scheduler import image_tokens, on_host, share_of, sigma_of
from ..text import TOKENIZERS, wordings
from .visual import Chained, grid_of, image_hooks, opening_pictures

logger = logging.getLogger(__name__)

_PLANS = 3  # text batches remembered: guidance by separate calls (Flux) alternates between two; one is spare


@dataclass(eq=False)
class _Call:
    """One call of the denoiser."""

    timestep: Tensor
    image_tokens: int
    active: bool  # whether it lies inside the window
    plan: Plan | None  # None in a graph
    gamma: Tensor  # (B, K), for graphs
    watched: bool = False  # whether the sites have to have run, as in the first call of a plan
    share: float | Tensor = 0.0  # of the schedule, where image-side membranes ask
    text: int = 0  # how many tokens of text come first where text and image are one sequence


class _Record:
    """What happened in one call of the pipeline."""

    def __init__(self, prompts: PromptRecord):
        self.prompts = prompts
        self.plans: list[Plan] = []  # in the order of their first use
        self.current: Plan | None = None
        self.calls: list[_Step] = []  # none where the whole denoiser is compiled
        self.idle: tuple[str, ...] = ()  # sites that did not run
        self.grid: Any = None  # of the image's tokens, see `grid_of`


@dataclass(frozen=True, eq=False)
class _Step:
    timestep: Tensor
    image_tokens: int
    active: bool


class MembraneHandle(Handle):
    """Membranes at work on one denoiser."""

    NAME = "_semiperm_membranes"
    ERROR = MembraneError
    methods = frozenset(["membranes"])
    weights_fixed = False  # LoRA weights may be fused in place at any time

    def __init__(
        self, pipe, membranes: Membranes, config: MembraneConfig, sites: dict, bank: GateBank, layers: Mapping
    ):
        super().__init__(pipe, config)
        self.membranes = membranes
        self.strength, self.bank = float(config.strength), bank
        texts = [Site(self, key, module, pair) for key, (module, pair) in sites.items()]
        around: dict[nn.Module, Any] = dict(zip((module for module, _ in sites.values()), texts, strict=True))
        images = image_hooks(self, membranes, layers, self.bank.columns, bank.width)
        for module, hook in images:  # outside of what changes a weight
            around[module] = Chained(hook, around[module]) if module in around else hook
        self.sites, self.images = [*texts, *(hook for _, hook in images)], bool(images)
        self.hooks = [*around.items(), (self.denoiser, RootHook(self))]
        self.sample_name = parameters_of(type(self.denoiser))[0]
        self.folds = Folds()
        # kept by themselves: the denoiser may outlive the pipeline, and others that share it still have words
        self.words = SimpleNamespace(**{name: getattr(pipe, name, None) for name in TOKENIZERS})
        self.graphs = False  # whether sites were seen to run in graphs of a denoiser that is not one itself

    def new_record(self) -> _Record:
        # what was encoded before counts where its embeddings are still held: they may come back as `prompt_embeds`
        self.bank.recorded = self.bank.recorded.following()
        return _Record(self.bank.recorded)

    def install(self) -> None:
        super().install()
        parameter = next(self.denoiser.parameters())
        if parameter.device.type != "meta":  # offloaded: the text tells
            self._place(parameter.device, parameter.dtype)

    def remove(self) -> None:
        if getattr(self.denoiser, self.NAME, None) is not self:
            return
        super().remove()
        self.folds, run = Folds(), self.run
        if run is not None and run.encodes and not run.began and not self.compiled:
            logger.warning("%s", self.never_ran())

    # --- of the call at hand, for the sites ---

    @property
    def plan(self) -> Plan | None:
        call = self.call
        return None if call is None else call.plan

    @property
    def outside(self) -> bool:
        return not self.call.active

    @property
    def gamma(self) -> Tensor:
        call = self.call
        if call is None:
            raise MembraneError(
                "a wrapped projection was called before its denoiser; membranes see prompts at the denoiser's forward,"
                " call that"
            )
        return call.gamma

    def report(self) -> dict:
        """What fired in the last call, one entry per row the denoiser saw: see `membrane_report`.

        Raises:
            MembraneError: the pipeline has not run since (or only compiled, which keeps no record), or ran without the
                membranes.
        """
        run = self.run
        if run is None or not run.record.calls:
            raise MembraneError(
                self.never_ran()
                if run is not None and run.encodes and not self.compiled
                else "no report yet: the pipeline has not been called since apply_membranes (a compiled denoiser keeps"
                " no record)"
            )
        record = run.record
        rows = [row for plan in record.plans for row in self._rows(plan)]
        kept = {
            "modules": len(self.sites),
            "idle_modules": record.idle,
            "modes": modes_of(record.plans),
        }
        return membrane_report(self.bank, self.config, rows, self.steps(), **kept)

    def opening_maps(self) -> dict[str, list[Image.Image]]:
        """Where image-side membranes opened in the last call: concept -> a grey picture for each image, of the latents'
        size; white is fully open. {} without such membranes.

        Raises:
            MembraneError: the pipeline has not run since.
        """
        self.report()
        record = self.run.record
        rows = [(p.openings, row) for p in record.plans for row, shut in enumerate(p.negative) if not shut]
        own = [(m.concept, c) for m, c in zip(self.membranes, self.bank.columns, strict=True) if m.visual is not None]
        return {concept: opening_pictures(rows, column, record.grid) for concept, column in own}

    def _rows(self, plan: Plan) -> list[dict]:
        """One entry a row."""
        found = []
        rows = zip(plan.hidden, plan.negative, plan.gates.tolist(), strict=True)
        for row, (hidden, negative, of_prompt) in enumerate(rows):
            gates, share = opened_row(of_prompt, [(plan.openings, row)], self.membranes, self.bank.columns)
            entry = self.run.record.prompts.find(hidden, negative)
            found.append(
                {
                    "kind": "negative" if negative else "positive",
                    "prompt": entry.prompt if entry else None,
                    "source": "prompt" if entry and entry.prompt is not None else "embeds",
                    "gamma": self.bank.named(gates),
                    "opened": share,
                }
            )
        return found

    def steps(self) -> list[dict]:
        """Several calls at one noise level are one step."""
        run = self.run
        steps: dict[float, dict] = {}
        for call in run.record.calls if run is not None else ():
            share = self._share(call.timestep, call.image_tokens)
            sigma = sigma_of(self.scheduler, self.family, call.timestep)
            steps[share] = {"share": share, "sigma": sigma, "active": call.active}
        return list(steps.values())

    def _share(self, timestep: Tensor, tokens: int) -> float | Tensor:
        known = None if torch.compiler.is_compiling() else self.run.timesteps(self.scheduler)
        return share_of(self.scheduler, self.family, timestep, tokens, known)

    # --- called by the hooks ---

    def begin(self, inputs: dict) -> _Call:
        """Look at the text and the step of a call of the denoiser."""
        hidden = inputs.get("encoder_hidden_states")
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden  # (text, image prompt) of IP-Adapter
        if hidden is None:
            raise MembraneError(
                "the denoiser was called without encoder_hidden_states: a membrane cannot see the prompt"
            )
        pooled = inputs.get("pooled_projections")
        timestep, sample = torch.as_tensor(inputs["timestep"]), inputs[self.sample_name]
        tokens, window = image_tokens(self.family, self.denoiser, sample), self.config.window
        if torch.compiler.is_compiling():
            gamma = self.bank(hidden, pooled, self._traced_negative(len(hidden))) * self.strength
            share = self._share(timestep, tokens) if self.images or not window.whole else 0.0
            if not window.whole:
                gamma = gamma * window.contains(share).to(gamma)
            return _Call(timestep, tokens, True, None, gamma.to(hidden.dtype), share=share, text=hidden.shape[1])
        run = self.called()
        if not run.record.calls:
            self.folds.verify()
        share = 0.0
        if self.images or not window.whole:
            timestep = on_host(timestep)
            share = self._share(timestep, tokens)
        inside = window.whole or bool(window.contains(share))
        run.record.grid = grid_of(inputs, sample)
        run.record.calls.append(_Step(timestep, tokens, inside))
        plan, new = self._plan_of(run, hidden, pooled)
        gamma = plan.gamma.to(hidden.dtype)
        gamma = gamma if inside else torch.zeros_like(gamma)
        return _Call(timestep, tokens, inside, plan, gamma, new, share, hidden.shape[1])

    def finish(self, call: _Call, output):
        """After the first call of a plan: did the wrapped projections run at all?"""
        if torch.compiler.is_compiling():
            return output
        plan, alone = call.plan, self.traced is call
        if len(plan.ran) < len(self.sites):
            self.graphs = self.graphs or any(site.graphed for site in self.sites)
        if self.graphs and len(plan.ran) < len(self.sites) and not alone:
            raise MembraneError(
                f"another thread called this {type(self.denoiser).__name__} at the same time, and parts of it are"
                " compiled, which keep one prompt at a time: call it from one thread, or do not compile it"
            )
        if call.watched:
            self._check_sites(call)
        return output

    def _plan_of(self, run: Run, hidden: Tensor, pooled: Tensor | None) -> tuple[Plan, bool]:
        """The remembered plan of this text batch, or a new one, in whose first call the sites are watched."""
        plans = run.record.plans
        plan = next((plan for plan in plans[-_PLANS:] if plan.fits(hidden, pooled) and plan.said == said()), None)
        new = plan is None
        if plan is None:
            plan = self._new_plan(run, hidden, pooled)
            plans.append(plan)
            run.seen += 1
            for old in plans[:-_PLANS]:
                old.forget()
            for site in self.sites:
                site.graphed = False
        if plan.uniform and not plan.neutral and plan is not run.record.current:
            self.folds.claim(plan)
        run.record.current = plan
        return plan, new

    def _new_plan(self, run: Run, hidden: Tensor, pooled: Tensor | None) -> Plan:
        grad = torch.is_grad_enabled()
        # a row of unknown text counts as positive: it is judged
        negative = tuple(bool(row) for row in self.negative_rows(hidden))
        self._recognise(run, hidden, negative)
        with torch.set_grad_enabled(grad and hidden.requires_grad):
            gates = self.bank(hidden, pooled, negative, run.record.prompts)
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
            said=said(),
            negative=negative,
        )

    def _check_sites(self, call: _Call) -> None:
        idle = tuple(site.key for site in self.sites if site not in call.plan.ran and not site.graphed)
        self.here.record.idle = idle
        if len(idle) == len(self.sites):
            raise MembraneError(
                f"none of the {len(self.sites)} wrapped projections ran (first: {idle[0]}); were the attention"
                " layers fused (fuse_qkv_projections) or replaced? Undo that, then apply_membranes again"
            )
        if idle:
            logger.warning("%d of %d wrapped projections did not run, e.g. %s", len(idle), len(self.sites), idle[0])

    def begin_run(self, encoded, arguments: dict) -> None:
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
                self.here.record.prompts.add(hidden, wordings(self.pipe, *texts), negative)
                return
        self.here.record.prompts.add(hidden, [Wording(None, (), ())] * len(hidden), negative)

    def _recognise(self, run: Run, hidden: Tensor, negative: tuple[bool, ...]) -> None:
        """The words of rows that a text encoder was seen to read, for a pipeline that nobody listens to."""
        for text in run.texts:
            if text.sure or not text.prompts or run.record.prompts.known(hidden):
                continue
            for row, prompt in zip(text.rows, text.prompts, strict=True):
                for number in same_rows(hidden, row[None]).nonzero().flatten().tolist():
                    words = wordings(self.words, [prompt])
                    run.record.prompts.add(hidden[number : number + 1], words, negative[number])

    def _traced_negative(self, count: int) -> tuple[bool, ...] | None:
        """In a graph: None goes by what is on record; where guidance is two calls, by the branch that is named."""
        if self.family.one_call:
            return None
        context = vars(self.denoiser).get("cache_context")
        return (context is not None and context.name == "uncond",) * count

    def _place(self, device: torch.device, dtype: torch.dtype) -> None:
        self.bank.place(device)
        for site in self.sites:
            site.place(device, dtype)

    def never_ran(self) -> str:
        return (
            f"encode_prompt was called {self.run.encodes if self.run else 0} time(s), but the membranes on"
            f" pipe.{self.attribute} never ran: the images, if any, are not protected"
        )


def _strings(prompt) -> list[str]:
    if prompt is None:
        return []
    return [prompt] if isinstance(prompt, str) else [p for p in prompt if isinstance(p, str)]
