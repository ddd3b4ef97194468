"""`activedpo label`: its options and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from activedpo_fast.cli.session import PENDING, say, session

EPILOG = """\b
Examples:
  activedpo label picked.jsonl
  activedpo label picked.jsonl --labeler ann --overlap 20
  activedpo label picked.jsonl --report
"""


def label(
    picks: Annotated[
        Path,
        typer.Argument(
            metavar="PICKS",
            help="JSONL file of picked pairs, from `activedpo select` or `activedpo run`.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="Labels file. Default: labels-NAME.jsonl next to PICKS, where `activedpo run` "
            "looks for it."
        ),
    ] = None,
    labeler: Annotated[
        str, typer.Option(metavar="NAME", help="Who labels; several people take turns or share.")
    ] = "labeler",
    overlap: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            metavar="PERCENT",
            help="Share of the pairs that every labeler gets, to measure agreement; the others "
            "go to one labeler each. Default: 0.",
        ),
    ] = None,
    combine: Annotated[
        Literal["majority", "dawid-skene"],
        typer.Option(help="How several answers to a pair become one label."),
    ] = "majority",
    question: Annotated[
        str, typer.Option(help="What the page asks.")
    ] = "Which response is better?",
    seed: Annotated[
        int | None, typer.Option(help="Seed of the sides and of the shared pairs. Default: 0.")
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 for any free one.")
    ] = 0,
    open_browser: Annotated[
        bool, typer.Option("--open", help="Open the page in the default browser.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Only print the report of the labels so far.")
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="Print nothing except errors and the page's address."),
    ] = False,
) -> None:
    """Label pairs in a page that this machine serves to itself.

    Every answer is on disk before the next pair is shown, and the same command goes on where it was
    ended. Exit code 3 means that pairs are left to label.
    """
    with session(quiet):
        from activedpo_fast.cli.label import label_picks, report_of

        if report:
            say(quiet, report_of(picks, output=output, combine=combine), lines=True)
            return
        text, complete = label_picks(
            picks,
            output=output,
            labeler=labeler,
            overlap=overlap,
            seed=seed,
            combine=combine,
            question=question,
            port=port,
            open_browser=open_browser,
            quiet=quiet,
        )
        say(quiet, text, lines=True)
        if not complete:
            raise typer.Exit(PENDING)
