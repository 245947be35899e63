"""`semiperm attack`: pictures as they come back from the world, to see what a mark survives."""

from pathlib import Path
from typing import Annotated

import typer

from . import common
from .detect import open_picture, picture_files

EXAMPLE = "Example: semiperm attack pictures/ --attack jpeg:25 --attack rotate:5 -o attacked/ --grid attacked.png"
CELL, GAP, CAPTION, ROWS = 160, 8, 22, 8  # of the grid


def _list(asked: bool):
    if not asked:
        return
    from rich.table import Table

    from ..methods.attacks.pictures import ATTACKS, SUITE
    from ..pipelines.attacks.pictures import model_attacks

    table, through = Table(), model_attacks(None)
    for heading in ("attack", "by default", "what it does, and what its strength counts"):
        table.add_column(heading)
    for one in (ATTACKS | through).values():
        needs = "; needs --model" if one.name in through else ""
        table.add_row(one.name, "" if one.strength is None else f"{one.strength:g}", one.about + needs)
    console = common.console()
    console.print(table)
    console.print(f"Without --attack: {' '.join(SUITE)}", markup=False)
    raise typer.Exit


def run(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGES...", help="Pictures, and folders of them.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A folder for the attacked pictures.")],
    attacks: Annotated[
        list[str] | None,
        typer.Option(
            "--attack",
            metavar="NAME[:STRENGTH]",
            help="Repeatable; several joined by + follow one another. Default: a usual suite.",
        ),
    ] = None,
    grid: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also one .png that shows the first pictures side by side.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=common.MOST_SEED, help="Of places and noise; the next pictures count up.")
    ] = 0,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help=f"For attacks through a model: {common.MODEL_HELP}.")
    ] = None,
    device: common.Device = "auto",
    dtype: common.DType = "auto",
    listed: Annotated[
        bool, typer.Option("--list", callback=_list, is_eager=True, help="Show all attacks, and stop.")
    ] = False,
):
    """Attack pictures as JPEG, crops, blur, noise or turns do, one PNG a picture and attack: NAME-ATTACK.png.

    What was done is kept in each PNG's text chunk `semiperm`. Pictures that cannot be read or attacked are named on
    standard error and left out; the exit code is then 1. The originals stay as they are.
    """
    from ..methods.attacks.pictures import ATTACKS, SUITE, parse_attack
    from ..methods.errors import SemipermError
    from ..pipelines.attacks.pictures import model_attacks

    known = ATTACKS | model_attacks(None)
    chains = [parse_attack(text, known) for text in attacks or SUITE]
    labels = list(dict.fromkeys("+".join(one.label(strength) for one, strength in chain) for chain in chains))
    if grid is not None and grid.suffix.lower() != ".png":
        raise common.CliError(f"--grid {grid}: the grid is written as .png; give a .png file")
    files = picture_files(images)
    paths = common.output_paths(output, files, labels, grid)
    through = sorted({one.name for chain in chains for one, _ in chain} - ATTACKS.keys())
    if through and model is None:
        raise common.CliError(f"{', '.join(through)} needs a model; give --model MODEL, such as --model canvas")
    if through:
        known = ATTACKS | model_attacks(common.load_model(model, device, dtype))
    failed, written, shown = 0, 0, []
    with common.progress("attacking", len(files) * len(labels)) as advance:
        for number, file in enumerate(files):
            try:
                pixels, row = to_pixels(open_picture(file).first), []
                for label, path in zip(labels, paths[number], strict=True):
                    image = attacked(pixels, label, seed + number, known)
                    common.write_png(path, image, {"attack": label, "seed": seed + number, "source": file.name})
                    row.append(thumbnail(image))
                    written += 1
                    advance()
            except (common.CliError, SemipermError) as error:
                failed += 1
                typer.echo(f"error: {file}: {common.one_line(error)}", err=True)
                continue
            if grid is not None and len(shown) < ROWS:
                shown.append((file.name, row))
    if shown:
        common.write_png(grid, attack_grid(labels, shown), {"attacks": labels, "seed": seed})
    console = common.console()
    console.print(f"{written} pictures in {output}", markup=False)
    if failed:
        raise typer.Exit(1)


def to_pixels(image):
    """RGB picture -> (1, 3, H, W) float32 in 0..1."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def attacked(pixels, label: str, seed: int, known):
    """(1, 3, H, W) -> the attacked picture; chance depends on the seed alone."""
    import torch
    from PIL import Image

    from ..methods.attacks.pictures import attack

    out = attack(pixels, label, torch.Generator().manual_seed(seed), known)[0]
    return Image.fromarray((out.permute(1, 2, 0) * 255).round().byte().numpy())


def thumbnail(image):
    """At most `CELL` pixels wide and high."""
    small = image.copy()
    small.thumbnail((CELL, CELL))
    return small


def attack_grid(labels: list[str], rows: list[tuple[str, list]]):
    """One row a picture, one column an attack."""
    from PIL import Image, ImageDraw, ImageFont

    width = GAP + len(labels) * (CELL + GAP)
    image = Image.new("RGB", (width, GAP + CAPTION + len(rows) * (CELL + CAPTION + GAP)), (255, 255, 255))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for column, label in enumerate(labels):
        short = label if len(label) <= 24 else f"{label[:22]}..."
        draw.text((GAP + column * (CELL + GAP), GAP), short, (28, 28, 32), font)
    for number, (name, cells) in enumerate(rows):
        top = GAP + CAPTION + number * (CELL + CAPTION + GAP)
        for column, cell in enumerate(cells):
            image.paste(cell, (GAP + column * (CELL + GAP), top))
        draw.text((GAP, top + CELL + 2), name.encode("ascii", "replace").decode(), (104, 104, 112), font)
    return image
