"""`semiperm bench kernels`: the kernels beside the naive algorithms they replace."""

from pathlib import Path
from typing import Annotated

import typer

from . import common

EXAMPLE = "Example: semiperm bench kernels --json kernels.json"


def run(
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, few rounds, no torch.compile.")] = False,
    resources: Annotated[
        bool, typer.Option("--resources", help="Compile instead, for all GPUs and without one: registers, spills.")
    ] = False,
    model: Annotated[
        bool, typer.Option("--model", help="A model of the match's time on an H100 instead; nothing is measured.")
    ] = False,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
):
    """Time the kernels, and measure their memory, against the naive algorithms: on the GPU, or else the CPU."""
    console = common.console()
    if model:
        _modelled(console, json_path)
        return
    with console.status("compiling for every GPU" if resources else "timing; keep the machine quiet") as status:
        rows = compiled() if resources else timed(quick, status.update)
    if json_path is not None:
        common.write_json(json_path, rows)
    console.print(resource_table(rows) if resources else time_table(rows))


def _modelled(console, json_path: Path | None) -> None:
    from rich.table import Table

    from ..benchmarks.kernels.model import run as rows_of_model

    rows = rows_of_model()
    if json_path is not None:
        common.write_json(json_path, rows)
    table = Table(caption="a model of an H100, not measured: ours, and in times eager and eager in chunks")
    for heading in ("shape", "programs", "splits", "ms", "ratio", "chunks ratio"):
        table.add_column(heading)
    for row in rows:
        table.add_row(row["shape"], *(str(row[key]) for key in ("programs", "splits", "ms", "ratio", "chunks_ratio")))
    console.print(table)


def timed(quick: bool, tell) -> list[dict]:
    """The rows of benchmarks/kernels/run.py; CliError where a kernel is wrong."""
    from ..benchmarks.kernels.run import KernelBenchmarkError, run

    try:
        return run(quick=quick, tell=tell)
    except KernelBenchmarkError as error:
        raise common.CliError(str(error)) from error


def compiled() -> list[dict]:
    """The rows of benchmarks/kernels/resources.py, in a process of its own: Triton must not interpret there."""
    import json
    import os
    import subprocess
    import sys
    import tempfile

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "semiperm.benchmarks.kernels.resources", "--json", str(path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise common.CliError(f"the kernels were not compiled: {last.removeprefix('error: ')}")
        return json.loads(path.read_text(encoding="utf-8"))


def time_table(rows: list[dict]):
    """Our time in times the baseline's, and the extra memory of both."""
    from rich.table import Table

    table = Table(caption="our time in times the baseline's (median, middle half); memory beside inputs and outputs")
    table.add_column("name", no_wrap=True)
    for heading in ("shape", "baseline", "ratio", "spread", "peak", "baseline peak"):
        table.add_column(heading)
    for row in rows:
        ratio, spread = "not timed", ""
        if row["ratio"] is not None:
            ratio, spread = f"{row['ratio']:.3f}", "{:.3f} to {:.3f}".format(*row["spread"])
        peaks = [size(row[key]) for key in ("peak_bytes", "baseline_peak_bytes")]
        peaks[1] += ", computed" if row.get("computed") else ""
        name = row["name"].replace("/", "/\n")
        table.add_row(name, row["shape"], row["baseline"], ratio, spread, *peaks)
    return table


def resource_table(rows: list[dict]):
    from rich.table import Table

    table = Table(caption="of a thread: registers, spilled words; of a program: shared memory")
    for heading in ("name", "target", "registers", "spills", "shared"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        cells = (str(row[key]) for key in ("registers", "spills"))
        table.add_row(row["name"], row["target"], *cells, size(row["shared_bytes"]))
    return table


def size(count: int | None) -> str:
    """12.3 MB, or "unknown"."""
    if count is None:
        return "unknown"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
