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
    progress,
    say,
    session,
)
from activedpo_fast.distributed.launcher import launched

EPILOG = f"""\b
Examples:
  activedpo run run.yaml
  activedpo run examples/run.yaml --quiet
  activedpo run examples/recorded.yaml
  torchrun --nproc-per-node 2 -m activedpo_fast run run.yaml

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
    what it says (such as `activedpo label FILE`), then run the same command again. Under torchrun
    or `accelerate launch`, the processes share the work, each with a GPU of its own if there are
    any.
    """
    # The processes are connected first: some libraries do it themselves when they are imported.
    with session(quiet), launched(train=True) as group:
        from activedpo_fast.cli.run import run_rounds

        hush()
        command = f"activedpo run {shell_word(config)}"
        with exit_when_labels_are_missing():
            table = run_rounds(config, command=command, show_progress=progress(quiet), group=group)
            say(quiet, table, lines=True)
