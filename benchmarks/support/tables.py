"""The tables of docs/models.md."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import table
from benchmarks.support.adapters import ADAPTERS
from benchmarks.support.bases import ADAPTERS_ON_BASES
from benchmarks.support.runs import Results

_WHOLE = {"shared": "captured", "whole": "captured, whole", "alone": "captured, alone"}


def support_tables(results: Results) -> dict[str, str]:
    """Return the tables by their place in the document."""
    notes: list[str] = []

    def cells(row: dict[str, Any], columns: tuple[str, ...]) -> dict[str, str]:
        return {column: _cell(row["cells"][column], notes) for column in columns}

    architectures = [
        {"name": name, **cells(row, ADAPTERS)} for name, row in results["architectures"].items()
    ]
    bases = [
        {
            "name": name,
            **cells(row, tuple(ADAPTERS_ON_BASES)),
            "rounding": _rounding(row["cells"]),
            "package": _package(row["versions"]),
        }
        for name, row in results["bases"].items()
    ]
    return {
        "support: versions": _versions(results),
        "support: architectures": table(
            architectures,
            {"architecture": _of("name"), **{column: _of(column) for column in ADAPTERS}},
        ),
        "support: bases": table(
            bases,
            {
                "base": _of("name"),
                **{column: _of(column) for column in ADAPTERS_ON_BASES},
                "the definition's own rounding": _of("rounding"),
                "package": _of("package"),
            },
        ),
        "support: notes": "\n".join(f"{n}. {note}" for n, note in enumerate(notes, 1)),
    }


def _of(name: str) -> Any:
    return lambda row: row[name]


def _cell(cell: dict[str, Any], notes: list[str]) -> str:
    """Return the verdict with its error, or with the number of a note."""
    verdict = cell["verdict"]
    if "message" in cell:
        said = f"{'without the library: ' * (verdict == 'impossible')}{_escaped(cell['message'])}"
        if said not in notes:
            notes.append(said)
        shown = "–" if verdict == "impossible" else verdict
        return f"{_bold(shown, verdict)} ({notes.index(said) + 1})"
    shown = _WHOLE[cell["layout"]] if verdict == "captured" else verdict
    return f"{_bold(shown, verdict)} {number(cell.get('error'))}"


def _bold(shown: str, verdict: str) -> str:
    return f"**{shown}**" if verdict in ("wrong", "failed") else shown


def _escaped(message: str) -> str:
    for sign in "<>|*_`":
        message = message.replace(sign, f"\\{sign}")
    return message


def _rounding(cells: dict[str, dict[str, Any]]) -> str:
    found = [cell["rounding"] for cell in cells.values() if "rounding" in cell]
    return number(max(found)) if found else "–"


def number(value: float | None) -> str:
    """Return it with one digit: 7e-7."""
    if value is None:
        return "not finite"
    digits, power = f"{value:.0e}".split("e")
    return f"{digits}e{int(power)}"


def _package(versions: dict[str, str]) -> str:
    own = [f"{n} {v}" for n, v in versions.items() if n not in _COMMON]
    return ", ".join(own) or "–"


_COMMON = ("torch", "transformers", "peft", "activedpo-fast")


def _versions(results: Results) -> str:
    """Return the days and versions of all rows, a line for each that differs."""
    lines = []
    for rows in results.values():
        for row in rows.values():
            common = ", ".join(f"{n} {row['versions'][n]}" for n in _COMMON)
            line = f"{row['day']}, on a CPU: {common}."
            if line not in lines:
                lines.append(line)
    return "\n\n".join(lines)
