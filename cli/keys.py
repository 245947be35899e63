"""`semiperm keys`: the secrets that sign pictures, and copies of them that only detect. Prints no secret, ever."""

import json
from pathlib import Path
from typing import Annotated

import typer

from . import common

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Make, list and hand on the keys of the mark.")
File = Annotated[
    Path, typer.Option("--keyring", metavar="FILE", help="The keyring, readable by you alone.", show_default=False)
]
Name = Annotated[str, typer.Option(help="The key's name.", show_default=False)]


@app.command("new", epilog="Example: semiperm keys new --name studio --keyring keys.json")
def new(name: Name, keyring: File):
    """Add a fresh random key to a keyring; the file is made where there is none.

    Keep a copy of the keyring: nobody can read the marks of a lost key. Whoever has the file can sign in your name.
    """
    from ..methods.watermark.keyring import update_keyring

    key = update_keyring(keyring, lambda ring: ring.new(name))
    common.say(f"{keyring}: new key {key.name}, id {key.key_id}")


@app.command("list", epilog="Example: semiperm keys list --keyring keys.json")
def list_(
    keyring: File,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
):
    """Show names, ids, dates and what each key may do: sign, or only detect."""
    from ..methods.watermark.keyring import load_keyring

    rows = [
        {"name": key.name, "key_id": key.key_id, "created": key.created, "may_sign": key.mac_key is not None}
        for key in load_keyring(keyring)
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return

    from rich.table import Table
    from rich.text import Text

    table = Table()
    for heading in ("name", "id", "created", "may"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        may = "sign and detect" if row["may_sign"] else "detect"
        table.add_row(*map(Text, map(common.printable, (row["name"], row["key_id"], row["created"], may))))
    common.console().print(table)


@app.command(
    "export-detector",
    epilog="Example: semiperm keys export-detector --name studio --keyring keys.json -o detector.json",
)
def export_detector(
    name: Name,
    keyring: File,
    output: Annotated[Path, typer.Option("--output", "-o", help="The keyring to write; must not exist yet.")],
):
    """Write a keyring that reads the marks of one key but cannot make its seal (the MAC) or bind content.

    With it the verdict is at best `unverified`. Whoever has it can also fake a mark that looks like yours until you
    check the seal with the full keyring: hand it only to those you trust not to.
    """
    from ..methods.watermark.keyring import load_keyring, update_keyring

    key = load_keyring(keyring).get(name)
    update_keyring(output, lambda ring: ring.add(key.detector()), fresh=True)
    common.say(f"{output}: {name}, to detect only")


def payload_record(payload) -> dict:
    """A payload as JSON keeps it: numbers of up to 64 bits as hexadecimal text, since many readers round them."""
    return {
        "version": payload.version,
        "time": payload.time,
        "model": f"{payload.model:08x}",
        "unique_id": f"{payload.unique_id:016x}",
    }
