"""What a graph will do to the mark, seen before anything is drawn.

Passes that draw over a signed picture without signing, and samplers that nobody checked, would lose it without a word.

A node sees what is wired into it, never what is done with what it returns; the queued graph tells.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from ...methods.errors import WatermarkError

MODEL_NODE, NOISE_NODE = "SemipermWatermarkModel", "SemipermWatermarkNoise"
_DRAWN = ("LATENT", "IMAGE")
_DRAWS = ("MODEL", "GUIDER")
LATER_PASSES = ("refuse", "allow")

Prompt = dict[str, dict]  # node id -> {"class_type", "inputs"}, as /prompt takes it
Types = Callable[[str], tuple[dict[str, str], list[str]]]  # class -> types of its inputs by name, of its outputs


def node_types(class_type: str) -> tuple[dict[str, str], list[str]]:
    """`Types` of the nodes that ComfyUI knows; of others nothing."""
    import nodes  # ComfyUI's own: ours is known by another name

    known = nodes.NODE_CLASS_MAPPINGS.get(class_type)
    if known is None:
        return {}, []
    found = {}
    for kind, inputs in known.INPUT_TYPES().items():
        if kind != "hidden":
            for name, (kind_of_input, *_) in inputs.items():
                found[name] = "COMBO" if isinstance(kind_of_input, (list, tuple)) else kind_of_input
    return found, list(known.RETURN_TYPES)


def queued_prompt() -> Prompt:
    """The graph that ComfyUI is running; {} where there is none."""
    from server import PromptServer

    running = PromptServer.instance.prompt_queue.get_current_queue()[0]
    return running[0][2] if running else {}


def fingerprint() -> str:
    """What would lose the mark in the graph that runs: a node is asked again when that changes, and refuses then."""
    return "; ".join(losses(queued_prompt(), node_types))


def losses(prompt: Prompt, types: Types, only: str | None = None) -> list[str]:
    """What in this graph would lose the mark, in words.

    Args:
        only: the id of a Watermark Model or Watermark Noise, where only its pictures count.
    """
    graph = _Graph(prompt, types)
    signing = [key for key in graph.nodes(MODEL_NODE, NOISE_NODE) if only in (None, key)]
    found = []
    for key in signing:
        if prompt[key]["class_type"] == NOISE_NODE:
            found += graph.unchecked(key)
        if prompt[key]["inputs"].get("later_passes") != "allow":
            found += [graph.told(sampler) for sampler in graph.overdrawn(key)]
    return list(dict.fromkeys(found))


def check_graph(hidden) -> None:
    """Refuse a graph in which the mark of this node would be lost.

    Args:
        hidden: the node's, with `prompt` and `unique_id`.

    Raises:
        WatermarkError: another sampler draws from the noise than the one that was checked, or a later pass adds noise
            to a signed picture and does not sign it.
    """
    prompt, key = hidden.prompt or {}, str(hidden.unique_id)
    if key in prompt and (found := losses(prompt, node_types, only=key)):
        raise WatermarkError("; ".join(found))


class _Graph:
    def __init__(self, prompt: Prompt, types: Types):
        self.prompt, self.types = prompt, functools.cache(types)

    def nodes(self, *classes: str) -> list[str]:
        return [key for key, node in self.prompt.items() if node.get("class_type") in classes]

    def links(self, key: str, kinds: tuple[str, ...]) -> Iterator[tuple[str, str, int]]:
        """(input, id and output that it comes from) of a node's wired inputs of these types."""
        inputs, _ = self.types(self.prompt[key]["class_type"])
        for name, value in self.prompt[key]["inputs"].items():
            if isinstance(value, list) and len(value) == 2 and str(value[0]) in self.prompt:
                source, out = str(value[0]), int(value[1])
                outputs = self.types(self.prompt[source]["class_type"])[1]
                kind = outputs[out] if out < len(outputs) else inputs.get(name, "")
                if kind in kinds or (kind == "*" and inputs.get(name) in kinds):
                    yield name, source, out

    def before(self, key: str, kinds: tuple[str, ...]) -> set[str]:
        """Every node that what flows into this one along links of these types came through."""
        found, left = set(), [key]
        while left:
            for _, source, _ in self.links(left.pop(), kinds):
                if source not in found:
                    found.add(source)
                    left.append(source)
        return found

    def draws(self, key: str) -> bool:
        """Whether this node is a sampler: it takes a model, and a sampler or its name, and returns what it drew."""
        node = self.prompt[key]
        inputs, outputs = self.types(node["class_type"])
        chooses = "sampler_name" in inputs or "SAMPLER" in inputs.values()
        return chooses and any(kind in _DRAWN for kind in outputs) and any(self.links(key, _DRAWS))

    def adds_noise(self, key: str) -> bool:
        inputs = self.prompt[key]["inputs"]
        off = inputs.get("add_noise") in ("disable", False) or inputs.get("denoise") == 0
        sources = [self.prompt[source]["class_type"] for _, source, _ in self.links(key, ("NOISE",))]
        return not off and "DisableNoise" not in sources

    def signed_by(self, key: str) -> set[str]:
        """The nodes of ours that sign what this sampler draws."""
        models = {k for k in self.before(key, _DRAWS) if self.prompt[k]["class_type"] == MODEL_NODE}
        noises = {k for _, k, _ in self.links(key, ("NOISE",)) if self.prompt[k]["class_type"] == NOISE_NODE}
        return models | noises

    def overdrawn(self, signer: str) -> list[str]:
        """Samplers that add noise to a picture which this node signed, and sign nothing themselves."""
        samplers = [key for key in self.prompt if self.draws(key)]
        signed = {key for key in samplers if signer in self.signed_by(key)}
        return [
            key
            for key in samplers
            if self.adds_noise(key) and not self.signed_by(key) and signed & self.before(key, _DRAWN)
        ]

    def told(self, key: str) -> str:
        return (
            f"{self.name(key)} adds noise to a signed picture and signs none of it, which draws over the mark;"
            " expected the MODEL of Watermark Model (or the NOISE of Watermark Noise) there, too: wire it, or set"
            " later_passes to allow where the mark may be lost"
        )

    def unchecked(self, signer: str) -> Iterator[str]:
        """Consumers of this node's noise whose sampler is not the one that is wired into it."""
        checked = self.prompt[signer]["inputs"].get("sampler")
        for key, node in self.prompt.items():
            if any(source == signer for _, source, _ in self.links(key, ("NOISE",))):
                used = node["inputs"].get("sampler")
                if isinstance(used, list) and not self.same(used, checked):
                    yield (
                        f"{self.name(key)} draws from the signed noise with another sampler than the one that is"
                        " wired into Watermark Noise, so that nothing checked it; expected one node wired into both"
                    )

    def same(self, one, other) -> bool:
        """Whether two links bring the same: one output, or that of two nodes with equal inputs."""
        if one == other or not (isinstance(one, list) and isinstance(other, list)):
            return one == other
        if one[1] != other[1] or not {str(one[0]), str(other[0])} <= set(self.prompt):
            return False
        a, b = (self.prompt[str(link[0])] for link in (one, other))
        if a["class_type"] != b["class_type"] or set(a["inputs"]) != set(b["inputs"]):
            return False
        return all(self.same(value, b["inputs"][name]) for name, value in a["inputs"].items())

    def name(self, key: str) -> str:
        node = self.prompt[key]
        return f"{node.get('_meta', {}).get('title') or node['class_type']} (node {key})"
