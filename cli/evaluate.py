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
        Path | None, typer.Option(metavar="FILE.csv", help="Columns prompt,seed,object,style. Default: built in.")
    ] = None,
    withhold: Annotated[
        bool,
        typer.Option(
            "--withhold",
            help="Keep all phrasings but the names from the methods, and ask by those alone. Default of --suite: both.",
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
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep finished runs here and go on from them.")
    ] = None,
    gate: common.Gate = "auto",
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
    explained in docs/methods.md. The judge knows the objects and
    styles of the canvas; MODEL must be trained on them.
    """
    if model in common.MODELS and common.MODELS[model].edition != 1:
        raise common.CliError(
            f"{model} draws the second edition's world, which the judge of `evaluate` does not know; give canvas, or"
            f" measure what it draws by `semiperm canvas check {model}`"
        )
    if bool(membrane) == suite:
        raise common.CliError("give either --membrane FILE (one or more) or --suite")
    if prompts is not None:
        common.existing_file(prompts, "prompt file")
    strengths = [common.split_strength(text)[1] for text in membrane or ()]
    if membrane and not any(strengths):
        raise common.CliError("every --membrane has the strength 0; that is the untouched model")

    from ..benchmarks.erasure import evaluate as erasure
    from ..benchmarks.erasure.methods import METHODS, applied
    from ..benchmarks.store import Store
    from ..benchmarks.timing import machine, versions

    own = erasure.read_cases(prompts) if prompts else None
    modes = ("withheld",) if withhold else ("given",) if own or not suite else erasure.WORDS
    cases = {words: own or erasure.built_in_cases(repeats, words=words) for words in modes}
    names = [name for name, _ in erasure.check_asked(cases[modes[0]], concept or ())]
    pipe = common.load_model(model, device, dtype)
    if suite:
        methods, main = METHODS, erasure.MAIN_METHOD
        sets = [(name,) for name in names] or list(erasure.SUITE)
    else:
        stack = common.load_stack(pipe, membrane, concept or [], text_encoder=text_encoder, bias=bias)
        names = names or [name for name, _ in erasure.check_asked(cases[modes[0]], stack.concepts)]
        methods, main = {"membrane": lambda pipe, _: applied(pipe, stack, gate, negative_rows)}, "membrane"
        sets = [tuple(dict.fromkeys(names))]
    sampling = common.sampling(model, steps, guidance)

    from ..canvas import Judge

    judge, found = Judge.load(), []
    for words in modes:
        kept = settings(pipe, cases[words], membrane, (gate, negative_rows), sampling, words, each) if resume else None
        finished = Store(resume, "evaluate", kept)
        with common.progress(f"pictures, {words} words", None) as advance:
            found.append(
                erasure.evaluate(
                    pipe, judge, cases[words], sets, methods=methods, main=main, words=words, each=each,
                    negative=negative, finished=finished, advance=advance, batch=batch, **sampling,
                )
            )  # fmt: skip
    made = {"machine": machine(pipe.device, pipe.dtype), "versions": versions("torch", "diffusers")}
    whole = found[0] if len(found) == 1 else {k: found[0][k] for k in ("n", "method")}
    result = {"model": model, **sampling, **made, **whole, "rows": [row for part in found for row in part["rows"]]}
    if json_path is not None:
        common.write_json(json_path, result)
    show(common.console(), result)


def settings(pipe, cases, membranes, gate: tuple, sampling: dict, words: str, each: int | None) -> dict:
    """All beside the code that changes the pictures: prompts, weights, membrane files, sampling."""
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
        "words": words,
        "each": each,
    }


def show(console, result: dict) -> None:
    """Print the table: percent with 95 % intervals."""
    from rich.table import Table

    from ..benchmarks.erasure.evaluate import SCORES

    table = Table(caption=f"percent [95 % interval] over {result['n']} prompts, the same seeds in every row")
    for heading in ("method", "concept", "words", "UA", "IRA", "CRA", *SCORES[3:]):
        table.add_column(heading)
    for line in result["rows"]:
        table.add_row(line["method"], line["concept"], line["words"], *(percent(line[key]) for key in SCORES))
    console.print(table)


def percent(interval: list) -> str:
    """ "97.5 (94.1-99.0)", or a dash where nothing was judged."""
    value, low, high = interval
    return "-" if value is None else f"{100 * value:.1f} ({100 * low:.1f}-{100 * high:.1f})"
