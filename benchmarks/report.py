"""Tables from the JSON of benchmark runs, for the documentation.

    python -m benchmarks.report             print the tables of the runs in benchmarks/results
    python -m benchmarks.report --write     put them into the documents

The documents mark their places (see `benchmarks.markdown`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.fidelity.tables import cheaper_tables, fidelity_tables
from benchmarks.markdown import where_and_when, write_into
from benchmarks.rows.tables import tables
from benchmarks.selection.tables import on_disk_table, selection_tables

RESULTS = Path("benchmarks/results")
DOCUMENTS = ("docs/benchmarks.md", "README.md")


def main(
    results: Annotated[Path, typer.Option(help="the folder of runs' JSON")] = RESULTS,
    write: Annotated[
        bool, typer.Option(help=f"put the tables into {', '.join(DOCUMENTS)}")
    ] = False,
) -> None:
    """Print the tables of benchmark runs, or write them into the documentation."""
    found: dict[str, str] = {}
    if (path := results / "cpu.json").exists():
        found["machine"], own = _run(path)
        found |= own
    if (path := results / "response_tokens.json").exists():
        where, own = _run(path)
        found["response tokens"] = f"{where}\n\n{own['summary']}"
    if (path := results / "fidelity.json").exists():
        found |= fidelity_tables(json.loads(path.read_text()))
    if (path := results / "cheaper_rows.json").exists():
        found |= cheaper_tables(json.loads(path.read_text()))
    if (path := results / "selection.json").exists():
        found |= selection_tables(json.loads(path.read_text()))
    if (path := results / "selection_on_disk.json").exists():
        found["selection: on disk"] = on_disk_table(json.loads(path.read_text()))
    if not write:
        print("\n\n".join(found.values()))
        return
    for document in map(Path, DOCUMENTS):
        document.write_text(write_into(document.read_text(), found))
        print(f"written: {document}")


def _run(path: Path) -> tuple[str, dict[str, str]]:
    """Return where and when a run of `make bench` was measured, and its tables."""
    run = json.loads(path.read_text())
    where = where_and_when(run["machine_info"], run["datetime"][:10], run["commit_info"]["id"])
    return where, tables([{**b["extra_info"], "group": b["group"]} for b in run["benchmarks"]])


if __name__ == "__main__":
    typer.run(main)
