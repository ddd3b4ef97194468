"""`activedpo report`: its options and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from activedpo_fast.cli.session import Quiet, hush, say, session

EPILOG = """\b
Examples:
  activedpo report runs/example
  activedpo report runs/random runs/activedpo --output compared.html
  activedpo report runs/example --card README.md
"""


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="Folders of runs (output_dir); the differences of several are to the first.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The HTML file. Default: report.html in RUN, or in the current folder for several "
            "runs."
        ),
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option(help="Also write a model card of the run's last adapter to this file."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Report what runs did: metrics, cost, labels and picks, as a table and one HTML file.

    The file needs no network and runs no script. Unfinished runs are reported as far as they go.
    """
    with session(quiet):
        from activedpo_fast.cli.report import report_runs

        hush()
        say(quiet, report_runs(runs, output=output, card=card), lines=True)
