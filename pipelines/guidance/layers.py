"""The attention seam on diffusers' layers: values that text gives, and outputs over the prompt and over the harm.

Values: where text becomes them (`attn2.to_v` of UNets, `add_v_proj` of joint attention, Flux's single blocks). Of UNets
the categories' are computed from their embeddings; in transformers, where text changes from block to block, they are
read off rows that are carried beside the batch in the first step, and kept.

Outputs: in cross-attention a second attention over the harm, whose keys and values are kept for the run; in joint
attention the harm's text is a row beside the batch, which shares its image tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...methods.errors import GuidanceError
from ...methods.modules import is_own_forward
from ..family import Family
from ..hooks import others_at, untouched

__all__ = ["attention_hooks", "joint_of", "needs_rows"]

_OUTERMOST = (
    0.5  # outside of hooks that change weights, inside of those that push outputs, however methods were applied
)
_VALUES = re.compile(r"(^|\.)(attn2\.to_v|add_v_proj|single_transformer_blocks\.\d+\.attn\.to_v)$")
_ATTENTION = re.compile(r"(^|\.)attn2?$")


def needs_rows(family: Family) -> bool:
    """Whether the text of a category must be carried beside the batch to be read: text changes from block to block."""
    return not family.cross_attention


def attention_hooks(handle, denoiser: nn.Module, family: Family) -> list[tuple[nn.Module, Callable]]:
    """(module, hook) of each layer at which the handle's algorithms act.

    Raises:
        GuidanceError: there is none.
    """
    config, found = handle.config, []
    modules = dict(denoiser.named_modules())
    crossed = "attn2" not in family.self_attention  # SD3.5's is self-attention
    if config.having("values"):
        layers = [(p, m) for p, m in modules.items() if _VALUES.search(p) and (crossed or "attn2" not in p)]
        found += [(m, Values(handle, p, _heads(modules, p), "single_" in p)) for p, m in layers]
    if config.having("outputs"):
        layers = [
            (p, m)
            for p, m in modules.items()
            if _ATTENTION.search(p)
            and (p.endswith("attn2") if crossed and _has(modules, "attn2") else p.endswith("attn"))
        ]
        for path, module in layers:
            found += _output_hooks(handle, path, module, family)
    if (config.having("values") or config.having("outputs")) and not found:
        raise GuidanceError(
            f"0 attention layers of this {type(denoiser).__name__} were recognised (attn2, attn, add_v_proj); adavd and"
            " nag act at those: take sld or safree"
        )
    return found


def _has(modules: dict[str, nn.Module], name: str) -> bool:
    return any(path.endswith(name) for path in modules)


def _heads(modules: dict[str, nn.Module], path: str) -> int:
    return int(modules[path.rpartition(".")[0]].heads)


def _output_hooks(handle, path: str, module: nn.Module, family: Family) -> list[tuple[nn.Module, Callable]]:
    out = getattr(module, "to_out", None)
    projection = out[0] if out is not None else None
    if not needs_rows(family):
        site = CrossOutputs(handle, path, module)
        return [(module.to_q, site.query), (projection, site.combine)]
    if projection is None:  # Flux's single blocks, whose output projection is the block's
        return [(module, SingleOutputs(handle, path))]
    site = JointOutputs(handle, path)
    return [(module, site.share), (projection, site.combine)]


class _Hook:
    """A bound hook that says where it wants to stand."""

    outermost = _OUTERMOST

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)


class Values:
    """Around a projection of text to values."""

    outermost = _OUTERMOST

    def __init__(self, handle, path: str, heads: int, single: bool):
        self.handle, self.path, self.heads, self.single = handle, path, heads, single

    def __call__(self, original: Callable, module: nn.Module, x: Tensor, *args, **kwargs):
        values = original(x, *args, **kwargs)
        call = self.handle.call
        if call is None or not call.active or not call.positive:
            return values
        rows = [row for row in call.positive if self.handle.guides(row, call)]
        if not rows:
            return values
        call.edited += 1
        kept = self._kept(module, x, values, rows)
        if kept is None:
            kept = self._edited(call, values, rows, self._harm(module, call, values))
            self._keep(module, x, values, rows, kept)
        self.handle.acted(self.path, rows, kept[1])
        return kept[0]

    def _edited(self, call, values: Tensor, rows: list[int], harm: Tensor) -> tuple[Tensor, Tensor]:
        config, stretch = self.handle.config, slice(0, call.text if self.single else values.shape[1])
        part = values[rows][:, stretch]
        share = torch.zeros(len(rows), device=values.device)
        for algorithm in config.having("values"):
            edited, taken = algorithm.edit_values(part, harm, self.heads, config.strength)
            if self.handle.begins:
                edited[:, 0] = part[:, 0]  # the begin-of-text token is no word
            part, share = edited, share + taken
        values = values.clone()
        values[rows, stretch] = part
        return values, share

    def _plain(self, module: nn.Module, x: Tensor, values: Tensor) -> bool:
        """Whether these values depend on the text and the layer's own weight alone, so that they serve all steps."""
        return (
            not needs_rows(self.handle.family)
            and not torch.compiler.is_compiling()
            and not values.requires_grad
            and not x.is_inference()
            and isinstance(module, nn.Linear)
            and getattr(type(module), "_semiperm_base", type(module)) is nn.Linear
            and is_own_forward(module)
            and not others_at(module, self.handle.NAME)
            and not module._forward_hooks
            and not module._forward_pre_hooks
        )

    def _kept(self, module: nn.Module, x: Tensor, values: Tensor, rows: list[int]) -> tuple[Tensor, Tensor] | None:
        """What was made of the same text before: text is given to cross-attention as the same tensor in every step."""
        known = self.handle.now.edited.get(self.path)
        if known is None or known[0] is not x or known[1] != self._state(module, x, values, rows):
            return None
        return known[2] if self._plain(module, x, values) else None

    def _keep(self, module: nn.Module, x: Tensor, values: Tensor, rows: list[int], made: tuple[Tensor, Tensor]) -> None:
        if self._plain(module, x, values):
            self.handle.now.edited[self.path] = x, self._state(module, x, values, rows), made

    @staticmethod
    def _state(module: nn.Module, x: Tensor, values: Tensor, rows: list[int]) -> tuple:
        weight = module.weight
        return x._version, id(weight), weight._version, values.dtype, values.device, tuple(rows)

    def _harm(self, module: nn.Module, call, values: Tensor) -> Tensor:
        """(R, C): the values of the categories' phrases at their last tokens."""
        run, texts = self.handle.now, self.handle.texts
        if self.path not in run.values:
            if needs_rows(self.handle.family):
                rows = call.rows_of("values")[:: len(call.positive)]
                if not rows:
                    raise GuidanceError(
                        f"adavd: {self.path} has no values of the categories; apply safe guidance again"
                    )
                found = [values[row, p] for row, ps in zip(rows, texts.positions, strict=True) for p in ps]
            else:
                states = [texts.phrases[i, p] for i, ps in enumerate(texts.positions) for p in ps]
                found = list(untouched(module)(torch.stack(states).to(values)))
            run.values[self.path] = torch.stack(found).detach()
        return run.values[self.path]


class CrossOutputs:
    """Cross-attention: the same queries over the harm."""

    def __init__(self, handle, path: str, attention: nn.Module):
        self.handle, self.path, self.attention = handle, path, attention
        self.query, self.combine = _Hook(self._query), _Hook(self._combine)

    def _query(self, original: Callable, module: nn.Module, x: Tensor, *args, **kwargs):
        query = original(x, *args, **kwargs)
        call = self.handle.call
        if call is not None and call.active:
            call.queries[self.path] = query
        return query

    def _combine(self, original: Callable, module: nn.Module, x: Tensor, *args, **kwargs):
        call = self.handle.call
        query = None if call is None else call.queries.pop(self.path, None)
        rows = [] if query is None else [row for row in call.positive if self.handle.guides(row, call)]
        if not rows:
            return original(x, *args, **kwargs)
        negative = self._over_harm(query[rows])
        combined, share = self.handle.config.combine(x[rows], negative)
        self.handle.acted(self.path, rows, share)
        call.outputs += 1
        x = x.clone()
        x[rows] = combined
        return original(x, *args, **kwargs)

    def _over_harm(self, query: Tensor) -> Tensor:
        """Attention of these queries (B, N, C) over all categories' text; its keys and values are kept for the run."""
        attention, run = self.attention, self.handle.now
        if f"{self.path}.k" not in run.values:
            text = self.handle.texts.together.to(query)
            for name in ("k", "v"):
                run.values[f"{self.path}.{name}"] = untouched(getattr(attention, f"to_{name}"))(text).detach()
        q, k, v = (
            rearrange(t, "b n (h c) -> b h n c", h=attention.heads)
            for t in (query, run.values[f"{self.path}.k"], run.values[f"{self.path}.v"])
        )
        for name, norm in (("q", attention.norm_q), ("k", attention.norm_k)):
            if norm is not None:
                q, k = (norm(q), k) if name == "q" else (q, norm(k))
        k, v = (t.expand(len(q), -1, -1, -1) for t in (k, v))
        return rearrange(F.scaled_dot_product_attention(q, k, v, scale=attention.scale), "b h n c -> b n (h c)")


class JointOutputs:
    """Joint attention: the harm's row takes the image tokens of its prompt's row."""

    def __init__(self, handle, path: str):
        self.handle, self.path = handle, path
        self.share, self.combine = _Hook(self._share), _Hook(self._combine)

    def _share(self, original: Callable, module: nn.Module, hidden_states: Tensor, *args, **kwargs):
        rows, sources = output_rows(self.handle)
        if rows:
            hidden_states = hidden_states.clone()
            hidden_states[rows] = hidden_states[sources]
        return original(hidden_states, *args, **kwargs)

    def _combine(self, original: Callable, module: nn.Module, x: Tensor, *args, **kwargs):
        rows, sources = output_rows(self.handle)
        if rows:
            x = _with_combined(self.handle, self.path, x, rows, sources, slice(0, x.shape[1]))
        return original(x, *args, **kwargs)


class SingleOutputs:
    """The same where text and image are one sequence, text first."""

    outermost = _OUTERMOST

    def __init__(self, handle, path: str):
        self.handle, self.path = handle, path

    def __call__(self, original: Callable, module: nn.Module, hidden_states: Tensor, *args, **kwargs):
        rows, sources = output_rows(self.handle)
        if not rows:
            return original(hidden_states, *args, **kwargs)
        image = slice(self.handle.call.text, hidden_states.shape[1])
        hidden_states = hidden_states.clone()
        hidden_states[rows, image] = hidden_states[sources, image]
        return _with_combined(self.handle, self.path, original(hidden_states, *args, **kwargs), rows, sources, image)


def output_rows(handle) -> tuple[list[int], list[int]]:
    """(rows of the harm, the prompts' rows that they belong to) of the call at hand."""
    call = handle.call
    if call is None or not call.active:
        return [], []
    sources = next((list(extra.sources) for extra in call.extras if extra.kind == "outputs"), [])
    pairs = [(row, s) for row, s in zip(call.rows_of("outputs"), sources, strict=True) if handle.guides(s, call)]
    return [row for row, _ in pairs], [source for _, source in pairs]


def _with_combined(handle, path: str, x: Tensor, rows: list[int], sources: list[int], stretch: slice) -> Tensor:
    positive = x[sources][:, stretch]
    combined, share = handle.config.combine(positive, x[rows][:, stretch])
    handle.acted(path, sources, share)
    handle.call.outputs += 1
    x = x.clone()
    x[sources, stretch] = combined
    x[rows, stretch] = combined  # the same image from here on
    return x


def joint_of(family: Family, config: Any) -> bool:
    """Whether rows of the harm are carried in each step for the outputs seam."""
    return bool(config.having("outputs")) and needs_rows(family)
