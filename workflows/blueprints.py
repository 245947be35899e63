"""Subgraph blueprints: several of our nodes as one, in the node library of newer ComfyUIs. build.py writes them."""

import uuid
from typing import NamedTuple

GAP = 60


class Blueprint(NamedTuple):
    """A node made of nodes.

    Args:
        api: its nodes, as in an API graph.
        inputs: (name, type, [(node, input)]) of the whole. outputs: (name, type, node, output).
        shown: (node, widget) of those that stand on its outside.
    """

    api: dict
    inputs: list
    outputs: list
    shown: list


def _node(kind: str, title: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}


_SOLVE = _node(
    "SemipermSolveMembranes", "Solve Membranes",
    concept="", surrogate="", preserve="", method="uce", rank=2, push=1.0, preserve_scale=8.0,
)  # fmt: skip
_LOAD = _node(
    "SemipermLoadMembrane", "Load Membrane",
    membrane_name="semiperm/canvas_robot.safetensors", concept="", text_encoder="refuse",
)  # fmt: skip
_APPLY = _node(
    "SemipermApplyMembranes", "Apply Membranes",
    membranes=["1", 0], strength=1.0, gate="auto", start=0.0, end=1.0, negative_rows=False,
)  # fmt: skip
_ERASED = ("MODEL", "MODEL", "2", 0)
BLUEPRINTS = {
    "Erase a concept": Blueprint(
        {"1": _SOLVE, "2": _APPLY},
        [("model", "MODEL", [("1", "model"), ("2", "model")]), ("clip", "CLIP", [("1", "clip"), ("2", "clip")])],
        [_ERASED, ("membranes", "SEMIPERM_MEMBRANES", "1", 0)],
        [("1", "concept"), ("1", "surrogate"), ("2", "strength"), ("2", "gate")],
    ),
    "Erase by file": Blueprint(
        {"1": _LOAD, "2": _APPLY},
        [("model", "MODEL", [("2", "model")]), ("clip", "CLIP", [("2", "clip")])],
        [_ERASED],
        [("1", "membrane_name"), ("2", "strength"), ("2", "gate")],
    ),
}


def blueprint(name: str, parts: Blueprint, nodes: dict[str, dict]) -> dict:
    """A UI graph of one node that is a subgraph, as ComfyUI reads blueprints.

    Args:
        nodes: those of `parts.api` as litegraph has them, without position and links; changed.
    """
    whole, links = uuid.uuid5(uuid.NAMESPACE_URL, f"semiperm/{name}"), []  # the same at every build

    def link(origin: int, out: int, target: int, index: int, kind: str) -> int:
        ends = {"origin_id": origin, "origin_slot": out, "target_id": target, "target_slot": index}
        links.append({"id": len(links) + 1, **ends, "type": kind})
        return len(links)

    def into(origin: int, out: int, key: str, input_name: str, kind: str) -> int:
        index, slot = next((i, s) for i, s in enumerate(nodes[key]["inputs"]) if s["name"] == input_name)
        slot["link"] = link(origin, out, int(key), index, kind)
        return slot["link"]

    def end(way: str, slot: str, kind: str, made: list[int]) -> dict:
        return {"id": str(uuid.uuid5(whole, f"{way} {slot}")), "name": slot, "type": kind, "linkIds": made}

    for key, node in parts.api.items():
        for input_name, value in node["inputs"].items():
            if isinstance(value, list):
                source = nodes[value[0]]["outputs"][value[1]]
                source["links"].append(into(int(value[0]), value[1], key, input_name, source["type"]))
    left = 0
    for order, node in enumerate(nodes.values()):
        node |= {"pos": [left, 0], "order": order}
        left += node["size"][0] + GAP
    inputs = [
        end("in", slot, kind, [into(-10, index, *target, kind) for target in targets])
        for index, (slot, kind, targets) in enumerate(parts.inputs)
    ]
    outputs = []
    for index, (slot, kind, key, out) in enumerate(parts.outputs):
        number = link(int(key), out, -20, index, kind)
        nodes[key]["outputs"][out]["links"].append(number)
        outputs.append(end("out", slot, kind, [number]))
    state = {"lastGroupId": 0, "lastNodeId": len(nodes), "lastLinkId": len(links), "lastRerouteId": 0}
    subgraph = {
        "id": str(whole), "version": 1, "state": state, "revision": 0, "config": {}, "name": name,
        "inputNode": {"id": -10, "bounding": [-200, 0, 120, 100]},
        "outputNode": {"id": -20, "bounding": [left, 0, 120, 100]},
        "inputs": inputs, "outputs": outputs, "widgets": [], "nodes": list(nodes.values()), "groups": [],
        "links": links, "extra": {},
    }  # fmt: skip
    instance = {
        "id": 1, "type": str(whole), "title": name, "pos": [0, 0], "size": [360, 300], "flags": {}, "order": 0,
        "mode": 0, "inputs": [{"name": slot, "type": kind, "link": None} for slot, kind, _ in parts.inputs],
        "outputs": [{"name": slot, "type": kind, "links": []} for slot, kind, *_ in parts.outputs],
        "properties": {"proxyWidgets": [list(widget) for widget in parts.shown], "cnr_id": "semiperm"},
        "widgets_values": [],
    }  # fmt: skip
    graph = {"revision": 0, "last_node_id": 1, "last_link_id": 0, "nodes": [instance], "links": [], "groups": []}
    return graph | {"definitions": {"subgraphs": [subgraph]}, "config": {}, "extra": {}, "version": 0.4}
