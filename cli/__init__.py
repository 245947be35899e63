"""The command line. Nothing here, nor in the command files, imports torch before a command runs."""

import typer

from . import (
    arena,
    attack,
    attack_prompts,
    bench,
    bench_kernels,
    bench_watermark,
    canvas,
    demo,
    detect,
    erase,
    evaluate,
    generate,
    guard,
    inspect,
    keys,
    provenance,
    train,
)
from .common import OneLineErrors

app = typer.Typer(
    name="semiperm",
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Take concepts out of text-to-image diffusion models, reversibly, and mark their pictures.",
    epilog="Start with: semiperm demo",
)


def _version(asked: bool):
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"semiperm {version('semiperm')}")
        except PackageNotFoundError:
            typer.echo("semiperm, not installed (run from a clone)")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
):
    pass


for _module in (demo, erase, train, generate, detect, provenance, attack, attack_prompts, inspect, evaluate, arena):
    _name = _module.__name__.rpartition(".")[2].replace("_", "-")
    app.command(_name, epilog=_module.EXAMPLE)(_module.run)
bench.app.command("kernels", epilog=bench_kernels.EXAMPLE)(bench_kernels.run)
bench.app.command("watermark", epilog=bench_watermark.EXAMPLE)(bench_watermark.run)
app.add_typer(keys.app, name="keys")
app.add_typer(guard.app, name="guard")
app.add_typer(bench.app, name="bench")
app.add_typer(canvas.app, name="canvas")


def main():
    """Entry point of the `semiperm` command."""
    app()
