"""`semiperm bench`: time and memory, side by side with the peers."""

from pathlib import Path
from typing import Annotated

import typer

from . import common

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure time, side by side with the peers.")


@app.command("membranes", epilog="Example: semiperm bench membranes --json membranes.json")
def membranes(
    model: Annotated[str, typer.Option(metavar="MODEL", help=common.MODEL_HELP)] = "canvas",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds, and no 100 membranes.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
):
    """Time a denoising step with 1, 10 and 100 membranes against the bare pipeline, and PEFT beside it."""
    pipe = common.load_model(model, dtype="auto")

    from ..benchmarks.membranes import run

    console = common.console()
    with console.status("timing; keep the machine quiet"):
        rows = [{**row, "model": model} for row in run(pipe, quick=quick)]
    if json_path is not None:
        common.write_json(json_path, rows)
    show(console, rows)


@app.command("comfyui", epilog="Example: COMFYUI_PATH=~/comfy/ComfyUI semiperm bench comfyui --json comfyui.json")
def comfyui(
    path: Annotated[Path, typer.Option(envvar="COMFYUI_PATH", help="The ComfyUI folder.")] = Path("~/comfy/ComfyUI"),
    python: Annotated[
        Path | None, typer.Option(envvar="COMFYUI_PYTHON", help="Its Python. Default: that of a venv beside it.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Pairs of runs for each figure.")] = 15,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
):
    """Time sampling in ComfyUI with 1, 10 and 100 membranes against the bare graph."""
    from ..benchmarks.launch import ROOT, run_in_comfyui

    path = path.expanduser()
    common.existing_file(path / "main.py", "ComfyUI at")
    python = (python or path.parent / "venv" / "bin" / "python").expanduser()
    common.existing_file(python, "Python of ComfyUI at")
    console = common.console()
    try:
        with console.status("timing; keep the machine quiet"):
            rows = run_in_comfyui(path, python, ROOT / "benchmarks" / "comfyui_membranes.py", rounds)
    except RuntimeError as error:
        raise common.CliError(f"ComfyUI's Python failed: {str(error).splitlines()[-1]}") from error
    if json_path is not None:
        common.write_json(json_path, rows)
    show(console, rows)


def show(console, rows: list[dict]) -> None:
    """Print the table: the median ratio to the bare pipeline, and its spread."""
    from rich.table import Table

    table = Table(caption="time of one step, in times the bare pipeline's (median, middle half)")
    for heading in ("name", "K", "ratio", "spread"):
        table.add_column(heading)
    for row in rows:
        low, high = row["spread"]
        table.add_row(row["name"], str(row["k"]), f"{row['ratio']:.3f}", f"{low:.3f} to {high:.3f}")
    console.print(table)
