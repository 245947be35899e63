"""`semiperm detect`: which pictures carry a mark of the keyring's keys, and what it says."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from . import common, keys

EXAMPLE = "Example: semiperm detect pictures/ --keyring keys.json --json > found.json"
BATCH = 8  # pictures looked at together, and lost at most when the run is stopped
PIXELS = 8 << 20  # in the model at once: eight of SDXL's
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF")  # none that makes Pillow start other programs
SUFFIXES = set(".png .apng .jpg .jpeg .jpe .jfif .webp .avif .avifs .bmp .dib .tif .tiff .gif".split())


def run(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGES...", help="Pictures, and folders of them.", show_default=False)
    ],
    keyring: keys.File,
    model: Annotated[str, typer.Option(metavar="MODEL", help=common.MODEL_HELP)] = "canvas",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of lines.")] = False,
    resume: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep finished pictures here and go on from them.")
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Where nothing is found, undo flips, turns, shifts and crops. Slow.")
    ] = False,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="WIDTHxHEIGHT", help="Of the signed pictures, if it is known; their own and the model's are tried."
        ),
    ] = None,
    heatmap: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also write NAME-heatmap.png there: where in each picture the mark agrees."),
    ] = None,
    reader: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A reader trained with MODEL (`canvas reader`). Default: its own, if it has one."
        ),
    ] = None,
    issued: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Marks that were signed, as `generate --issued` lists them.")
    ] = None,
    device: common.Device = "auto",
    dtype: common.DType = "auto",
):
    """Look for the marks of a keyring in pictures made by MODEL.

    Verdicts: valid (a mark whose seal is right), content differs (such a mark, in a picture that does not show what
    was bound to it: it was carried over), unverified (a mark, but its seal is wrong or unreadable, or this keyring
    cannot check it) and absent (no mark of these keys, or too little is left of one). A line for each picture is
    printed as soon as it is known; on a terminal a table follows. Of animated files and files of several pages all
    pictures are looked at, the best of them is told. In folders, files without a suffix count by their content.
    Pictures that cannot be read are named on standard error and left out; the exit code is then 1.
    """
    files = picture_files(images)
    options = {"search": search, "size": parse_size(size)}

    from ..benchmarks.store import Store, digest
    from ..canvas.models import aid_files
    from ..methods.watermark.issued import load_issued
    from ..methods.watermark.keyring import load_keyring

    ring = load_keyring(keyring)
    aids = aid_files(model) | ({} if reader is None else {"reader": reader})
    beside = [digest(path) if path and path.is_file() else None for path in (*aids.values(), issued)]
    finished = Store(resume, "detect", [digest(keyring), model, options, beside])
    known = {} if issued is None else {"issued": load_issued(issued)}
    rows, failed, pipe = {}, 0, None
    maps = [] if heatmap is None else common.output_paths(heatmap, files, ["heatmap"])
    map_of = {file: path for file, (path,) in zip(files, maps, strict=False)}
    with common.progress("pictures", len(files)) as advance:
        for start in range(0, len(files), BATCH):
            part, pictures, found, digests = files[start : start + BATCH], {}, {}, {}
            for file in part:
                try:
                    digests[file] = digest(file) if resume else str(file)
                    found[file] = finished.get(digests[file])
                    if found[file] is None or (file in map_of and not map_of[file].exists()):
                        pictures[file] = open_picture(file)
                except (common.CliError, OSError) as error:
                    found[file] = error
            if pictures:
                if pipe is None:
                    pipe = common.load_model(model, device, dtype)
                    options |= known | aids_of(pipe, model, aids, reader)
                single = {file: opened.first for file, opened in pictures.items() if opened.count == 1}
                seen = {}
                found |= look(pipe, ring, single, options, seen) if single else {}
                for file, opened in pictures.items():
                    if opened.count > 1:
                        inside = {}
                        found[file] = look_into(pipe, ring, opened, options, inside)
                        seen |= dict.fromkeys([file], *inside.values()) if inside else {}
                for file in map_of.keys() & seen.keys():
                    write_map(map_of[file], *seen[file])
            for file in part:
                if isinstance(found[file], Exception):
                    failed += 1
                    common.complain(found[file], file)
                    continue
                if file in pictures:
                    finished.put(digests[file], found[file])
                rows[file] = {"file": str(file), **found[file]}
                if not as_json:
                    common.say(line(rows[file], ring))
            advance(len(part))
    if as_json:
        typer.echo(json.dumps(list(rows.values()), indent=2))  # ASCII: file names need not be text
    elif (console := common.console()).is_terminal:
        show(console, list(rows.values()), ring)
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
            inside = sorted(file for file in path.rglob("*") if file.is_file() and _may_be_picture(file))
        files |= dict.fromkeys(inside)
    if not files:
        raise common.CliError(f"there are no pictures ({', '.join(sorted(SUFFIXES))}) in {', '.join(map(str, paths))}")
    return list(files)


def _may_be_picture(file: Path) -> bool:
    if file.suffix:
        return file.suffix.lower() in SUFFIXES
    try:
        _recognised(file).close()
    except common.CliError as error:
        return not isinstance(error, _NotAPicture)  # a damaged or huge one is worth an error
    return True


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


class _NotAPicture(common.CliError):
    pass


@dataclass
class Opened:
    """A picture file: how many pictures are in it, the first, and all others as they are asked for; RGB."""

    count: int
    first: object
    rest: Iterator


def open_picture(file: Path) -> Opened:
    """Open a picture file and read its first picture whole.

    Raises:
        CliError: not a file, not a picture, a damaged or a huge one.
    """
    from ..methods.pictures import as_rgb

    if not file.is_file():
        raise common.CliError("there is no such file")
    image = _recognised(file)
    try:
        with _reading():
            count, first = getattr(image, "n_frames", 1), as_rgb(image)
    except BaseException:
        image.close()
        raise

    def rest():
        with image:
            for number in range(1, count):
                with _reading():
                    image.seek(number)
                    frame = as_rgb(image)
                yield frame

    if count == 1:
        image.close()
    return Opened(count, first, rest())


def _recognised(file: Path):
    """The PIL image of a file, of which only the header has been read."""
    from PIL import Image

    Image.init()
    with _reading():
        return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])


@contextmanager
def _reading():
    import warnings

    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except UnidentifiedImageError as error:
        raise _NotAPicture(f"not a picture that can be read here ({', '.join(FORMATS)})") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise common.CliError(f"too large: {common.one_line(error)}") from error
    except Exception as error:  # decoders fail on damaged files in every way there is
        raise common.CliError(f"damaged: {common.one_line(error)}") from error


def aids_of(pipe, model: str, files: dict[str, Path], reader: Path | None) -> dict:
    """The options that help to read a model's marks, where there are files of its own.

    Raises:
        CliError: a reader was given, of another model or none.
    """
    from ..methods.watermark.aids import aids_of_model
    from ..pipelines.watermark.fingerprint import fingerprint

    if reader is not None and not reader.is_file():
        raise common.CliError(f"--reader {reader}: there is no such file; `semiperm canvas reader` trains one")
    found = aids_of_model(files, lambda: fingerprint(pipe))
    if reader is not None and "reader" not in found:
        raise common.CliError(f"--reader {reader} was trained with another model than {model}; train one for it")
    return found


def look_into(pipe, ring, opened: Opened, options: dict, seen: dict) -> dict | Exception:
    """The best picture of a file, until one is found; each has its share of the error, so that the p-value is exact.

    It alone is left in `seen`, with its result.
    """
    from ..methods.watermark.config import DetectionConfig

    if opened.count == 1:
        return look(pipe, ring, {0: opened.first}, options, seen)[0]
    options = {**options, "false_positive_rate": DetectionConfig().false_positive_rate / opened.count}
    best, evaluations, known = None, 0, set()
    frames = enumerate(itertools.chain([opened.first], opened.rest))
    try:
        while part := dict(itertools.islice(frames, BATCH)):
            fresh = {}
            for number, frame in part.items():
                shown = hashlib.sha256(frame.tobytes()).digest()
                if shown not in known:  # still pictures say nothing new
                    known.add(shown)
                    fresh[number] = frame
            for number, row in look(pipe, ring, fresh, options, seen).items() if fresh else ():
                if isinstance(row, Exception):
                    return row
                evaluations += row["model_evaluations"]
                rank = row["verdict"] != "valid", row["log10_p"]
                if best is None or rank < best[0]:
                    best = rank, number, row
            for other in seen.keys() - {best[1]}:
                del seen[other]
            if best[2]["verdict"] != "absent":
                break
    except common.CliError as error:
        return error
    _, number, row = best
    log10_p = min(0.0, row["log10_p"] + math.log10(opened.count))
    about = {"p_value": 10**log10_p, "log10_p": log10_p, "model_evaluations": evaluations}
    return row | about | {"frame": number + 1, "frames": opened.count}


def look(pipe, ring, pictures: dict, options: dict, seen: dict) -> dict:
    """File -> what was found, or the error; where the pictures fail together, they are looked at one by one.

    In `seen` is left file -> (picture, the whole result).
    """
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
        return {file: look(pipe, ring, {file: picture}, options, seen)[file] for file, picture in pictures.items()}
    seen |= {file: both for file, both in zip(pictures, zip(pictures.values(), results, strict=True), strict=True)}
    return {file: described(result) for file, result in zip(pictures, results, strict=True)}


def write_map(path: Path, picture, result) -> None:
    """Where the mark of a picture agrees and where it does not, as a PNG."""
    from PIL import Image

    from ..methods.pictures import picture_of
    from ..methods.watermark.heatmap import heat_map

    shown = heat_map(picture_of(picture), result)
    about = {"verdict": result.verdict, "p_value": float(result.p_value), "undone": result.transform}
    common.write_png(path, Image.fromarray((shown * 255).round().byte().numpy()), about)


def described(result) -> dict:
    """A detection as JSON keeps it; what was undone and the content's p-value only where there is something to say."""
    from ..methods.watermark.views import AS_GIVEN

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


def told(row: dict, ring) -> tuple[str, ...]:
    """File, verdict, p, key, unique id, when it was made and what was undone, as text."""
    from datetime import datetime, timezone

    names = {key.key_id: key.name for key in ring}
    payload = row["payload"] or {}
    made = payload.get("time")
    made = datetime.fromtimestamp(made, timezone.utc).strftime("%Y-%m-%d %H:%M") if made else ""
    p = f"{row['p_value']:.2g}" if row["p_value"] > 1e-99 else f"1e{row['log10_p']:.0f}"
    undone = [f"picture {row['frame']} of {row['frames']}"] if "frame" in row else []
    undone += [row["transform"]] if "transform" in row else []
    key = names.get(row["key_id"], "")
    said = row["file"], row["verdict"], p, key, payload.get("unique_id", ""), made, ", ".join(undone)
    return tuple(map(common.printable, said))


def line(row: dict, ring) -> str:
    """A row as one line of text."""
    file, verdict, p, key, unique_id, made, undone = told(row, ring)
    parts = (f"p {p}", key and f"key {key}", unique_id and f"id {unique_id}", made and f"made {made} UTC", undone)
    return f"{file}: {verdict}, {', '.join(part for part in parts if part)}"


def show(console, rows: list[dict], ring) -> None:
    """Print the table."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for heading in ("file", "verdict", "p", "key", "unique id", "made (UTC)", "undone"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, told(row, ring)))
    console.print(table)
