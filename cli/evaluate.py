"""`semiperm evaluate`: unlearning accuracy and what it costs elsewhere, with 95 % intervals."""

from pathlib import Path
from typing import Annotated

import typer

from . import common

EXAMPLE = "Example: semiperm evaluate canvas --membrane erased.safetensors --concept robot --json robot.json"


def run(
    model: common.Model,
    membrane: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:strength]", help="A membrane file; repeatable, applied together.")
    ] = None,
    concept: Annotated[
        list[str] | None,
        typer.Option(
            help="What must be gone; repeatable. Default: the membranes' concepts, or the suite's. Files that do not"
            " say what they erase are named so, in their order."
        ),
    ] = None,
    text_encoder: common.TextEncoder = "refuse",
    bias: common.Bias = "refuse",
    suite: Annotated[
        bool, typer.Option("--suite", help="Erase concepts one at a time by every method, and compare. Takes long.")
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE.csv", help="Columns prompt,seed,object,style[,hazard]. Default: built in."),
    ] = None,
    withhold: Annotated[
        bool,
        typer.Option(
            "--withhold",
            help="Keep all phrasings but the names from the methods, and ask by others. Default of --suite: both.",
        ),
    ] = False,
    each: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many prompts that ask for a concept, and as many others. Default: all."),
    ] = None,
    negative: Annotated[
        bool,
        typer.Option("--negative", help="Also ask for each concept with a negative prompt that names it."),
    ] = False,
    world: Annotated[
        str | None,
        typer.Option(help="Whose words and judges: an embedded model's. Default: MODEL where it is one, or canvas."),
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep finished runs here and go on from them.")
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(help="auto (the default), probe, paper, official or always; repeatable, to compare them."),
    ] = None,
    negative_rows: common.NegativeRows = False,
    repeats: Annotated[int, typer.Option(min=1, help="Built-in prompts for each pair of object and style.")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Pictures made at once.")] = 32,
    steps: common.Steps = None,
    guidance: common.Guidance = None,
    device: common.Device = "auto",
    dtype: common.DType = "auto",
):
    """Print UA, IRA and CRA as UnlearnCanvas defines them, beside the untouched model on the same prompts and seeds.

    UA is the share of pictures without the concept among those that ask for it. IRA is the accuracy of the other
    concepts of its domain (objects or styles), CRA the accuracy in the other domain; kept, attributes and negative are
    explained in docs/methods.md. The judges know the objects, styles and hazards of the embedded worlds; MODEL must be
    trained on one of them.
    """
    if bool(membrane) == suite:
        raise common.CliError("give either --membrane FILE (one or more) or --suite")
    if prompts is not None:
        common.existing_file(prompts, "prompt file")
    strengths = [common.split_strength(text)[1] for text in membrane or ()]
    if membrane and not any(strengths):
        raise common.CliError("every --membrane has the strength 0; that is the untouched model")

    from ..benchmarks.erasure import cases as asking
    from ..benchmarks.erasure import evaluate as erasure
    from ..benchmarks.erasure.methods import applied, methods_of
    from ..benchmarks.store import Store
    from ..benchmarks.timing import machine, versions

    about = common.world_of(world or (model if model in common.MODELS else "canvas"))
    own = asking.read_cases(prompts, about) if prompts else None
    modes = askings(about, withhold, every=suite and not own)
    cases = {words: own or asking.built_in_cases(about, repeats, words=words) for words in modes}
    names = [name for name, _ in asking.check_asked(about, cases[modes[0]], concept or ())]
    sampling = common.sampling(model, steps, guidance)
    guided = sampling.get("guidance_scale", about.guidance_scale) > 1
    if negative and not guided:
        raise common.CliError("--negative asks with a negative prompt, which changes nothing at a guidance scale of 1")
    pipe = common.load_model(model, device, dtype)
    stacked: list[str] = []
    if suite:
        methods, main = methods_of(guided), erasure.MAIN_METHOD
        sets = [(name,) for name in names] or list(about.suite)
    else:
        stack = common.load_stack(pipe, membrane, concept or [], text_encoder=text_encoder, bias=bias)
        names = names or [name for name, _ in asking.check_asked(about, cases[modes[0]], stack.concepts)]
        gates = dict.fromkeys(gate or ("auto",))
        methods = {
            "membrane" if len(gates) == 1 else f"membrane/{one}": lambda pipe, _, one=one: applied(
                pipe, stack, one, negative_rows
            )
            for one in gates
        }
        main, stacked = next(iter(methods)), list(stack.concepts)
        sets = [tuple(dict.fromkeys(names))]
    judges, found = about.judges(), []
    for words in modes:
        kept = None
        if resume:
            kept = settings(pipe, cases[words], membrane, (gate, negative_rows), sampling, (words, each), about)
        finished = Store(resume, "evaluate", kept)
        with common.progress(f"pictures, {words} words", None) as advance:
            found.append(
                erasure.evaluate(
                    pipe, about, judges, cases[words], sets, methods=methods, main=main, words=words, each=each,
                    negative=negative, finished=finished, advance=advance, batch=batch, **sampling,
                )
            )  # fmt: skip
    made = {"machine": machine(pipe.device, pipe.dtype), "versions": versions("torch", "diffusers")}
    whole = found[0] if len(found) == 1 else {k: found[0][k] for k in ("n", "method")}
    asked = {"withhold": withhold, "negative": negative, "repeats": repeats, "each": each, "concepts": concept or []}
    asked |= {"stack": stacked} if stacked else {}
    result = {"model": model, "world": about.name, "asked": asked, **sampling, **made, **whole}
    result["rows"] = [row for part in found for row in part["rows"]]
    if json_path is not None:
        common.write_json(json_path, result)
    show(common.console(), result)


def askings(world, withhold: bool, every: bool) -> list[str]:
    """Which of the world's askings are made: those that tell the names alone, all of them, or the first."""
    from ..canvas.world import NAME

    if withhold:
        return [words for words, asking in world.askings.items() if asking.told == NAME]
    return list(world.askings) if every else list(world.askings)[:1]


def settings(pipe, cases, membranes, gate: tuple, sampling: dict, asked: tuple, world) -> dict:
    """All beside the code that changes the verdicts: prompts, weights, membrane files, sampling, judges."""
    from dataclasses import asdict

    from ..benchmarks.store import digest
    from ..methods.membranes.base_model import base_model_hash
    from ..methods.membranes.layouts import adapter_file
    from ..pipelines.family import denoiser_of

    weights = {k: v for k, v in denoiser_of(pipe)[0].state_dict().items() if v.ndim == 2}
    return {
        "cases": [asdict(case) for case in cases],
        "weights": base_model_hash(weights),
        "membranes": [[text, digest(adapter_file(common.split_strength(text)[0]))] for text in membranes or ()],
        "gate": gate,
        "sampling": sampling,
        "asked": asked,  # words, and how many of each
        "world": [world.name, digest(*world.files())],
    }


def show(console, result: dict) -> None:
    """Print the table: percent with 95 % intervals."""
    from rich.table import Table

    from ..benchmarks.erasure.scores import SCORES

    rows = result["rows"]
    used = [key for key in SCORES if any(row[key][0] is not None for row in rows)]
    table = Table(caption=f"percent [95 % interval] over {result['n']} prompts, the same seeds in every row")
    for heading in (
        "method",
        "concept",
        "words",
        "judge",
        *(key.upper() if key in SCORES[:3] else key for key in used),
    ):
        table.add_column(heading)
    for line in rows:
        about = (line[key] for key in ("method", "concept", "words", "judge"))
        table.add_row(*about, *(percent(line[key]) for key in used))
    console.print(table)


def percent(interval: list) -> str:
    """ "97.5 (94.1-99.0)", or a dash where nothing was judged."""
    value, low, high = interval
    return "-" if value is None else f"{100 * value:.1f} ({100 * low:.1f}-{100 * high:.1f})"
