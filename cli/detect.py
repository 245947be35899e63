"""`semiperm detect`: which pictures carry a mark of the keyring's keys, and what it says."""

import json
from pathlib import Path
from typing import Annotated

import typer

from . import common, keys

EXAMPLE = "Example: semiperm detect pictures/ --keyring keys.json --json > found.json"
BATCH = 8  # pictures looked at together, and lost at most when the run is stopped
PIXELS = 8 << 20  # in the model at once: eight of SDXL's
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # no formats that make Pillow start other programs


def run(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGES...", help="Pictures, and folders of them.", show_default=False)
    ],
    keyring: keys.File,
    model: Annotated[str, typer.Option(metavar="MODEL", help=common.MODEL_HELP)] = "canvas",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
    resume: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep finished pictures here and go on from them.")
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Where nothing is found, undo flips, turns, shifts and crops. Slow.")
    ] = False,
    size: Annotated[
        str | None,
        typer.Option(metavar="WIDTHxHEIGHT", help="Of the signed pictures, if they were resized or cropped."),
    ] = None,
    device: common.Device = "auto",
    dtype: common.DType = "auto",
):
    """Look for the marks of a keyring in pictures made by MODEL.

    Verdicts: valid (a mark whose seal is right), content differs (such a mark, in a picture that does not show what
    was bound to it: it was carried over), unverified (a mark, but its seal is wrong or unreadable, or this keyring
    cannot check it) and absent (no mark of these keys, or too little is left of one). Pictures that cannot be read
    are named on standard error and left out; the exit code is then 1.
    """
    files = picture_files(images)
    options = {"search": search, "size": parse_size(size)}

    from ..benchmarks.store import Store, digest
    from ..methods.watermark.keyring import load_keyring

    ring = load_keyring(keyring)
    finished = Store(resume, "detect", [digest(keyring), model, options])
    rows, failed, pipe = {}, 0, None
    with common.progress("pictures", len(files)) as advance:
        for start in range(0, len(files), BATCH):
            part, pictures, found, digests = files[start : start + BATCH], {}, {}, {}
            for file in part:
                try:
                    digests[file] = digest(file) if resume else str(file)
                    found[file] = finished.get(digests[file])
                    if found[file] is None:
                        pictures[file] = read_picture(file)
                except (common.CliError, OSError) as error:
                    found[file] = error
            if pictures:
                pipe = common.load_model(model, device, dtype) if pipe is None else pipe
                found |= look(pipe, ring, pictures, options)
            for file in part:
                if isinstance(found[file], Exception):
                    failed += 1
                    common.complain(found[file], file)
                    continue
                if file in pictures:
                    finished.put(digests[file], found[file])
                rows[file] = {"file": str(file), **found[file]}
            advance(len(part))
    if as_json:
        typer.echo(json.dumps(list(rows.values()), indent=2))  # ASCII: file names need not be text
    else:
        show(common.console(), list(rows.values()), ring)
    if failed:
        raise typer.Exit(1)


def picture_files(paths: list[Path]) -> list[Path]:
    """The files named, and the pictures in the folders named, each once.

    Raises:
        CliError: nothing to look at.
    """
    files = {}
    for path in paths:
        inside = [path]
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        files |= dict.fromkeys(inside)
    if not files:
        raise common.CliError(f"there are no pictures ({', '.join(sorted(SUFFIXES))}) in {', '.join(map(str, paths))}")
    return list(files)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """ "640x480" -> (480, 640): height first, as everywhere inside.

    Raises:
        CliError: something else.
    """
    if text is None:
        return None
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise common.CliError(f"--size {text}: expected WIDTHxHEIGHT in pixels, such as 1024x768")
    return int(height), int(width)


def read_picture(file: Path):
    """Read a whole picture as RGB.

    Raises:
        CliError: not a file, not a picture, a damaged or a huge one.
    """
    import warnings

    from PIL import Image, UnidentifiedImageError

    if not file.is_file():
        raise common.CliError("there is no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise common.CliError(f"not a picture that can be read here ({', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise common.CliError(f"too large: {common.one_line(error)}") from error
    except Image.DecompressionBombWarning as error:
        raise common.CliError(f"too large: {common.one_line(error)}") from error
    except Exception as error:  # decoders fail on damaged files in every way there is
        raise common.CliError(f"damaged: {common.one_line(error)}") from error


def look(pipe, ring, pictures: dict, options: dict = {}) -> dict:  # noqa: B006 (never written to)
    """File -> what was found, or the error; where the pictures fail together, they are looked at one by one."""
    from ..methods.errors import SemipermError
    from ..pipelines.watermark.detect import detect_watermark

    largest = max(picture.width * picture.height for picture in pictures.values())
    try:
        results = detect_watermark(pipe, [*pictures.values()], ring, batch_size=max(1, PIXELS // largest), **options)
    except (SemipermError, RuntimeError, MemoryError) as error:
        if not isinstance(error, SemipermError) and "memory" not in f"{error!r}".lower():
            raise  # torch says RuntimeError when memory runs out on the CPU, and of our own mistakes
        if len(pictures) == 1:
            return dict.fromkeys(pictures, error)
        return {file: look(pipe, ring, {file: picture}, options)[file] for file, picture in pictures.items()}
    return {file: described(result) for file, result in zip(pictures, results, strict=True)}


def described(result) -> dict:
    """A detection as JSON keeps it; what was undone and the content's p-value only where there is something to say."""
    from ..methods.watermark.detection import AS_GIVEN

    more = {} if result.transform == AS_GIVEN else {"transform": result.transform}
    if result.content_p_value is not None:
        more["content_p_value"] = float(result.content_p_value)
    return {
        "verdict": result.verdict,
        "p_value": float(result.p_value),
        "log10_p": float(result.log10_p),
        "payload": None if result.payload is None else keys.payload_record(result.payload),
        "key_id": result.key_id,
        "model_evaluations": result.model_evaluations,
        **more,
    }


def show(console, rows: list[dict], ring) -> None:
    """Print the table."""
    from datetime import datetime, timezone

    from rich.table import Table
    from rich.text import Text

    names = {key.key_id: key.name for key in ring}
    table = Table()
    for heading in ("file", "verdict", "p", "key", "unique id", "made (UTC)", "undone"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        payload = row["payload"] or {}
        made = payload.get("time")
        made = datetime.fromtimestamp(made, timezone.utc).strftime("%Y-%m-%d %H:%M") if made else ""
        p = f"{row['p_value']:.2g}" if row["p_value"] > 1e-99 else f"1e{row['log10_p']:.0f}"
        key = names.get(row["key_id"], "")
        said = (row["file"], row["verdict"], p, key, str(payload.get("unique_id", "")), made)
        table.add_row(*map(Text, map(common.printable, (*said, row.get("transform", "")))))
    console.print(table)
