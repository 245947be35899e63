"""Membranes on a ComfyUI model: a clone of its ModelPatcher with object patches; the base weights are not touched.

Each wrapped projection gets a patched `forward` (its weights keep their names, so LoRA patches still find them), and
so does the diffusion model, which is where a call's text is seen. Patches that are there already are called through.
Every row of a batch is judged by its own text, however ComfyUI batches, splits or areas the conditionings.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import comfy.lora
import comfy.patcher_extension
import comfy.utils
import torch
from torch import Tensor

from ...methods.errors import MembraneError
from ...methods.membranes.base_model import check_base_models
from ...methods.membranes.config import MembraneConfig
from ...methods.membranes.gate_bank import GateBank
from ...methods.membranes.image_site import ImageSite, Openings, opened_row
from ...methods.membranes.packing import pack
from ...methods.membranes.record import membrane_report
from ...methods.membranes.sites import Folds, Plan, Site, modes_of
from ...methods.membranes.types import Membranes
from ..base_weights import base_weights
from ..extra_rows import Rows
from ..progress import Progress
from ..root_patch import add_around, add_root
from ..run_reports import RunReports
from .wordings import wording_of

logger = logging.getLogger(__name__)

ATTACHMENT = "semiperm_membranes"
_PLANS = 16  # text batches remembered: split and area conditionings take turns, rarely more than a few
_NEGATIVE = 1  # in ComfyUI's cond_or_uncond
_WRAPPER = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
_numbers = itertools.count()


def apply_membranes_to(
    model,
    membranes: Membranes,
    config: MembraneConfig | None = None,
    clip=None,
):
    """Return a clone of the model on which the membranes act; the given model stays as it is.

    Args:
        model: ComfyUI's ModelPatcher of an SD1.x, SD2, SDXL, SD3 or Flux model.
        config: how they act; strength 0 returns the model itself.
        clip: encodes the concept's phrases for the gates "paper" and "official".

    Raises:
        MembraneError: no membranes, a value outside its range, modules that this model has not, other shapes, another
            base model, or a gate that cannot be served.
    """
    if not membranes:
        raise MembraneError("no membranes to apply; connect Load Membrane or Erase Concept")
    config = config or MembraneConfig()
    weights = base_weights(model)
    targets, image_targets = _targets(model, membranes, weights), _image_targets(model, membranes, weights)
    if config.check_base:
        wrapped = {key: part_of(weights, *target) for key, target in targets.items()}
        wrapped |= {key: weights[f"{path}.weight"] for key, path in image_targets.items()}
        check_base_models(membranes, wrapped)
    bank = GateBank(_encoder(model, clip), membranes, config.gate, config.negative_rows)
    if config.strength == 0:
        return model
    patch = MembranePatch(membranes, config, bank, Progress(model.get_model_object("model_sampling")))
    patched = model.clone()
    for key, (path, part) in targets.items():
        module = comfy.utils.get_attr(model.model, path)
        site = Site(
            patch, key, module, pack(membranes, key, cross_terms=config.gate == "official"), cacheable=part is None
        )
        patch.sites.append(site)
        add_around(patched, f"{path}.forward", partial(through, site, module, part))
    for key, path in image_targets.items():  # outside of what changes a weight
        layer = _ImageLayer(patch, key)
        patch.sites.append(layer)
        add_around(patched, f"{path}.forward", layer.around)
    add_root(patched, patch.around)
    patched.add_wrapper_with_key(_WRAPPER, f"semiperm_membranes_{next(_numbers)}", patch.sample)
    patched.set_attachments(ATTACHMENT, patch)
    return patched


def report_of(model, samples: Tensor | None = None) -> dict:
    """What fired in a sampling run of a model from `apply_membranes_to` (of the last applied stack).

    Args:
        samples: what the run returned; None: the last run, whatever it drew.

    Returns:
        See `membrane_report`.

    Raises:
        MembraneError: no membranes on this model, it has not sampled, or none of its last runs returned these latents.
    """
    patch = model.get_attachment(ATTACHMENT)
    if patch is None:
        raise MembraneError(
            "this model carries no membranes (or their strength is 0); connect the model that comes out of Erase"
            " Concept or Apply Membranes"
        )
    return patch.report() if samples is None else patch.reports.of(samples)


def opening_maps_of(model, samples: Tensor) -> dict[str, Tensor]:
    """Where image-side membranes opened in the run that returned these latents: concept -> (images, H, W) in 0..1.

    Raises:
        MembraneError: as `report_of`.
    """
    report_of(model, samples)
    return model.get_attachment(ATTACHMENT).maps.of(samples)


class MembranePatch:
    """One stack at work on one model: the state its sites share, and the record of what fired."""

    def __init__(self, membranes: Membranes, config: MembraneConfig, bank: GateBank, progress: Progress):
        self.membranes, self.config, self.bank, self.progress = membranes, config, bank, progress
        self.strength = float(config.strength)
        self.sites: list[Site | _ImageLayer] = []
        self.share, self.text, self.grid = 0.0, 0, (1, 1)  # of the call at hand
        self.plan: Plan | None = None
        self.outside, self.gamma, self.folds = False, None, Folds()
        self.weights_fixed = True
        self._plans: list[tuple[Tensor, Plan]] = []
        self._rows: dict[tuple, _Row] = {}
        self._steps: list[dict] = []
        self._modes: list[str] = []
        self._called = False
        self.reports, self.maps = RunReports(MembraneError), RunReports(MembraneError)

    def sample(self, executor, *args, **kwargs):
        """Around a whole sampling run: nothing is carried from one to the next, and one that we missed is an error."""
        self._plans, self.plan, self._rows, self._steps, self._called = [], None, {}, [], False
        self.bank.recorded.begin()
        for kind, conds in (getattr(executor.class_obj, "conds", None) or {}).items():
            for cond in conds:
                wording = wording_of(embedding := cond.get("cross_attn"))
                if wording is not None:
                    self.bank.recorded.add(embedding, [wording], kind == "negative")
        patcher = getattr(executor.class_obj, "model_patcher", None)
        # hooks (scheduled LoRA) change weights in place between steps, and inference tensors would not tell
        self.weights_fixed = not getattr(patcher, "hook_patches", None)
        try:
            result = executor(*args, **kwargs)
        finally:
            self._modes = modes_of([plan for _, plan in self._plans])
            self._plans, self.plan = [], None
        if not self._called:
            raise MembraneError(
                "the model sampled, but the membranes on it never ran: another node replaced"
                " diffusion_model.forward; put Apply Membranes after that node"
            )
        if missed := self.config.window.missed(self._steps):  # no error: a second pass may lie outside on purpose
            logger.warning("Apply Membranes: %s", missed)
        self.reports.keep(result, self.report())
        self.maps.keep(result, self._maps())
        return result

    def around(self, original: Callable) -> Callable:
        """The diffusion model's forward, with a look at its text first."""

        def forward(*args, **kwargs):
            context = kwargs.get("context", args[2] if len(args) > 2 else None)
            if context is None:
                raise MembraneError("the model was called without text conditioning: a membrane cannot see the prompt")
            first, x = not self._called, args[0] if args else kwargs["x"]
            self.grid = tuple(x.shape[-2:])
            self._begin(context, kwargs.get("y"), kwargs.get("transformer_options") or {})
            output = original(*args, **kwargs)
            if first and not any(site.ran for site in self.sites):
                raise MembraneError(
                    f"none of the {len(self.sites)} wrapped projections ran (first: {self.sites[0].key}); another node"
                    " replaced the attention layers: put Apply Membranes after it"
                )
            return output

        return forward

    def _begin(self, context: Tensor, pooled: Tensor | None, options: dict) -> None:
        self._called = True
        # every step brings a new tensor with the same text: the remembered plan takes it for its own
        rows = Rows(len(context), options.get("cond_or_uncond") or [0], len(context))
        negative = tuple(rows.chunks[rows.chunk_of(i)] == _NEGATIVE for i in range(len(context)))
        known = ((t, p) for t, p in self._plans if t.shape == context.shape and p.negative == negative)
        plan = next((p for t, p in known if torch.equal(t, context)), None)
        if plan is None:
            plan = self._make(context, pooled, negative)
            self._plans = [(context.clone(), plan), *self._plans][:_PLANS]
        plan.hidden, plan.pooled, self.plan = context, pooled, plan
        share, sigma = self.progress(options)
        self.share, self.text = share, context.shape[1]
        self.outside = not self.config.window.contains(share)
        if not self._steps or self._steps[-1]["sigma"] != sigma:
            self._steps.append({"share": share, "sigma": sigma, "active": not self.outside})

    def _make(self, context: Tensor, pooled: Tensor | None, negative: tuple[bool, ...]) -> Plan:
        self.bank.place(context.device)
        gamma = self.bank(context, pooled, negative)
        if not torch.isfinite(gamma).all():
            raise MembraneError("a gate is NaN or Inf: the text conditioning is not finite; check the text encoder")
        openings = Openings()
        for i, (text, values) in enumerate(zip(context, gamma.tolist(), strict=True)):
            entry = self.bank.recorded.find(text, negative[i])
            fired = {
                "kind": "negative" if negative[i] else "positive",
                "prompt": entry.prompt if entry else None,
                "source": "prompt" if entry else "embeds",
            }
            # a plan that was dropped and made again is no new row
            row = self._rows.setdefault((i, negative[i], float(text.float().sum()), *values), _Row(fired, values, []))
            row.seen.append((openings, i))
        gates, gamma = gamma, gamma * self.strength
        return Plan(
            hidden=context,
            pooled=None,
            stamps=(),
            gates=gates,
            gamma=gamma,
            mode=self.config.mode,
            neutral=not bool(gamma.any()),
            uniform=bool((gamma == gamma[:1]).all()),
            grad=torch.is_grad_enabled(),
            negative=negative,
            openings=openings,
        )

    def _maps(self) -> dict[str, Tensor]:
        found, rows = {}, [row for row in self._rows.values() if row.fired["kind"] == "positive"]
        for membrane, column in zip(self.membranes, self.bank.columns, strict=True):
            if membrane.visual is not None and rows:
                each = [[o.map(i, column, *self.grid) for o, i in row.seen] for row in rows]
                found[membrane.concept] = torch.stack([torch.stack(maps).amax(dim=0) for maps in each])
        return found

    def report(self) -> dict:
        """Of the last run; see `report_of`."""
        if not self._called:
            raise MembraneError("no report yet: this model has not sampled; connect the sampler's latent to the report")
        idle = [site.key for site in self.sites if not site.ran]
        kept = {"modules": len(self.sites), "idle_modules": idle, "modes": self._modes}
        rows = []
        for row in self._rows.values():
            gates, opened = opened_row(row.gates, row.seen, self.membranes, self.bank.columns)
            rows.append(row.fired | {"gamma": self.bank.named(gates), "opened": opened})
        return membrane_report(self.bank, self.config, rows, self._steps, **kept)


class _Row(NamedTuple):
    """What is known of one row of text: for people, its prompt's gates, and (openings, its number in them)."""

    fired: dict
    gates: list[float]
    seen: list[tuple[Openings, int]]


def text_first(key: str) -> bool:
    """Whether a layer's tokens are text, then the image: Flux's single blocks'."""
    return "_single_transformer_blocks_" in key


class _ImageLayer:
    """One layer that image-side membranes read, in one patch."""

    def __init__(self, patch: MembranePatch, key: str):
        self.patch, self.key, self.ran = patch, key, False
        own = zip(patch.bank.columns, patch.membranes, strict=True)
        parts = [(column, m.visual) for column, m in own if m.visual is not None and key in m.visual.sites]
        self.site = ImageSite(key, parts, patch.bank.width, text_first(key))

    def around(self, original: Callable) -> Callable:
        def forward(x, *args, **kwargs):
            y, plan, patch = original(x, *args, **kwargs), self.patch.plan, self.patch
            self.ran = True
            if plan is None or plan.neutral or patch.outside:
                return y
            self.site.place(y.device)
            gamma = plan.gamma.to(y.device)
            y, gates = self.site.edit(y, self.site.packed_at(patch.share, y.dtype), gamma, patch.text)
            plan.openings.add(gates.detach(), self.site, gamma)
            return y

        return forward


def through(site: Callable, module, part: tuple[int, int] | None, original: Callable) -> Callable:
    """A patch of a layer's forward: a site's hook on it, or on some rows of what it answers."""

    def forward(x, *args, **kwargs):
        if part is None:
            return site(original, module, x, *args, **kwargs)
        y = original(x, *args, **kwargs).clone()  # a slice of a projection that computes several at once
        y.narrow(-1, *part).copy_(site(lambda *_, **__: y.narrow(-1, *part), module, x))
        return y

    return forward


def _targets(model, membranes: Membranes, weights: dict[str, Tensor]) -> dict[str, tuple[str, tuple[int, int] | None]]:
    """Module key -> (path in the model, (offset, length) of its output rows or None)."""
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    found = {key: known[key] for key in membranes.module_keys if key in known}
    if len(found) < len(membranes.module_keys):
        missing = next(key for key in membranes.module_keys if key not in known)
        example = next((key for key in known if key.startswith("lora_")), "none")
        raise MembraneError(
            f"the membranes match {len(found)} of {len(membranes.module_keys)} modules of this"
            f" {type(model.model).__name__} model; {missing!r} does not exist here (it has e.g. {example!r}): they were"
            " made for another architecture, or wrap a text encoder, which is not supported"
        )
    targets = {}
    for key, target in found.items():
        if (place := target_of(target)) is None:
            raise MembraneError(f"{key} is stored transformed in this model; membranes on it are not supported here")
        targets[key] = place
        weight, pair = part_of(weights, *targets[key]), next(m.modules[key] for m in membranes if key in m.modules)
        if tuple(weight.shape[:2]) != (pair.out_features, pair.in_features) or math.prod(weight.shape[2:]) != 1:
            raise MembraneError(
                f"{key}: a membrane of (out, in) = {(pair.out_features, pair.in_features)} on a weight"
                f" {tuple(weight.shape)}; it was made for another base model"
            )
    return targets


def _image_targets(model, membranes: Membranes, weights: dict[str, Tensor]) -> dict[str, str]:
    """Layer's key -> its path in the model."""
    known, found = comfy.lora.model_lora_keys_unet(model.model, {}), {}
    for key in membranes.image_keys:
        target = known.get(key)
        channels = next(m.visual.sites[key].channels for m in membranes if m.visual and key in m.visual.sites)
        if not isinstance(target, str) or weights[target].shape[0] != channels:
            raise MembraneError(
                f"an image-side membrane reads {channels} channels of {key}, which this {type(model.model).__name__}"
                f" model {'has not' if target is None else 'has otherwise'}: it was made for another model"
            )
        found[key] = target.removesuffix(".weight")
    return found


def target_of(target) -> tuple[str, tuple[int, int] | None] | None:
    """(path in the model, (offset, length) of its output rows or None) of an entry of ComfyUI's table of LoRA keys.

    None where the weight is stored transformed, so that no rows of it are the projection's own.
    """
    name, part = (target, None) if isinstance(target, str) else (target[0], target[1])
    if part is not None and (part[0] != 0 or len(target) > 2):
        return None
    return name.removesuffix(".weight"), part and (part[1], part[2])


def part_of(weights: dict[str, Tensor], path: str, part: tuple[int, int] | None) -> Tensor:
    weight = weights[f"{path}.weight"]
    return weight if part is None else weight.narrow(0, *part)


def _encoder(model, clip) -> Callable:
    @functools.cache  # once for all membranes
    def space():
        from .concept_text import text_space

        return text_space(model, clip)

    def encode(phrases):
        if clip is None:
            raise MembraneError(
                "the gates 'paper' and 'official' compare the prompt with the concept's phrases, and 'auto' takes"
                " 'paper' for a membrane without a probe: connect CLIP to this node, or choose the gate 'always'"
            )
        return space().encode(phrases)

    return encode
