"""`semiperm guard`: categories of harm, and the detectors that decide when safe guidance acts."""

import json
from pathlib import Path
from typing import Annotated

import typer

from . import common

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List categories of harm, fit their detectors.")


@app.command("fit", epilog="Example: semiperm guard fit canvas hazard -o hazard.safetensors --steps 15")
def fit(
    model: common.Model,
    category: Annotated[
        list[str], typer.Argument(help="A category's name or .toml file; several.", metavar="CATEGORY...")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write (.safetensors).")],
    benign: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Harmless prompts, one a line. Default: ours.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts that show it, one a line. Default: its phrases.")
    ] = None,
    false_alarms: Annotated[
        float | None, typer.Option(help="Share of harmless pictures that may fire. Default: the category's.")
    ] = None,
    text_only: Annotated[bool, typer.Option("--text-only", help="No picture detector; nothing is drawn.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=common.MOST_SEED, help="Seed of the first picture.")] = 0,
    steps: common.Steps = None,
    guidance: common.Guidance = None,
    device: common.Device = "auto",
    dtype: common.DType = "auto",
):
    """Fit a text and a picture detector of each category, in closed form, for a stated rate of false alarms.

    Half of the harmless prompts are fitted on, the other half sets the thresholds; a rate of 0.01 needs 798 of them.
    """
    if output.suffix != ".safetensors":
        raise common.CliError(f"-o {output}: detectors are written as safetensors; name it {output.stem}.safetensors")
    files = {"benign": lines_of(benign), "prompts": lines_of(prompts)}

    import dataclasses

    from ..methods.guidance.category import as_categories
    from ..methods.guidance.detectors import save_detectors

    categories = as_categories(category)
    if false_alarms is not None:
        categories = tuple(dataclasses.replace(one, false_alarms=false_alarms) for one in categories)
    pipe = common.load_model(model, device, dtype)

    from ..pipelines.guidance.fit import fit_detectors

    sampling = common.sampling(model, steps, guidance)
    given = {"steps": sampling.pop("num_inference_steps", 20), "pictures": not text_only, "seed": seed} | sampling
    with common.progress("pictures", None) as advance:
        pairs = fit_detectors(pipe, categories, **files, **given, progress=advance)
    save_detectors(pairs, output)
    for pair in pairs:
        kinds = " and ".join(name for name in ("text", "picture") if getattr(pair, name) is not None)
        common.say(f"{output}: {pair.category}, {kinds}, false alarms at most {pair.false_alarms:g}")


@app.command("list", epilog="Example: semiperm guard list")
def list_(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="A .toml file, or detectors of `guard fit`.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
):
    """Show the categories that come with the package, or what a file holds."""
    if file is not None:
        common.existing_file(file, "file")

    from ..methods.guidance.category import bundled_categories, load_category

    if file is not None and file.suffix == ".safetensors":
        from ..methods.guidance.detectors import load_detectors

        rows = [
            {
                "category": pair.category,
                "false_alarms": pair.false_alarms,
                "text": pair.text is not None,
                "picture": pair.picture is not None,
                "model": pair.model,
            }
            for pair in load_detectors(file)
        ]
    else:
        found = bundled_categories().values() if file is None else [load_category(file)]
        rows = [
            {
                "category": one.name,
                "preset": one.preset,
                "false_alarms": one.false_alarms,
                "phrases": list(one.phrases),
            }
            for one in found
        ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return

    from rich.table import Table
    from rich.text import Text

    table = Table()
    for heading in rows[0]:
        table.add_column(heading.replace("_", " "), overflow="fold")
    for row in rows:
        cells = (", ".join(value) if isinstance(value, list) else value for value in row.values())
        table.add_row(*map(Text, map(common.printable, cells)))
    common.console().print(table)


# ---- for generate and inspect ----------------------------------------------------------------------------------------


def split_guard(text: str) -> tuple[str, float]:
    """Parse CATEGORY[:strength].

    Raises:
        CliError: a strength that is no number from 0 to 4.
    """
    name, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        strength = float(tail)
    except ValueError:
        strength = -1.0
    if not 0 <= strength <= 4:
        raise common.CliError(f"--guard {text}: expected CATEGORY or CATEGORY:strength, with a strength from 0 to 4")
    return name, strength


def guard_config(guard: list[str], algorithms: str, detectors: Path | None, when_unsafe: str):
    """What --guard and all that needs it ask for; None without --guard.

    Raises:
        CliError: options that do not go together. GuidanceError: names that nobody knows.
    """
    if not guard:
        if detectors is not None or when_unsafe != "guide":
            raise common.CliError("--guard-detectors and --when-unsafe need --guard: they say when it acts")
        return None
    named = [split_guard(text) for text in guard]
    if len({strength for _, strength in named}) > 1:
        raise common.CliError("--guard: strengths differ; expected one for all categories, which are guided together")

    from ..methods.guidance.category import as_categories
    from ..methods.guidance.config import SafeGuidanceConfig
    from ..methods.guidance.detectors import load_detectors

    categories = as_categories([name for name, _ in named])
    wanted = {category.name for category in categories}
    pairs = [pair for pair in load_detectors(detectors) if pair.category in wanted] if detectors is not None else []
    if detectors is not None and not pairs:
        raise common.CliError(f"--guard-detectors {detectors}: none of its detectors is of {', '.join(sorted(wanted))}")
    names = [name.strip() for name in algorithms.split(",")]
    return SafeGuidanceConfig(categories, names, named[0][1], detectors=pairs, when_unsafe=when_unsafe)


def key_of(path: Path | None) -> bytes | None:
    """The secret in a file, or None."""
    return None if path is None else common.existing_file(path, "key file").read_bytes().strip()


def lines_of(path: Path | None) -> list[str] | None:
    """A text file's lines that are not empty, or None.

    Raises:
        CliError: there is no such file, or nothing in it.
    """
    if path is None:
        return None
    lines = [line.strip() for line in common.existing_file(path, "file").read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise common.CliError(f"{path} has no lines; expected one prompt a line")
    return lines


def show_picture(path: Path, key: bytes | None, as_json: bool) -> None:
    """Print what a picture says of how it was made, and whether its guard's record is as it was sealed.

    Raises:
        CliError: it says nothing, or what it says is damaged.
    """
    from ..methods.guidance.record import CHUNK, SEAL, sealed_is_intact
    from ..methods.provenance.picture_file import parse

    texts = parse(path.read_bytes()).texts(CHUNK)
    if not texts:
        raise common.CliError(f"{path} says nothing of how it was made: it has no text chunk `{CHUNK}`")
    try:
        record = json.loads(texts[0])
    except ValueError:
        raise common.CliError(f"{path}: its text chunk `semiperm` is damaged: not JSON") from None
    guards = record.get("guard") if isinstance(record, dict) else None
    guards = guards if isinstance(guards, list) else [] if guards is None else [guards]  # several: ComfyUI's nodes
    if key is not None and not guards:
        raise common.CliError(f"{path} has no record of a guard whose seal could be checked")
    seal = None
    if key is not None:
        seal = all(sealed_is_intact(guard, key) for guard in guards)
    if as_json:
        typer.echo(json.dumps(record if seal is None else record | {"seal_intact": seal}, indent=2, ensure_ascii=False))
    else:
        for line in picture_lines(path, record, guards, seal, SEAL):
            common.say(line)
    if seal is False:
        raise typer.Exit(1)


def picture_lines(path: Path, record: dict, guards: list[dict], seal: bool | None, name: str) -> list[str]:
    """The record of a picture, in words."""
    prompt = f"{record['prompt']!r} " if "prompt" in record else ""
    lines = [f"{path}: {prompt}by {record.get('model', 'unknown')}"]
    if membranes := record.get("membranes"):
        lines.append(f"membranes: {', '.join(membranes)}")
    if not guards:
        return [*lines, "guard: none"]
    for guard in guards:
        lines += guard_lines(guard)
    if seal is not None:
        lines.append("seal: intact" if seal else "seal: BROKEN, the record was changed, or the key is another")
    elif any(name in guard for guard in guards):
        lines.append("seal: not checked (--guard-key FILE)")
    return lines


def guard_lines(guard: dict) -> list[str]:
    """What one guard did, in words."""
    steps = guard["steps"]
    active = sum(bool(step["active"]) for step in steps)
    lines = [
        f"guard: {', '.join(guard['algorithms'])} away from {', '.join(guard['categories'])}, strength"
        f" {guard['strength']:g}; active in {active} of {len(steps)} steps, {guard['evaluations']} extra evaluations"
    ]
    for row in guard["rows"]:
        scores = [
            f"{kind} {row[f'{kind}_score']:.2f}" for kind in ("text", "picture") if row[f"{kind}_score"] is not None
        ]
        detected = f"; detectors (above 0 fires): {', '.join(scores)}" if scores else ""
        refused = "; refused" if row["refused"] else ""
        lines.append(
            f"image {row['image']}: fired in {100 * row['fired']:.0f} % of the steps, mean scale {row['scale']:.3f}, by"
            f" {row['category'] or 'no category'}{detected}{refused}"
        )
    return [*lines, f"config {guard['config']}, categories {guard['categories_hash']}"]
