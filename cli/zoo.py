"""`semiperm zoo`: the membranes that come with the package, and the command that makes them."""

import json
from pathlib import Path
from typing import Annotated

import typer

from . import common

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Ready membranes for the embedded models.")
Folder = Annotated[Path | None, typer.Option(metavar="DIR", help="Another zoo than the package's own.")]


@app.command("list", epilog="Example: semiperm zoo list")
def list_(
    folder: Folder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the cards as JSON.")] = False,
):
    """Show every membrane of the zoo by the name that --membrane and load_membranes take."""
    from ..methods.membranes.zoo import read_card, zoo_names, zoo_path

    names = zoo_names(folder)
    cards = {name: read_card(zoo_path(name, folder)) for name in names}
    if as_json:
        typer.echo(json.dumps(cards, indent=2, ensure_ascii=False))
        return
    if not names:
        common.say("the zoo is empty; semiperm zoo make --world canvas-scenes makes it")
        return

    from rich.table import Table

    table = Table()
    for heading in ("name", "concept", "kind", "KiB", "UA", "kept"):
        table.add_column(heading, overflow="fold")
    for name, card in cards.items():
        row = next((row for row in card["figures"] if row["method"] == f"zoo/{card['kind']}"), {})
        shares = ["-" if not row.get(key) or row[key][0] is None else f"{row[key][0]:.2f}" for key in ("ua", "kept")]
        table.add_row(f"zoo:{name}", card["concept"], card["kind"], f"{card['bytes'] / 1024:.0f}", *shares)
    common.console().print(table)


@app.command(epilog="Example: semiperm zoo show robot-image")
def show(
    name: Annotated[str, typer.Argument(help="As `zoo list` has it, with or without the model.")],
    folder: Folder = None,
):
    """Print a membrane's card as Markdown."""
    from ..methods.membranes.zoo import PREFIX, card_text, read_card, zoo_path

    for line in card_text(read_card(zoo_path(name.removeprefix(PREFIX), folder))).splitlines():
        common.say(line)


@app.command(epilog="Example: semiperm zoo make --world canvas-scenes --kind text --kind image")
def make(
    world: Annotated[str, typer.Option(metavar="MODEL", help="The embedded model to make it for.")] = "canvas",
    concept: Annotated[
        list[str] | None, typer.Option(help="A concept of the world; repeatable. Default: all that it erases alone.")
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="text, image or trained; repeatable. Default: all three.")
    ] = None,
    folder: Folder = None,
    each: Annotated[
        int, typer.Option(min=0, help="Pictures that ask for a concept, and as many that do not; 0 measures nothing.")
    ] = 24,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="A table [training], as `train --config` takes it.")
    ] = None,
    work: Annotated[Path, typer.Option(metavar="DIR", help="What a stopped run goes on from.")] = Path("zoo-work"),
    steps: common.Steps = None,
    device: common.Device = "auto",
    dtype: common.DType = "auto",
):
    """Make every membrane that is missing, measure it on words that no method knows, and write its card.

    A run that was stopped goes on when the same command is given again.
    """
    from ..benchmarks.membranes.zoo import ZooConfig, make_zoo
    from ..methods.membranes.zoo import KINDS, ZOO
    from ..methods.training.config import TrainingConfig, read_training

    about = common.world_of(world)
    training = TrainingConfig(**({} if config is None else read_training(config).settings))
    asked = ZooConfig(tuple(concept or ()), tuple(kind or KINDS), each, training)
    pipe = common.load_model(world, device, dtype)
    made = make_zoo(
        pipe, about, folder or ZOO, asked, work=work, progress=common.say, **common.sampling(world, steps, None)
    )
    common.say(f"{folder or ZOO}: {len(made)} membranes of {world}")


@app.command(epilog="Example: semiperm zoo arena arena.json")
def arena(
    file: Annotated[Path, typer.Argument(metavar="FILE.json", help="What `semiperm arena --json` wrote.")],
    folder: Folder = None,
):
    """Put the arena's figures into the cards of the concepts and kinds that it measured."""
    from ..methods.membranes.zoo import add_arena, zoo_names, zoo_path

    try:
        rows = json.loads(common.existing_file(file, "arena file").read_text(encoding="utf-8"))["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise common.CliError(f"{file} holds no rows of an arena ({common.one_line(error)})") from error
    found = {name: add_arena(zoo_path(name, folder), rows) for name in zoo_names(folder)}
    common.say(f"{sum(found.values())} rows in {sum(map(bool, found.values()))} of {len(found)} cards")
