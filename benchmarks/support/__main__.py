"""Which models work, and how exactly: the tables of docs/models.md.

python -m benchmarks.support                 measure what this code has not measured yet
python -m benchmarks.support --only T5       measure a row again
python -m benchmarks.support --write         and put the tables into the document
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from activedpo_fast._files import write_atomic
from activedpo_fast.errors import ActiveDPOError
from benchmarks.markdown import write_into
from benchmarks.support.runs import RESULTS, missing_packages, run
from benchmarks.support.tables import support_tables

DOCUMENT = Path("docs/models.md")


def main(
    only: Annotated[
        list[str] | None, typer.Option(help="a row to measure; may be given several times")
    ] = None,
    results: Annotated[Path, typer.Option(help="the JSON of all rows")] = RESULTS,
    write: Annotated[bool, typer.Option(help=f"put the tables into {DOCUMENT}")] = False,
) -> None:
    """Measure architectures, adapters and bases, and print or write the tables."""
    torch.set_num_threads(1)  # the models are too small to share
    try:
        found = support_tables(run(results, only or ()))
    except ActiveDPOError as error:
        raise typer.BadParameter(str(error)) from error
    for package in missing_packages():
        print(f"not installed, its rows are left as they are: {package}")
    if not write:
        print("\n\n".join(found.values()))
        return
    write_atomic(DOCUMENT, write_into(DOCUMENT.read_text(), found))
    print(f"written: {DOCUMENT}")


if __name__ == "__main__":
    typer.run(main)
