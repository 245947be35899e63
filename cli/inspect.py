"""`semiperm inspect`: what a membrane file holds, and how a picture was made."""

import json
from pathlib import Path
from typing import Annotated

import typer

from . import common
from .guard import key_of, show_picture

EXAMPLE = "Example: semiperm inspect erased.safetensors"


def run(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A membrane, SPM or LoRA file or folder, or edited weights; or a PNG of `generate`.",
            show_default=False,
        ),
    ],
    concept: Annotated[
        str | None, typer.Option(metavar="NAME", help="What it erases, where the file does not say.")
    ] = None,
    guard_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of a picture: check its guard's seal with this file's secret.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
):
    """Show the layout, concepts, rank, alpha, wrapped modules, base model and size of all that generate reads.

    What a file adapts beside the denoiser's projections stands below the table: it is refused, or dropped by an option.
    Of a picture: prompt, membranes and what safe guidance did; exit code 1 where a seal is broken.
    """
    common.existing_adapter(file, "file")
    if file.suffix.lower() == ".png":
        show_picture(file, key_of(guard_key), as_json)
        return

    from ..methods.membranes.file import load_membranes
    from ..methods.membranes.layouts import adapter_file, membranes_in, read_adapter

    file = adapter_file(file)
    loaded = []
    described = {"file": str(file), "bytes": file.stat().st_size}
    if membranes_in(file):
        loaded = load_membranes(file, concept)
        described |= {"layout": "semiperm membranes", "membranes": [*map(describe, loaded)]}
        described |= {"left_out": [], "notes": []}
    else:
        described |= described_adapter(read_adapter(file), concept)
    if as_json:
        typer.echo(json.dumps(described, indent=2, ensure_ascii=False))
        return

    from rich.table import Table
    from rich.text import Text

    rows = described["membranes"]
    methods, bases = sorted({row["method"] for row in rows}), sorted({row["base_model"] or "unknown" for row in rows})
    console = common.console()
    size = f"{described['bytes'] / 1024:.0f} KiB"
    for line in (
        f"{file}: {size}, {described['layout']}, {len(rows)} membranes",
        f"method {', '.join(methods)}; base model {', '.join(bases)}",
    ):
        console.print(line, markup=False, soft_wrap=True)
    table = Table()
    for heading in ("concept", "also called", "rank", "alpha", "modules", "norm", "gate probe"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        becomes = f" -> {row['surrogate']}" if row["surrogate"] else ""
        called = row["concept"] if row["named"] else "not said (--concept NAME)"
        also = ", ".join(phrase for phrase in row["phrases"] if phrase != row["concept"])
        ranks, probe = "/".join(map(str, row["ranks"])) or "by the model", "yes" if row["probe"] else "no"
        alphas, norm = "/".join(f"{alpha:g}" for alpha in row["alphas"]), f"{row['norm']:.3g}" if row["alphas"] else "-"
        cells = (called + becomes, also, ranks, alphas or "-", str(row["modules"]), norm, probe)
        table.add_row(*map(Text, cells))
    console.print(table)
    if any(row["probe"] or row["visual"] for row in rows):
        common.show_gates(console, loaded)
    for line in described["left_out"] + described["notes"]:
        console.print(line, markup=False, soft_wrap=True)


def described_adapter(adapter, concept: str | None) -> dict:
    """The same of somebody else's file, read without its model: edited weights have a rank only beside that."""
    from ..methods.membranes.layouts import membrane_of
    from ..methods.membranes.types import LowRank, Membrane

    pairs, weights = adapter.pairs, {name: t for name, t in adapter.weights.items() if name.endswith(".weight")}
    left_out = []
    if adapter.text_encoder:
        left_out.append(f"text encoder: {len(adapter.text_encoder)} modules; --text-encoder drop leaves them out")
    biases = len(adapter.biases) + len([name for name in adapter.weights if name.endswith(".bias")])
    if biases:
        left_out.append(f"biases: {biases}; where they are edited, --bias drop leaves the edits out")
    rows = []
    if pairs or weights:
        import torch

        stand_in = {"": LowRank(torch.zeros(1, 1), torch.zeros(1, 1), 1.0)}
        method = "weights" if weights else "spm" if adapter.layout == "SPM" else "lora"
        row = describe(membrane_of(adapter, lambda label: Membrane(label, pairs or stand_in, method=method), concept))
        rows = [row if pairs else row | {"modules": len(weights), "ranks": [], "alphas": []}]
    return {"layout": adapter.layout, "membranes": rows, "left_out": left_out, "notes": list(adapter.notes)}


def describe(membrane) -> dict:
    """A JSON-ready description; `norm` is the Frobenius norm of the whole weight change."""
    import math

    squares, parts = 0.0, membrane.modules if membrane.visual is None else membrane.visual.sites
    for pair in membrane.modules.values():
        down, up = pair.down.flatten(1).double(), pair.up.flatten(1).double()
        # ||U D||^2 = tr(U^T U D D^T): r x r instead of out x in
        squares += pair.scale**2 * float(((up.T @ up) * (down @ down.T)).sum())
    return {
        "concept": membrane.concept,
        "named": membrane.named,
        "phrases": list(membrane.phrases),
        "surrogate": membrane.surrogate,
        "method": membrane.method,
        "ranks": sorted({part.rank for part in parts.values()}),
        "alphas": sorted({round(pair.alpha, 6) for pair in membrane.modules.values()}),
        "modules": len(membrane.keys),
        "norm": math.sqrt(max(squares, 0.0)),
        "kind": "low-rank" if membrane.visual is None else "visual",
        "visual": membrane.visual and side_of(membrane.visual),
        "probe": membrane.probe is not None,
        "detector": detector_of(membrane.probe),
        "base_model": membrane.base_model,
        "metadata": dict(membrane.metadata),
    }


def side_of(side) -> dict:
    """What is known of an image side, JSON-ready; `false_open` is a promise, `false_closed` was counted."""
    names = ("beta", "shares", "false_open", "calibrated", "false_closed", "checked")
    return {name: getattr(side, name) for name in names}


def detector_of(probe) -> dict | None:
    """What is known of a detector, JSON-ready; rates are shares of `checked` prompts kept out of its fit."""
    if probe is None:
        return None
    names = ("separation", "false_closed", "false_open", "checked", "tells")
    return {name: getattr(probe, name) for name in names}
