"""The command `activedpo`: its commands, and how errors become exit codes.

The options and the help of each command are in `cli/commands/`. What is slow to import is imported
inside functions.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from activedpo_fast._files import first_line, reason_of
from activedpo_fast._printable import one_line
from activedpo_fast.cli.commands import (
    demo,
    env,
    exchange,
    features,
    label,
    report,
    run,
    select,
    store,
)
from activedpo_fast.cli.session import interrupted, terminated_as_interrupted
from activedpo_fast.cli.streams import mend_streams
from activedpo_fast.cli.usage import usage_line
from activedpo_fast.distributed.launcher import launched_rank
from activedpo_fast.errors import ActiveDPOError

app = typer.Typer(
    name="activedpo",
    help="Choose which preference pairs to label next, for the model that you are training now.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command(epilog=features.EPILOG)(features.features)
app.command(epilog=select.EPILOG)(select.select)
app.command(epilog=label.EPILOG)(label.label)
app.command(epilog=run.EPILOG)(run.run)
app.command(epilog=report.EPILOG)(report.report)
app.command(epilog=env.EPILOG)(env.env)
app.command(epilog=demo.EPILOG)(demo.demo)
app.add_typer(exchange.app)
app.add_typer(store.app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: done; 2: bad input, one line on stderr; 3: labels are missing; 130: interrupted; 143:
    terminated (SIGTERM).
    Unexpected exceptions keep their traceback.
    """
    mend_streams()
    _wait_politely()
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    command = typer.main.get_command(app)
    try:
        with terminated_as_interrupted():
            code = command.main(args, prog_name="activedpo", standalone_mode=False)
            sys.stdout.flush()
    except ActiveDPOError as error:
        return _fail(str(error), error)
    except (BrokenPipeError, SystemExit):  # typer makes the latter of the former
        # Whoever read the output, such as `head`, has gone; at the end Python would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as error:
        return interrupted(error)
    except OSError as error:
        # No permission to read or write a file, a full disk, a name that is too long.
        place = error.filename or "reading or writing a file"
        return _fail(f"{place}: {reason_of(error)}", error)
    except Exception as error:
        if type(error).__name__ == "SafetensorError":  # its module is slow to import
            what = f"a safetensors file cannot be read or written: {first_line(error)}"
            return _fail(what, error)
        # The base class of usage errors differs between versions of typer; this method does not.
        if not hasattr(error, "format_message"):
            raise
        return _fail(usage_line(error), error)
    return code if isinstance(code, int) else 0


def _wait_politely() -> None:
    """Let OpenMP's threads spin briefly before they sleep, unless the user has set how they wait.

    By default they spin for milliseconds, and two processes on the same cores slow each other down
    many times. GNU OpenMP (PyTorch's on Linux, and ours) reads this when it is loaded, which no
    import has done yet.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def _fail(message: str, error: Exception) -> int:
    """Say what is wrong, which one of several processes does."""
    if launched_rank() == getattr(error, "said_by", 0):
        print("activedpo: error: " + one_line(" ".join(message.split())), file=sys.stderr)
    return 2


def _raise_limits(context: typer.Context, given: list[str]) -> list[str]:
    """Raise limits while the command runs; each is given as NAME=NUMBER."""
    from activedpo_fast._limits import raised_limits

    numbers: dict[str, int] = {}
    for text in given:
        name, equals, number = text.partition("=")
        if not (equals and number.isascii() and number.isdigit() and len(number) < 19):
            raise ActiveDPOError(f"--limit {text}: expected NAME=N, N an integer from 1")
        numbers[name] = int(number)
    context.with_resource(raised_limits(**numbers))
    return given


def _show_version(wanted: bool) -> None:
    if wanted:
        from activedpo_fast import __version__

        typer.echo(f"activedpo-fast {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
    limit: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=N",
            callback=_raise_limits,
            help="Another bound on what is read from files, by the name that its error message "
            "has; may be repeated.",
        ),
    ] = [],  # noqa: B006, which typer copies
) -> None:
    """Choose which preference pairs to label next for the model that you are training now."""
