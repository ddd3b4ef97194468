"""What commands share: the messages of libraries, progress bars, exit codes, Ctrl-C and SIGTERM.

Slow imports happen inside the functions.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated

import typer

from activedpo_fast._files import reason_of
from activedpo_fast._printable import one_line, printable
from activedpo_fast.distributed.launcher import launched_rank, require_one_process
from activedpo_fast.errors import ActiveDPOError

INTERRUPTED, TERMINATED = 130, 143  # exit codes after SIGINT and SIGTERM
PENDING = 3  # exit code while labels from people are missing

# Warnings that libraries print at every start and that users can do nothing about.
_HARMLESS = (
    "`is_gradient_checkpointing` is deprecated",
    "`gradient_checkpointing` is deprecated",
    "fan_in_fan_out is set to False but the target module is `Conv1D`",
)

# What a process has to say that the others do not.
_OF_ROWS = ("gradients.finite.rows", "gradients.token_budget")

Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print nothing except errors: no progress, no result.")
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


class _OneLine(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        return f"activedpo: {one_line(record.getMessage())}"


class _Terminated(KeyboardInterrupt):
    """SIGTERM: what Ctrl-C does, with the exit code of its own signal."""


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Unwind on SIGTERM as on Ctrl-C, so that locks and temporary files are removed."""

    def terminate(number: int, frame: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def interrupted(error: KeyboardInterrupt) -> int:
    terminated = isinstance(error, _Terminated)
    if launched_rank() == 0:
        print(f"activedpo: {'terminated' if terminated else 'interrupted'}", file=sys.stderr)
    return TERMINATED if terminated else INTERRUPTED


def one_process(command: str) -> None:
    """Refuse several processes. Call it before other imports: some libraries connect on import."""
    require_one_process(command)


@contextmanager
def exit_when_labels_are_missing() -> Iterator[None]:
    """Say what people have to do, and end with an exit code of its own.

    Of several processes, the first says it.
    """
    from activedpo_fast.labels import LabelsPending

    try:
        yield
    except LabelsPending as pending:
        if launched_rank() == 0:
            print(f"activedpo: {one_line(str(pending))}", file=sys.stderr)
        raise typer.Exit(PENDING) from None


def progress(quiet: bool) -> bool | None:
    return False if quiet or launched_rank() > 0 else None


def say(quiet: bool, text: str | None, *, lines: bool = False) -> None:
    if not (quiet or text is None):
        echo(text, lines=lines)


def echo(text: object, *, lines: bool = False) -> None:
    """Print a line of results, or several, which may have names and ids of files of others.

    In a single line, the line ends that a name may have are shown as escapes.
    """
    try:
        typer.echo(printable(str(text), keep="\n" if lines else ""))
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ActiveDPOError(f"the standard output cannot be written: {reason_of(error)}") from None


@contextmanager
def session(quiet: bool) -> Iterator[None]:
    """Show our messages on stderr, hide harmless warnings, and report Ctrl-C in one line.

    Of several processes, the first shows them, and each what concerns its own responses.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine())
    log = logging.getLogger("activedpo_fast")
    log.addHandler(handler)
    first = launched_rank() == 0
    levels = {log: logging.INFO if first and not quiet else logging.ERROR}
    if not (first or quiet):
        levels.update((log.getChild(name), logging.WARNING) for name in _OF_ROWS)
    try:
        with warnings.catch_warnings(), _levels(levels):
            for message in _HARMLESS if first else ("",):
                warnings.filterwarnings("ignore", message=message)
            yield
    except KeyboardInterrupt as error:
        raise typer.Exit(interrupted(error)) from None
    finally:
        log.removeHandler(handler)


@contextmanager
def _levels(levels: Mapping[logging.Logger, int]) -> Iterator[None]:
    before = {log: log.level for log in levels}
    for log, level in levels.items():
        log.setLevel(level)
    try:
        yield
    finally:
        for log, level in before.items():
            log.setLevel(level)


def hush() -> None:
    """Turn off progress bars and routine messages of the libraries that load and train models."""
    from datasets.utils.logging import set_verbosity_error as quiet_datasets
    from datasets.utils.tqdm import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # where it may not write its cache
    quiet_datasets()
    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
