"""Tables from the JSON of benchmark runs, for the documentation.

    python -m benchmarks.report             print the tables of the runs in benchmarks/results
    python -m benchmarks.report --write     put them into the documents

The documents mark their places (see `benchmarks.markdown`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from benchmarks.fidelity.tables import cheaper_tables, fidelity_tables
from benchmarks.machine import vectors
from benchmarks.markdown import Row, where_and_when, write_into
from benchmarks.rows.tables import tables, tables_of_runs
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
        found |= tables(_run(path).rows)
    runs = [_run(path) for path in sorted(results.glob("cpu*.json"))]
    if runs:
        found["machine"] = "\n".join(f"* {run.kind}: {run.where}" for run in runs)
        found |= tables_of_runs([(run.kind, run.rows) for run in runs])
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


class _Run(NamedTuple):
    """A run of `make bench`: where and when it was measured, and its rows."""

    kind: str
    where: str
    rows: list[Row]


def _run(path: Path) -> _Run:
    run = json.loads(path.read_text())
    machine = run["machine_info"]
    return _Run(
        vectors(machine),
        where_and_when(machine, run["datetime"][:10], run["commit_info"]["id"]),
        [{**b["extra_info"], "group": b["group"]} for b in run["benchmarks"]],
    )


if __name__ == "__main__":
    typer.run(main)
