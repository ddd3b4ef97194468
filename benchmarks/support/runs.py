"""The rows of the tables: which are out of date, and their results on disk."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from activedpo_fast._files import write_json
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.progress import progress_bar
from benchmarks.machine import describe_run
from benchmarks.support.adapters import ADAPTERS, adapted
from benchmarks.support.architectures import ARCHITECTURES
from benchmarks.support.bases import ADAPTERS_ON_BASES, BASES, measure_base
from benchmarks.support.cells import Cell, measure

RESULTS = Path("benchmarks/results/support.json")
_CODE = ("activedpo_fast", "benchmarks/support")  # what figures depend on, besides versions

# By table: the columns of each row.
COLUMNS = {
    "architectures": {name: list(ADAPTERS) for name in ARCHITECTURES},
    "bases": {name: list(ADAPTERS_ON_BASES) for name in BASES},
}
Results = dict[str, dict[str, dict[str, Any]]]


def read(path: Path) -> Results:
    """Return what `run` has written; nothing if there is no such file."""
    empty: Results = {table: {} for table in COLUMNS}
    return {**empty, **json.loads(path.read_text())} if path.exists() else empty


def run(path: Path, only: Sequence[str] = (), show_progress: bool | None = None) -> Results:
    """Measure the rows that this code and these versions have not measured; return all rows.

    A row is on disk when it is done, so that a run that is cut off continues. Bases whose package
    is not installed are left as they are.

    Args:
        only: names of rows to measure, whether they are up to date or not. Default: all others.

    Raises:
        ActiveDPOError: an unknown name.
    """
    known = [name for rows in COLUMNS.values() for name in rows]
    for name in only:
        if name not in known:
            raise ActiveDPOError(f"there is no row {name!r}; there are: {', '.join(known)}")
    results = read(path)
    state = _state()
    due = [
        (table, name)
        for table, rows in COLUMNS.items()
        for name in rows
        if (name in only if only else not _is_current(results[table].get(name), table, name, state))
        and (table != "bases" or BASES[name].installed)
    ]
    cells = sum(len(COLUMNS[table][name]) for table, name in due)
    with (
        tempfile.TemporaryDirectory() as folder,
        progress_bar(show_progress, total=cells, desc="models", unit="cell") as bar,
    ):
        for table, name in due:
            found = {}
            for column, cell in _measured(table, name, Path(folder)):
                found[column] = cell.as_json()
                bar.update()
            day = datetime.now(UTC).strftime("%Y-%m-%d")
            row = {**state, "day": day, "cells": found}
            row["versions"] = _versions(table, name, state)
            results[table][name] = row
            ordered = {
                t: {n: results[t][n] for n in rows if n in results[t]}
                for t, rows in COLUMNS.items()
            }
            write_json(path, ordered)
    return read(path) if due else results


def _measured(table: str, name: str, folder: Path) -> Iterator[tuple[str, Cell]]:
    for column in COLUMNS[table][name]:
        yield column, measure_cell(table, name, column, folder)


def measure_cell(table: str, name: str, column: str, folder: Path) -> Cell:
    """Return one cell; `folder` is for the model that bases are made of."""
    if table == "bases":
        return measure_base(BASES[name], column, folder)
    architecture = ARCHITECTURES[name]
    return measure(lambda: adapted(architecture.build(), column, architecture.attention))


def missing_packages() -> list[str]:
    """Return the packages of bases that are not installed."""
    return sorted({str(base.package) for base in BASES.values() if not base.installed})


def _is_current(row: dict[str, Any] | None, table: str, name: str, state: dict[str, Any]) -> bool:
    return (
        row is not None
        and row["code"] == state["code"]
        and row["versions"] == _versions(table, name, state)
        and list(row["cells"]) == COLUMNS[table][name]
    )


def _versions(table: str, name: str, state: dict[str, Any]) -> dict[str, str]:
    own = BASES[name].versions if table == "bases" else {}
    return {**state["versions"], **own}


def _state() -> dict[str, Any]:
    digest = hashlib.sha256()
    for folder in _CODE:
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(f"{path}\0".encode() + path.read_bytes())
    return {"code": digest.hexdigest()[:16], "versions": describe_run()["versions"]}
