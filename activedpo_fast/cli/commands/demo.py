"""`activedpo demo`: its options and help."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Literal

import typer

from activedpo_fast.cli.session import (
    Quiet,
    Seed,
    exit_when_labels_are_missing,
    hush,
    one_process,
    progress,
    session,
)

EPILOG = """\b
Examples:
  activedpo demo
  activedpo demo --model smollm2 --output runs/smollm2
  activedpo demo --label
"""


def demo(
    model: Annotated[
        Literal["reviews", "small", "smollm2"],
        typer.Option(
            help="reviews: a small vendored model that finishes reviews. small (also vendored) and "
            "smollm2 (SmolLM2-135M-Instruct) write synopses."
        ),
    ] = "reviews",
    output: Annotated[Path, typer.Option(help="Folder for all output.")] = Path("runs/demo"),
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Number of rounds; default: the demo's.")
    ] = None,
    seed: Seed = 0,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Start over instead of continuing the run in the folder."),
    ] = False,
    label: Annotated[
        bool,
        typer.Option(
            "--label", help="You label 20 pairs in a local page, and the model is trained on them."
        ),
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Run ActiveDPO and random selection side by side, on real text and a real model."""
    with session(quiet):
        one_process("activedpo demo")
        from activedpo_fast.demo.run import run_demo

        hush()
        # Warns that some responses continue the prompt's last word; TRL and this library tokenize
        # these the same.
        logging.getLogger("trl").setLevel(logging.ERROR)
        with exit_when_labels_are_missing():
            run_demo(
                model=model,
                output=output,
                rounds=rounds,
                seed=seed,
                fresh=fresh,
                label=label,
                show_progress=progress(quiet),
            )
