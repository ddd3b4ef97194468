"""`activedpo exchange ...`: picks to an annotation tool, and its labels back."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from activedpo_fast.cli.session import Quiet, say, session

if TYPE_CHECKING:
    from activedpo_fast.labels.exchange import Imported

app = typer.Typer(
    name="exchange",
    help="Have pairs labeled in an annotation tool: export the picks, import the labels.",
    rich_markup_mode=None,
    no_args_is_help=True,
)

# The names of labels.exchange.TOOLS; a test compares them.
ToolName = Literal[
    "label-studio", "argilla", "potato", "potato-scale", "distilabel", "lmarena", "csv", "jsonl"
]

Picks = Annotated[
    Path, typer.Argument(metavar="PICKS", help="JSONL file of picked pairs, such as picked.jsonl.")
]
ToolOption = Annotated[
    ToolName, typer.Option("--tool", help="The annotation tool, or the kind of file.")
]


@app.command(
    "export",
    epilog="""\b
Examples:
  activedpo exchange export picked.jsonl --tool label-studio --output to_label
  activedpo exchange export picked.jsonl --tool csv --output to_label.csv --seed 7
""",
)
def export_command(
    picks: Picks,
    tool: ToolOption,
    output: Annotated[
        Path,
        typer.Option(
            help="Folder to write to; a .csv file for csv, .jsonl for distilabel, lmarena, jsonl."
        ),
    ],
    seed: Annotated[int, typer.Option(help="Chooses which response of a pair is on the left.")] = 0,
    keep_sides: Annotated[
        bool, typer.Option("--keep-sides", help="The first response of every pair is on the left.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Write picks as an annotation tool reads them.

    Every record has an id, hashes of the responses and the seed, so that its label is matched to
    the right response even if the sides are swapped later.
    """
    from activedpo_fast.labels.exchange import export_picks

    with session(quiet):
        number = export_picks(picks, tool, output, seed=None if keep_sides else seed)
        say(quiet, f"{output}: {number} pairs for {tool}")


@app.command(
    "import",
    epilog="""\b
Examples:
  activedpo exchange import picked.jsonl export.json --tool label-studio --output labels.jsonl
  activedpo exchange import picked.jsonl to_label/annotation_output --tool potato \\
      --output labels.jsonl --set-aside not_used.jsonl
  activedpo exchange import picked.jsonl to_label.csv --tool csv --output labels.jsonl --labeler ann
  activedpo exchange import picked.jsonl export.json --tool argilla --output labels.jsonl \\
      --combine dawid-skene
""",
)
def import_command(
    picks: Picks,
    answers: Annotated[
        Path, typer.Argument(metavar="ANSWERS", help="What the tool exported: a file, or a folder.")
    ],
    tool: ToolOption,
    output: Annotated[
        Path,
        typer.Option(
            help="JSONL file of labels; without --combine several labelers get one file each, "
            "beside it."
        ),
    ],
    set_aside: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSONL file for answers that cannot be used: unknown ids, changed texts, second "
            "or conflicting answers. Without it they are an error.",
        ),
    ] = None,
    labeler: Annotated[
        str, typer.Option(help="The labeler's name where the tool has none.")
    ] = "unknown",
    combine: Annotated[
        Literal["majority", "dawid-skene"] | None,
        typer.Option(help="Make one label of all labelers' answers to a pair, in one file."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write the labels that come back from an annotation tool.

    PICKS is the file that was exported. The output has its lines with "label", and can be read
    wherever labels are read; pairs without an answer have null.
    """
    from activedpo_fast.labels.exchange import import_answers

    with session(quiet):
        done = import_answers(
            picks, answers, tool, output, set_aside=set_aside, labeler=labeler, combine=combine
        )
        for line in _report(done):
            say(quiet, line)
        if set_aside is not None:
            say(quiet, f"{set_aside}: {done.set_aside} answers set aside")


def _report(done: Imported) -> list[str]:
    lines = [
        f"{file}: {sum(done.answered[name].values())} of {done.picks} pairs answered by {name!r} "
        f"({_counts(done.answered[name])})"
        for name, file in done.files.items()
    ]
    if done.combined is not None:
        split = f"; {done.split} are ties because the answers are split" if done.split else ""
        file = next(iter(done.files.values()))
        lines = [
            *(line.replace(f"{file}: ", "", 1) for line in lines),
            f"{file}: {done.combined.total()} of {done.picks} pairs have a label "
            f"({_counts(done.combined)}){split}",
        ]
    if done.unanswered:
        lines.append(f"{done.unanswered} of {done.picks} pairs have no answer yet")
    return lines


def _counts(answered: Counter[int | str]) -> str:
    preferences = answered[0] + answered[1]
    return f"{preferences} with a preference, {answered['tie']} ties, {answered['skip']} skips"
