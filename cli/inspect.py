"""`semiperm inspect`: what a membrane file holds."""

import json
from pathlib import Path
from typing import Annotated

import typer

from . import common

EXAMPLE = "Example: semiperm inspect erased.safetensors"


def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A membrane, SPM or LoRA file.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
):
    """Show the concepts, method, rank, wrapped modules, base model and size of a membrane file."""
    common.existing_file(file, "file")

    from ..methods.membranes.file import load_membranes

    described = {"file": str(file), "bytes": file.stat().st_size, "membranes": [*map(describe, load_membranes(file))]}
    if as_json:
        typer.echo(json.dumps(described, indent=2, ensure_ascii=False))
        return

    from rich.table import Table
    from rich.text import Text

    rows = described["membranes"]
    methods, bases = sorted({row["method"] for row in rows}), sorted({row["base_model"] or "unknown" for row in rows})
    console = common.console()
    console.print(f"{file}: {described['bytes'] / 1024:.0f} KiB, {len(rows)} membranes", markup=False, soft_wrap=True)
    console.print(f"method {', '.join(methods)}; base model {', '.join(bases)}", markup=False, soft_wrap=True)
    table = Table()
    for heading in ("concept", "also called", "rank", "modules", "norm", "gate probe"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        becomes = f" -> {row['surrogate']}" if row["surrogate"] else ""
        also = ", ".join(phrase for phrase in row["phrases"] if phrase != row["concept"])
        ranks, probe = "/".join(map(str, row["ranks"])), "yes" if row["probe"] else "no"
        cells = (row["concept"] + becomes, also, ranks, str(row["modules"]), f"{row['norm']:.3g}", probe)
        table.add_row(*map(Text, cells))
    console.print(table)


def describe(membrane) -> dict:
    """A JSON-ready description; `norm` is the Frobenius norm of the whole weight change."""
    import math

    squares = 0.0
    for pair in membrane.modules.values():
        down, up = pair.down.flatten(1).double(), pair.up.flatten(1).double()
        # ||U D||^2 = tr(U^T U D D^T): r x r instead of out x in
        squares += pair.scale**2 * float(((up.T @ up) * (down @ down.T)).sum())
    return {
        "concept": membrane.concept,
        "phrases": list(membrane.phrases),
        "surrogate": membrane.surrogate,
        "method": membrane.method,
        "ranks": sorted({pair.rank for pair in membrane.modules.values()}),
        "modules": len(membrane.modules),
        "norm": math.sqrt(max(squares, 0.0)),
        "probe": membrane.probe is not None,
        "base_model": membrane.base_model,
        "metadata": dict(membrane.metadata),
    }
