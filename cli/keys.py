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


@app.command("test-certificate", epilog="Example: semiperm keys test-certificate -o certificate")
def test_certificate(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="The folder of the three files; none may exist yet.")
    ],
    name: Annotated[str, typer.Option(help="Of the signer, as viewers show it.")] = "Test signer",
    days: Annotated[int, typer.Option(min=1, max=366, help="That the certificate holds.")] = 30,
):
    """Write a certificate chain for trying out C2PA manifests: chain.pem, its key.pem, and authority.pem.

    Sign with `generate --c2pa-cert DIR/chain.pem --c2pa-key DIR/key.pem`, examine with `provenance --trust
    DIR/authority.pem`. Anybody can make such a chain under any name: no viewer trusts it.
    """
    from ..methods.files import write_file
    from ..methods.provenance.certificates import trial_chain

    made = trial_chain(name, days)
    files = {"chain.pem": made.chain, "authority.pem": made.authority, "key.pem": made.private_key}
    for file in files:
        if (output / file).exists() or (output / file).is_symlink():
            raise common.CliError(f"{output / file} exists already; give another folder: no key is written over")
    for file, content in files.items():
        write_file(output / file, content, mode=0o600 if file == "key.pem" else None)
    common.say(f"{output}: chain.pem, key.pem and authority.pem for {name}, {days} days, trusted by nobody")


def payload_record(payload) -> dict:
    """A payload as JSON keeps it: numbers of up to 64 bits as hexadecimal text, since many readers round them."""
    return {
        "version": payload.version,
        "time": payload.time,
        "model": f"{payload.model:08x}",
        "unique_id": f"{payload.unique_id:016x}",
    }
