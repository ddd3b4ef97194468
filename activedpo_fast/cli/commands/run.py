"""`activedpo run`: its options and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from activedpo_fast._printable import shell_word
from activedpo_fast.cli.options import keys_help
from activedpo_fast.cli.session import (
    Quiet,
    exit_when_labels_are_missing,
    hush,
    one_process,
    progress,
    say,
    session,
)

EPILOG = f"""\b
Examples:
  activedpo run run.yaml
  activedpo run examples/run.yaml --quiet
  activedpo run examples/recorded.yaml

\b
Sources of labels:
  oracle: {{kind: people, via: page}}  (or files, or label_studio)
  oracle: {{kind: reward_model, model: FOLDER}}
  oracle: {{kind: judge, model: NAME, base_url: http://localhost:8000/v1}}
  oracle: {{kind: recorded}}

\b
Responses from a server that loads each round's adapter, such as vLLM (docs/cli.md):
  generation: {{base_url: http://localhost:8000/v1, model: NAME}}

\b
Metrics on held-out data after each round (docs/cli.md):
  evaluate: {{prompts: FILE, oracle: {{kind: reward_model, model: FOLDER}}}}
  evaluate: {{preferences: FILE}}

{keys_help()}
"""


def run(
    config: Annotated[
        Path,
        typer.Argument(metavar="CONFIG", help="YAML file; see docs/cli.md, examples/run.yaml."),
    ],
    quiet: Quiet = False,
) -> None:
    """Run the rounds that a YAML file describes.

    A round generates responses, selects pairs, has them labeled and trains. Work that an earlier
    run finished is not repeated. Exit code 3 means that the run waits for labels from people: do
    what it says (such as `activedpo label FILE`), then run the same command again.
    """
    with session(quiet):
        one_process("activedpo run")
        from activedpo_fast.cli.run import run_rounds
        from activedpo_fast.cli.run_file import load_config

        hush()
        command = f"activedpo run {shell_word(config)}"
        with exit_when_labels_are_missing():
            settings = load_config(config)
            table = run_rounds(settings, command=command, show_progress=progress(quiet))
            say(quiet, table, lines=True)
