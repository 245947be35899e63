"""The command line as a user types it, in this process."""

from semiperm.cli import app
from typer.testing import CliRunner


def run(*arguments):
    """The result of a command, whatever it is."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def runs(*arguments, code: int = 0) -> str:
    """Run a command that must end with this exit code and complain of nothing; return what it printed."""
    result = run(*arguments)
    assert result.exit_code == code, result.output + repr(result.exception)
    assert isinstance(result.exception, (SystemExit, type(None))) and not result.stderr.strip(), result.stderr
    return result.stdout


def fails(*arguments) -> str:
    """Run a command that must fail with exit code 2 and one line; return the line."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert "Traceback" not in result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]
