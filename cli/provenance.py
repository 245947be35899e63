"""`semiperm provenance`: what a picture file says of its origin, and what of it does not fit together."""

import json
from pathlib import Path
from typing import Annotated

import typer

from . import common

EXAMPLE = "Example: semiperm provenance robot.png --keyring keys.json"
LARGEST = 1 << 30  # bytes of a file; it is read whole


def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A PNG, JPEG or WebP picture.", show_default=False)],
    trust: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Certificates (PEM) of authorities whose signers you trust.")
    ] = None,
    keyring: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Look for the mark of these keys, too, and compare.")
    ] = None,
    model: Annotated[str, typer.Option(metavar="MODEL", help=f"With --keyring: {common.MODEL_HELP}")] = "canvas",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    device: common.Device = "auto",
    dtype: common.DType = "auto",
):
    """Show a file's provenance record and C2PA manifest. The exit code is 1 if they do not fit together.

    The record is a claim: who has the file can write another. A manifest whose signer you trust (--trust) is proof that
    the signer made this file as it is. Without either, the mark in the picture may be left: see `semiperm detect`.
    """
    common.existing_file(file, "picture")
    if file.stat().st_size > LARGEST:
        raise common.CliError(f"{file} takes {file.stat().st_size >> 20} MiB; pictures of up to 1,024 are read")

    from ..methods.errors import WatermarkError
    from ..methods.provenance.examine import examine

    data = file.read_bytes()
    anchors = None if trust is None else common.existing_file(trust, "certificate file").read_bytes()
    found = None if keyring is None else look(file, keyring, model, device, dtype)
    try:
        report = examine(data, trust=anchors, found=found)
    except WatermarkError as error:
        raise common.CliError(f"{file}: {common.one_line(error)}") from error
    if as_json:
        typer.echo(json.dumps({"file": str(file), **described(report), "mark": found}, indent=2))
    else:
        show(file, report, found)
    if report.problems:
        raise typer.Exit(1)


def look(file: Path, keyring: Path, model: str, device: str, dtype: str) -> dict:
    """What the detector sees in the picture: verdict, p_value, key_id, unique_id."""
    from ..methods.watermark.keyring import load_keyring
    from . import detect

    ring, opened = load_keyring(keyring), detect.open_picture(file)
    row = detect.look_into(common.load_model(model, device, dtype), ring, opened, {}, {})
    if isinstance(row, Exception):
        raise common.CliError(f"{file}: {common.one_line(row)}") from row
    payload = row["payload"] or {}
    seen = {name: row[name] for name in ("verdict", "p_value", "key_id")}
    return seen | {"unique_id": payload.get("unique_id")}


def described(report) -> dict:
    """A report as JSON keeps it."""
    from dataclasses import asdict

    record = None if report.provenance is None else json.loads(report.provenance.to_json())
    manifest = None if report.manifest is None else asdict(report.manifest)
    return {"format": report.format, "provenance": record, "c2pa": manifest, "problems": list(report.problems)}


def show(file: Path, report, found: dict | None) -> None:
    """Print the table, and below it what does not fit."""
    from rich.table import Table
    from rich.text import Text

    described_ = described(report)
    parts = (("metadata", described_["provenance"]), ("C2PA", described_["c2pa"]), ("mark", found))
    console = common.console()
    table = Table()
    for heading in ("from", "what", "says"):
        table.add_column(heading, overflow="fold")
    for name, part in parts:
        for what, value in (part or {}).items():
            if value not in (None, [], ()):
                table.add_row(*map(Text, (name, what, common.printable(value))))
    if table.row_count:
        console.print(table)
    else:
        common.say(f"{file}: no provenance record and no C2PA manifest")
    for problem in report.problems:
        common.say(f"does not fit: {common.printable(problem)}")
